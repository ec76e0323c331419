"""Copies in the place of deliveries that would be held for too long; tasks run apart."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from amqp_tasks import TaskApp, TaskStatus
from amqp_tasks.runtime.quarantine import Quarantine
from amqp_tasks.runtime.ticket import Ticket

from . import shop
from .harness import MakeApp, depth, left_in_queues, memory, record_of, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]


def unacked(app: TaskApp) -> int:
    """How many deliveries of the main queue wait for a verdict."""
    broker = memory(app)[0]
    consumers = [each for session in broker._sessions for each in session._consumers]
    return sum(len(each._unacked) for each in consumers if each.queue == app.settings.queue)


async def test_a_long_task_is_kept_by_a_copy_until_it_has_ended(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(guard_after=10)
    async with app.worker():
        handle = await app.task(shop.nap)(3600.0)
        await journal.wait_for("nap started")
        await anyio.sleep(8)
        assert unacked(app) == 1
        await until(lambda: unacked(app) == 0, within=3)
        for _ in range(100):
            await anyio.sleep(30)
            assert unacked(app) <= 1, "the copy, for a moment"
        assert await handle.join(timeout=1000) is TaskStatus.FINISHED
        await until(lambda: left_in_queues(app) == 0)
    assert journal.count("nap started") == 1
    assert record_of(app, handle).crashes == 0


async def test_a_worker_without_a_slot_holds_nothing_that_another_one_could_run(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(max_running_tasks=2, guard_after=10)
    nap, add = app.task(shop.nap), app.task(shop.add)
    other = make_app(max_running_tasks=2)
    other.__dict__["_memory"] = memory(app)
    other.task(shop.add)
    async with app.worker():
        long = [await nap(600.0) for _ in range(2)]
        await until(lambda: journal.count("nap started") == 2)
        await anyio.sleep(30)
        quick = [await add(number) for number in range(6)]
        await anyio.sleep(30)
        # And so do the copies of the two that run.
        assert depth(app) == 6 + 2, "all of them wait for somebody who has room"
        async with other.worker():
            for number, handle in enumerate(quick):
                assert await handle.result(timeout=10) == number + 1
        for each in long:
            assert await each.join(timeout=1000) is TaskStatus.FINISHED


def ticket() -> Ticket:
    delivery: Any = object()  # nothing is done with it here
    return Ticket(delivery, anyio.Semaphore(1))


async def test_suspects_run_one_at_a_time_unless_one_waits() -> None:
    quarantine, first, second = Quarantine(max_crashes=3), ticket(), ticket()
    with quarantine.place("first", 2, first) as may_start:
        assert may_start
        with quarantine.place("innocent", 0, ticket()) as may_start:
            assert may_start
        with quarantine.place("once", 1, ticket()) as may_start:
            assert may_start
        with quarantine.place("second", 2, second) as may_start:
            assert not may_start
        assert quarantine.shall_wait("second")
        assert not quarantine.shall_wait("once")
        first.begin_wait()
        assert not quarantine.shall_wait("second")
        with quarantine.place("second", 2, second) as may_start:
            assert may_start
            with quarantine.place("third", 2, ticket()) as may_start:
                assert not may_start
    assert not quarantine.shall_wait("third")


@pytest.mark.parametrize("crashes", [0, 1, 2])
async def test_with_one_crash_allowed_there_are_no_suspects(crashes: int) -> None:
    quarantine = Quarantine(max_crashes=1)
    for name in ("a", "b"):
        with quarantine.place(name, crashes, ticket()) as may_start:
            assert may_start
