"""Scheduling a call now, after the request, and around the commit."""

from __future__ import annotations

import functools
from typing import Any

import anyio
import pytest
from guillotina.component import get_utility
from guillotina.content import create_content_in_container
from guillotina.exceptions import ConflictError, TransactionNotFound
from guillotina.interfaces import IApplication
from guillotina.request import Request
from guillotina.response import HTTPConflict
from guillotina.transactions import transaction

from amqp_tasks import ArgumentsError, DefinitionError
from guillotina_bridge.decorators import ObjectTaskDefinition, TaskDefinition, object_task, task
from guillotina_bridge.exceptions import TaskNotFoundException
from guillotina_bridge.interfaces import ITaskDefinition
from guillotina_bridge.service import get_service
from guillotina_bridge.state import TaskState

from .conftest import Database, Site, StartGuillotina
from .scheduling import (
    count,
    error_of,
    give,
    note,
    nothing_has_run,
    parent,
    ran,
    set_title,
    title_of,
    who,
    within_request,
)

__all__ = ["nothing_has_run"]

pytestmark = pytest.mark.anyio

WAYS = ["__call__", "schedule", "after_request", "after_commit", "before_commit"]


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


async def call_by(way: str, definition: TaskDefinition, *args: Any, **kwargs: Any) -> Any:
    result = getattr(definition, way)(*args, **kwargs)
    return await result if way in ("__call__", "schedule") else result


async def all_ended(*, at_least: int = 0) -> list[dict[str, Any]]:
    """Wait until no task is under way any more, and return what is known of all."""
    app = get_service().app
    with anyio.fail_after(20):
        while True:
            states = await app.list_tasks()
            if len(states) >= at_least and all(state.status.ended for state in states):
                return [await TaskState(state.task_id).get_state() for state in states]
            await anyio.sleep(0.01)


# ------------------------------------------------------------------------ decorating


def test_decorators_are_used_bare_and_with_arguments() -> None:
    async def func() -> None:
        """What it does."""

    for made, kind in [
        (task(func), TaskDefinition),
        (task(retries=3)(func), TaskDefinition),
        (task(func, 3), TaskDefinition),
        (object_task(func), ObjectTaskDefinition),
        (object_task(retries=3)(func), ObjectTaskDefinition),
    ]:
        assert type(made) is kind
        assert ITaskDefinition.providedBy(made)
        assert (made.func, made.retries) == (func, 3)
        assert (getattr(made, "__name__"), made.__doc__) == ("func", "What it does.")  # noqa: B009
    assert task(retries=7)(func).retries == 7


async def test_the_function_can_be_called_here_and_now() -> None:
    assert await give.func(3) == 3


# ------------------------------------------------------------------------ all ways


@pytest.mark.parametrize("way", WAYS)
async def test_a_task_is_scheduled_and_knows_who_asked(site: Site, way: str) -> None:
    site.add_user("bob", roles=["guillotina.Reader"])

    async def view(context: Any, request: Request) -> None:
        await call_by(way, who)

    headers = {"X-Trace": "t1"}
    response = await within_request(site, view, user="bob", headers=headers)
    assert response.status_code == 200
    [state] = await all_ended(at_least=1)
    seen = state["result"]
    assert (seen["user"], seen["container"], seen["header"]) == ("bob", "a", "t1")


@pytest.mark.parametrize("way", WAYS)
async def test_an_id_of_the_callers_is_taken(dummy: Site, way: str) -> None:
    async def view(context: Any, request: Request) -> None:
        for value in (1, 2):
            await call_by(way, note, value, _task_id="mine", _retries=1)

    assert (await within_request(dummy, view)).status_code == 200
    [state] = await all_ended(at_least=1)
    assert state["task_id"] == "mine"
    assert ran in ([1], [2])


@pytest.mark.parametrize("way", WAYS)
async def test_mistakes_raise_at_the_call(dummy: Site, way: str) -> None:
    async def inner() -> None: ...

    for definition, args, kind in [
        (task(inner), (), DefinitionError),
        (task(functools.partial(give, 1)), (), DefinitionError),
        (give, (object(),), ArgumentsError),
        (give, (), ArgumentsError),
        (set_title, (None, "new"), ArgumentsError),
    ]:
        error = await error_of(dummy, lambda _: call_by(way, definition, *args))  # noqa: B023
        assert isinstance(error, kind)
    assert await get_service().app.list_tasks() == []


@pytest.mark.parametrize("way", ["after_request", "after_commit", "before_commit"])
async def test_what_is_said_at_the_call_is_what_the_task_gets(dummy: Site, way: str) -> None:
    async def view(context: Any, request: Request) -> None:
        value = {"list": [1]}
        request.annotations = {"key": "before"}
        await call_by(way, note, value)
        value["list"].append(2)
        request.annotations["key"] = "after"

    assert (await within_request(dummy, view)).status_code == 200
    [state] = await all_ended(at_least=1)
    assert ran == [{"list": [1]}]
    assert state["job_data"]["req_data"]["annotations"] == {"key": "before"}


@pytest.mark.parametrize("way", WAYS)
async def test_another_request_can_be_given(dummy: Site, way: str) -> None:
    async def view(context: Any, request: Request) -> None:
        other = Request.factory({**request.scope, "path": "/db/a/other"}, None, None)
        await call_by(way, who, _request=other)

    assert (await within_request(dummy, view)).status_code == 200
    [state] = await all_ended(at_least=1)
    assert state["job_data"]["req_data"]["url"].endswith("/db/a/other")


