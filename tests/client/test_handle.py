"""Handles: how a task's end is waited for, and how its state is looked at."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from amqp_tasks import (
    AmqpTasksError,
    ArgumentsError,
    DecodeError,
    RemoteTaskError,
    ResultTimeout,
    RetryPolicy,
    StateStoreUnavailable,
    TaskApp,
    TaskCanceled,
    TaskHandle,
    TaskNotFound,
    TaskStatus,
)
from amqp_tasks.abc import Listener
from amqp_tasks.core.operations import Operation
from amqp_tasks.drivers.memory import MemoryStore

from ..runtime import shop
from ..runtime.harness import MakeApp, memory, now, rewire, until, until_status

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]

ONCE = RetryPolicy(max_retries=0)

ODD_IDS = [
    "plain",
    "with space",
    "ünï-日本-\U0001f600",
    "{braced}",
    "}{",
    "%7D",
    "a*b?[c]",
    "a:b/c\\d",
    'it\'s "quoted"',
    "$(touch x)",
    "-",
    "x" * 400,
]


class FrailStore(MemoryStore):
    """A store that can be switched off."""

    is_down = False

    async def apply(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        if self.is_down:
            raise StateStoreUnavailable("memory://: nobody answers")
        return await super().apply(operations)


class HesitantListener:
    """Does each thing half a second later."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    async def subscribe(self, topic: str) -> None:
        await anyio.sleep(0.5)
        await self._listener.subscribe(topic)

    async def unsubscribe(self, topic: str) -> None:
        await anyio.sleep(0.5)
        await self._listener.unsubscribe(topic)

    def __aiter__(self) -> AsyncIterator[tuple[str, str]]:
        return self._listener.__aiter__()


class HesitantStore(MemoryStore):
    @asynccontextmanager
    async def listen(self) -> AsyncGenerator[Any, None]:
        async with super().listen() as listener:
            yield HesitantListener(listener)


# ------------------------------------------------------------------------- waiting


async def test_a_result_comes_when_the_task_ends_and_not_at_the_next_look(app: TaskApp) -> None:
    async with app.worker():
        handle = await app.task(shop.nap)(33.3)
        began = now()
        assert await handle.result() == "nap"
        assert now() - began == pytest.approx(33.3, abs=0.02)


async def test_everybody_who_waits_for_a_task_is_told(app: TaskApp) -> None:
    told: list[tuple[str, float]] = []

    async def wait(handle: TaskHandle[str]) -> None:
        told.append((await handle.result(), now()))

    async with app.worker():
        began = now()
        handle = await app.task(shop.nap)(10.0)
        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(wait, handle if number % 2 else app.handle(handle.task_id))
    assert [result for result, _ in told] == ["nap"] * 20
    assert all(moment - began == pytest.approx(10, abs=0.02) for _, moment in told)


async def test_one_who_stops_waiting_before_it_has_begun_does_not_disturb_the_others(
    app: TaskApp,
) -> None:
    rewire(app, store=HesitantStore(now))
    async with app.worker():
        handle = await app.task(shop.nap)(10.0)
        began = now()
        async with anyio.create_task_group() as tasks, anyio.create_task_group() as leaving:
            leaving.start_soon(handle.result)
            await anyio.sleep(0.2)
            tasks.start_soon(handle.result)
            await anyio.sleep(0.2)
            leaving.cancel_scope.cancel()
        assert now() - began < 10.6  # to unsubscribe takes half a second


async def test_one_who_begins_to_wait_while_the_last_one_leaves_is_told_at_once(
    app: TaskApp,
) -> None:
    rewire(app, store=HesitantStore(now))
    async with app.worker():
        handle = await app.task(shop.nap)(10.0)
        began = now()
        async with anyio.create_task_group() as tasks, anyio.create_task_group() as leaving:
            leaving.start_soon(handle.result)
            await anyio.sleep(2)
            leaving.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.2)
            tasks.start_soon(handle.result)
        assert now() - began < 10.6  # to unsubscribe takes half a second


async def test_when_nobody_waits_any_more_nothing_is_listened_for(app: TaskApp) -> None:
    async with app.connect():
        handle = await app.task(shop.add)(1)
        for seconds in (0.01, 1.0):
            with anyio.move_on_after(seconds):
                await handle.result()
        (listener,) = memory(app)[1]._listeners
        await until(lambda: not listener._topics)


async def test_a_result_that_is_there_already_comes_at_once_and_again(app: TaskApp) -> None:
    async with app.worker():
        handle = await app.task(shop.add)(1)
        assert await handle.join(timeout=10) is TaskStatus.FINISHED
        for timeout in (0, 0.5, 10, None):
            began = now()
            assert await handle.result(timeout=timeout) == 2
            assert now() == began


