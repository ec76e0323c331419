"""How a task runs: in a context of its own, as its user, and what comes of its errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest
from guillotina import task_vars
from guillotina.content import create_content_in_container
from guillotina.exceptions import ConflictError, TIDConflictError
from guillotina.interfaces import ILayers
from guillotina.transactions import get_transaction, transaction
from guillotina.utils import (
    execute,
    get_authenticated_user,
    get_authenticated_user_id,
    get_current_container,
    get_current_request,
    get_database,
    navigate_to,
)
from prometheus_client import REGISTRY

from amqp_tasks import MessageType, RemoteTaskError, TaskStatus, current_attempt
from guillotina_bridge import utils
from guillotina_bridge.context import enter_container, enter_request
from guillotina_bridge.exceptions import ObjectNotFoundException
from guillotina_bridge.job import run_attempt
from guillotina_bridge.task_vars import amqp_job

from .attempts import StartSite, message, start_site, working
from .conftest import Database, Site

__all__ = ["start_site"]

pytestmark = pytest.mark.anyio

trace: ContextVar[int | None] = ContextVar("trace", default=None)
"""A variable of another application's, which no task may find set."""

notes: list[Any] = []
"""What the tasks of a test have noted down."""


@pytest.fixture(autouse=True)
def _nothing_noted() -> Iterator[None]:
    yield
    notes.clear()
    Meeting.barrier = None


async def note(what: Any) -> None:
    notes.append(what)


async def create_item(item_id: str) -> str:
    await create_content_in_container(get_current_container(), "Item", item_id)
    return item_id


async def stored(site: Site, container: str = "a") -> set[str]:
    """The ids of what is in a container."""
    response = await site.request("GET", f"/db/{container}/@ids")
    return set(response.json())


# ------------------------------------------------------------------ a clean context


class Meeting:
    """Where tasks wait until so many of them are there."""

    barrier: asyncio.Barrier | None = None


def assert_clean() -> None:
    assert trace.get() is None
    assert task_vars.futures.get() == {}
    assert set(task_vars.security_policies.get()) <= {get_authenticated_user_id()}
    assert get_current_request().annotations == {}
    assert get_authenticated_user().data == {}
    txn = get_transaction()
    assert not {**txn.added, **txn.modified, **txn.deleted}
    assert all(txn is not other for other in notes)
    notes.append(txn)


def leave_traces(number: int) -> None:
    trace.set(number)
    get_current_request().annotations["number"] = number
    get_authenticated_user().data["number"] = number
    execute.after_request(note, number)


def where_i_am() -> list[Any]:
    job, container = amqp_job.get(), get_current_container()
    assert job is not None
    assert job.task_id == current_attempt().task_id
    assert container.__txn__ is task_vars.registry.get().__txn__ is get_transaction()
    return [
        container.id,
        get_authenticated_user_id(),
        get_transaction().user,
        get_current_request().path,
        get_current_request().annotations["number"],
        get_authenticated_user().data["number"],
        trace.get(),
        job.data["args"][0],
        len(task_vars.futures.get()[""]),
    ]


async def mingle(number: int) -> list[Any]:
    assert_clean()
    leave_traces(number)
    before = where_i_am()
    if Meeting.barrier is not None:
        await Meeting.barrier.wait()
    await create_item(f"item-{number}")
    await asyncio.sleep(0)
    assert where_i_am() == before
    return before