@pytest.mark.parametrize("way", ["after_request", "after_commit", "before_commit"])
async def test_a_view_that_raises_schedules_nothing(site: Site, way: str) -> None:
    async def view(context: Any, request: Request) -> None:
        await call_by(way, note, 1)
        raise HTTPConflict

    async def another(context: Any, request: Request) -> None:
        await call_by(way, note, 2)
        raise ZeroDivisionError

    async def good(context: Any, request: Request) -> None:
        await note(3)

    assert (await within_request(site, view)).status_code == 409
    assert (await within_request(site, another)).status_code == 500
    assert (await within_request(site, good)).status_code == 200
    await all_ended(at_least=1)
    assert ran == [3]


# ------------------------------------------------------------------------ the commit


async def test_after_commit_a_task_sees_what_was_stored(site: Site) -> None:
    async def view(context: Any, request: Request) -> None:
        state = title_of.after_commit("new")
        with pytest.raises(TaskNotFoundException):
            await state.get_status()
        await create_content_in_container(context, "Item", "new", title="stored")

    assert (await within_request(site, view)).status_code == 200
    [state] = await all_ended(at_least=1)
    assert state["result"] == "stored"


async def test_after_a_conflict_a_task_is_scheduled_once(site: Site) -> None:
    tries = []

    async def view(context: Any, request: Request) -> None:
        note.after_commit("committed")
        note.after_request("answered")
        context.title = "new"
        context.register()
        tries.append(1)
        if len(tries) < 3:
            raise ConflictError

    assert (await within_request(site, view)).status_code == 200
    await all_ended(at_least=2)
    assert len(tries) == 3
    assert sorted(ran) == ["answered", "committed"]


@pytest.mark.parametrize("way", ["after_commit", "before_commit"])
async def test_on_a_request_that_never_commits_it_raises(site: Site, way: str) -> None:
    error = await error_of(site, lambda _: call_by(way, note, 1), method="GET")
    assert isinstance(error, TransactionNotFound)
    for words in (way, "GET", "await task(...)", "after_request"):
        assert words in str(error)
    with pytest.raises(TransactionNotFound, match="no transaction"):
        await call_by(way, note, 1)


async def test_a_get_request_schedules_now_and_when_it_is_answered(dummy: Site) -> None:
    async def view(context: Any, request: Request) -> None:
        await note("now")
        note.after_request("answered")

    assert (await within_request(dummy, view, method="GET")).status_code == 200
    await all_ended(at_least=2)
    assert sorted(ran) == ["answered", "now"]


async def test_a_transaction_of_its_own_is_committed_within_a_get_request(site: Site) -> None:
    async def view(context: Any, request: Request) -> None:
        db = await get_utility(IApplication, name="root").async_get("db")
        async with transaction(db=db):
            note.after_commit("committed")

    assert (await within_request(site, view, method="GET")).status_code == 200
    await all_ended(at_least=1)
    assert ran == ["committed"]


async def test_a_transaction_that_only_reads_is_committed_within_a_writing_request(
    site: Site,
) -> None:
    async def view(context: Any, request: Request) -> None:
        db = await get_utility(IApplication, name="root").async_get("db")
        async with transaction(db=db, read_only=True):
            note.after_commit("committed")

    assert (await within_request(site, view)).status_code == 200
    await all_ended(at_least=1)
    assert ran == ["committed"]


async def test_a_task_schedules_when_it_is_committed(
    start_guillotina: StartGuillotina, database: Database
) -> None:
    """Also if a GET request has scheduled the task itself."""
    site = await start_guillotina(
        database,
        amqp={"embedded_worker": True, "max_task_retries": 0},
        applications=["tests.bridge.scheduling"],
    )
    await site.make_container("a")

    async def view(context: Any, request: Request) -> None:
        await parent(True)
        await parent(False)

    assert (await within_request(site, view, method="GET")).status_code == 200
    await all_ended(at_least=4)
    assert sorted(ran) == ["answered", "committed"]


async def test_a_waiting_client_is_answered_when_the_task_is_queued(dummy: Site) -> None:
    async def view(context: Any, request: Request) -> None:
        note.after_request(1)

    response = await within_request(dummy, view, headers={"X-Wait": "20"})
    assert response.headers["XG-Wait"] == "done"
    assert len(await get_service().app.list_tasks()) == 1


async def test_a_future_of_the_same_name_replaces_the_first(dummy: Site) -> None:
    async def view(context: Any, request: Request) -> None:
        assert note.after_request(1, _name="once") == "once"
        note.after_request(2, _name="once")

    assert (await within_request(dummy, view)).status_code == 200
    await all_ended(at_least=1)
    assert ran == [2]


async def test_a_generator_is_collected(dummy: Site) -> None:
    async def view(context: Any, request: Request) -> None:
        await count(3)

    assert (await within_request(dummy, view)).status_code == 200
    [state] = await all_ended(at_least=1)
    assert state["result"] == [0, 1, 2]
    assert [message for _, message in state["eventlog"]] == ["at 0", "at 1", "at 2"]
