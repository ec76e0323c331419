"""The error queue, for people and programs to work with."""

# A letter and the queue that it is of are one thing in two classes.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
from pydantic_core import from_json

from ..core.lifecycle import TaskStatus
from ..core.message import FilterExtra, decode
from ..exceptions import DecodeError
from ..runtime.errors import MAX_HELD, ErrorDesk, Found, Replayed
from ..runtime.failures import single_error
from ..runtime.io_loop import IoLoop
from ..runtime.link import Servers
from ..settings import Settings

__all__ = ["ErrorLetter", "ErrorQueue", "open_error_queue"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorLetter:
    """A message in the error queue, and why it is there."""

    position: int
    """From 1, the oldest; where it was when the queue was opened."""
    task_id: str | None
    """None if not even that much of it could be read."""
    name: str | None
    """Registered name of the task; None if it could not be read."""
    reason: str
    """``exception``, or a word of `amqp_tasks.core.outcome.Reason`, or what RabbitMQ says
    of a message that it has moved here itself (``delivery_limit``, ``rejected``)."""
    type: str
    """Dotted name of the exception's class."""
    message: str
    traceback: str
    """Its last 8,000 characters at most; `ErrorQueue.traceback` may know more."""
    attempt: int | None
    """Number of the attempt that failed."""
    worker: str | None
    """Incarnation of the worker that put it here."""
    at: float | None
    """When that was, seconds since the epoch."""
    deadline: float | None
    """Seconds since the epoch."""
    problem: str | None
    """Why it is no message of ours and cannot be replayed; None if it can."""
    body: bytes
    headers: Mapping[str, Any]
    _found: Found = field(repr=False, compare=False)


class ErrorQueue:
    """The letters of an error queue, oldest first. `TaskApp.error_queue` opens it.

    Iterating goes once through the letters that were there when it was opened. They are
    looked at, not removed: those that were neither replayed nor dropped are given back when
    the block is left, in their order. Meanwhile nobody else sees them.

    Attributes:
        name: of the queue.
        total: how many letters there were.
    """

    max_held = MAX_HELD
    """Letters that can be looked at without replaying or dropping any; see `unseen`."""

    def __init__(self, io: IoLoop, desk: ErrorDesk, name: str) -> None:
        self.name = name
        self.total = desk.total
        self._io = io
        self._desk = desk
        self._found: deque[Found] = deque()
        self._has_ended = False

    @property
    def unseen(self) -> int:
        """How many letters the iteration has left out, when it has ended: those behind the
        first `max_held` that nobody has replayed or dropped."""
        return self._desk.unseen if self._has_ended else 0

    def __aiter__(self) -> ErrorQueue:
        return self

    async def __anext__(self) -> ErrorLetter:
        if not self._found:
            self._found.extend(await self._io.call(self._desk.take))
        if not self._found:
            self._has_ended = True
            raise StopAsyncIteration
        return _letter(self._found.popleft())

    async def replay(self, letter: ErrorLetter) -> Replayed:
        """Put a letter's task back into the main queue, its first attempt ahead of it.

        A deadline is dropped if it is over; what the letter says of its error is dropped
        anyway. If this process is killed on the way, the letter is still there, and
        replaying it again neither loses nor doubles the task. Of several letters of one
        task the first is replayed, and the others are removed.

        Raises:
            DecodeError: it is no message of ours (`letter.problem` says why).
            TaskCanceled: somebody has canceled the task, after an earlier replay.
            PublishFailed, StateStoreError: the letter is still there; replay it again.
            ArgumentsError: it was replayed or dropped before.
        """
        return await self._io.call(self._desk.replay, letter._found)

    async def drop(self, letter: ErrorLetter) -> None:
        """Remove a letter for good. The task's state stays as it is.

        Raises:
            ArgumentsError: it was replayed or dropped before.
        """
        await self._io.call(self._desk.drop, letter._found)

    async def traceback(self, letter: ErrorLetter) -> str:
        """Return the whole traceback if the task's state still has it, else the letter's.

        Raises:
            StateStoreError: the state store does not answer.
        """
        if letter.task_id is None:
            return letter.traceback
        record = await self._io.call(self._desk.read, letter.task_id)
        if record is None or record.status is not TaskStatus.ERRORED or record.error is None:
            return letter.traceback
        whole = str(from_json(record.error).get("traceback", ""))
        # Or else the state speaks of another failure than this letter does.
        return whole if whole.endswith(letter.traceback) else letter.traceback


def _letter(found: Found) -> ErrorLetter:
    headers, body = found.delivery.headers, found.delivery.body
    name: str | None = None
    deadline: float | None = None
    problem: str | None = None
    task_id: str | None
    try:
        message = decode(body, headers)
    except DecodeError as error:
        task_id, problem = error.task_id, str(error)
    else:
        task_id, name, deadline = message.task_id, message.func, message.deadline
    attempt = headers.get("error-attempt")
    reason = _text(headers, "error-reason")
    by_broker = "" if reason else _broker_reason(headers)
    return ErrorLetter(
        position=found.position,
        task_id=task_id,
        name=name,
        reason=reason or by_broker or "unknown",
        type=_text(headers, "error-type"),
        message=_text(headers, "error-message")
        or (f"moved here by the broker ({by_broker})" if by_broker else ""),
        traceback=_text(headers, "error-traceback"),
        attempt=attempt if isinstance(attempt, int) else None,
        worker=_text(headers, "error-worker") or None,
        at=_seconds(headers.get("error-at")),
        deadline=deadline,
        problem=problem,
        body=body,
        headers=headers,
        _found=found,
    )


def _text(headers: Mapping[str, Any], key: str) -> str:
    value = headers.get(key)
    return value if isinstance(value, str) else ""


def _seconds(value: object) -> float | None:
    try:
        seconds = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        return None
    return seconds if math.isfinite(seconds) else None


def _broker_reason(headers: Mapping[str, Any]) -> str:
    """Return why the broker has dead-lettered a message, as it says in a header."""
    deaths = headers.get("x-death")
    latest = deaths[0] if isinstance(deaths, list) and deaths else None
    reason = latest.get("reason") if isinstance(latest, dict) else None
    return reason if isinstance(reason, str) else ""


@asynccontextmanager
async def open_error_queue(
    io: IoLoop,
    servers: Servers,
    settings: Settings,
    *,
    clock: Callable[[], float],
    filter_extra: FilterExtra | None,
) -> AsyncGenerator[ErrorQueue, None]:
    """Read the error queue for as long as the block; then give back what is left."""
    with single_error():
        desk = await io.make(ErrorDesk, servers, settings, clock, filter_extra)
        async with anyio.create_task_group() as tasks:
            await tasks.start(io.serve, desk.run)
            try:
                yield ErrorQueue(io, desk, servers.topology.error.name)
            finally:
                tasks.cancel_scope.cancel()
