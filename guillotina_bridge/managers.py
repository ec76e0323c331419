"""The state managers ``memory`` and ``redis``: the states that workers keep, as utilities.

They are the same but for their names: where states are is up to the service's app. An
application can have a manager of its own instead; see `mirror`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final, NoReturn

from guillotina import configure
from guillotina.component import query_utility
from zope.interface import implementer

from amqp_tasks import (
    AmqpTasksError,
    ArgumentsError,
    SettingsError,
    TaskHandle,
    TaskNotFound,
    TaskState,
    TaskStatus,
    current_attempt,
)

from .exceptions import TaskAccessUnauthorized, TaskNotFoundException
from .interfaces import IStateManagerUtility
from .service import get_service
from .views import RESERVED, UPDATE, view

__all__ = [
    "MemoryStateManager",
    "RedisStateManager",
    "cancel_in_app",
    "find_manager",
    "get_state_manager",
    "is_custom",
    "state_in_app",
]

PAGE: Final = 200
"""States that are read in one go: with them come their messages and results."""

WHOLE_LOG: Final = 1_000_000
"""Entries: what a task has added by updates may be anywhere among them."""


def get_state_manager(loop: object = None) -> Any:
    """Return the utility, an `IStateManagerUtility`, that `persistent_manager` names.

    Args:
        loop: not used; guillotina_amqp had it.

    Raises:
        AMQPConfigurationNotFoundError: the bridge does not run.
        SettingsError: there is no such utility.
    """
    return find_manager(get_service().settings.persistent_manager)


def find_manager(name: str) -> Any:
    """Return the state manager of that name.

    Raises:
        SettingsError: there is none.
    """
    found = query_utility(IStateManagerUtility, name=name)
    if found is None:
        raise SettingsError(
            f"amqp.persistent_manager={name!r}: must be memory, redis, or the name of a utility "
            "that provides IStateManagerUtility"
        )
    return found


def is_custom() -> bool:
    """Tell whether states are kept by a manager of an application's own as well."""
    return get_service().settings.persistent_manager not in ("memory", "redis")


async def state_in_app(task_id: str, *, log_entries: int = WHOLE_LOG) -> TaskState | None:
    """Return the state of a task as its workers keep it; None if there is none.

    Args:
        log_entries: the latest of its log, as many at most: 1 for who does not look at it.
    """
    try:
        return await _handle(task_id).state(log_entries=log_entries)
    except (TaskNotFound, ArgumentsError):  # the latter: it can be no task's id
        return None


async def cancel_in_app(task_id: str) -> bool:
    """Cancel a task. False if it has ended otherwise, and stays as it is.

    Raises:
        TaskNotFoundException: nothing is known about it.
    """
    try:
        handle = _handle(task_id)
        return await handle.cancel() or await handle.status() is TaskStatus.CANCELED
    except (TaskNotFound, ArgumentsError) as error:
        raise TaskNotFoundException(task_id) from error


async def _status(task_id: str) -> TaskStatus | None:
    try:
        return await _handle(task_id).status()
    except (TaskNotFound, ArgumentsError):
        return None


def _handle(task_id: str) -> TaskHandle[Any]:
    return get_service().app.handle(task_id)


@implementer(IStateManagerUtility)
class _AppStateManager:
    async def get(self, task_id: str) -> dict[str, Any]:
        """Return the state of a task; an empty one if there is none."""
        state = await state_in_app(task_id)
        return {} if state is None else view(state)

    async def exists(self, task_id: str) -> bool:
        """Return whether there is a state of that task."""
        return await _status(task_id) is not None

    async def list(self) -> AsyncIterator[str]:
        """Iterate over the ids of all tasks, in their order."""
        app, after = get_service().app, None
        while page := await app.list_tasks(after=after, limit=PAGE):
            for state in page:
                yield state.task_id
            after = page[-1].task_id

    async def update(self, task_id: str, data: dict[str, Any], ttl: float | None = None) -> None:
        """Add to the state of the running task. `ttl` is not used: states expire as a whole.

        Raises:
            TaskAccessUnauthorized: somebody else than the task does so.
            ArgumentsError: `data` has keys that say how the task does, which is not up to it.
        """
        attempt = _attempt_of(task_id)
        if taken := sorted(RESERVED & data.keys()):
            raise ArgumentsError(
                f"{', '.join(taken)}: kept by the worker; use other keys, or, to log something, "
                "yield (MessageType.DEBUG, message)"
            )
        await attempt.emit(UPDATE, data)

    async def cancel(self, task_id: str) -> bool:
        """Cancel a task; see `TaskState.cancel`."""
        return await cancel_in_app(task_id)

    async def is_canceled(self, task_id: str) -> bool:
        """Return whether a task has been canceled, or is to be as soon as it stops."""
        state = await state_in_app(task_id, log_entries=1)
        return state is not None and (
            state.status is TaskStatus.CANCELED or state.cancel_requested is not None
        )

    async def clean_canceled(self, task_id: str) -> bool:
        """Do nothing: a request to cancel ends with its task."""
        return False

    async def is_mine(self, task_id: str) -> bool:
        """Return whether a worker of this process runs the task."""
        state = await state_in_app(task_id, log_entries=1)
        own = get_service().worker_id
        return state is not None and state.status is TaskStatus.RUNNING and state.worker == own

    async def acquire(self, task_id: str, ttl: float) -> NoReturn:
        """Not possible."""
        raise _only_workers(task_id)

    async def refresh_lock(self, task_id: str, ttl: float) -> NoReturn:
        """Not possible."""
        raise _only_workers(task_id)

    async def release(self, task_id: str) -> NoReturn:
        """Not possible."""
        raise _only_workers(task_id)


@configure.utility(provides=IStateManagerUtility, name="memory")
class MemoryStateManager(_AppStateManager):
    """States in this process, for as long as it lives."""


@configure.utility(provides=IStateManagerUtility, name="redis")
class RedisStateManager(_AppStateManager):
    """States in Redis."""


def _attempt_of(task_id: str) -> Any:
    try:
        attempt = current_attempt()
    except AmqpTasksError:
        attempt = None
    if attempt is None or attempt.task_id != task_id:
        raise TaskAccessUnauthorized(
            f"the state of {task_id!r} can be updated by that task only, while it runs"
        )
    return attempt


def _only_workers(task_id: str) -> TaskAccessUnauthorized:
    return TaskAccessUnauthorized(
        f"{task_id!r} cannot be locked or released: who runs a task is settled among the workers. "
        "What must not happen twice can be held against current_attempt().fence"
    )
