"""What is known about a task: in memory, and in Redis."""

from __future__ import annotations

import re
import time
from typing import Any

import anyio
import pytest
from guillotina.request import Request

from amqp_tasks import AmqpTasksError
from guillotina_bridge.exceptions import (
    TaskAccessUnauthorized,
    TaskNotFinishedException,
    TaskNotFoundException,
)
from guillotina_bridge.interfaces import IStateManagerUtility
from guillotina_bridge.state import (
    MemoryStateManager,
    RedisStateManager,
    TaskState,
    TaskStatus,
    get_state_manager,
)

from .conftest import Site, StartGuillotina
from .scheduling import (
    count,
    ended,
    fail,
    give,
    nothing_has_run,
    ran,
    reserved_update,
    scheduled,
    update_and_log,
    updating,
    wait,
    within_request,
)

__all__ = ["nothing_has_run"]

pytestmark = pytest.mark.anyio

MANAGERS = {"memory": MemoryStateManager, "redis": RedisStateManager}


@pytest.fixture(params=MANAGERS)
async def site(request: pytest.FixtureRequest, start_guillotina: StartGuillotina) -> Site:
    """A site that runs its tasks itself."""
    settings: dict[str, Any] = {"amqp": {}}
    if request.param == "redis":
        settings = dict(request.getfixturevalue("server_settings"))
    settings["amqp"] |= {
        "persistent_manager": request.param,
        "embedded_worker": True,
        "max_task_retries": 0,
    }
    site = await start_guillotina(applications=["tests.bridge.scheduling"], **settings)
    await site.make_container("a")
    return site


async def started(site: Site, *args: Any) -> TaskState:
    """Schedule a task that waits, and return when it does."""

    async def view(context: Any, request: Request) -> str:
        return (await wait(*args)).task_id

    task_id = (await within_request(site, view)).json()
    with anyio.fail_after(20):
        while "started" not in ran:
            await anyio.sleep(0.01)
    return TaskState(task_id)


async def test_the_manager_is_the_one_that_is_configured(
    site: Site, request: pytest.FixtureRequest
) -> None:
    manager = get_state_manager()
    assert type(manager) is MANAGERS[request.node.callspec.params["site"]]
    assert IStateManagerUtility.providedBy(manager)
    assert get_state_manager(loop=None) is manager


async def test_a_finished_task(site: Site) -> None:
    state = await scheduled(site, lambda: count(2))
    assert set(state) == {
        *("task_id", "status", "updated", "job_data", "job_retries", "eventlog", "result"),
    }
    assert (state["status"], state["job_retries"], state["result"]) == ("finished", 0, [0, 1])
    assert abs(state["updated"] - time.time()) < 20
    assert state["job_data"]["func"] == "tests.bridge.scheduling.count"
    assert state["job_data"]["args"] == [2]
    assert [message for _, message in state["eventlog"]] == ["at 0", "at 1"]
    for at, _ in state["eventlog"]:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}", at)
    known = TaskState(state["task_id"])
    assert await known.get_state() == await known.join() == state
    assert await known.get_status() == TaskStatus.FINISHED
    assert not await known.is_canceled()
    assert await known.cancel() is False
    assert await known.retry() is False


@pytest.mark.parametrize("value", [0, "", [], False, None])
async def test_a_result_that_is_nothing_is_a_result(site: Site, value: Any) -> None:
    state = await scheduled(site, lambda: give(value))
    assert state["result"] == value
    assert await TaskState(state["task_id"]).get_result() == value


async def test_an_errored_task(site: Site) -> None:
    state = await scheduled(site, lambda: fail("what was wrong"))
    assert state["status"] == "errored"
    assert "ValueError: what was wrong" in state["error"]
    assert "in fail" in state["error"]
    assert "result" not in state
    known = TaskState(state["task_id"])
    assert await known.get_result() is None
    assert await known.cancel() is False
    assert await known.retry()
    assert (await ended(known))["status"] == "errored"


async def test_a_task_that_runs_and_is_canceled(site: Site) -> None:
    known = await started(site)
    assert await known.get_status() == "running"
    with pytest.raises(TaskNotFinishedException):
        await known.get_result()
    assert await get_state_manager().is_mine(known.task_id)
    assert await known.cancel()
    assert await known.is_canceled()  # whether it has stopped yet or not
    state = await ended(known)
    assert (state["status"], state["reason"]) == ("canceled", "user")
    assert await known.cancel()  # and again
    assert await known.is_canceled()
    assert not await get_state_manager().is_mine(known.task_id)
    with pytest.raises(TaskNotFinishedException):
        await known.get_result()
    assert ran == ["started"]


async def test_joining_waits_for_the_end(site: Site) -> None:
    known = await started(site, 0.3)
    assert (await ended(known))["status"] == "finished"
    assert ran == ["started", "ended"]


async def test_nothing_is_known_of_an_unknown_task(site: Site) -> None:
    manager = get_state_manager()
    for task_id in ("task:db-a-unknown", "", "\n"):  # the last two can be nobody's
        known = TaskState(task_id)
        for method in ("get_state", "get_status", "get_result", "join", "cancel", "retry"):
            with pytest.raises(TaskNotFoundException):
                await getattr(known, method)()
        assert not await known.is_canceled()
        assert await manager.get(task_id) == {}
        assert not await manager.exists(task_id)
        assert not await manager.is_mine(task_id)
        with pytest.raises(TaskNotFoundException):
            await manager.cancel(task_id)


async def test_the_manager_lists_ids_in_pages_and_nothing_else(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def view(context: Any, request: Request) -> list[str]:
        return [(await give(number)).task_id for number in range(7)]

    ids = (await within_request(site, view)).json()
    monkeypatch.setattr("guillotina_bridge.managers.PAGE", 3)
    assert [task_id async for task_id in get_state_manager().list()] == sorted(ids)
    for task_id in ids:
        await ended(TaskState(task_id))
        assert await get_state_manager().exists(task_id)


async def test_a_task_updates_its_own_state(site: Site) -> None:
    state = await scheduled(site, updating)
    assert (state["progress"], state["phase"]) == (2, "writing")
    assert (state["status"], state["result"], state["eventlog"]) == ("finished", "done", [])
    assert await get_state_manager().get(state["task_id"]) == state


async def test_an_update_is_kept_however_long_the_log_gets(site: Site) -> None:
    state = await scheduled(site, lambda: update_and_log(1_100))
    assert state["phase"] == "early"
    assert [message for _, message in state["eventlog"]] == list(range(100, 1_100))


async def test_what_the_worker_keeps_and_others_states_cannot_be_updated(site: Site) -> None:
    state = await scheduled(site, reserved_update)
    assert "ArgumentsError: eventlog, status" in state["error"]
    with pytest.raises(TaskAccessUnauthorized, match="by that task only"):
        await get_state_manager().update(state["task_id"], {"progress": 1})


async def test_there_are_no_locks(site: Site) -> None:
    known, manager = TaskState("task:db-a-any"), get_state_manager()
    for call in (
        *(known.acquire, known.refresh_lock, known.release),
        lambda: manager.acquire("any", 5),
        lambda: manager.refresh_lock("any", 5),
        lambda: manager.release("any"),
    ):
        with pytest.raises(TaskAccessUnauthorized, match="settled among the workers") as caught:
            await call()
        assert isinstance(caught.value, AmqpTasksError)
    assert not await manager.clean_canceled("any")
