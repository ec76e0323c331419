"""What a task sees of its attempt: itself, its children, its threads, its log."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import anyio
import pytest

from amqp_tasks import (
    AmqpTasksError,
    MessageType,
    RemoteTaskError,
    RetryPolicy,
    StateStoreUnavailable,
    TaskApp,
    TaskState,
    TaskStatus,
    current_attempt,
)
from amqp_tasks.core.operations import AppendEvents, Operation
from amqp_tasks.drivers.memory import MemoryStore

from ..conftest import REAL_CLOCKS
from . import shop, surroundings
from .harness import now, record_of, rewire, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]

ONCE = RetryPolicy(max_retries=0)


class ForgetfulStore(MemoryStore):
    """A store that does not take event logs."""

    async def apply(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        if any(isinstance(one, AppendEvents) for one in operations):
            raise StateStoreUnavailable("memory://: nobody answers")
        return await super().apply(operations)


def told(state: TaskState) -> list[tuple[str, Any]]:
    return [(entry["kind"], entry["message"]) for entry in state.eventlog]


# ------------------------------------------------------------------------- itself


async def log_numbers(count: int) -> None:
    for number in range(count):
        await current_attempt().log(number)


async def test_a_state_has_the_latest_entries_of_a_long_log(app: TaskApp) -> None:
    async with app.worker():
        handle = await app.task(log_numbers)(1_100)
        await handle.result(timeout=30)
        state = await handle.state()
        assert [entry["message"] for entry in state.eventlog] == list(range(100, 1_100))
        assert [event.message async for event in handle.events()] == list(range(1_100))


async def test_a_task_knows_its_attempt(app: TaskApp) -> None:
    about = app.task(retry=RetryPolicy(delay=1))(surroundings.about_itself)
    async with app.worker() as worker:
        handle = await about()
        facts = await handle.result(timeout=10)
    record = record_of(app, handle)
    assert facts == {
        "task_id": handle.task_id,
        "name": about.name,
        "number": 2,
        "fence": record.fence,
        "deadline": None,
        "worker": worker.id,
        "reason": None,
    }


async def test_the_attempt_is_known_in_children_and_in_functions_they_call(app: TaskApp) -> None:
    async with app.worker():
        handle = await app.task(surroundings.ids_in_children)()
        assert await handle.result(timeout=10) == [handle.task_id] * 3


async def test_each_task_sees_its_own_attempt(app: TaskApp) -> None:
    about = app.task(surroundings.id_after)
    async with app.worker():
        handles = [await about(float(number % 5)) for number in range(20)]
        for handle in handles:
            assert await handle.result(timeout=10) == handle.task_id


async def test_outside_of_a_task_there_is_no_attempt(app: TaskApp) -> None:
    with pytest.raises(AmqpTasksError, match="outside of a task"):
        current_attempt()
    async with app.worker():
        assert await (await app.task(shop.add)(1)).result(timeout=10) == 2
        with pytest.raises(AmqpTasksError, match="outside of a task"):
            current_attempt()


async def test_a_task_sees_nothing_of_the_context_in_which_the_worker_was_started(
    app: TaskApp,
) -> None:
    token = surroundings.REQUEST.set("the worker's")
    swap = app.task(surroundings.swap_request)
    async with app.worker():
        handles = [await swap("a"), await swap("b")]
        assert [await handle.result(timeout=10) for handle in handles] == ["none", "none"]
    assert surroundings.REQUEST.get() == "the worker's"
    surroundings.REQUEST.reset(token)


# -------------------------------------------------------------------- its children


async def test_a_task_can_wait_for_the_result_of_another(app: TaskApp) -> None:
    app.task(shop.add)
    async with app.worker():
        assert await (await app.task(shop.add_elsewhere)(2, 3)).result(timeout=10) == 5


async def test_a_task_that_was_queued_by_a_task_says_so(app: TaskApp) -> None:
    add = app.task(shop.add)
    async with app.worker():
        parent = await app.task(shop.add_elsewhere)(2, 3)
        await parent.join(timeout=10)
        (child,) = [state for state in await app.list_tasks() if state.name == add.name]
        assert child.parent == parent.task_id
        assert (await parent.state()).parent is None


async def test_the_error_of_a_task_that_is_waited_for_fails_who_waits(app: TaskApp) -> None:
    app.task(retry=ONCE)(shop.fail)
    async with app.worker():
        handle = await app.task(retry=ONCE)(surroundings.fail_elsewhere)()
        with pytest.raises(RemoteTaskError) as caught:
            await handle.result(timeout=10)
    assert caught.value.type == "amqp_tasks.exceptions.RemoteTaskError"
    assert "tests.runtime.shop.OutOfStock: no" in caught.value.message


@pytest.mark.parametrize("kind", ["coroutine", "child"])
async def test_errors_in_a_task_group_of_the_task_are_its_error(app: TaskApp, kind: str) -> None:
    async with app.worker():
        handle = await app.task(retry=ONCE)(surroundings.fail_in_group)(kind)
        with pytest.raises(RemoteTaskError) as caught:
            await handle.result(timeout=10)
        assert "raise OutOfStock" in caught.value.traceback
        assert await (await app.task(shop.add)(1)).result(timeout=10) == 2


# ------------------------------------------------------------------- what it tells


async def test_a_generator_s_messages_are_its_log_and_its_items_are_its_result(
    app: TaskApp, caplog: pytest.LogCaptureFixture
) -> None:
    async with app.worker():
        handle = await app.task(shop.narrate)(2)
        with caplog.at_level(logging.WARNING):
            assert await handle.result(timeout=10) == [0, 1]
        state = await handle.state()
    assert told(state) == [("debug", "begun"), ("result", 0), ("result", 1), ("debug", {"left": 0})]
    assert [entry["attempt"] for entry in state.eventlog] == [1] * 4
    assert all(state.created_at <= entry["at"] <= now() for entry in state.eventlog)
    (record,) = caplog.records
    assert "'whatever', which is ignored" in record.getMessage()
    assert MessageType.__name__ in record.getMessage()


async def test_a_generator_without_items_has_an_empty_list_for_a_result(app: TaskApp) -> None:
    async with app.worker():
        assert await (await app.task(shop.narrate)(0)).result(timeout=10) == []


async def test_a_generator_that_fails_keeps_its_log_and_has_no_result(app: TaskApp) -> None:
    narrate = app.task(retry=RetryPolicy(max_retries=1, delay=1))(shop.narrate_and_fail)
    async with app.worker():
        handle = await narrate()
        with pytest.raises(RemoteTaskError, match="in a generator"):
            await handle.result(timeout=10)
        state = await handle.state()
    assert told(state) == [("debug", "before"), ("result", 1)] * 2
    assert [entry["attempt"] for entry in state.eventlog] == [1, 1, 2, 2]
    assert state.result is None


async def test_any_task_can_write_to_its_log_whatever_it_has_to_say(app: TaskApp) -> None:
    async with app.worker():
        handle = await app.task(surroundings.log_everything)()
        assert await handle.result(timeout=10) == "done"
        messages = told(await handle.state())
    assert messages[:3] == [("log", None), ("log", {"x": [1]}), ("log", "text")]
    assert messages[3][1].startswith("<object object")


async def test_a_log_that_cannot_be_written_fails_nobody(
    app: TaskApp, caplog: pytest.LogCaptureFixture
) -> None:
    rewire(app, store=ForgetfulStore(now))
    async with app.worker():
        handle = await app.task(shop.narrate)(2)
        assert await handle.result(timeout=10) == [0, 1]
        assert told(await handle.state()) == []
    assert "its event log could not be written" in caplog.text


async def test_the_log_of_a_lost_lease_is_not_written(app: TaskApp, journal: shop.Journal) -> None:
    async with app.worker():
        handle = await app.task(surroundings.log_when_told)()
        await journal.wait_for("log_when_told started")
        record_of(app, handle).fence += 1
        journal.open("log")
        await anyio.sleep(1)
        assert told(await handle.state()) == []
        record_of(app, handle).fence -= 1
        await handle.cancel()


# ------------------------------------------------------------------------- threads


class TestThreads:
    """On real clocks: a virtual one does not wait for threads."""

    @pytest.fixture(params=REAL_CLOCKS)
    def anyio_backend(self, request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
        return REAL_CLOCKS[request.param]()

    @pytest.fixture
    def app(self) -> TaskApp:
        return TaskApp(broker_url="memory://", state_url="memory://", clock=time.time)

    async def test_a_synchronous_function_runs_in_a_thread_and_knows_its_attempt(
        self, app: TaskApp
    ) -> None:
        async with app.worker():
            handle = await app.task(surroundings.where_it_runs)()
            task_id, is_main_thread = await handle.result(timeout=10)
        assert task_id == handle.task_id
        assert is_main_thread is False

    async def test_a_synchronous_function_does_not_keep_the_others_waiting(
        self, app: TaskApp
    ) -> None:
        block, add = app.task(surroundings.block), app.task(shop.add)
        surroundings.unblock.clear()
        async with app.worker():
            blocked = [await block() for _ in range(5)]
            try:
                assert await (await add(1)).result(timeout=10) == 2
                assert {await handle.status() for handle in blocked} <= {
                    TaskStatus.RUNNING,
                    TaskStatus.SCHEDULED,
                }
            finally:
                surroundings.unblock.set()
            for handle in blocked:
                assert await handle.result(timeout=10) == "unblocked"

    async def test_a_function_in_a_thread_can_call_back_into_the_event_loop(
        self, app: TaskApp
    ) -> None:
        async with app.worker():
            handle = await app.task(surroundings.log_from_thread)()
            assert await handle.join(timeout=10) is TaskStatus.FINISHED
            assert told(await handle.state()) == [("log", "from a thread")]

    async def test_a_function_in_a_thread_that_is_cancelled_goes_on_and_is_finished(
        self, app: TaskApp
    ) -> None:
        surroundings.unblock.clear()
        surroundings.blocked.clear()
        async with app.worker():
            handle = await app.task(surroundings.block)()
            await until(surroundings.blocked.is_set, within=10)
            assert await handle.cancel()
            surroundings.unblock.set()
            assert await handle.result(timeout=10) == "unblocked"

    async def test_a_function_in_a_thread_that_looks_for_its_cancellation_is_canceled(
        self, app: TaskApp
    ) -> None:
        surroundings.blocked.clear()
        async with app.worker():
            handle = await app.task(surroundings.look_for_cancellation)()
            await until(surroundings.blocked.is_set, within=10)
            assert await handle.cancel()
            assert await handle.join(timeout=10) is TaskStatus.CANCELED

    async def test_what_a_function_in_a_thread_raises_is_its_error(self, app: TaskApp) -> None:
        async with app.worker():
            for name in ("OutOfStock", "SystemExit", "StopIteration"):
                handle = await app.task(retry=ONCE, name=name)(surroundings.raise_in_thread)(name)
                with pytest.raises(RemoteTaskError) as caught:
                    await handle.result(timeout=10)
                assert name in caught.value.type + caught.value.traceback
