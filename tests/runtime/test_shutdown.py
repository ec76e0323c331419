"""How a worker stops: in good order, in a hurry, and when it has lost its broker."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
import pytest

from amqp_tasks import BrokerUnavailable, NotConnected, TaskApp, TaskHandle, TaskStatus
from amqp_tasks.drivers.memory import MemoryBroker

from . import shop
from .harness import MakeApp, depth, left_in_queues, memory, now, record_of, rewire, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]


class FrailBroker(MemoryBroker):
    """A broker that can be switched off."""

    is_down = False

    def session(self) -> AbstractAsyncContextManager[Any]:  # type: ignore[override]
        if self.is_down:
            raise BrokerUnavailable("memory://: nobody answers")
        return super().session()

    def go_down(self) -> None:
        self.is_down = True
        self.drop_sessions()


def assert_given_back(app: TaskApp, handle: TaskHandle[Any]) -> None:
    """It waits as if it had never been started."""
    record = record_of(app, handle)
    assert (record.status, record.attempt, record.crashes) == (TaskStatus.SCHEDULED, 1, 0)
    assert depth(app) == left_in_queues(app) == 1


# ------------------------------------------------------------------- in good order


async def test_leaving_the_block_lets_running_tasks_finish(
    app: TaskApp, journal: shop.Journal
) -> None:
    async with app.worker():
        handle = await app.task(shop.nap)(25.0)
        await journal.wait_for("nap started")
    assert record_of(app, handle).status is TaskStatus.FINISHED
    assert left_in_queues(app) == 0


async def test_a_worker_that_stops_starts_nothing_more(make_app: MakeApp) -> None:
    app = make_app(max_running_tasks=1)
    nap = app.task(shop.nap)
    async with app.worker():
        handles = [await nap(5.0, f"nap {number}") for number in range(3)]
        await shop.journal.wait_for("nap 0 started")
    statuses = [record_of(app, handle).status for handle in handles]
    assert statuses == [TaskStatus.FINISHED, TaskStatus.SCHEDULED, TaskStatus.SCHEDULED]
    assert depth(app) == 2


async def test_after_the_grace_a_task_is_given_back_uncounted_with_reason_shutdown(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(shutdown_grace=5)
    async with app.worker():
        handle = await app.task(shop.tell_reason)()
        await journal.wait_for("tell_reason started")
        began = now()
    assert now() - began == pytest.approx(5, abs=0.1)
    assert journal.count("reason shutdown") == 1
    assert_given_back(app, handle)


async def test_what_was_given_back_is_run_by_the_next_worker_as_the_same_attempt(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(shutdown_grace=5)
    nap = app.task(shop.nap)
    async with app.worker():
        handle = await nap(20.0)
        await journal.wait_for("nap started")
    async with app.worker() as worker:
        assert await handle.result(timeout=30) == "nap"
        state = await handle.state()
    assert (state.attempt, state.worker) == (1, worker.id)


async def test_a_task_may_clean_up_after_the_grace(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(shutdown_grace=1)
    async with app.worker():
        handle = await app.task(shop.clean_up)(4.0)
        await journal.wait_for("clean_up started")
        began = now()
    assert now() - began == pytest.approx(5, abs=0.1)
    assert journal.count("cleaned up") == 1
    assert_given_back(app, handle)


async def test_a_worker_that_is_stopped_again_with_a_shorter_grace_hurries(
    app: TaskApp, journal: shop.Journal
) -> None:
    async with app.worker() as worker:
        handle = await app.task(shop.tell_reason)()
        await journal.wait_for("tell_reason started")
        began = now()
        worker.stop(1000)
        await anyio.sleep(3)
        worker.stop(2)
        await worker.wait_ended()
        assert now() - began == pytest.approx(5, abs=0.1)
    assert_given_back(app, handle)


# ----------------------------------------------------------------------- in a hurry


async def test_cancelling_the_block_gives_no_grace(app: TaskApp, journal: shop.Journal) -> None:
    with anyio.CancelScope() as scope:
        async with app.worker():
            handle = await app.task(shop.tell_reason)()
            await journal.wait_for("tell_reason started")
            began = now()
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert now() - began < 0.1
    assert journal.count("reason shutdown") == 1
    assert_given_back(app, handle)


async def test_cancelling_while_the_worker_drains_ends_the_grace(
    app: TaskApp, journal: shop.Journal
) -> None:
    tell = app.task(shop.tell_reason).options(inherit_deadline=False)
    with anyio.move_on_after(10) as scope:
        async with app.worker():
            handle = await tell()
            await journal.wait_for("tell_reason started")
            began = now()
    assert scope.cancelled_caught
    assert now() - began == pytest.approx(10, abs=0.1)
    assert_given_back(app, handle)


async def test_an_error_in_the_block_comes_out_as_itself_and_gives_no_grace(
    app: TaskApp, journal: shop.Journal
) -> None:
    with pytest.raises(KeyError, match="mine"):  # noqa: PT012  the block raises
        async with app.worker():
            handle = await app.task(shop.tell_reason)()
            await journal.wait_for("tell_reason started")
            began = now()
            raise KeyError("mine")
    assert now() - began < 0.1
    assert_given_back(app, handle)


async def test_a_group_of_errors_in_the_block_comes_out_as_itself(app: TaskApp) -> None:
    with pytest.raises(ExceptionGroup, match="ours") as caught:
        async with app.worker():
            raise ExceptionGroup("ours", [KeyError(1), ValueError(2)])
    assert caught.group_contains(KeyError)
    assert caught.group_contains(ValueError)


@pytest.mark.parametrize("count", range(0, 40, 2))
async def test_a_worker_can_be_cancelled_in_any_phase_of_its_start(
    app: TaskApp, count: int
) -> None:
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(app.run_worker)
            for _ in range(count):
                await anyio.lowlevel.checkpoint()
            scope.cancel()
    broker, store = memory(app)
    assert not broker._sessions
    assert not store._listeners
    assert not store._presence


async def test_a_worker_that_has_left_is_not_present_and_not_connected(app: TaskApp) -> None:
    async with app.worker() as worker:
        assert worker.id in memory(app)[1]._presence
    broker, store = memory(app)
    assert not store._presence
    assert not store._listeners
    assert not broker._sessions
    with pytest.raises(NotConnected):
        await app.task(shop.add)(1)


# -------------------------------------------------------------- the broker is lost


async def test_a_broker_that_is_away_at_the_start_is_an_error_at_once(app: TaskApp) -> None:
    broker = FrailBroker(now)
    broker.is_down = True
    rewire(app, broker=broker)
    for block in (app.worker(), app.connect()):
        with pytest.raises(BrokerUnavailable, match="nobody answers"):
            async with block:
                pass


async def test_a_broker_that_comes_back_in_time_is_worked_for_again(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(reconnect_timeout=60)
    broker = FrailBroker(now)
    rewire(app, broker=broker)
    async with app.worker():
        handle = await app.task(shop.nap)(30.0)
        await journal.wait_for("nap started")
        broker.go_down()
        await anyio.sleep(40)
        broker.is_down = False
        assert await handle.result(timeout=0) == "nap"
        assert await (await app.task(shop.add)(1)).result(timeout=60) == 2
        await until(lambda: left_in_queues(app) == 0)
    assert journal.count("nap started") == 1


async def test_a_broker_that_stays_away_ends_the_worker_after_its_attempts_were_stopped(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(reconnect_timeout=20)
    broker = FrailBroker(now)
    rewire(app, broker=broker)
    with pytest.raises(BrokerUnavailable, match="reconnect_timeout=20"):  # noqa: PT012  the block raises
        async with app.worker():
            handle = await app.task(shop.clean_up)(5.0)
            await journal.wait_for("clean_up started")
            broker.go_down()
            began = now()
            await anyio.sleep_forever()
    assert 25 <= now() - began <= 25 + 2 * 10
    assert journal.count("cleaned up") == 1
    assert_given_back(app, handle)
    assert not memory(app)[1]._presence
