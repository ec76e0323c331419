"""An application whose views are functions of the tests: what they do, they do in a request."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import datetime
from json import loads
from typing import Any

import httpx
import pytest
from guillotina import configure, task_vars
from guillotina.interfaces import IContainer
from guillotina.request import Request
from guillotina.utils import get_authenticated_user_id, get_current_request

from amqp_tasks import current_attempt
from guillotina_bridge import object_task, task
from guillotina_bridge.interfaces import MessageType
from guillotina_bridge.state import TaskState, get_state_manager
from guillotina_bridge.task_vars import amqp_job

from .conftest import Site

app_settings: dict[str, Any] = {"applications": ["guillotina_bridge", "tests.bridge.site"]}

View = Callable[[Any, Request], Awaitable[Any]]

_view: View
ran: list[Any] = []
"""What tasks have written down."""


@configure.service(
    method="POST", name="@do", context=IContainer, permission="guillotina.AccessContent"
)
@configure.service(
    method="GET", name="@do", context=IContainer, permission="guillotina.AccessContent"
)
async def do(context: Any, request: Request) -> Any:
    return await _view(context, request)


async def within_request(
    site: Site, view: View, *, method: str = "POST", container: str = "a", **options: Any
) -> httpx.Response:
    """Run a function as the view of a request."""
    global _view
    _view = view
    return await site.request(method, f"/db/{container}/@do", **options)


async def scheduled(site: Site, call: Callable[[], Awaitable[TaskState]], **options: Any) -> Any:
    """Schedule a task in a request, wait until it has ended, and return its state."""
    found: list[TaskState] = []

    async def view(context: Any, request: Request) -> None:
        found.append(await call())

    response = await within_request(site, view, **options)
    assert response.status_code == 200, response.text
    return await ended(found[0])


async def error_of(site: Site, call: Callable[[Any], Any], **options: Any) -> BaseException:
    """Do what has to raise, in a request, with the container; return what it has raised."""
    raised: list[BaseException] = []

    async def view(context: Any, request: Request) -> None:
        try:
            result = call(context)
            if isinstance(result, Awaitable):
                await result
        except Exception as error:
            raised.append(error)

    response = await within_request(site, view, **options)
    assert response.status_code == 200, response.text
    return raised[0]


async def ended(state: TaskState, seconds: float = 20) -> dict[str, Any]:
    async with asyncio.timeout(seconds):
        return await state.join()


@pytest.fixture(autouse=True)
def nothing_has_run() -> Iterator[None]:
    ran.clear()
    yield
    ran.clear()


# ------------------------------------------------------------------------ tasks


async def plain(one: int, two: int = 1) -> int:
    """Not decorated."""
    return one + two


def synchronous(one: int) -> int:
    return -one


@task
async def note(value: Any) -> Any:
    ran.append(value)
    return value


async def schedule_note(value: str) -> str:
    return (await note(value)).task_id


@task
async def parent(succeed: bool) -> None:
    note.after_commit("committed")
    note.after_request("answered")
    if not succeed:
        raise NotNowError


class NotNowError(Exception):
    pass


@task(retries=0)
async def note_once(value: Any) -> Any:
    ran.append(value)
    return value


@task
async def who() -> dict[str, Any]:
    """Return what the task knows of who has scheduled it."""
    job = amqp_job.get()
    assert job is not None
    return {
        "user": get_authenticated_user_id(),
        "container": task_vars.container.get().id,
        "header": get_current_request().headers.get("x-trace"),
        "message": job.data,
    }


@task
async def until(when: datetime) -> str:
    return type(when).__name__


@task
async def count(upto: int) -> AsyncIterator[tuple[str, Any]]:
    for number in range(upto):
        yield MessageType.DEBUG, f"at {number}"
        yield MessageType.RESULT, number


@task
async def count_slowly(upto: int, seconds: float = 0) -> AsyncIterator[tuple[str, Any]]:
    for number in range(upto):
        yield MessageType.DEBUG, f"at {number}"
        await asyncio.sleep(seconds)
        yield MessageType.RESULT, number


@task
async def give(value: Any) -> Any:
    return value


@task
async def fail(text: str) -> None:
    raise ValueError(text)


@task
async def wait(seconds: float = 60) -> None:
    ran.append("started")
    await asyncio.sleep(seconds)
    ran.append("ended")


@task
async def updating() -> str:
    task_id = current_attempt().task_id
    await get_state_manager().update(task_id, {"progress": 1, "phase": "reading"})
    assert (await TaskState(task_id).get_state())["phase"] == "reading"
    await get_state_manager().update(task_id, {"progress": 2, "phase": "writing"}, ttl=5)
    return "done"


@task
async def update_and_log(count: int) -> None:
    await get_state_manager().update(current_attempt().task_id, {"phase": "early"})
    for number in range(count):
        await current_attempt().log(number)


@task
async def reserved_update() -> None:
    data = {"status": "finished", "eventlog": [], "progress": 1}
    await get_state_manager().update(current_attempt().task_id, data)


@task
async def title_of(name: str) -> str | None:
    """Return the title that is stored; None if there is no such item."""
    item = await task_vars.container.get().async_get(name)
    return None if item is None else item.title


@object_task
async def set_title(item: Any, title: str, *, at: datetime | None = None) -> str:
    old: str = item.title
    item.title = f"{title}, {type(at).__name__}"
    item.register()
    return old


@object_task
async def count_letters(item: Any, *, path: str = "") -> AsyncIterator[tuple[str, Any]]:
    for letter in item.title:
        yield MessageType.DEBUG, f"{path}{letter}"
        yield MessageType.RESULT, letter


@object_task
def title_in_thread(item: Any) -> str:
    return str(item.title)


@object_task
async def no_object() -> None: ...


def says_so(func: Any) -> Any:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the function itself is to be called")

    wrapper.__real_func__ = func  # type: ignore[attr-defined]  # how decorators say so
    return wrapper


def hides(func: Any) -> Any:
    @functools.wraps(func)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await func(*args, **kwargs)

    return wrapper


@says_so
async def decorated(value: int) -> int:
    return value + 1


@hides
async def wrapped(value: int) -> int:
    return value + 2


async def hidden() -> None: ...


hidden_function = hidden
hidden = hides(hidden)  # by its name, one finds something else

elsewhere = loads
"""A function that is imported here, and not served."""


class Methods:
    async def method(self) -> None: ...
