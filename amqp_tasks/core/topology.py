"""Which queues there are, with which arguments, and how a wait is cut into steps.

One app has one durable direct exchange and these queues, each bound to it under its
own name::

    <queue>              where workers consume; what is rejected goes to <queue>-error
    <queue>-delay        holds a message for `delayed_ttl_ms`, then back to <queue>
    <queue>-error        keeps what failed for good, for `errored_ttl_ms`
    <queue>-wait-<ms>    the steps of the ladder: hold a message that long, then back
    <queue>-beacon-...   of one connection, and gone with it: see `runtime.beacon`

RabbitMQ expires messages at the head of a queue only, so a queue can hold one delay
and no other: a short wait behind a long one would wait for the long one. Any delay is
therefore cut into the steps of a fixed ladder, the largest first. A message that comes
back before it is due takes the next step; the wait is held by the broker, not by a
worker's memory, and a restart of either loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

__all__ = ["LADDER_MS", "QueueSpec", "QueueType", "Topology", "ladder_step"]

QueueType = Literal["quorum", "classic"]

LADDER_MS: Final = (
    250,
    1_000,
    5_000,
    15_000,
    60_000,
    300_000,
    1_800_000,
    7_200_000,
    43_200_000,
)
"""The steps, in milliseconds. Nine queues, and no wait takes any of them more than five
times (the longest excepted)."""


DELIVERY_LIMIT: Final = 1_000_000
"""Times that a quorum queue delivers a message; practically no limit."""


@dataclass(frozen=True, slots=True)
class QueueSpec:
    """A queue: its name and its arguments as RabbitMQ takes them.

    Durable, unless it is `exclusive`: then it belongs to one connection, and goes with it.
    """

    name: str
    arguments: Mapping[str, Any]
    exclusive: bool = False


def ladder_step(remaining_ms: float) -> int:
    """Return the largest step for a wait of `remaining_ms` milliseconds.

    A wait may end up to one smallest step late, never early. That slack also absorbs
    the milliseconds each step takes beyond its time, which would otherwise turn the
    last 15 s step of a wait into a dozen smaller ones.
    """
    reach = remaining_ms + LADDER_MS[0]
    return max((step for step in LADDER_MS if step <= reach), default=LADDER_MS[0])


@dataclass(frozen=True, slots=True)
class Topology:
    """The exchange and queues of one app."""

    exchange: str
    queue: str
    queue_type: QueueType = "quorum"
    delayed_ttl_ms: int = 120_000
    errored_ttl_ms: int = 604_800_000

    @property
    def main(self) -> QueueSpec:
        return QueueSpec(self.queue, self._arguments(dead_letter_to=f"{self.queue}-error"))

    @property
    def delay(self) -> QueueSpec:
        return self._holding(f"{self.queue}-delay", self.delayed_ttl_ms)

    @property
    def error(self) -> QueueSpec:
        return QueueSpec(f"{self.queue}-error", self._arguments(ttl_ms=self.errored_ttl_ms))

    def step(self, step_ms: int) -> QueueSpec:
        """Return the ladder's queue that holds a message for `step_ms` milliseconds."""
        return self._holding(f"{self.queue}-wait-{step_ms}", step_ms)

    def always(self) -> tuple[QueueSpec, ...]:
        """Return the queues to declare on every connection, each before its users."""
        return (self.error, self.main, self.delay)

    def beacon(self, name: str, *, ttl_ms: int) -> tuple[QueueSpec, QueueSpec]:
        """Return a queue that beacons come back by, and the one that they wait in first."""
        back = f"{self.queue}-beacon-{name}"
        arguments = {
            "x-queue-type": "classic",  # others cannot be exclusive
            "x-message-ttl": ttl_ms,
            "x-dead-letter-exchange": self.exchange,
            "x-dead-letter-routing-key": back,
        }
        return (
            QueueSpec(back, {"x-queue-type": "classic"}, exclusive=True),
            QueueSpec(f"{self.queue}-beacon-delay-{name}", arguments, exclusive=True),
        )

    def waiting_room(self, wait_ms: float) -> QueueSpec:
        """Return the queue in which a message waits for (the first part of) `wait_ms`."""
        if round(wait_ms) == self.delayed_ttl_ms:
            return self.delay
        return self.step(ladder_step(wait_ms))

    def _holding(self, name: str, ttl_ms: int) -> QueueSpec:
        return QueueSpec(name, self._arguments(dead_letter_to=self.queue, ttl_ms=ttl_ms))

    def _arguments(
        self, *, dead_letter_to: str | None = None, ttl_ms: int | None = None
    ) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        if dead_letter_to is not None:
            arguments["x-dead-letter-exchange"] = self.exchange
            arguments["x-dead-letter-routing-key"] = dead_letter_to
        if ttl_ms is not None:
            arguments["x-message-ttl"] = ttl_ms
        if self.queue_type == "quorum":
            arguments["x-queue-type"] = "quorum"
            # RabbitMQ 4 drops or dead-letters what was delivered 20 times, and giving back
            # counts. Which tasks take workers down is for the state store to say.
            arguments["x-delivery-limit"] = DELIVERY_LIMIT
            if dead_letter_to is not None:
                # Without these two a quorum queue forgets a message before the next
                # queue has it (RabbitMQ's guide on quorum queues, "at-least-once").
                arguments["x-dead-letter-strategy"] = "at-least-once"
                arguments["x-overflow"] = "reject-publish"
        return arguments
