"""Copies that keep a task in the place of its delivery.

RabbitMQ closes a channel that holds a delivery for half an hour, and sends a consumer no
more than it has room for. So a delivery cannot be held for as long as a task may take, nor
by a task that waits for others. A copy of the message takes its place: it comes back now
and then, finds the task running, and waits again; or it finds the worker gone, and the
task starts anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

import anyio
from anyio.abc import TaskGroup, TaskStatus

from ..core.message import Message
from ..core.settlement import guard
from .link import Link
from .ticket import Ticket

__all__ = ["Guarded", "Guards"]

LOOKS: Final = 10
"""Looks for deliveries that are held too long, in the time for which they may be."""


class Guarded(Protocol):
    """A task that runs here."""

    @property
    def message(self) -> Message: ...

    @property
    def ticket(self) -> Ticket: ...


class Guards:
    """Replaces deliveries by copies. `run` is its service.

    Args:
        running: the tasks that run here.
        after: seconds for which a delivery is held.
    """

    def __init__(self, link: Link, running: Mapping[str, Guarded], after: float) -> None:
        self._link = link
        self._running = running
        self._after = after
        self._tasks: TaskGroup

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Look for deliveries that are held for too long, until cancelled."""
        async with anyio.create_task_group() as self._tasks:
            task_status.started()
            while True:
                await anyio.sleep(self._after / LOOKS)
                for task in list(self._running.values()):
                    if task.ticket.age() >= self._after * (1 - 1 / LOOKS):
                        self._replace(task)

    def begin_wait(self, task: Guarded) -> None:
        """Let others have the slot of a task that waits, and its place at the broker."""
        task.ticket.begin_wait()
        self._replace(task)

    def _replace(self, task: Guarded) -> None:
        ticket = task.ticket
        if ticket.is_settled:
            ticket.give_slot_if_waiting()
        elif not ticket.is_guarded:
            ticket.is_guarded = ticket.has_copy = True
            self._tasks.start_soon(self._publish, task)

    async def _publish(self, task: Guarded) -> None:
        await self._link.publish_persistently(guard(task.message, self._link.topology))
        task.ticket.ack()
        task.ticket.give_slot_if_waiting()