async def test_thirty_tasks_leak_nothing(start_site: StartSite, database: Database) -> None:
    site = await start_site(database, "a", "b")
    Meeting.barrier = asyncio.Barrier(10)
    places = [("ab"[number % 2], ("bob", "eve")[number // 2 % 2]) for number in range(30)]
    async with working(max_running_tasks=30) as tasks:
        handles = []
        for number, (container, user) in enumerate(places):
            extra = message(container, user=user)
            handles.append(await tasks(mingle, number, extra=extra))
        results = [await handle.result(timeout=30) for handle in handles]
    assert results == [
        [container, user, user, f"/db/{container}/@something", *[number] * 4, 1]
        for number, (container, user) in enumerate(places)
    ]
    transactions = [one for one in notes if not isinstance(one, int)]
    assert len({id(txn) for txn in transactions}) == len(transactions) == 30
    assert sorted(one for one in notes if isinstance(one, int)) == list(range(30))
    assert await stored(site, "a") == {f"item-{number}" for number in range(0, 30, 2)}
    assert await stored(site, "b") == {f"item-{number}" for number in range(1, 30, 2)}


async def conflict(times: int, kind: str) -> int:
    assert_clean()
    number = len(notes)
    leave_traces(number)
    await create_item(f"item-{number}")
    if number <= times:
        error = {"ConflictError": ConflictError, "TIDConflictError": TIDConflictError}[kind]()
        if kind == "TIDConflictError":
            raise ExceptionGroup("of a task group", [error])
        raise error
    return number


@pytest.mark.parametrize("kind", ["ConflictError", "TIDConflictError"])
async def test_a_try_after_a_conflict_is_as_clean_as_the_first(
    start_site: StartSite, database: Database, kind: str
) -> None:
    site = await start_site(database, "a")
    async with working() as tasks:
        handle = await tasks(conflict, 2, kind)
        assert await handle.result(timeout=30) == 3
        assert (await handle.state()).attempt == 1
    assert await stored(site) == {"item-3"}
    assert notes[3:] == [3], "futures of tries that failed have run"


async def test_conflicts_without_end(start_site: StartSite, database: Database) -> None:
    site = await start_site(database, "a", conflict_retry_attempts="2")
    async with working() as tasks:
        handle = await tasks(conflict, 9, "ConflictError", retries=1)
        with pytest.raises(RemoteTaskError, match="ConflictError"):
            await handle.result(timeout=30)
        assert (await handle.state()).attempt == 2
    assert len(notes) == 2 * 3
    assert await stored(site) == set()


async def after_a_cancel_between_tries(until: str) -> None:
    notes.append("begun")
    current_attempt().cancel_scope.cancel()
    raise ConflictError


async def test_a_cancelled_task_is_not_tried_again(
    start_site: StartSite, database: Database
) -> None:
    await start_site(database, "a")
    async with working() as tasks:
        await (await tasks(after_a_cancel_between_tries, "")).join(timeout=30)
    assert notes == ["begun"]


async def pollute(call: Callable[[], Awaitable[Any]]) -> Any:
    """As a middleware: leave a finished transaction, and all the rest of a request."""
    db = await get_database("db")
    task_vars.db.set(db)
    request = enter_request(message("b", user="eve")["req_data"])
    async with transaction(db=db) as txn:
        await enter_container("b", request)
    assert get_transaction() is txn
    notes.append(txn)
    execute.after_request(note, "a future of eve's")
    return await call()


async def test_whatever_was_there_before(start_site: StartSite, database: Database) -> None:
    await start_site(database, "a", "b")
    async with working(middleware=[pollute, run_attempt]) as tasks:
        result = await tasks.run(mingle, 1)
    assert result[:4] == ["a", "bob", "bob", "/db/a/@something"]
    polluting, own, *futures = notes
    assert own is not polluting
    assert futures == [1]


# ------------------------------------------------------------------ the job, and kinds of functions


async def what_is_my_job(*args: Any, **kwargs: Any) -> list[Any]:
    job = amqp_job.get()
    assert job is not None
    return [job.data, job.task_id, job.function_name, job.db_id, job.container_id, repr(job)]


async def test_the_job(start_site: StartSite, database: Database) -> None:
    await start_site(database, "a")
    name = f"{__name__}.what_is_my_job"
    async with working() as tasks:
        extra = message("a", more=1)
        handle = await tasks(what_is_my_job, 1, two=2, extra=extra)
        body = {"func": name, "args": [1], "kwargs": {"two": 2}, "task_id": handle.task_id}
        assert await handle.result(timeout=30) == [
            {**extra, **body},
            handle.task_id,
            name,
            "db",
            "a",
            f"<Job {handle.task_id!r} ({name})>",
        ]
    assert amqp_job.get() is None


async def nowhere() -> list[Any]:
    variables = (task_vars.db, task_vars.tm, task_vars.txn, task_vars.container, task_vars.registry)
    execute.after_request(note, "a future")
    return [variable.get() for variable in variables]


@pytest.mark.parametrize("extra", [{}, {"db_id": None, "container_id": None}])
async def test_a_task_of_no_database(
    start_site: StartSite, database: Database, extra: dict[str, Any]
) -> None:
    await start_site(database, "a")
    async with working() as tasks:
        assert await tasks.run(nowhere, extra=extra) == [None] * 5
    assert notes == ["a future"]


async def in_a_database() -> list[Any]:
    return [task_vars.db.get().id, task_vars.container.get(), get_authenticated_user_id()]


async def activate_layer(name: str) -> None:
    layers = task_vars.registry.get().for_interface(ILayers)
    layers["active_layers"] |= {name}


async def test_a_layer_that_is_gone(
    start_site: StartSite, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    site = await start_site(database, "a")
    async with working() as tasks:
        await tasks.run(activate_layer, "no_such_module.ILayer")
        await tasks.run(create_item, "item")
    assert "layer no_such_module.ILayer cannot be imported" in caplog.text
    assert await stored(site) == {"item"}


async def test_a_task_of_no_container(start_site: StartSite, database: Database) -> None:
    await start_site(database)
    async with working() as tasks:
        assert await tasks.run(in_a_database, extra=message(None)) == ["db", None, "bob"]


def in_a_thread() -> list[Any]:
    return [get_current_container().id, get_authenticated_user_id()]


async def generate(count: int) -> AsyncIterator[tuple[str, Any]]:
    for number in range(count):
        yield MessageType.DEBUG, f"{number} of {count}"
        yield MessageType.RESULT, await create_item(f"item-{number}")


async def test_functions_of_each_kind(start_site: StartSite, database: Database) -> None:
    site = await start_site(database, "a")
    async with working() as tasks:
        assert await tasks.run(in_a_thread) == ["a", "bob"]
        assert await tasks.run(generate, 2) == ["item-0", "item-1"]
    assert await stored(site) == {"item-0", "item-1"}


# ------------------------------------------------------------------ errors


async def test_a_reader_may_not_add(start_site: StartSite, database: Database) -> None:
    site = await start_site(database, "a")
    extra = message("a", user="bob")
    extra["req_data"]["user"]["roles"] = ["guillotina.Reader"]
    async with working() as tasks:
        with pytest.raises(RemoteTaskError) as caught:
            await tasks.run(create_item, "item", extra=extra)
    assert caught.value.type == "guillotina.exceptions.NoPermissionToAdd"
    assert await stored(site) == set()


async def fail_after_writing() -> None:
    await create_item("item")
    execute.after_request(note, "a future")
    get_current_request().add_future("made already", note("a coroutine"))
    raise RuntimeError("as it must")


async def test_an_exception_stores_nothing(start_site: StartSite, database: Database) -> None:
    site = await start_site(database, "a")
    async with working() as tasks:
        with pytest.raises(RemoteTaskError, match="as it must"):
            await tasks.run(fail_after_writing)
    assert await stored(site) == set()
    assert notes == []


async def return_no_json_after_writing() -> object:
    await create_item("item")
    return object()


async def test_a_result_that_is_no_json_stores_nothing(
    start_site: StartSite, database: Database
) -> None:
    site = await start_site(database, "a")
    async with working() as tasks:
        with pytest.raises(RemoteTaskError) as caught:
            await tasks.run(return_no_json_after_writing)
        assert caught.value.reason == "bad_result"
    assert await stored(site) == set()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"container_id": "gone"}, "there is no container 'gone' in database 'db'"),
        ({"db_id": "gone"}, "there is no database 'gone'"),
    ],
)
async def test_a_container_that_is_gone(
    start_site: StartSite, database: Database, change: dict[str, str], text: str
) -> None:
    site = await start_site(database, "a", "gone")
    await site.request("DELETE", "/db/gone")
    async with working() as tasks:
        handle = await tasks(create_item, "item", extra={**message("a"), **change}, retries=3)
        with pytest.raises(RemoteTaskError, match=text) as caught:
            await handle.result(timeout=30)
        assert caught.value.type == "guillotina_bridge.exceptions.ContainerNotFound"
        assert (await handle.state()).attempt == 1


