"""One attempt, as the task that runs in it sees it."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import Context, ContextVar
from enum import StrEnum
from typing import Any, Protocol

import anyio
from pydantic_core import to_json

from ..core.message import Message
from ..core.outcome import CancelReason, Failure
from ..exceptions import AmqpTasksError, StateStoreError

__all__ = [
    "Attempt",
    "MessageType",
    "attempt_in",
    "attempt_or_none",
    "current_attempt",
    "set_current_attempt",
]

log = logging.getLogger(__name__)

_current: ContextVar[Attempt] = ContextVar("amqp_tasks.attempt")

Append = Callable[[str], Awaitable[None]]


class MessageType(StrEnum):
    """What an async-generator task yields, as the first of a pair."""

    DEBUG = "debug"
    """The second is a message for the task's event log."""
    RESULT = "result"
    """The second is one more item of the task's result, a list."""


class Slot(Protocol):
    """The slot of an attempt in its worker, as the task loop sees it."""

    def begin_wait(self) -> None:
        """Give it away soon: the attempt waits for other tasks, in one more place."""

    def end_wait(self) -> None:
        """The attempt waits in one place less."""

    async def take(self) -> None:
        """Return when the attempt has it again, or waits elsewhere and needs none."""


class Attempt:
    """The running attempt of a task; `current_attempt` gives it.

    Attributes:
        task_id: id of the task.
        name: registered name of the task.
        args, kwargs: what it was called with, as the message has it: values that JSON has.
        extra: members of the message's body beside these (`CallOptions.extra`).
        number: number of this attempt, from 1.
        fence: an integer that is larger for every later attempt of the same task, on
            whichever worker. Hand it to what you write to, and have smaller ones
            refused there: so an outside effect happens once even if a worker that was
            presumed dead comes back.
        deadline: seconds since the epoch after which nobody needs the result, or None.
        worker: the worker's incarnation.
        cancel_scope: the scope in which the task runs.
        cancel_reason: why the task is being cancelled; None as long as it is not.
    """

    def __init__(
        self,
        *,
        message: Message,
        name: str,
        fence: int,
        worker: str,
        cancel_scope: anyio.CancelScope,
        limit_reason: CancelReason,
        append: Append,
        slot: Slot,
        clock: Callable[[], float],
    ) -> None:
        self.task_id = message.task_id
        self.name = name
        self.args = message.args
        self.kwargs = message.kwargs
        self.extra = message.extra
        self.number = message.attempt
        self.fence = fence
        self.deadline = message.deadline
        self.worker = worker
        self.cancel_scope = cancel_scope
        self._limit_reason = limit_reason
        self._reason: CancelReason | None = None
        self.blocked: Failure | None = None
        """What the watchdog has to say, if it had to interrupt this attempt."""
        self.interrupts = 0
        """How often it had to."""
        self._append = append
        self._slot = slot
        self._returning: set[anyio.CancelScope] = set()
        self._clock = clock

    def __repr__(self) -> str:
        return f"<Attempt {self.number} of {self.task_id!r} ({self.name}), fence {self.fence}>"

    @property
    def cancel_reason(self) -> CancelReason | None:
        if self._reason is None and self.cancel_scope.cancel_called:
            # Nobody but the scope's own deadline cancels it without giving a reason.
            self._reason = self._limit_reason
        return self._reason

    def cancel(self, reason: CancelReason) -> None:
        """Cancel this attempt's scope. The first reason stays."""
        if self.cancel_reason is None:
            self._reason = reason
            self.cancel_scope.cancel()
            for scope in self._returning:
                scope.cancel()

    def interrupted(self, failure: Failure) -> None:
        """Note that it captured the loop and is interrupted. Also from a signal handler."""
        self.blocked = failure
        self.interrupts += 1
        if self.cancel_reason is None:
            # Its scope is cancelled when the loop is free to do so.
            self._reason = CancelReason.BLOCKED_LOOP

    @asynccontextmanager
    async def without_slot(self) -> AsyncGenerator[None, None]:
        """Let another task have this one's slot in the worker, for as long as the block.

        For a task that waits for other tasks: those may need the slot. Leaving the block
        waits for a slot, whatever ended the wait, because what comes next needs it: only
        the end of the attempt itself does not wait.
        """
        self._slot.begin_wait()
        try:
            yield
        finally:
            self._slot.end_wait()
            await self._return_to_work()  # noqa: ASYNC102  shields itself, within limits

    async def _return_to_work(self) -> None:
        limit = self.cancel_scope.deadline
        with anyio.CancelScope(shield=True, deadline=limit) as scope:
            self._returning.add(scope)
            try:
                if self.cancel_reason is None:
                    await self._slot.take()
            finally:
                self._returning.discard(scope)

    async def log(self, message: Any) -> None:
        """Append a message (any JSON value) to the task's event log.

        Does not fail when the state store is away: a task is not stopped for its log.
        """
        await self.emit("log", message)

    async def emit(self, kind: str, message: Any) -> None:
        """Append an entry of some kind to the task's event log."""
        try:
            await self._append(self.entry(kind, message))
        except StateStoreError as error:
            log.warning("%r: its event log could not be written: %s", self, error)

    def entry(self, kind: str, message: Any) -> str:
        """Return an entry of the event log as JSON text."""
        entry = {"at": self._clock(), "attempt": self.number, "kind": kind, "message": message}
        return to_json(entry, inf_nan_mode="constants", fallback=repr).decode()


def current_attempt() -> Attempt:
    """Return the attempt in which the caller runs, in a child task or a thread as well.

    Raises:
        AmqpTasksError: the caller does not run in a task.
    """
    attempt = attempt_or_none()
    if attempt is None:
        raise AmqpTasksError("current_attempt() was called outside of a task")
    return attempt


def attempt_or_none() -> Attempt | None:
    """Return the attempt in which the caller runs, if it does."""
    return _current.get(None)


def attempt_in(context: Context) -> Attempt | None:
    """Return the attempt that runs in a context, if one does."""
    return context.get(_current)


def set_current_attempt(attempt: Attempt) -> None:
    """Make `attempt` the current one in this context."""
    _current.set(attempt)
