"""A state manager of an application's own: told of every state, asked what to cancel."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from guillotina.request import Request

from amqp_tasks import SettingsError, Task
from guillotina_bridge.exceptions import TaskNotFoundException
from guillotina_bridge.service import get_service
from guillotina_bridge.state import TaskState, get_state_manager

from .conftest import Site, StartGuillotina
from .own_manager import OwnManager
from .scheduling import (
    count_slowly,
    ended,
    fail,
    give,
    nothing_has_run,
    ran,
    scheduled,
    wait,
    within_request,
)

__all__ = ["nothing_has_run"]

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["memory", "servers"])
async def site(request: pytest.FixtureRequest, start_guillotina: StartGuillotina) -> Site:
    """A site that runs its tasks itself; what holds is in memory, or in real servers."""
    settings: dict[str, Any] = {"amqp": {}}
    if request.param == "servers":
        settings = dict(request.getfixturevalue("server_settings"))
    settings["amqp"] |= {
        "persistent_manager": "own",
        "embedded_worker": True,
        "max_task_retries": 0,
        "cancel_poll_interval": 0.2,
        "state_timeout": 1,
    }
    site = await start_guillotina(applications=["tests.bridge.own_manager"], **settings)
    await site.make_container("a")
    return site


@pytest.fixture
def manager(site: Site) -> OwnManager:
    found = get_state_manager()
    assert isinstance(found, OwnManager)
    return found


async def until(is_so: Callable[[], Any]) -> None:
    with anyio.fail_after(20):
        while not is_so():
            await anyio.sleep(0.01)


async def schedule(site: Site, task: Any, *args: Any, **options: Any) -> TaskState:
    async def view(context: Any, request: Request) -> Any:
        return (await task(*args, **options)).task_id

    return TaskState((await within_request(site, view)).json())


async def test_it_is_told_how_a_task_does(site: Site, manager: OwnManager) -> None:
    known = await schedule(site, count_slowly, 2)
    state = await ended(known)
    assert manager.history(known.task_id) == ["scheduled", "running", "finished"]
    assert state == manager.states[known.task_id]
    assert (state["result"], state["job_retries"]) == ([0, 1], 0)
    assert [message for _, message in state["eventlog"]] == ["at 0", "at 1"]
    assert state["job_data"]["func"] == "tests.bridge.scheduling.count_slowly"
    assert manager.loops == {asyncio.get_running_loop()}
    assert manager.times_to_live == {86_400}
    assert await known.get_result() == [0, 1]
    assert [task_id async for task_id in get_state_manager().list()] == [known.task_id]
    answer = await site.request("GET", f"/db/a/@amqp-tasks/{known.task_id}")
    assert answer.json()["result"] == [0, 1]
    assert (await site.request("GET", "/db/a/@amqp-tasks")).json() == [known.task_id]


async def test_it_is_told_before_the_task_can_be_queued(site: Site, manager: OwnManager) -> None:
    """What it is told of a running task is never overtaken by what was known before."""
    for number in range(10):
        await ended(await schedule(site, give, number))
    for task_id in manager.states:
        assert manager.history(task_id) == ["scheduled", "running", "finished"]


async def test_it_is_told_of_failures(site: Site, manager: OwnManager) -> None:
    state = await scheduled(site, lambda: fail("what was wrong"))
    assert "ValueError: what was wrong" in state["error"]
    assert manager.history(state["task_id"]) == ["scheduled", "running", "errored"]
    known = TaskState(state["task_id"])
    assert await known.retry()
    assert (await ended(known))["status"] == "errored"
    assert manager.history(known.task_id)[3] in ("scheduled", "running")


async def test_it_is_told_of_retries(start_guillotina: StartGuillotina) -> None:
    amqp = {
        "persistent_manager": "own",
        "embedded_worker": True,
        "max_task_retries": 1,
        "delayed_ttl_ms": 300,
    }
    site = await start_guillotina(applications=["tests.bridge.own_manager"], amqp=amqp)
    await site.make_container("a")
    state = await scheduled(site, lambda: fail("again"))
    assert state["job_retries"] == 1
    assert get_state_manager().history(state["task_id"]) == [
        *("scheduled", "running", "retrying", "running", "errored")
    ]


async def test_the_log_of_a_running_task_can_be_read(site: Site, manager: OwnManager) -> None:
    known = await schedule(site, count_slowly, 1, 60)

    def logged() -> list[str]:
        log = manager.states[known.task_id]["eventlog"]
        return [message for _, message in log]

    await until(lambda: logged() == ["at 0"])
    assert await known.cancel()
    await ended(known)


async def test_its_request_to_cancel_stops_a_running_task(site: Site, manager: OwnManager) -> None:
    known = await schedule(site, wait)
    await until(lambda: ran)
    await manager.cancel(known.task_id)
    state = await ended(known)
    assert (state["status"], state["reason"]) == ("canceled", "user")
    assert manager.history(known.task_id) == ["scheduled", "running", "canceled"]
    assert ran == ["started"]
    assert await known.is_canceled()
    await until(lambda: manager.canceled == set())


async def test_its_request_to_cancel_stops_a_task_that_waits(
    site: Site, manager: OwnManager
) -> None:
    manager.canceled.add("mine")
    known = await schedule(site, wait, _task_id="mine")
    assert (await ended(known))["status"] == "canceled"
    assert ran == []


async def test_a_request_to_cancel_is_told_to_it(site: Site, manager: OwnManager) -> None:
    known = await schedule(site, wait)
    await until(lambda: ran)
    assert await known.cancel()
    assert manager.was_canceled == [known.task_id]
    assert (await ended(known))["status"] == "canceled"
    assert await known.cancel()
    finished = await schedule(site, give, 1)
    await ended(finished)
    assert await finished.cancel() is False
    assert finished.task_id not in manager.was_canceled
    await until(lambda: manager.canceled == set())


async def test_a_repeated_call_does_not_take_an_end_back(site: Site, manager: OwnManager) -> None:
    for _ in range(2):
        known = await schedule(site, give, 1, _task_id="mine")
        await ended(known)
    assert manager.history("mine") == ["scheduled", "running", "finished"]


async def test_it_is_told_what_no_attempt_could_tell(site: Site, manager: OwnManager) -> None:
    """A task that never starts is looked at when somebody asks."""

    async def any_function() -> None: ...

    await Task(any_function, get_service().app, name="os.getcwd").options(task_id="mine")()
    await manager.update("mine", {"status": "scheduled", "note": "its own"})
    state = await ended(TaskState("mine"))
    assert (state["status"], state["reason"], state["note"]) == (
        *("errored", "unknown_task", "its own"),
    )
    assert manager.history("mine")[-1] == "errored"


async def test_what_it_alone_knows_is_known(site: Site, manager: OwnManager) -> None:
    await manager.update("old", {"status": "finished", "result": 3})
    assert await TaskState("old").join() == {"status": "finished", "result": 3}
    await manager.update("older", {"status": "scheduled"})
    assert await TaskState("older").cancel()
    assert manager.canceled == {"older"}
    with pytest.raises(TaskNotFoundException):
        await TaskState("oldest").cancel()
    with pytest.raises(TaskNotFoundException):
        await TaskState("oldest").join()


@pytest.mark.parametrize("how", ["raises", "cancels"])
async def test_its_failures_fail_no_task(
    site: Site, manager: OwnManager, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    await fails_no_task(site, manager, how)
    failed = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert sorted(set(failed)) == sorted(failed)  # each method once
    assert "the state manager 'own' fails at update" in failed


async def test_it_fails_no_task_when_it_hangs(start_guillotina: StartGuillotina) -> None:
    amqp = {"persistent_manager": "own", "embedded_worker": True, "state_timeout": 0.1}
    site = await start_guillotina(applications=["tests.bridge.own_manager"], amqp=amqp)
    await site.make_container("a")
    await fails_no_task(site, get_state_manager(), "hangs")


async def fails_no_task(site: Site, manager: OwnManager, how: str) -> None:
    manager.failing = how
    known = await schedule(site, give, 1)
    state = await ended(known)
    assert (state["status"], state["result"]) == ("finished", 1)
    other = await schedule(site, wait)
    await until(lambda: ran)
    assert await other.cancel()
    assert (await ended(other))["status"] == "canceled"
    manager.failing = None
    assert await known.get_result() == 1
    assert manager.states[known.task_id]["status"] == "finished"


async def test_it_is_told_of_tasks_that_are_given_back(
    start_guillotina: StartGuillotina, server_settings: dict[str, Any]
) -> None:
    server_settings["amqp"] |= {
        "persistent_manager": "own",
        "embedded_worker": True,
        "shutdown_grace": 0,
    }
    site = await start_guillotina(applications=["tests.bridge.own_manager"], **server_settings)
    await site.make_container("a")
    manager = get_state_manager()
    known = await schedule(site, wait)
    await until(lambda: ran)
    await site.stop()
    assert manager.history(known.task_id) == ["scheduled", "running", "scheduled"]


async def test_a_manager_that_is_not_there_is_named(start_guillotina: StartGuillotina) -> None:
    amqp = {"persistent_manager": "nobody", "embedded_worker": True}

    async def use_it() -> None:
        await start_guillotina(applications=["tests.bridge.scheduling"], amqp=amqp)
        get_state_manager()

    with pytest.raises(SettingsError, match="'nobody'"):
        await use_it()
