"""The slots of a worker, and tasks that give theirs away while they wait for others."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from amqp_tasks import TaskStatus
from amqp_tasks.drivers.memory import MemoryBroker

from . import families, shop
from .harness import MakeApp, left_in_queues, now, record_of, rewire, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]


class SlowSession:
    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    async def publish(self, exchange: str, publication: Any, timeout: float) -> None:
        await anyio.sleep(1)
        await self._session.publish(exchange, publication, timeout)


class SlowBroker(MemoryBroker):
    """A broker that takes a second to confirm a message."""

    @asynccontextmanager
    async def session(self) -> Any:
        async with super().session() as session:
            yield SlowSession(session)


@pytest.mark.parametrize(
    "func",
    [
        families.lose_patience_and_work,
        families.work_while_children_run,
        families.outlive_a_child,
    ],
    ids=lambda func: func.__name__,
)
@pytest.mark.parametrize("limit", [1, 2])
async def test_a_task_that_has_waited_works_on_in_a_slot(
    make_app: MakeApp, journal: shop.Journal, func: Any, limit: int
) -> None:
    app = make_app(max_running_tasks=limit, max_task_retries=0)
    app.task(shop.count_running)
    app.task(shop.fail_after)
    lead = app.task(func)
    async with app.worker():
        leading = [await lead(5.0) for _ in range(limit)]
        for handle in leading:
            assert await handle.join(timeout=200) is TaskStatus.FINISHED
        await until(lambda: left_in_queues(app) == 0 or journal.running == 0)
    assert journal.most_running <= limit


async def test_a_task_that_loses_its_patience_while_it_gives_its_slot_away_can_wait_again(
    make_app: MakeApp,
) -> None:
    app = make_app(max_running_tasks=1)
    rewire(app, broker=SlowBroker(now))
    app.task(shop.nap)
    async with app.worker():
        handle = await app.task(families.lose_patience_twice)(5.0)
        assert await handle.result(timeout=100) == "nap"


async def test_a_task_that_waits_in_two_places_has_no_slot_until_both_are_done(
    make_app: MakeApp,
) -> None:
    app = make_app(max_running_tasks=1)
    app.task(shop.nap)
    async with app.worker():
        handle = await app.task(families.wait_for_two_at_once)(5.0)
        assert sorted(await handle.result(timeout=100)) == ["long", "short"]


async def test_a_task_that_begins_to_wait_while_it_waits_for_its_slot_does_not_keep_it(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(max_running_tasks=1)
    app.task(shop.nap)
    async with app.worker():
        handle = await app.task(families.wait_again_while_the_slot_is_taken)(5.0)
        await handle.result(timeout=100)
    assert journal.count("second ended") == 1


@pytest.mark.parametrize("moment", [0.05, 0.5, 5.5])
async def test_a_task_that_is_cancelled_while_it_waits_for_another_gives_everything_back(
    make_app: MakeApp, journal: shop.Journal, moment: float
) -> None:
    app = make_app(max_running_tasks=1)
    app.task(shop.nap)
    async with app.worker():
        parent = await app.task(shop.nap_elsewhere)(5.0)
        child = shop.journal.task(shop.nap)
        await until(lambda: len([*_named(app, child.name)]) == 1)
        await anyio.sleep(moment)
        await parent.cancel()
        assert await parent.join(timeout=20) in (TaskStatus.CANCELED, TaskStatus.FINISHED)
        # One slot, and it is there for whoever comes next, one at a time.
        count = app.task(shop.count_running)
        for handle in [await count(1.0) for _ in range(3)]:
            assert await handle.join(timeout=30) is TaskStatus.FINISHED
        await until(lambda: left_in_queues(app) == 0)
    assert journal.most_running == 1


def _named(app: Any, name: str) -> list[str]:
    return [task_id for task_id, record in app._memory[1]._records.items() if record.name == name]


async def test_a_task_that_gave_its_slot_away_is_given_back_when_the_worker_stops(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(max_running_tasks=1, shutdown_grace=0)
    app.task(shop.nap)
    async with app.worker():
        parent = await app.task(shop.nap_elsewhere)(100.0)
        await journal.wait_for("nap started")
    record = record_of(app, parent)
    assert (record.status, record.attempt, record.crashes) == (TaskStatus.SCHEDULED, 1, 0)
    async with app.worker():
        assert await parent.result(timeout=400) == "nap"


async def test_a_task_that_gave_its_slot_away_runs_once_however_short_its_state_is_kept(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(state_ttl=2)
    app.task(shop.nap)
    async with app.worker():
        assert await (await app.task(shop.nap_elsewhere)(1.0)).result(timeout=20) == "nap"
        await anyio.sleep(60)
    assert journal.count("nap started") == 1