async def whose_object_is_gone(in_group: bool) -> None:
    await create_item("item")
    notes.append("begun")
    if in_group:
        raise ExceptionGroup("of a task group", [ObjectNotFoundException()])
    raise ObjectNotFoundException


@pytest.mark.parametrize("in_group", [False, True])
async def test_an_object_that_is_gone(
    start_site: StartSite, database: Database, in_group: bool
) -> None:
    site = await start_site(database, "a")
    async with working() as tasks:
        handle = await tasks(whose_object_is_gone, in_group, retries=3)
        assert await handle.result(timeout=30) is None
        assert await handle.status() == TaskStatus.FINISHED
    assert notes == ["begun"]
    assert await stored(site) == set()


# ------------------------------------------------------------------ metrics


def labels() -> set[tuple[str, str, str]]:
    """Name, final status and container of all attempts that were ever measured."""
    return {
        (each["dotted_name"], each["final_status"], each["container_id"])
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "amqp_job_duration_count"
        for each in [sample.labels]
    }


async def test_what_a_message_makes_up_is_no_label(
    start_site: StartSite, database: Database
) -> None:
    await start_site(database, "a")
    served = "tests.bridge.task_site.what_is_seen"
    async with working() as tasks:
        await (await tasks(utils._run_object_task, "made.up", "/")).join(timeout=30)
        await (await tasks(utils._run_object_task, served, "/")).join(timeout=30)
        await (await tasks(create_item, "item", extra=message("made-up"))).join(timeout=30)
        await (await tasks(create_item, "item")).join(timeout=30)
    assert {
        ("run_object_task/unknown", "errored", "a"),
        (f"run_object_task/{served}", "errored", "a"),  # it takes no object
        (f"{__name__}.create_item", "errored", ""),
        (f"{__name__}.create_item", "finished", "a"),
    } <= labels()
    assert "made" not in str(labels())


