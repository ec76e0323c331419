"""Cancelling tasks: what is stopped, when, and what its state says."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
import pytest

from amqp_tasks import (
    RemoteTaskError,
    RetryPolicy,
    TaskApp,
    TaskCanceled,
    TaskHandle,
    TaskNotFound,
    TaskStatus,
)
from amqp_tasks.core.lifecycle import Event
from amqp_tasks.core.operations import Operation, RequestCancel, Settle
from amqp_tasks.drivers.memory import MemoryStore

from . import shop
from .harness import MakeApp, depth, left_in_queues, now, record_of, rewire, until, until_status

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]

asyncio_only = pytest.mark.parametrize("anyio_backend", ["asyncio-virtual"], indirect=True)
"""Only there can anybody raise a cancellation."""


class DeafStore(MemoryStore):
    """A store whose announcements reach nobody."""

    def listen(self) -> AbstractAsyncContextManager[Any]:  # type: ignore[override]
        return MemoryStore(self._clock).listen()


class LateStore(MemoryStore):
    """A store in which a cancel request arrives just before the end of an attempt is written."""

    def __init__(self, event: Event) -> None:
        super().__init__(now)
        self.event = event

    async def apply(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        for one in operations:
            if isinstance(one, Settle) and one.event is self.event:
                request = RequestCancel(task_id=one.task_id, reason="user", now=one.now)
                assert await super().apply([request]) == ["requested"]
        return await super().apply(operations)


async def assert_canceled(handle: TaskHandle[Any], reason: str = "user") -> None:
    assert await handle.join(timeout=60) is TaskStatus.CANCELED
    state = await handle.state()
    assert (state.reason, state.result) == (reason, None)
    assert state.ended_at is not None
    with pytest.raises(TaskCanceled, match=reason):
        await handle.result(timeout=0)


# ----------------------------------------------------------------------- running


async def test_a_running_task_is_cancelled_at_once_when_it_is_announced(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(cancel_poll_interval=1000)
    async with app.worker():
        handle = await app.task(shop.tell_reason)()
        await journal.wait_for("tell_reason started")
        began = now()
        assert await handle.cancel()
        await journal.wait_for("reason user")
        await assert_canceled(handle)
        assert now() - began < 0.01
        assert depth(app) == depth(app, "-error") == 0


async def test_without_announcements_it_is_cancelled_within_the_poll_interval(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(cancel_poll_interval=5)
    rewire(app, store=DeafStore(now))
    async with app.worker():
        handle = await app.task(shop.tell_reason)()
        await journal.wait_for("tell_reason started")
        await anyio.sleep(1)
        assert await handle.cancel()
        await anyio.sleep(3)
        assert journal.count("reason user") == 0
        await journal.wait_for("reason user", within=1.01)
        await assert_canceled(handle)


async def test_polling_goes_on_while_the_worker_drains(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(shutdown_grace=1000)
    rewire(app, store=DeafStore(now))
    async with app.connect(), anyio.create_task_group() as tasks:
        async with app.worker() as worker:
            handle = await app.task(shop.tell_reason)()
            await journal.wait_for("tell_reason started")
            worker.stop(1000)
            tasks.start_soon(handle.cancel)
            await journal.wait_for("reason user", within=2)
        await assert_canceled(handle)


async def test_the_neighbours_of_a_cancelled_task_go_on(
    app: TaskApp, journal: shop.Journal
) -> None:
    async with app.worker():
        neighbour = await app.task(shop.nap)(10.0)
        handle = await app.task(shop.tell_reason)()
        await journal.wait_for("tell_reason started")
        await handle.cancel()
        await assert_canceled(handle)
        assert await neighbour.result(timeout=20) == "nap"


async def test_a_generator_is_closed_when_it_is_cancelled(
    app: TaskApp, journal: shop.Journal
) -> None:
    async with app.worker():
        handle = await app.task(shop.narrate_for_ever)()
        await journal.wait_for("narrate_for_ever started")
        await handle.cancel()
        await assert_canceled(handle)
        assert journal.count("generator closed") == 1


# ----------------------------------------------------------------------- waiting


async def test_a_task_that_waits_in_the_queue_is_canceled_at_once_and_never_starts(
    app: TaskApp, journal: shop.Journal
) -> None:
    echo, add = app.task(shop.echo), app.task(shop.add)
    async with app.connect():
        handle = await echo(1)
        assert await handle.cancel()
        await assert_canceled(handle)
    async with app.worker():
        assert await (await add(1)).result(timeout=10) == 2
        await until(lambda: depth(app) == 0)
        await anyio.sleep(10)
        assert journal.count("echo") == 0
        await assert_canceled(handle)


async def test_a_task_that_waits_for_a_slot_is_canceled_at_once_and_never_starts(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(max_running_tasks=1)
    nap, echo = app.task(shop.nap), app.task(shop.echo)
    async with app.worker():
        first, second = await nap(5.0), await echo(1)
        await journal.wait_for("nap started")
        assert await second.cancel()
        await assert_canceled(second)
        assert await first.result(timeout=10) == "nap"
        await until(lambda: left_in_queues(app) == 0)
    assert journal.count("echo") == 0


async def test_a_task_that_waits_for_a_retry_is_canceled_at_once_and_never_starts_again(
    app: TaskApp, journal: shop.Journal
) -> None:
    async with app.worker():
        handle = await app.task(retry=RetryPolicy(delay=10))(shop.fail)()
        await until_status(handle, TaskStatus.RETRYING)
        assert await handle.cancel()
        await assert_canceled(handle)
        await anyio.sleep(100)
        assert left_in_queues(app) == 0
        await assert_canceled(handle)
    assert journal.count("fail") == 1


@pytest.mark.parametrize("option", ["countdown", "eta"])
async def test_a_task_that_waits_for_its_time_is_canceled_at_once_and_never_starts(
    app: TaskApp, journal: shop.Journal, option: str
) -> None:
    eta = dt.datetime.fromtimestamp(now() + 30, dt.UTC)
    echo = app.task(shop.echo)
    later = echo.options(countdown=30) if option == "countdown" else echo.options(eta=eta)
    async with app.worker():
        handle = await later(1)
        await anyio.sleep(10)
        assert await handle.cancel()
        await assert_canceled(handle)
        await anyio.sleep(100)
        assert left_in_queues(app) == 0
        await assert_canceled(handle)
    assert journal.count("echo") == 0


async def test_a_canceled_task_is_not_forgotten_before_its_message_has_come_by(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(state_ttl=10, cancel_poll_interval=60, presence_ttl=600)
    async with app.worker():
        handle = await app.task(shop.echo).options(countdown=7200)(1)
        assert await handle.cancel()
        await anyio.sleep(7100)
        await assert_canceled(handle)
        await anyio.sleep(200)
        with pytest.raises(TaskNotFound):
            await handle.status()
    assert journal.count("echo") == 0


# ------------------------------------------------------------- ended, or unknown


async def test_a_task_that_has_ended_cannot_be_cancelled_and_stays_as_it_is(
    app: TaskApp, journal: shop.Journal
) -> None:
    fail = app.task(retry=RetryPolicy(max_retries=0))(shop.fail)
    async with app.worker():
        canceled = await app.task(shop.tell_reason)()
        await journal.wait_for("tell_reason started")
        await canceled.cancel()
        for handle in (canceled, await fail(), await app.task(shop.add)(1)):
            await handle.join(timeout=10)
            await until(lambda: left_in_queues(app) == depth(app, "-error"))
            before = await handle.state()
            await anyio.sleep(1)
            assert await handle.cancel() is False
            await anyio.sleep(1)
            assert await handle.state() == before


async def test_a_task_that_nobody_knows_is_not_found(app: TaskApp) -> None:
    async with app.connect():
        with pytest.raises(TaskNotFound, match="no-such-task"):
            await app.handle("no-such-task").cancel()


async def test_cancelling_twice_is_cancelling_once(app: TaskApp, journal: shop.Journal) -> None:
    async with app.worker():
        handle = await app.task(shop.clean_up)(5.0)
        await journal.wait_for("clean_up started")
        assert await handle.cancel()
        await anyio.sleep(1)
        assert await handle.cancel()
        await assert_canceled(handle)
    assert journal.count("cleaned up") == 1


# ------------------------------------------------------------ how the task takes it


async def test_a_task_that_finishes_although_it_was_cancelled_is_finished(
    app: TaskApp, journal: shop.Journal
) -> None:
    async with app.worker():
        handle = await app.task(shop.finish_anyway)("done")
        await journal.wait_for("finish_anyway started")
        assert await handle.cancel()
        assert await handle.result(timeout=10) == "done"
        state = await handle.state()
        assert (state.status, state.reason) == (TaskStatus.FINISHED, None)


async def test_a_task_that_raises_while_it_is_cancelled_by_a_user_is_canceled_all_the_same(
    app: TaskApp, journal: shop.Journal
) -> None:
    async with app.worker():
        handle = await app.task(shop.raise_when_cancelled)()
        await journal.wait_for("raise_when_cancelled started")
        assert await handle.cancel()
        await assert_canceled(handle)
        assert depth(app, "-error") == 0


async def test_a_cancelled_task_may_clean_up_and_is_waited_for(
    app: TaskApp, journal: shop.Journal
) -> None:
    async with app.worker():
        handle = await app.task(shop.clean_up)(5.0)
        await journal.wait_for("clean_up started")
        await handle.cancel()
        await anyio.sleep(4.9)
        assert await handle.status() is TaskStatus.RUNNING
        await assert_canceled(handle)
    assert journal.count("cleaned up") == 1


async def test_a_task_that_shields_itself_for_long_is_named_once_in_log_and_state(
    make_app: MakeApp, journal: shop.Journal, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(cancel_grace=5)
    async with app.worker():
        handle = await app.task(shop.clean_up)(60.0)
        await journal.wait_for("clean_up started")
        with caplog.at_level(logging.ERROR):
            await handle.cancel()
            await anyio.sleep(4.9)
            assert not caplog.records
            assert (await handle.state()).cancel_requested == "user"
            await assert_canceled(handle)
        assert (await handle.state()).cancel_requested is None
        (record,) = caplog.records
        assert handle.task_id in record.getMessage()
        assert "cancelled (user)" in record.getMessage()
        (entry,) = (await handle.state()).eventlog
    assert entry["kind"] == "overdue"
    assert "cancelled (user)" in entry["message"]


@asyncio_only
async def test_a_cancellation_that_nobody_asked_for_is_an_error(
    app: TaskApp, journal: shop.Journal
) -> None:
    bare = app.task(retry=RetryPolicy(max_retries=1, delay=0))(shop.raise_bare_cancelled)
    async with app.worker():
        handle = await bare()
        with pytest.raises(RemoteTaskError) as caught:
            await handle.result(timeout=10)
        assert caught.value.type == "asyncio.exceptions.CancelledError"
        assert await (await app.task(shop.add)(1)).result(timeout=10) == 2
    assert journal.count("bare") == 2


@asyncio_only
async def test_a_cancellation_of_one_s_own_after_swallowing_ours_does_not_hang_the_worker(
    app: TaskApp, journal: shop.Journal
) -> None:
    async with app.worker():
        handle = await app.task(shop.cancel_bare_when_cancelled)()
        await journal.wait_for("cancel_bare_when_cancelled started")
        await handle.cancel()
        await assert_canceled(handle)
        assert await (await app.task(shop.add)(1)).result(timeout=10) == 2


# ------------------------------------------------------------------- at the last moment


async def test_a_cancel_that_arrives_while_an_attempt_fails_wins_over_the_retry(
    app: TaskApp, journal: shop.Journal
) -> None:
    rewire(app, store=LateStore(Event.RETRY))
    async with app.worker():
        handle = await app.task(retry=RetryPolicy(delay=5))(shop.fail)()
        await assert_canceled(handle)
        await anyio.sleep(100)
        await assert_canceled(handle)
        assert left_in_queues(app) == 0
    assert journal.count("fail") == 1


async def test_a_cancel_that_arrives_while_an_attempt_is_given_back_wins(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(shutdown_grace=0)
    rewire(app, store=LateStore(Event.RELEASE))
    async with app.worker():
        handle = await app.task(shop.nap)(10.0)
        await journal.wait_for("nap started")
    assert record_of(app, handle).status is TaskStatus.CANCELED
    async with app.worker():
        await until(lambda: left_in_queues(app) == 0)
        await anyio.sleep(10)
        await assert_canceled(handle)
    assert journal.count("nap started") == 1
