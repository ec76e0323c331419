"""Scheduling a call now: what is checked, what travels, what runs."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import anyio
import pytest
from guillotina.exceptions import RequestNotFound
from guillotina.request import Request
from guillotina.utils import get_current_request

from amqp_tasks import ArgumentsError, DefinitionError, Task, UnknownTask
from guillotina_bridge import add_object_task, add_task
from guillotina_bridge.exceptions import AMQPConfigurationNotFoundError
from guillotina_bridge.service import get_service
from guillotina_bridge.state import TaskState
from guillotina_bridge.utils import (
    cancel_task,
    find,
    generate_task_id,
    get_task_id_prefix,
)

from . import scheduling
from .conftest import Database, Site, StartGuillotina
from .scheduling import (
    count_letters,
    ended,
    error_of,
    nothing_has_run,
    plain,
    ran,
    scheduled,
    set_title,
    synchronous,
    title_in_thread,
    within_request,
)

__all__ = ["nothing_has_run"]

pytestmark = pytest.mark.anyio

ITEM = {"@type": "Item", "id": "item", "title": "old"}


@pytest.fixture
async def site(start_guillotina: StartGuillotina, database: Database) -> Site:
    site = await start_guillotina(database, applications=["tests.bridge.scheduling"])
    await site.make_container("a")
    return site


@pytest.fixture
async def dummy(start_guillotina: StartGuillotina) -> Site:
    """For what has nothing to do with databases."""
    site = await start_guillotina(applications=["tests.bridge.scheduling"])
    await site.make_container("a")
    return site


# ------------------------------------------------------------------------ what runs


async def test_a_function_runs_with_arguments_and_keywords(site: Site) -> None:
    state = await scheduled(site, lambda: add_task(plain, 1, two=2))
    assert (state["status"], state["result"]) == ("finished", 3)


async def test_the_task_knows_who_has_scheduled_it_and_no_secrets(site: Site) -> None:
    site.add_user("bob", roles=["guillotina.Reader"])
    headers = {"X-Trace": "t1", "Cookie": "c00kie", "Proxy-Authorization": "pr0xy"}
    state = await scheduled(site, lambda: add_task(scheduling.who), user="bob", headers=headers)
    seen = state["result"]
    assert (seen["user"], seen["container"], seen["header"]) == ("bob", "a", "t1")
    assert set(seen["message"]) == {
        *("func", "args", "kwargs", "task_id"),
        *("db_id", "container_id", "req_data"),
    }
    assert seen["message"]["func"] == "tests.bridge.scheduling.who"
    assert state["job_data"] == seen["message"]
    text = repr(state).lower()
    assert not [
        word for word in ("authorization", "cookie", "basic ", "c00kie", "pr0xy") if word in text
    ]


async def test_an_id_is_the_containers_and_a_uuid(dummy: Site) -> None:
    async def view(context: Any, request: Request) -> None:
        assert get_task_id_prefix() == "task:db-a-"
        assert UUID(generate_task_id().removeprefix("task:db-a-")).version == 4

    assert (await within_request(dummy, view)).status_code == 200
    assert UUID(generate_task_id()).version == 4


async def test_an_id_of_the_callers_is_queued_once(dummy: Site) -> None:
    for _ in range(2):
        state = await scheduled(dummy, lambda: add_task(scheduling.note, 1, _task_id="mine"))
        assert state["task_id"] == "mine"
    assert ran == [1]


async def test_a_task_is_canceled_by_its_id(dummy: Site) -> None:
    async def view(context: Any, request: Request) -> str:
        return (await add_task(scheduling.wait)).task_id

    task_id = (await within_request(dummy, view)).json()
    while not ran:
        await anyio.sleep(0.01)
    assert await cancel_task(task_id)
    assert (await ended(TaskState(task_id)))["status"] == "canceled"
    assert ran == ["started"]


async def test_the_deadline_of_who_asks_is_not_the_tasks(dummy: Site) -> None:
    async def call() -> Any:
        with anyio.move_on_after(5):
            return await add_task(plain, 1)

    state = await scheduled(dummy, call)
    record = await get_service().app.handle(state["task_id"]).state()
    assert record.deadline is None


async def test_a_task_schedules_another(dummy: Site) -> None:
    state = await scheduled(dummy, lambda: add_task(scheduling.schedule_note, "from a task"))
    child = await ended(TaskState(state["result"]))
    assert child["job_data"]["req_data"]["user"]["id"] == "root"
    assert ran == ["from a task"]


async def test_what_decorators_make_of_a_function_is_seen_through(dummy: Site) -> None:
    for func, result in [
        (synchronous, -1),
        (scheduling.decorated, 2),
        (scheduling.wrapped, 3),
        (scheduling.give, 1),
    ]:
        state = await scheduled(dummy, functools.partial(add_task, func, 1))
        assert state["result"] == result


# ------------------------------------------------------------------------ objects


async def test_an_object_is_found_by_its_path_and_stored(site: Site) -> None:
    await site.request("POST", "/db/a", json=ITEM)

    async def view(item: Any, request: Request) -> str:
        at = datetime.now(UTC)
        return (await set_title(await item.async_get("item"), "new", at=at)).task_id

    task_id = (await within_request(site, view)).json()
    state = await ended(TaskState(task_id))
    assert (state["status"], state["result"]) == ("finished", "old")
    assert state["job_data"]["args"][:3] == ["tests.bridge.scheduling.set_title", "/item", "new"]
    # The argument was read as what the function's annotation says.
    assert (await site.request("GET", "/db/a/item")).json()["title"] == "new, datetime"


@pytest.mark.parametrize(
    ("func", "kwargs", "result"),
    [(count_letters, {"path": "!"}, ["o", "l", "d"]), (title_in_thread, {}, "old")],
)
async def test_generators_and_synchronous_functions_get_objects(
    dummy: Site, func: Any, kwargs: dict[str, Any], result: Any
) -> None:
    await dummy.request("POST", "/db/a", json=ITEM)

    async def view(context: Any, request: Request) -> str:
        ob = await context.async_get("item")
        return (await add_object_task(func, ob, **kwargs)).task_id

    task_id = (await within_request(dummy, view)).json()
    state = await ended(TaskState(task_id))
    assert state["result"] == result
    logged = [message for _, message in state["eventlog"]]
    assert logged == (["!o", "!l", "!d"] if kwargs else [])


async def test_an_object_that_is_gone_ends_its_task_with_none(dummy: Site) -> None:
    await dummy.request("POST", "/db/a", json=ITEM)

    async def view(context: Any, request: Request) -> str:
        item = await context.async_get("item")
        await context.async_del("item")
        return set_title.after_commit(item, "new").task_id

    task_id = (await within_request(dummy, view)).json()
    state = await ended(TaskState(task_id))
    assert (state["status"], state["result"], state["job_retries"]) == ("finished", None, 0)


async def test_objects_that_could_be_mistaken_for_others_are_refused(dummy: Site) -> None:
    await dummy.make_container("b")
    await dummy.request("POST", "/db/b", json=ITEM)

    async def other(context: Any) -> Any:
        return await (await context.__parent__.async_get("b")).async_get("item")

    async def orphan(context: Any) -> Any:
        found = await other(context)
        found.__parent__ = None
        return found

    async def schedule(find_it: Any, context: Any) -> None:
        await set_title(await find_it(context), "new")

    for find_it in (other, orphan):
        error = await error_of(dummy, functools.partial(schedule, find_it))
        assert isinstance(error, ArgumentsError)
        assert "container 'a'" in str(error)


# ------------------------------------------------------------------------ what is refused


def closing_over(value: Any) -> Any:
    async def inner() -> Any:
        return value

    return inner


async def test_what_no_worker_can_run_raises_at_the_call(dummy: Site) -> None:
    for func, words in [
        (lambda: None, "lambda"),
        (functools.partial(plain, 1), "partial"),
        (scheduling.Methods().method, "method"),
        (scheduling.Methods.method, "method"),
        (scheduling.hidden_function, "__real_func__"),
        (os.system, "builtin_function"),
        (os.path.join, "not in a served package"),
        (add_task, "not in a served package"),
        ("tests.bridge.scheduling.plain", "str"),
        (closing_over(1), "closure"),
    ]:
        error = await error_of(dummy, functools.partial(_add, func))
        assert isinstance(error, DefinitionError), func
        assert words in str(error)


async def _add(func: Any, _: Any) -> None:
    await add_task(func)


async def test_wrong_arguments_raise_at_the_call(dummy: Site) -> None:
    calls: list[tuple[Callable[[Any], Any], str]] = [
        (lambda _: add_task(plain), "missing a required argument: 'one'"),
        (lambda _: add_task(plain, "one"), "valid integer"),
        (lambda _: add_task(scheduling.give, object()), "cannot be written as JSON"),
        (lambda _: add_task(plain, 1, _task_id=""), "''"),
        (lambda _: add_task(plain, 1, _retries=-1), "_retries=-1"),
        (lambda context: set_title(context), "missing a required argument: 'title'"),
        (lambda context: set_title(context, ["new"]), "valid string"),
        (lambda _: set_title(), "the object is missing"),
        (lambda _: set_title(None, "new"), "not within the current container"),
    ]
    for call, words in calls:
        error = await error_of(dummy, call)
        assert isinstance(error, ArgumentsError), words
        assert words in str(error)


async def test_an_object_task_without_an_object_raises_at_the_call(dummy: Site) -> None:
    error = await error_of(dummy, scheduling.no_object)
    assert isinstance(error, DefinitionError)


async def test_annotations_that_cannot_travel_raise_at_the_call(dummy: Site) -> None:
    async def call(context: Any) -> None:
        request = get_current_request()
        request.annotations = {"lock": object()}
        await add_task(plain, 1)

    error = await error_of(dummy, call)
    assert isinstance(error, ArgumentsError)
    assert "annotations" in str(error)


async def test_without_a_request_there_is_none_to_tell_of(dummy: Site) -> None:
    with pytest.raises(RequestNotFound):
        await add_task(plain, 1)


async def test_without_a_running_bridge_it_raises(dummy: Site) -> None:
    await dummy.stop()
    with pytest.raises(AMQPConfigurationNotFoundError):
        await add_task(plain, 1)


# ------------------------------------------------------------------------ by name


async def test_names_that_are_not_served_are_unknown(dummy: Site) -> None:
    for name in [
        *("os.system", "subprocess.run", "builtins.eval", "eval", "", "."),
        *("guillotina.utils.resolve_dotted_name", "guillotina_amqp.utils.add_task"),
        *("guillotina_bridge.utils.cancel_task", "guillotina_bridge.find"),
        *("tests.bridge.conftest.in_empty_context", "tests.bridge.scheduling2.f"),
        "tests.bridge.scheduling.elsewhere",  # json.loads
        *("tests.bridge.scheduling.ran", "tests.bridge.scheduling.nobody"),
        *("tests.bridge.scheduling.no.module", "tests.bridge.scheduling.Methods.method"),
    ]:
        with pytest.raises(UnknownTask):
            find(name)


async def test_nothing_is_imported_for_a_name_that_is_not_served(dummy: Site) -> None:
    with pytest.raises(UnknownTask):
        find("this.s")
    assert "this" not in sys.modules


@pytest.mark.parametrize("module", ["guillotina_bridge.utils", "guillotina_amqp.utils"])
async def test_a_message_cannot_name_what_is_not_served_within_an_object_task(
    start_guillotina: StartGuillotina, module: str
) -> None:
    site = await start_guillotina(applications=["tests.bridge.scheduling"])
    await site.make_container("a")
    for name in (
        "os.system",
        "guillotina_bridge.utils.cancel_task",
        "tests.bridge.scheduling.gone",
    ):
        task_id = await queue_by_hand(f"{module}._run_object_task", [name, "/", "x"])
        state = await ended(TaskState(task_id))
        assert (state["status"], state["job_retries"]) == ("errored", 0)
        assert name in state["error"]


@pytest.mark.parametrize(
    ("name", "function", "result"),
    [("_run_object_task", "set_title", "a"), ("_yield_object_task", "count_letters", ["a"])],
)
async def test_messages_of_guillotina_amqp_run(
    dummy: Site, name: str, function: str, result: Any
) -> None:
    await dummy.request("PATCH", "/db/a", json={"title": "a"})
    args = [f"tests.bridge.scheduling.{function}", "/", *(["b"] if function == "set_title" else [])]
    task_id = await queue_by_hand(f"guillotina_amqp.utils.{name}", args)
    state = await ended(TaskState(task_id))
    assert (state["status"], state["result"]) == ("finished", result)


async def queue_by_hand(name: str, args: list[Any]) -> str:
    """Queue a message that names a function, whatever that is."""

    async def any_function(*args: Any) -> None: ...

    app = get_service().app
    extra = {
        "db_id": "db",
        "container_id": "a",
        "req_data": {
            "url": "http://localhost/db/a",
            "method": "POST",
            "headers": {},
            "user": {"id": "root", "roles": [], "groups": []},
        },
    }
    task: Task[..., None] = Task(any_function, app, name=name)
    return (await task.options(extra=extra)(*args)).task_id
