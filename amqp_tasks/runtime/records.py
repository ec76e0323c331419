"""What the watchdog has the I/O loop do while the task loop is captured."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import anyio
from anyio.abc import TaskStatus

from ..core.operations import AppendEvents
from ..core.outcome import Failed, Failure, GivenBack
from ..exceptions import StateStoreError
from .attempt import Attempt
from .batching import StateClient
from .consumer import Consumer
from .io_loop import Inbox

__all__ = ["Records"]

log = logging.getLogger(__name__)


class Records:
    """Writes, settles and gives back without asking the task loop. `run` is its service.

    Attributes:
        left: set when the worker has left: everything has its verdict, and the
            connections are closed.
    """

    def __init__(
        self, state: StateClient, consumer: Consumer, stop: Callable[[float], None]
    ) -> None:
        self.left = threading.Event()
        self._state = state
        self._consumer = consumer
        self._stop = stop
        self._notes: Inbox[tuple[Attempt, str, Any]] = Inbox()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Write what is noted, until cancelled."""
        task_status.started()
        while True:
            operations = [_append(*note) for note in await self._notes.take()]
            for error in await self._state.ask_all(operations):
                if isinstance(error, StateStoreError):
                    log.warning("a task's event log could not be written: %s", error)

    def note(self, attempt: Attempt, kind: str, message: Any) -> None:
        """Append an entry to a task's event log soon."""
        self._notes.put((attempt, kind, message))

    def abandon(self, culprit: Attempt | None, failure: Failure) -> None:
        """Settle the culprit as failed, give all others back, take no more, and leave.

        Whatever the task loop may report later, is too late.
        """
        self._consumer.stop()
        for running in self._consumer.running.values():
            is_culprit = culprit is not None and running.fence == culprit.fence
            running.report(Failed(failure) if is_culprit else GivenBack())
        self._stop(0)


def _append(attempt: Attempt, kind: str, message: Any) -> AppendEvents:
    entry = attempt.entry(kind, message)
    return AppendEvents(task_id=attempt.task_id, fence=attempt.fence, entries=(entry,))
