"""Whatever goes wrong, and whenever: nothing is lost, and nothing is recorded twice.

Each test does the same thing again and again, and each time the trouble comes one step
later.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from amqp_tasks import (
    PublishFailed,
    RetryPolicy,
    StateStoreUnavailable,
    TaskApp,
    TaskHandle,
    TaskStatus,
)
from amqp_tasks.core.operations import Beat, Leave, Operation
from amqp_tasks.drivers.memory import MemoryBroker, MemoryStore

from . import shop
from .harness import (
    MakeApp,
    depth,
    error_messages,
    left_in_queues,
    memory,
    now,
    record_of,
    rewire,
    ticks,
    until,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]

TWICE = RetryPolicy(max_retries=1, delay=1, jitter=0)


async def assert_all_slots_are_free(app: TaskApp, journal: shop.Journal) -> None:
    """As many tasks as there are slots run at the same time."""
    limit = app.settings.max_running_tasks
    count = app.task(shop.count_running)
    for handle in [await count(1.0) for _ in range(limit)]:
        assert await handle.join(timeout=1.5) is TaskStatus.FINISHED
    assert journal.most_running == limit


# ------------------------------------------------------------------- somebody acts


@pytest.mark.parametrize("count", range(32))
async def test_a_task_can_be_cancelled_in_any_phase(
    make_app: MakeApp, journal: shop.Journal, count: int
) -> None:
    app = make_app(max_running_tasks=2)
    async with app.worker():
        handle = await app.task(shop.tell_reason)()
        await ticks(count)
        assert await handle.cancel()
        assert await handle.join(timeout=2) is TaskStatus.CANCELED
        await until(lambda: left_in_queues(app) == 0)
        await assert_all_slots_are_free(app, journal)
    assert journal.count("tell_reason started") == journal.count("reason user")


@pytest.mark.parametrize("count", range(32))
async def test_a_task_that_ends_soon_and_is_cancelled_has_one_end(
    make_app: MakeApp, journal: shop.Journal, count: int
) -> None:
    app = make_app(max_running_tasks=2)
    echo = app.task(shop.echo)
    async with app.worker():
        handle = await echo("here")
        await ticks(count)
        asked = await handle.cancel()
        status = await handle.join(timeout=2)
        state = await handle.state()
        await anyio.sleep(10)
        assert await handle.state() == state
        assert left_in_queues(app) == 0
        await assert_all_slots_are_free(app, journal)
    if status is TaskStatus.CANCELED:
        assert asked
        assert (state.reason, state.result) == ("user", None)
    else:
        assert (status, state.result) == (TaskStatus.FINISHED, "here")
        assert journal.count("echo") == 1


@pytest.mark.parametrize("how", ["stop", "cancel", "error"])
@pytest.mark.parametrize("count", range(32))
async def test_a_worker_can_be_stopped_in_any_phase_of_a_task(
    app: TaskApp, journal: shop.Journal, count: int, how: str
) -> None:
    tell = app.task(shop.tell_reason)
    with anyio.CancelScope() as scope:
        try:
            async with app.worker() as worker:
                handle = await tell()
                await ticks(count)
                began = now()
                match how:
                    case "stop":
                        worker.stop(0)
                    case "cancel":
                        scope.cancel()
                    case _:
                        raise KeyError("mine")
        except KeyError:
            pass
    assert now() - began < 0.1
    record = record_of(app, handle)
    assert (record.status, record.attempt, record.crashes) == (TaskStatus.SCHEDULED, 1, 0)
    assert depth(app) == left_in_queues(app) == 1
    assert journal.count("tell_reason started") == journal.count("reason shutdown")


@pytest.mark.parametrize("count", range(0, 60, 3))
async def test_what_one_worker_has_begun_another_ends_and_each_task_runs_once(
    make_app: MakeApp, journal: shop.Journal, count: int
) -> None:
    app = make_app(max_running_tasks=2)
    echo = app.task(shop.echo)
    async with app.connect():
        handles = [await echo(number) for number in range(6)]
        async with app.worker() as worker:
            await ticks(count)
            worker.stop(0)
        async with app.worker():
            results = [await handle.result(timeout=10) for handle in handles]
        assert left_in_queues(app) == 0
    assert results == list(range(6))
    assert journal.count("echo") == 6


# ------------------------------------------------------------ a server does not answer


class LapsingStore(MemoryStore):
    """A store that fails once: at the n-th round trip that is not about presences."""

    def __init__(self, number: int, *, after: bool) -> None:
        super().__init__(now)
        self._number = number
        self._after = after

    async def apply(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        if all(isinstance(one, Beat | Leave) for one in operations):
            return await super().apply(operations)
        self._number -= 1
        if self._number == 0 and not self._after:
            raise StateStoreUnavailable("memory://: the question was lost")
        answers = await super().apply(operations)
        if self._number == 0:
            raise StateStoreUnavailable("memory://: the answer was lost")
        return answers


class LapsingSession:
    def __init__(self, session: Any, broker: LapsingBroker) -> None:
        self._session = session
        self._broker = broker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    async def publish(self, exchange: str, publication: Any, timeout: float) -> None:
        if publication.queue.exclusive:
            await self._session.publish(exchange, publication, timeout)
            return
        self._broker.number -= 1
        fails = self._broker.number == 0
        if not fails or self._broker.after:
            await self._session.publish(exchange, publication, timeout)
        if fails and self._broker.drops:
            self._broker.drop_sessions()
        if fails:
            raise PublishFailed("memory://: not confirmed", maybe=True)


class LapsingBroker(MemoryBroker):
    """A broker that does not confirm the n-th message, queued or not."""

    def __init__(self, number: int, *, after: bool, drops: bool) -> None:
        super().__init__(now)
        self.number = number
        self.after = after
        self.drops = drops

    @asynccontextmanager
    async def session(self) -> Any:
        async with super().session() as session:
            yield LapsingSession(session, self)


async def queue_somehow(app: TaskApp, task: Any, *args: Any) -> TaskHandle[Any]:
    """Queue a call, again if it is not certain."""
    while True:
        try:
            handle: TaskHandle[Any] = await task.options(task_id="one")(*args)
        except (StateStoreUnavailable, PublishFailed):
            continue
        return handle


async def end_of(handle: TaskHandle[Any]) -> TaskStatus:
    """Wait for the end, again if the store does not answer."""
    while True:
        try:
            return await handle.join(timeout=60)
        except StateStoreUnavailable:
            continue


async def assert_runs_twice_and_ends_once(
    app: TaskApp, journal: shop.Journal, func: Any, args: tuple[Any, ...], status: TaskStatus
) -> None:
    task = app.task(retry=TWICE)(func)
    async with app.worker():
        handle = await queue_somehow(app, task, *args)
        assert await end_of(handle) is status
        record = record_of(app, handle)
        await anyio.sleep(100)
        assert (record.attempt, record.crashes, record.owed) == (2, 0, None) or status.ended
        assert record_of(app, handle).ended_at == record.ended_at
        assert record_of(app, handle).owed is None
        assert left_in_queues(app) == len(error_messages(app))
    assert journal.count(func.__name__) == 2
    if status is TaskStatus.ERRORED:
        # At least once: what was not confirmed may be there, and is published again.
        assert 1 <= len(error_messages(app)) <= 2
    else:
        assert not error_messages(app)


CASES = [
    pytest.param(shop.fail_until, (2,), TaskStatus.FINISHED, id="finished"),
    pytest.param(shop.fail, (), TaskStatus.ERRORED, id="errored"),
]


@pytest.mark.parametrize("after", [False, True], ids=["question", "answer"])
@pytest.mark.parametrize("number", range(1, 20))
@pytest.mark.parametrize(("func", "args", "status"), CASES)
async def test_a_store_that_fails_once_at_any_step_changes_nothing(
    app: TaskApp,
    journal: shop.Journal,
    func: Any,
    args: tuple[Any, ...],
    status: TaskStatus,
    number: int,
    after: bool,
) -> None:
    rewire(app, store=LapsingStore(number, after=after))
    await assert_runs_twice_and_ends_once(app, journal, func, args, status)


@pytest.mark.parametrize("drops", [False, True], ids=["stays", "drops"])
@pytest.mark.parametrize("after", [False, True], ids=["lost", "queued"])
@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize(("func", "args", "status"), CASES)
async def test_a_message_that_is_not_confirmed_at_any_step_changes_nothing(
    app: TaskApp,
    journal: shop.Journal,
    func: Any,
    args: tuple[Any, ...],
    status: TaskStatus,
    number: int,
    after: bool,
    drops: bool,
) -> None:
    rewire(app, broker=LapsingBroker(number, after=after, drops=drops))
    await assert_runs_twice_and_ends_once(app, journal, func, args, status)


@pytest.mark.parametrize("count", range(0, 90, 3))
@pytest.mark.parametrize(("func", "args", "status"), CASES)
async def test_a_connection_lost_at_any_step_changes_nothing(
    app: TaskApp,
    journal: shop.Journal,
    func: Any,
    args: tuple[Any, ...],
    status: TaskStatus,
    count: int,
) -> None:
    task = app.task(retry=RetryPolicy(max_retries=1, delay=0))(func)
    async with app.worker():
        handle = await task(*args)
        await ticks(count)
        memory(app)[0].drop_sessions()
        assert await handle.join(timeout=60) is status
        await until(lambda: left_in_queues(app) == len(error_messages(app)))
    assert journal.count(func.__name__) == 2
