"""The tasks: functions of a module, which run as whoever has asked for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from guillotina.content import create_content_in_container
from guillotina.utils import get_current_container

from guillotina_bridge import object_task, task
from guillotina_bridge.interfaces import MessageType


@task
async def import_items(names: list[str], pause: float = 0) -> AsyncIterator[tuple[str, str]]:
    """Create an item per name in the container: all of them, or none if it is cancelled.

    Args:
        pause: seconds before each of them, so that there is something to watch.
    """
    container = get_current_container()
    for number, name in enumerate(names, start=1):
        await asyncio.sleep(pause)
        item = await create_content_in_container(container, "Item", name, title=name)
        yield MessageType.DEBUG, f"{number} of {len(names)}"
        yield MessageType.RESULT, item.id


@object_task
async def set_title(item: Any, title: str) -> str:
    """Change an object's title, and return the old one."""
    old: str = item.title
    item.title = title
    item.register()
    return old
