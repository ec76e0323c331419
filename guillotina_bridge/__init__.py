"""The addon that runs amqp_tasks in guillotina: ``applications: [guillotina_bridge]``.

::

    from guillotina_bridge import task

    @task
    async def count(kind: str) -> int: ...

    state = await count("Item")             # in a view; a worker runs it as the same user

and, elsewhere, ``g amqp-worker`` with the same configuration.
"""

from __future__ import annotations

from typing import Any

from guillotina import configure

from .decorators import object_task, task
from .settings import DEFAULTS
from .utils import add_object_task, add_task

__all__ = ["add_object_task", "add_task", "app_settings", "includeme", "object_task", "task"]

app_settings: dict[str, Any] = {
    "amqp": DEFAULTS,
    "commands": {"amqp-worker": "guillotina_bridge.commands.worker.WorkerCommand"},
}


def includeme(root: Any) -> None:
    """Register what there is; guillotina calls it."""
    configure.scan("guillotina_bridge.permissions")
    configure.scan("guillotina_bridge.managers")
    configure.scan("guillotina_bridge.api")
    configure.scan("guillotina_bridge.application")
