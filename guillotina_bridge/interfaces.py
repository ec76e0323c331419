"""What other applications provide to the bridge, or get from it."""

# zope.interface's methods are written as they are called, without `self`, and have no body.
# mypy: disable-error-code="misc, empty-body"
# pyright: reportSelfClsParameterName=false, reportReturnType=false
# pyright: reportUntypedBaseClass=false
# ruff: noqa: N805

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from zope.interface import Attribute, Interface

from amqp_tasks import MessageType

__all__ = ["IStateManagerUtility", "ITaskDefinition", "MessageType"]


class ITaskDefinition(Interface):
    """A function whose calls are scheduled as tasks; `guillotina_bridge.task` makes one."""

    func = Attribute("the function itself")

    async def __call__(*args: Any, _request: Any = None, **kwargs: Any) -> Any:
        """Schedule a call now."""

    def after_request(
        *args: Any, _request: Any = None, _name: str | None = None, **kwargs: Any
    ) -> str:
        """Schedule a call when the request has been answered well; return the future's name."""

    def after_commit(*args: Any, _request: Any = None, **kwargs: Any) -> None:
        """Schedule a call when the transaction has been committed."""


class IStateManagerUtility(Interface):
    """Keeps the states of tasks, each a dict; the setting `persistent_manager` names it.

    The bridge writes to and reads from a utility of an application's own. Locks are not
    asked for: what a task's worker may do is decided elsewhere.
    """

    async def update(task_id: str, data: dict[str, Any]) -> None:
        """Merge `data` into the state of a task."""

    async def get(task_id: str) -> dict[str, Any]:
        """Return the state of a task."""

    async def exists(task_id: str) -> bool:
        """Return whether there is a state of that task."""

    def list() -> AsyncIterator[str]:
        """Iterate over the ids of all tasks."""

    async def cancel(task_id: str) -> bool:
        """Note that a task is to be canceled."""

    async def is_canceled(task_id: str) -> bool:
        """Return whether a task is to be canceled."""

    async def clean_canceled(task_id: str) -> None:
        """Forget that a task is to be canceled."""

    async def is_mine(task_id: str) -> bool:
        """Return whether this worker holds the lock of a task."""

    async def acquire(task_id: str, ttl: int) -> None:
        """Lock a task for `ttl` seconds."""

    async def release(task_id: str) -> None:
        """Unlock a task."""

    async def refresh_lock(task_id: str, ttl: int) -> None:
        """Lock a task for `ttl` seconds more."""