async def test_a_result_that_does_not_come_in_time_is_a_timeout_and_the_task_goes_on(
    app: TaskApp,
) -> None:
    async with app.worker():
        handle = await app.task(shop.nap)(10.0)
        began = now()
        with pytest.raises(ResultTimeout, match=r"has not ended within 2\.5 s") as caught:
            await handle.result(timeout=2.5)
        assert now() - began == pytest.approx(2.5, abs=0.01)
        assert isinstance(caught.value, TimeoutError)
        assert isinstance(caught.value, AmqpTasksError)
        assert handle.task_id in str(caught.value)
        assert await handle.result(timeout=10) == "nap"


@pytest.mark.parametrize("timeout", [0, 2.5])
async def test_a_timeout_says_how_the_task_does(app: TaskApp, timeout: float) -> None:
    async with app.worker():
        napping = await app.task(shop.nap)(10.0)
        failing = await app.task(retry=RetryPolicy(delay=100))(shop.fail)("no such thing")
        await until_status(napping, TaskStatus.RUNNING)
        await until_status(failing, TaskStatus.RETRYING)
        with pytest.raises(ResultTimeout, match=r"; it is running, attempt 1$"):
            await napping.result(timeout=timeout)
        with pytest.raises(ResultTimeout) as caught:
            await failing.result(timeout=timeout)
    assert "; it is retrying, attempt 2, after a failure: " in str(caught.value)
    assert str(caught.value).endswith(": no such thing")


async def test_a_timeout_of_zero_looks_once(app: TaskApp) -> None:
    async with app.worker():
        handle = await app.task(shop.nap)(10.0)
        began = now()
        for wait in (handle.result, handle.join):
            with pytest.raises(ResultTimeout, match="within 0 s"):
                await wait(timeout=0)
        assert now() == began


@pytest.mark.parametrize("wrong", [-1, -0.001, float("nan"), float("inf"), "5", True])
async def test_a_timeout_that_cannot_be_is_refused(app: TaskApp, wrong: Any) -> None:
    async with app.connect():
        handle = await app.task(shop.add)(1)
        for wait in (handle.result, handle.join):
            with pytest.raises(ArgumentsError, match="timeout="):
                await wait(timeout=wrong)


async def test_join_says_how_it_ended_and_raises_nothing(
    app: TaskApp, journal: shop.Journal
) -> None:
    async with app.worker():
        finished = await app.task(shop.add)(1)
        errored = await app.task(retry=ONCE)(shop.fail)()
        canceled = await app.task(shop.tell_reason)()
        await journal.wait_for("tell_reason started")
        await canceled.cancel()
        statuses = [await handle.join(timeout=10) for handle in (finished, errored, canceled)]
    assert statuses == [TaskStatus.FINISHED, TaskStatus.ERRORED, TaskStatus.CANCELED]


async def test_a_task_that_has_not_succeeded_raises_each_time_it_is_asked(
    app: TaskApp, journal: shop.Journal
) -> None:
    async with app.worker():
        errored = await app.task(retry=ONCE)(shop.fail)("sold out")
        canceled = await app.task(shop.tell_reason)()
        await journal.wait_for("tell_reason started")
        await canceled.cancel()
        for _ in range(2):
            with pytest.raises(RemoteTaskError, match="sold out"):
                await errored.result(timeout=10)
            with pytest.raises(TaskCanceled, match=canceled.task_id):
                await canceled.result(timeout=10)


async def test_a_task_that_nobody_knows_is_not_found_whatever_is_asked(app: TaskApp) -> None:
    handle = app.handle("no-such-task")
    async with app.connect():
        for ask in (handle.result, handle.join, handle.status, handle.state, handle.cancel):
            with pytest.raises(TaskNotFound, match="'no-such-task'"):
                await ask()


async def test_a_task_whose_state_expires_while_it_is_waited_for_is_not_found(
    app: TaskApp,
) -> None:
    async with app.connect():
        handle = await app.task(shop.add)(1)

        async def forget() -> None:
            await anyio.sleep(3)
            memory(app)[1].clear()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(forget)
            with pytest.raises(TaskNotFound), anyio.fail_after(10):
                await handle.result()


async def test_a_store_that_is_away_is_an_error_of_its_own(make_app: MakeApp) -> None:
    app, store = make_app(), FrailStore(now)
    rewire(app, store=store)
    async with app.connect():
        handle = await app.task(shop.add)(1)
        store.is_down = True
        for ask in (handle.result, handle.status, handle.state, handle.cancel):
            with pytest.raises(StateStoreUnavailable, match="nobody answers"):
                await ask()
        store.is_down = False
        assert await handle.status() is TaskStatus.SCHEDULED


# ---------------------------------------------------------------------- the handle


async def test_handles_of_one_id_are_equal(app: TaskApp) -> None:
    async with app.connect():
        handle = await app.task(shop.add).options(task_id="one")(1)
    same, other = app.handle("one"), app.handle("other")
    assert handle == same
    assert hash(handle) == hash(same)
    assert handle != other
    assert handle != "one"
    assert len({handle, same, other}) == 2
    assert repr(same) == "<TaskHandle 'one'>"


