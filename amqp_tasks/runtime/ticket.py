"""A delivery, and the slot that it holds in its worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anyio

from ..abc import Delivery

__all__ = ["Ticket"]


class Ticket:
    """Gives each delivery one verdict, and each slot back once.

    A task that waits for others may part with both before it has ended: its slot, and
    its delivery, in whose place a copy of the message keeps the task.

    Args:
        slots: one of them was acquired for this delivery.
    """

    def __init__(self, delivery: Delivery, slots: anyio.Semaphore) -> None:
        self.is_settled = False
        self._delivery = delivery
        self._slots = slots
        self._has_slot = True

    @property
    def body(self) -> bytes:
        return self._delivery.body

    @property
    def headers(self) -> Mapping[str, Any]:
        return self._delivery.headers

    def ack(self) -> None:
        """Ack the delivery, if that was not done before."""
        if not self.is_settled:
            self.is_settled = True
            self._delivery.ack()

    def requeue(self) -> None:
        """Give the delivery back, unless a copy keeps the task already."""
        if not self.is_settled:
            self.is_settled = True
            self._delivery.requeue()

    def give_slot(self) -> None:
        """Let another delivery have the slot."""
        if self._has_slot:
            self._has_slot = False
            self._slots.release()

    async def take_slot(self) -> None:
        """Wait for a slot, after this one was given away."""
        if not self._has_slot:
            await self._slots.acquire()
            self._has_slot = True