# ------------------------------------------------------------------ futures


async def look_for(item_id: str) -> None:
    """As a future: see what the task has stored, in a transaction of its own."""
    assert get_transaction() is None
    async with transaction():
        container = await navigate_to(await task_vars.tm.get().get_root(), "a")
        notes.append(await container.async_contains(item_id))
        await create_content_in_container(container, "Item", f"after-{item_id}")
    execute.after_request(note, "a future of a future")


async def with_futures() -> str:
    request = get_current_request()
    await create_item("item")
    request.add_future("look", look_for, args=["item"])
    request.add_future("made already", note("a coroutine"))
    execute.after_request(fail, _name="fails")
    execute.after_request(cancel_itself, _name="cancels itself")
    execute.after_request(print, "not async", file=None)
    execute.after_request_failed(note, "never")
    request.add_future("never", note("of another scope"), scope="failure")
    execute.after_commit(after_commit, "committed")
    return "done"


async def after_commit(succeeded: bool, what: str) -> None:
    assert succeeded
    await note(what)


async def fail() -> None:
    raise RuntimeError("in a future")


async def cancel_itself() -> None:
    raise asyncio.CancelledError


async def hook_that_adds_a_future() -> None:
    execute.after_request(note, "future")


async def with_a_future_of_a_hook() -> None:
    get_transaction().add_before_commit_hook(hook_that_adds_a_future)


async def test_a_future_of_a_hook(start_site: StartSite, database: Database) -> None:
    await start_site(database, "a")
    async with working() as tasks:
        await tasks.run(with_a_future_of_a_hook)
    assert notes == ["future"]


async def test_futures_run_after_the_commit_and_before_the_end(
    start_site: StartSite, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    site = await start_site(database, "a")
    async with working() as tasks:
        handle = await tasks(with_futures)
        assert await handle.result(timeout=30) == "done"
        assert notes == ["committed", True, "a coroutine", "a future of a future"]
    assert await stored(site) == {"item", "after-item"}
    errors = [one.getMessage() for one in caplog.records if one.levelno >= logging.ERROR]
    assert [text.split(",")[0] for text in errors] == ["future 'fails'", "future 'cancels itself'"]
