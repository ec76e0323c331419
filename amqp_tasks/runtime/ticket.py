"""A delivery, and the slot that it holds in its worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anyio

from ..abc import Delivery

__all__ = ["Ticket"]


class Ticket:
    """Gives each delivery one verdict, and each slot back once.

    A task that waits for others, or runs for long, may part with either before it has
    ended: with its slot, and with its delivery, in whose place a copy of the message
    keeps the task.

    Args:
        slots: one of them was acquired for this delivery.

    Attributes:
        is_settled: the delivery has its verdict.
        has_copy: a copy of the message is on its way, or about to be.
        is_guarded: one that was made to take the delivery's place is.
    """

    def __init__(self, delivery: Delivery, slots: anyio.Semaphore) -> None:
        self.is_settled = False
        self.has_copy = False
        self.is_guarded = False
        self._delivery = delivery
        self._slots = slots
        self._since = anyio.current_time()
        self._has_slot = True
        self._waits = 0
        self._taking = anyio.CancelScope()

    @property
    def body(self) -> bytes:
        return self._delivery.body

    @property
    def headers(self) -> Mapping[str, Any]:
        return self._delivery.headers

    def age(self) -> float:
        """Return the seconds for which the delivery has been held."""
        return 0.0 if self.is_settled else anyio.current_time() - self._since

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

    @property
    def is_waiting(self) -> bool:
        """True while the task waits for others."""
        return self._waits > 0

    def begin_wait(self) -> None:
        """Note that the task waits for something, in one more place than before."""
        self._waits += 1
        self._taking.cancel()

    def end_wait(self) -> None:
        """Note that it waits in one place less."""
        self._waits -= 1

    def give_slot_if_waiting(self) -> None:
        """Let another delivery have the slot, if the task waits."""
        if self._waits:
            self.give_slot()

    def give_slot(self) -> None:
        """Let another delivery have the slot."""
        if self._has_slot:
            self._has_slot = False
            self._slots.release()

    async def take_slot(self) -> None:
        """Return when the task has a slot again, or waits again and needs none."""
        with anyio.CancelScope() as self._taking:
            while not self._has_slot and not self._waits:
                await self._slots.acquire()
                if self._has_slot or self._waits:
                    self._slots.release()
                else:
                    self._has_slot = True
