"""An application whose tasks are scheduled over HTTP, and write down what they did."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from guillotina import configure
from guillotina.content import create_content_in_container
from guillotina.interfaces import IContainer, IItem
from guillotina.request import Request
from guillotina.utils import get_current_container, get_current_request

from guillotina_bridge import object_task, task
from guillotina_bridge.interfaces import IStateManagerUtility, MessageType

app_settings: dict[str, Any] = {"applications": ["guillotina_bridge", "tests.bridge.site"]}


SHELF: dict[str, dict[str, Any]] = {}


@configure.utility(provides=IStateManagerUtility, name="shelf")
class Shelf:
    """A state manager as an application may have one, with no more than has to be."""

    async def update(self, task_id: str, data: dict[str, Any]) -> None:
        SHELF.setdefault(task_id, {}).update(data)

    async def get(self, task_id: str) -> dict[str, Any]:
        return SHELF.get(task_id, {})

    async def exists(self, task_id: str) -> bool:
        return task_id in SHELF

    async def list(self) -> AsyncIterator[str]:
        for task_id in list(SHELF):
            yield task_id

    async def cancel(self, task_id: str) -> bool:
        return True

    async def is_canceled(self, task_id: str) -> bool:
        return False


def note(oracle: str, *words: str) -> None:
    with Path(oracle).open("a") as file:
        file.write(" ".join(words) + "\n")


@task
async def nap(oracle: str, seconds: list[float]) -> AsyncIterator[tuple[str, Any]]:
    """Create an item and sleep; the n-th time it is started, for the n-th time."""
    note(oracle, "start")
    starts = Path(oracle).read_text().count("start\n")
    await create_content_in_container(get_current_container(), "Item", Path(oracle).name)
    yield MessageType.DEBUG, f"asleep at {type(asyncio.get_running_loop()).__module__}"
    await asyncio.sleep(seconds[starts - 1])
    note(oracle, "end")
    yield MessageType.RESULT, starts


@task
async def read(path: str) -> str:
    """Fail as long as there is no such file."""
    return Path(path).read_text()


@task
async def give(value: Any) -> Any:
    return value


@task
async def headers() -> dict[str, str]:
    """Return the headers that the task sees."""
    return dict(get_current_request().headers)


@object_task
async def set_title(item: Any, title: str) -> str:
    item.title = title
    item.register()
    return title


async def set_old_title(item: Any, title: str) -> str:
    """Not decorated, as a function that guillotina_amqp queued may be."""
    item.title = title
    item.register()
    return f"done: {title}"


async def set_old_titles(item: Any, *titles: str) -> AsyncIterator[tuple[str, str]]:
    for title in titles:
        item.title = title
        item.register()
        yield MessageType.RESULT, title


TASKS = {"give": give, "headers": headers, "nap": nap, "read": read}


@configure.service(
    method="POST", name="@run/{name}", context=IContainer, permission="guillotina.AccessContent"
)
async def run(context: IContainer, request: Request) -> dict[str, str]:
    """Schedule a task, under an id of the caller's if the query has one."""
    options = {"_task_id": request.query["id"]} if "id" in request.query else {}
    state = await TASKS[request.matchdict["name"]](*await request.json(), **options)
    return {"task_id": state.task_id}


@configure.service(
    method="POST", name="@set-title", context=IItem, permission="guillotina.ModifyContent"
)
async def post_title(context: Any, request: Request) -> dict[str, str]:
    state = await set_title(context, **await request.json())
    return {"task_id": state.task_id}
