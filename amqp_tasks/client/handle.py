"""A handle on a task that was queued, here or anywhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

import anyio
from pydantic_core import from_json

from ..core.checks import check_count, check_seconds
from ..core.lifecycle import TaskStatus
from ..core.operations import ReadEvents
from ..core.record import TaskRecord
from ..exceptions import AmqpTasksError, DecodeError, RemoteTaskError, ResultTimeout, TaskCanceled
from ..runtime.attempt import attempt_or_none
from .client import Client
from .events import TaskEvents
from .state import TaskState, state_from

__all__ = ["TaskHandle"]

R_co = TypeVar("R_co", covariant=True)

SHORT_WAIT: Final = 0.1
"""Seconds for which a task that waits for another keeps its slot."""

LAST_LOOK: Final = 0.5
"""Seconds that the look may take by which an error says how the task does."""


class TaskHandle(Generic[R_co]):
    """Stands for one task, by its id.

    Handles of the same id are equal; making one asks no server.

    Args:
        client: returns the connection to use, when it is needed.
        decode_result: makes the task's result of a JSON text.
    """

    def __init__(
        self,
        task_id: str,
        client: Callable[[], Client],
        decode_result: Callable[[str], R_co],
    ) -> None:
        self.task_id = task_id
        self._client = client
        self._decode_result = decode_result

    def __repr__(self) -> str:
        return f"<TaskHandle {self.task_id!r}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TaskHandle) and other.task_id == self.task_id

    def __hash__(self) -> int:
        return hash(self.task_id)

    async def result(self, timeout: float | None = None) -> R_co:
        """Wait until the task has ended and return its result.

        Cancelling the wait does not cancel the task.

        Args:
            timeout: seconds to wait at most; None for no limit, 0 to look once.

        Raises:
            RemoteTaskError: the task is errored; has the remote type, message, traceback.
            TaskCanceled: the task was canceled.
            TaskNotFound: nothing is known about it.
            ResultTimeout: it has not ended in time. A `TimeoutError`.
            DecodeError: the result does not fit the task's annotation: the id may be that of
                another task.
        """
        return self._result_of(await self._wait(timeout))

    async def result_beside(self) -> R_co:
        """Wait like `result`, for somebody who does so beside the task that he is part of.

        That task keeps its slot in the worker.
        """
        return self._result_of(await self._client().wait(self.task_id))

    def _decoded(self, record: TaskRecord, text: str) -> R_co:
        try:
            return self._decode_result(text)
        except Exception as error:  # validators are the user's code
            raise DecodeError(
                f"task {self.task_id!r} is {record.name}, and its result {text:.100} is not what "
                "this handle expects; was the id given to two different tasks?"
            ) from error

    def _result_of(self, record: TaskRecord) -> R_co:
        match record.status:
            case TaskStatus.FINISHED:
                return self._decoded(record, record.result or "null")
            case TaskStatus.ERRORED:
                raise _remote_error(record)
            case _:
                raise TaskCanceled(
                    f"task {self.task_id!r} was canceled ({record.reason or 'no reason given'})"
                )

    async def join(self, timeout: float | None = None) -> TaskStatus:
        """Wait until the task has ended, one way or another, and return its status.

        Raises:
            TaskNotFound: nothing is known about it.
            ResultTimeout: it has not ended within `timeout` seconds.
        """
        return (await self._wait(timeout)).status

    async def status(self) -> TaskStatus:
        """Return the task's status.

        Raises:
            TaskNotFound: nothing is known about it.
        """
        return (await self._client().read(self.task_id)).status

    async def state(self, *, log_entries: int = 1_000) -> TaskState:
        """Return all that is known about the task.

        Args:
            log_entries: of its event log the latest, as many at most.

        Raises:
            TaskNotFound: nothing is known about it.
            ArgumentsError: `log_entries` is no positive integer.
        """
        check_count(log_entries, "log_entries")
        client = self._client()
        record = await client.read(self.task_id)
        latest = ReadEvents(task_id=self.task_id, limit=log_entries, newest=True)
        events = await client.events(latest)
        return state_from(record, events, lambda text: self._decoded(record, text))

    async def cancel(self) -> bool:
        """Cancel the task: what waits never starts, and what runs is stopped.

        Returns:
            False if the task has ended already, and stays as it is. True otherwise; a
            running task may still finish before the cancellation reaches it.

        Raises:
            TaskNotFound: nothing is known about it.
        """
        return await self._client().cancel(self.task_id)

    async def retry(self) -> bool:
        """Start an errored task anew, with its first attempt.

        Like replaying its letter of the error queue, which is of no more use then and is
        removed when somebody replays it. A deadline is dropped if it is over.

        Returns:
            False if the task is not errored, and stays as it is.

        Raises:
            TaskNotFound: nothing is known about it.
            PublishFailed, StateStoreError: it may not have been queued; calling again is safe.
        """
        return await self._client().retry(self.task_id)

    def events(self, after: str | None = None) -> TaskEvents:
        """Iterate over the task's event log, as it grows, until the task has ended.

        Args:
            after: the `position` of the entry to go on behind; None from the beginning.

        Raises:
            TaskNotFound: (from the iteration) nothing is known about the task.
        """
        return TaskEvents(self.task_id, self._client(), after)

    async def _wait_for_end(self) -> TaskRecord:
        client = self._client()
        attempt = attempt_or_none()
        if attempt is None:
            return await client.wait(self.task_id)
        # A task that waits for another gives it its slot, which it may need. Most waits
        # are short, and then not worth the trouble.
        with anyio.move_on_after(SHORT_WAIT):
            return await client.wait(self.task_id)
        async with attempt.without_slot():
            return await client.wait(self.task_id)

    async def _wait(self, timeout: float | None) -> TaskRecord:
        limit = check_seconds(timeout, "timeout", zero=True)
        record: TaskRecord | None = None
        if limit == 0:
            record = await self._client().read(self.task_id)
            if record.status.ended:
                return record
        else:
            with anyio.move_on_after(limit):
                return await self._wait_for_end()
            with anyio.move_on_after(LAST_LOOK), suppress(AmqpTasksError):
                record = await self._client().read(self.task_id)
                if record.status.ended:
                    return record
        raise ResultTimeout(
            f"task {self.task_id!r} has not ended within {limit:g} s{_how_it_does(record)}"
        )


def _how_it_does(record: TaskRecord | None) -> str:
    """Return what is known of a task that somebody has waited for in vain."""
    if record is None:
        return ""
    text = f"; it is {record.status}, attempt {record.attempt}"
    if record.error is None:
        return text
    error = _remote_error(record)
    return f"{text}, after a failure: {error.type}: {error.message:.300}"


def _remote_error(record: TaskRecord) -> RemoteTaskError:
    error: dict[str, Any] = from_json(record.error) if record.error else {}
    return RemoteTaskError(
        record.task_id,
        type=error.get("type", "unknown"),
        message=error.get("message", ""),
        traceback=error.get("traceback", ""),
        reason=error.get("reason"),
    )
