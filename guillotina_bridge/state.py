"""What is known about a task, by its id."""

from __future__ import annotations

from typing import Any, Final

import anyio

from amqp_tasks import ArgumentsError, ResultTimeout, TaskNotFound, TaskStatus

from . import mirror
from .exceptions import TaskNotFinishedException, TaskNotFoundException
from .managers import (
    MemoryStateManager,
    RedisStateManager,
    cancel_in_app,
    get_state_manager,
    is_custom,
    state_in_app,
)
from .service import get_service
from .views import has_ended, view

__all__ = [
    "MemoryStateManager",
    "RedisStateManager",
    "TaskState",
    "TaskStatus",
    "get_state_manager",
]

LOCK_TTL: Final = 60.0


class TaskState:
    """Stands for one task, by its id; making one asks no server.

    Raises, by all of its methods:
        AMQPConfigurationNotFoundError: the bridge does not run.
        TaskNotFoundException: nothing is known about the task.
        StateStoreError: the states cannot be read.
    """

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id

    def __repr__(self) -> str:
        return f"<TaskState {self.task_id!r}>"

    async def get_state(self) -> dict[str, Any]:
        """Return all that is known.

        ========================  =======================================================
        ``task_id``
        ``status``                one of `TaskStatus`
        ``updated``               when that was written, in seconds since the epoch
        ``job_data``              the body of the message
        ``job_retries``           attempts before the one that runs, or ran last
        ``eventlog``              a list of ``[time, message]``
        ``result``                once it is finished
        ``error``                 the traceback of the latest failure, if there was one
        ``reason``                more about its end, if there is more to say
        ========================  =======================================================

        And what the task has added by ``get_state_manager().update(task_id, {...})``.
        """
        if is_custom():
            found = await mirror.read(self.task_id)
        else:
            state = await state_in_app(self.task_id)
            found = {} if state is None else view(state)
        if not found:
            raise TaskNotFoundException(self.task_id)
        return found

    async def get_status(self) -> str | None:
        """Return its status; None if a state manager of an application's own knows none."""
        if is_custom():
            return (await self.get_state()).get("status")
        state = await state_in_app(self.task_id, log_entries=1)
        if state is None:
            raise TaskNotFoundException(self.task_id)
        return str(state.status)

    async def get_result(self) -> Any:
        """Return its result; None if it is errored.

        Raises:
            TaskNotFinishedException: it has not ended, or was canceled.
        """
        state = await self.get_state()
        if state.get("status") not in (TaskStatus.FINISHED, TaskStatus.ERRORED):
            raise TaskNotFinishedException(self.task_id)
        return state.get("result")

    async def join(self, wait: float = 0.5) -> dict[str, Any]:
        """Wait until it has ended, however that is, and return its state.

        Args:
            wait: seconds between looks at a state manager of an application's own; others
                tell at once.
        """
        if not is_custom():
            try:
                await get_service().app.handle(self.task_id).join()
            except (TaskNotFound, ArgumentsError) as error:
                raise TaskNotFoundException(self.task_id) from error
            return await self.get_state()
        while not has_ended(state := await self.get_state()):
            await self._wait_for_end(wait)
        return state

    async def _wait_for_end(self, seconds: float) -> None:
        try:
            await get_service().app.handle(self.task_id).join(timeout=seconds)
        except ResultTimeout:
            pass
        except (TaskNotFound, ArgumentsError):  # the state manager alone knows it
            await anyio.sleep(seconds)

    async def cancel(self) -> bool:
        """Cancel it: what waits never starts, and what runs is stopped.

        Returns:
            False if it has ended otherwise, and stays as it is. True, and true again, if not;
            a running task may still finish before the cancellation reaches it.
        """
        return await (self._cancel_with_manager() if is_custom() else cancel_in_app(self.task_id))

    async def _cancel_with_manager(self) -> bool:
        try:
            canceled = await cancel_in_app(self.task_id)
        except TaskNotFoundException:
            if not await mirror.ask("get", self.task_id):
                raise
            # It alone knows the task: what has expired here, say.
            return bool(await mirror.ask("cancel", self.task_id))
        if canceled:
            await mirror.ask("cancel", self.task_id)
        await mirror.tell(self.task_id)
        return canceled

    async def retry(self) -> bool:
        """Start it anew if it is errored, with its first attempt.

        Returns:
            False if it is not errored, and stays as it is.

        Raises:
            PublishFailed: it may not have been queued; calling again is safe.
        """
        try:
            retried = await get_service().app.handle(self.task_id).retry()
        except (TaskNotFound, ArgumentsError) as error:
            raise TaskNotFoundException(self.task_id) from error
        if is_custom():
            await mirror.tell(self.task_id)
        return retried

    async def is_canceled(self) -> bool:
        """Return whether it has been canceled, or is to be as soon as it stops."""
        if await get_state_manager().is_canceled(self.task_id):
            return True
        # What has ended is not to be canceled any more, a manager may say.
        shown = await mirror.read(self.task_id) if is_custom() else {}
        return shown.get("status") == TaskStatus.CANCELED

    async def acquire(self, ttl: float = LOCK_TTL) -> bool:
        """Lock it, in a state manager that has locks; those of the bridge have not.

        Raises:
            TaskAccessUnauthorized: who runs a task is settled among the workers.
        """
        await get_state_manager().acquire(self.task_id, ttl)
        return True

    async def refresh_lock(self, ttl: float = LOCK_TTL) -> None:
        """Keep the lock; see `acquire`."""
        await get_state_manager().refresh_lock(self.task_id, ttl)

    async def release(self) -> None:
        """Give the lock back; see `acquire`."""
        await get_state_manager().release(self.task_id)
