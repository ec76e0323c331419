"""Connections: within which blocks an app can be used, and what happens at their edges."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest

from amqp_tasks import (
    BrokerUnavailable,
    NotConnected,
    PublishFailed,
    RemoteTaskError,
    StateStoreUnavailable,
    TaskApp,
    TaskStatus,
)
from amqp_tasks.core.operations import Create, Discharge, Operation
from amqp_tasks.drivers.memory import MemoryBroker, MemoryStore

from ..runtime import shop
from ..runtime.harness import MakeApp, depth, left_in_queues, memory, now, rewire, ticks, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]


# ------------------------------------------------------------------ where it can be used


async def test_outside_of_a_connection_everything_says_what_is_missing(app: TaskApp) -> None:
    add, handle = app.task(shop.add), app.handle("x")
    asks: list[Callable[[], Coroutine[Any, Any, Any]]] = [
        lambda: add(1),
        lambda: app.add_task(add, 1),
        handle.retry,
        app.list_tasks,
        handle.result,
        handle.join,
        handle.status,
        handle.state,
        handle.cancel,
    ]
    for ask in asks:
        with pytest.raises(NotConnected, match=r"`async with app\.connect\(\):`"):
            await ask()


async def test_after_the_block_it_is_as_before(app: TaskApp) -> None:
    add = app.task(shop.add)
    for _ in range(2):
        async with app.connect() as connected:
            assert connected is app
            await add(1)
        with pytest.raises(NotConnected):
            await add(1)
    assert depth(app) == 2
    broker, store = memory(app)
    assert not broker._sessions
    assert not store._listeners


async def test_a_connection_can_be_used_by_any_task_of_the_event_loop(app: TaskApp) -> None:
    add = app.task(shop.add)
    connected = anyio.Event()

    async def call() -> None:
        await connected.wait()
        assert await (await add(1)).result(timeout=10) == 2

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call)
        async with app.worker():
            connected.set()
            await until(lambda: not tasks.cancel_scope.cancel_called and len(_ended(app)) == 1)


def _ended(app: TaskApp) -> list[str]:
    return [one.task_id for one in memory(app)[1]._records.values() if one.status.ended]


async def test_connections_can_be_nested_and_the_outer_one_goes_on(app: TaskApp) -> None:
    add = app.task(shop.add)
    async with app.connect():
        async with app.connect():
            await add(1)
        await add(2)
        async with app.worker():
            assert await (await add(3)).result(timeout=10) == 4
        await add(4)
    assert depth(app) == 1


async def test_two_apps_do_not_meet(make_app: MakeApp) -> None:
    one, other = make_app(), make_app()
    add = one.task(shop.add)
    async with one.connect():
        with pytest.raises(NotConnected):
            await other.list_tasks()
        async with other.connect():
            await add(1)
            assert await other.list_tasks() == []


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
async def test_an_event_loop_of_another_thread_needs_a_connection_of_its_own(
    app: TaskApp, backend: str
) -> None:
    add = app.task(shop.add)

    async def elsewhere() -> None:
        with pytest.raises(NotConnected, match="on this event loop"):
            await add(1)
        async with app.connect():
            await add(2)

    async with app.connect():
        await anyio.to_thread.run_sync(lambda: anyio.run(elsewhere, backend=backend))
        await add(3)
    assert depth(app) == 2


# ---------------------------------------------------------------- the edges of the block


async def test_an_error_in_the_block_comes_out_as_itself(app: TaskApp) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with app.connect():
            raise KeyError("mine")


@pytest.mark.parametrize("block", ["connect", "worker"])
async def test_a_group_of_one_error_in_the_block_stays_a_group(app: TaskApp, block: str) -> None:
    with pytest.raises(ExceptionGroup, match="ours") as caught:
        async with app.connect() if block == "connect" else app.worker():
            raise ExceptionGroup("ours", [KeyError("mine")])
    assert [type(error) for error in caught.value.exceptions] == [KeyError]


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("count", range(24))
async def test_connecting_can_be_cancelled_in_any_phase(
    app: TaskApp, count: int, at_once: bool
) -> None:
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:

            async def connect() -> None:
                async with app.connect(may_start_without_broker=at_once):
                    await anyio.sleep_forever()

            tasks.start_soon(connect)
            await ticks(count)
            scope.cancel()
    broker, store = memory(app)
    assert not broker._sessions
    assert not store._listeners
    assert not app._clients


async def test_a_connection_that_is_lost_for_good_ends_the_block(make_app: MakeApp) -> None:
    app, broker = make_app(reconnect_timeout=20), FrailBroker(now)
    rewire(app, broker=broker)
    began = now()

    async def connect() -> None:
        async with app.connect():
            broker.go_down()
            await anyio.sleep_forever()

    with pytest.raises(BrokerUnavailable, match="reconnect_timeout=20"):
        await connect()
    assert 20 <= now() - began <= 20 + 2 * 10


async def test_a_block_that_may_lose_its_broker_goes_on(make_app: MakeApp) -> None:
    app, broker = make_app(reconnect_timeout=20, publish_timeout=7), FrailBroker(now)
    rewire(app, broker=broker)
    add = app.task(shop.add)
    async with app.connect(may_lose_broker=True):
        handle = await add(1)
        broker.go_down()
        await anyio.sleep(1000)
        assert await handle.status() is TaskStatus.SCHEDULED
        with pytest.raises(PublishFailed, match="memory://: nobody answers; nothing was queued"):
            await add(2)
        broker.is_down = False
        await anyio.sleep(10)
        await add(3)
    assert depth(app) == 2


async def test_a_block_that_may_lose_its_broker_needs_it_to_begin(make_app: MakeApp) -> None:
    app, broker = make_app(), FrailBroker(now)
    rewire(app, broker=broker)
    broker.go_down()
    with pytest.raises(BrokerUnavailable):
        async with app.connect(may_lose_broker=True):
            pytest.fail("it has begun")


async def test_a_block_that_may_start_without_a_broker(make_app: MakeApp) -> None:
    app, broker = make_app(publish_timeout=7), FrailBroker(now)
    rewire(app, broker=broker)
    echo = app.task(shop.echo).options(task_id="one", keep_unqueued=True)
    broker.go_down()
    began = now()
    async with app.connect(may_start_without_broker=True):
        assert now() == began
        with pytest.raises(PublishFailed, match="memory://: nobody answers"):
            await echo(1)
        assert (await app.handle("one").state()).reason == "not_queued"
        broker.is_down = False
        await anyio.sleep(20)
        assert await app.handle("one").retry() is True
    assert depth(app) == 1


async def test_it_does_not_wait_for_a_broker_that_is_there(app: TaskApp) -> None:
    began = now()
    async with app.connect(may_start_without_broker=True):
        await app.task(shop.add)(1)
    assert now() == began


async def test_a_broker_that_never_comes_ends_the_block_in_time(make_app: MakeApp) -> None:
    app, broker = make_app(reconnect_timeout=20), FrailBroker(now)
    rewire(app, broker=broker)
    broker.go_down()

    async def connect() -> None:
        async with app.connect(may_start_without_broker=True):
            await anyio.sleep_forever()

    began = now()
    with pytest.raises(BrokerUnavailable, match="reconnect_timeout=20"):
        await connect()
    assert 20 <= now() - began <= 20 + 2 * 10


# ------------------------------------------------------------------- trouble while queueing


class FrailBroker(MemoryBroker):
    """A broker that can be switched off, and that may confirm nothing."""

    is_down = False

    def session(self) -> AbstractAsyncContextManager[Any]:  # type: ignore[override]
        if self.is_down:
            raise BrokerUnavailable("memory://: nobody answers")
        return super().session()

    def go_down(self) -> None:
        self.is_down = True
        self.drop_sessions()


class SilentSession:
    """Publishes, and hears no confirmation: it may be queued or not."""

    def __init__(self, session: Any, arrives: bool) -> None:
        self._session = session
        self._arrives = arrives

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    async def publish(self, exchange: str, publication: Any, timeout: float) -> None:
        if self._arrives:
            await self._session.publish(exchange, publication, timeout)
        raise PublishFailed("no confirmation", maybe=True)


class SilentBroker(MemoryBroker):
    def __init__(self, arrives: bool) -> None:
        super().__init__(now)
        self._arrives = arrives
        self.is_silent = True

    @asynccontextmanager
    async def session(self) -> Any:
        async with super().session() as session:
            yield SilentSession(session, self._arrives) if self.is_silent else session


class FailingStore(MemoryStore):
    """A store that goes away at operations of one kind: before or after they are done."""

    def __init__(self, kind: type[Operation[Any]], after: bool) -> None:
        super().__init__(now)
        self._kind = kind
        self._after = after
        self.fails = True

    async def apply(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        is_meant = self.fails and any(isinstance(one, self._kind) for one in operations)
        answers = await super().apply(operations) if self._after or not is_meant else []
        if is_meant:
            raise StateStoreUnavailable("memory://: nobody answers")
        return answers


async def test_a_call_waits_for_a_connection_that_comes_back(app: TaskApp) -> None:
    broker = FrailBroker(now)
    rewire(app, broker=broker)
    async with app.connect(), anyio.create_task_group() as tasks:
        broker.go_down()
        tasks.start_soon(app.task(shop.add), 1)
        await anyio.sleep(5)
        broker.is_down = False
    assert depth(app) == 1


async def test_a_call_that_certainly_was_not_queued_leaves_no_state(make_app: MakeApp) -> None:
    app, broker = make_app(publish_timeout=7), FrailBroker(now)
    rewire(app, broker=broker)
    async with app.connect():
        broker.go_down()
        began = now()
        with pytest.raises(PublishFailed, match="publish_timeout") as caught:
            await app.task(shop.add)(1)
        assert now() - began == pytest.approx(7, abs=0.01)
        assert caught.value.maybe is False
        assert await app.list_tasks() == []


async def test_a_call_that_certainly_was_not_queued_can_be_kept_as_errored(
    make_app: MakeApp,
) -> None:
    app, broker = make_app(publish_timeout=7, state_ttl=100), FrailBroker(now)
    rewire(app, broker=broker)
    echo = app.task(shop.echo).options(task_id="one", keep_unqueued=True)
    async with app.connect():
        broker.go_down()
        with pytest.raises(PublishFailed):
            await echo(1)
        with pytest.raises(RemoteTaskError, match="publish_timeout") as caught:
            await app.handle("one").result(timeout=10)
        assert caught.value.reason == "not_queued"
        state = await app.handle("one").state()
        assert (state.status, state.reason) == (TaskStatus.ERRORED, "not_queued")
        await anyio.sleep(101)
        assert await app.list_tasks() == []


async def test_a_task_that_was_kept_although_it_was_not_queued_can_be_retried(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app, broker = make_app(publish_timeout=1), FrailBroker(now)
    rewire(app, broker=broker)
    echo = app.task(shop.echo).options(task_id="one", keep_unqueued=True)
    async with app.connect():
        broker.go_down()
        with pytest.raises(PublishFailed):
            await echo(1)
        # In vain: it is errored as before, and not scheduled for ever.
        with pytest.raises(PublishFailed):
            await app.handle("one").retry()
        assert await app.handle("one").status() is TaskStatus.ERRORED
        broker.is_down = False
        await anyio.sleep(60)  # until it has connected again
        assert await app.handle("one").retry() is True
    async with app.worker():
        assert await app.handle("one").result(timeout=10) == 1
    assert journal.count("echo") == 1


@pytest.mark.parametrize("arrives", [True, False])
async def test_a_call_that_may_have_been_queued_can_be_repeated_with_its_id(
    app: TaskApp, journal: shop.Journal, arrives: bool
) -> None:
    broker = SilentBroker(arrives)
    rewire(app, broker=broker)
    echo = app.task(shop.echo).options(task_id="one")
    async with app.connect():
        with pytest.raises(PublishFailed) as caught:
            await echo(1)
        assert caught.value.maybe is True
        assert [state.status for state in await app.list_tasks()] == [TaskStatus.SCHEDULED]
    broker.is_silent = False
    async with app.worker():
        assert await (await echo(1)).result(timeout=10) == 1
        await until(lambda: left_in_queues(app) == 0)
        await anyio.sleep(60)
    assert journal.count("echo") == 1


async def test_a_state_that_nobody_confirmed_is_forgotten_in_the_end(app: TaskApp) -> None:
    rewire(app, broker=SilentBroker(arrives=False))
    async with app.connect():
        with pytest.raises(PublishFailed):
            await app.task(shop.add)(1)
        await anyio.sleep(3601)
        assert await app.list_tasks() == []


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_a_store_that_is_away_when_the_state_is_written_queues_nothing(
    app: TaskApp, journal: shop.Journal, after: bool
) -> None:
    store = FailingStore(Create, after)
    rewire(app, store=store)
    echo = app.task(shop.echo).options(task_id="one")
    async with app.worker():
        with pytest.raises(StateStoreUnavailable):
            await echo(1)
        assert left_in_queues(app) == 0
        store.fails = False
        assert await (await echo(1)).result(timeout=10) == 1
        await until(lambda: left_in_queues(app) == 0)
    assert journal.count("echo") == 1


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_a_store_that_is_away_when_the_queueing_is_confirmed_does_not_matter(
    app: TaskApp, journal: shop.Journal, after: bool
) -> None:
    rewire(app, store=FailingStore(Discharge, after))
    async with app.connect():
        handle = await app.task(shop.echo)(1)
    async with app.worker():
        assert await handle.result(timeout=10) == 1
    assert journal.count("echo") == 1


@pytest.mark.parametrize("count", range(16))
async def test_a_call_that_is_cancelled_in_any_phase_can_be_repeated_with_its_id(
    app: TaskApp, journal: shop.Journal, count: int
) -> None:
    echo = app.task(shop.echo).options(task_id="one")
    async with app.worker():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(echo, 1)
            await ticks(count)
            tasks.cancel_scope.cancel()
        assert await (await echo(1)).result(timeout=10) == 1
        await until(lambda: left_in_queues(app) == 0)
        await anyio.sleep(60)
    assert journal.count("echo") == 1
