"""The event log of a task, as it grows."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Final

import anyio
from pydantic_core import from_json

from ..core.operations import ReadEvents
from .client import Client

__all__ = ["TaskEvent", "TaskEvents"]

PAGE: Final = 500
FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 1.0
"""Seconds between looks at a log that has nothing new."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEvent:
    """One entry of a task's event log."""

    position: str
    """Where it is in the log; `TaskHandle.events` can go on behind it."""
    at: float
    """Seconds since the epoch."""
    attempt: int
    kind: str
    """``log``, ``debug``, ``result``, or a word of the worker's own."""
    message: Any


class TaskEvents:
    """An async iterator over a task's event log; made by `TaskHandle.events`.

    Stopping half-way needs no closing: nothing is held between two entries.
    """

    def __init__(self, task_id: str, client: Client, after: str | None) -> None:
        self._task_id = task_id
        self._client = client
        self._after = after
        self._read: deque[TaskEvent] = deque()
        self._has_ended = False

    def __aiter__(self) -> TaskEvents:
        return self

    async def __anext__(self) -> TaskEvent:
        pause = FIRST_PAUSE
        while not self._read:
            if self._has_ended:
                raise StopAsyncIteration
            # In this order: what is written before the end is read after it was seen.
            ended = (await self._client.read(self._task_id)).status.ended
            await self._read_on()
            if self._read:
                break
            self._has_ended = ended
            if not ended:
                with anyio.move_on_after(pause):
                    await self._client.wait(self._task_id)
                pause = min(pause * 2, LONGEST_PAUSE)
        return self._read.popleft()

    async def _read_on(self) -> None:
        page = ReadEvents(task_id=self._task_id, after=self._after, limit=PAGE)
        for entry in await self._client.events(page):
            self._after = entry.position
            self._read.append(TaskEvent(position=entry.position, **from_json(entry.data)))