@pytest.mark.parametrize("task_id", ODD_IDS, ids=lambda value: value[:12])
async def test_any_printable_text_can_be_an_id(app: TaskApp, task_id: str) -> None:
    add = app.task(shop.add).options(task_id=task_id)
    async with app.worker():
        handle = await add(1)
        assert handle.task_id == task_id
        assert await handle.result(timeout=10) == 2
        assert (await app.handle(task_id).state()).task_id == task_id
        assert [state.task_id for state in await app.list_tasks(prefix=task_id)] == [task_id]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("", "not empty"),
        ("a\nb", "line breaks"),
        ("a\x00b", "control characters"),
        ("x" * 401, "has 401 characters; at most 400"),
        (5, "task_id=5"),
        (b"x", "must be a text"),
    ],
)
async def test_what_cannot_be_an_id_is_refused(app: TaskApp, wrong: Any, says: str) -> None:
    add = app.task(shop.add)
    with pytest.raises(ArgumentsError, match=says):
        app.handle(wrong)
    async with app.connect():
        with pytest.raises(ArgumentsError, match=says):
            await add.options(task_id=wrong)(1)
        with pytest.raises(ArgumentsError, match=says):
            await app.add_task(add, 1, task_id=wrong)
        assert await app.list_tasks() == []


async def test_two_calls_with_one_id_at_the_same_time_are_one_task(
    app: TaskApp, journal: shop.Journal
) -> None:
    echo = app.task(shop.echo).options(task_id="one")
    async with app.worker():
        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(echo, number)
        await app.handle("one").join(timeout=10)
        await anyio.sleep(60)
    assert journal.count("echo") == 1


# ------------------------------------------------------------------------ listing


async def test_tasks_are_listed_by_id_status_and_page(app: TaskApp, journal: shop.Journal) -> None:
    add, tell = app.task(shop.add), app.task(shop.tell_reason)
    fail = app.task(retry=ONCE)(shop.fail)
    async with app.worker():
        for name in ("b1", "a2", "a10", "c"):
            await (await add.options(task_id=name)(1)).result(timeout=10)
        await (await fail.options(task_id="a3")()).join(timeout=10)
        running = await tell.options(task_id="a1")()
        await journal.wait_for("tell_reason started")

        async def ids(**query: Any) -> list[str]:
            return [state.task_id for state in await app.list_tasks(**query)]

        assert await ids() == ["a1", "a10", "a2", "a3", "b1", "c"]
        assert await ids(prefix="a") == ["a1", "a10", "a2", "a3"]
        assert await ids(prefix="a1") == ["a1", "a10"]
        assert await ids(prefix="none") == []
        assert await ids(status=TaskStatus.FINISHED) == ["a10", "a2", "b1", "c"]
        assert await ids(status="errored") == ["a3"]
        assert await ids(status="canceled") == []
        assert await ids(prefix="a", status=TaskStatus.RUNNING) == ["a1"]
        assert await ids(limit=2) == ["a1", "a10"]
        assert await ids(limit=2, after="a10") == ["a2", "a3"]
        assert await ids(prefix="a", after="a2", limit=100) == ["a3"]
        assert await ids(after="c") == []
        await running.cancel()


async def test_a_listed_state_tells_what_a_handle_does_except_for_the_log(app: TaskApp) -> None:
    async with app.worker():
        app.task(shop.point_back)
        handle = await app.add_task(shop.point_back, {"x": 1, "y": "2"})
        await handle.join(timeout=10)
        (listed,) = await app.list_tasks()
        state = await app.handle(handle.task_id).state()
    assert listed == state
    assert listed.result == {"x": 1, "y": "2"}


async def test_a_status_that_there_is_not_is_refused(app: TaskApp) -> None:
    async with app.connect():
        with pytest.raises(ArgumentsError, match="status='done': must be one of scheduled"):
            await app.list_tasks(status="done")


async def test_an_id_that_is_another_task_s(app: TaskApp) -> None:
    nap, add = app.task(shop.nap), app.task(shop.add)
    async with app.worker():
        await (await nap.options(task_id="one")(0.1)).join(timeout=10)
        handle = await add.options(task_id="one")(1)  # which stands for the first
        for ask in (handle.result, handle.state):
            with pytest.raises(
                DecodeError, match=r"task 'one' is .*shop\.nap, and its result \"nap\""
            ):
                await ask()


@pytest.mark.parametrize("limit", [0, -1, 1.5, "5", True, None])
async def test_a_limit_that_is_none_is_refused(app: TaskApp, limit: Any) -> None:
    async with app.connect():
        with pytest.raises(ArgumentsError, match=r"limit=.*: must be an integer of 1 or more"):
            await app.list_tasks(limit=limit)
