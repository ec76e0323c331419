"""A task that runs here, on the I/O loop's side."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from ..core.message import Message
from ..core.outcome import CancelReason, Outcome
from ..core.settlement import Lease
from .guards import Guards
from .ticket import Ticket

__all__ = ["Running", "RunningSlot"]


class Running:
    """One attempt: what it was started with, and how it ended.

    Args:
        cancel: cancels the attempt that has a lease, on the task loop.
    """

    def __init__(
        self,
        message: Message,
        lease: Lease,
        ticket: Ticket,
        cancel: Callable[[str, CancelReason], None],
    ) -> None:
        self.message = message
        self.lease = lease
        self.ticket = ticket
        self.ended = anyio.Event()
        self.outcome: Outcome | None = None
        self._cancel = cancel

    @property
    def fence(self) -> int:
        return self.lease.fence

    @property
    def parent_owner(self) -> str | None:
        return self.message.parent_owner

    def cancel(self, reason: CancelReason) -> None:
        self._cancel(self.lease.id, reason)

    def report(self, outcome: Outcome) -> None:
        """Note how it ended. The first to say so is believed."""
        if self.outcome is None:
            self.outcome = outcome
            self.ended.set()


class RunningSlot:
    """The slot of a task that runs; see `attempt.Slot`."""

    def __init__(self, guards: Guards, running: Running) -> None:
        self._guards = guards
        self._running = running

    def begin_wait(self) -> None:
        self._guards.begin_wait(self._running)

    def end_wait(self) -> None:
        self._running.ticket.end_wait()

    async def take(self) -> None:
        await self._running.ticket.take_slot()
