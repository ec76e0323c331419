"""Verdicts on deliveries, and the fewest commands that tell the broker about them.

AMQP numbers the deliveries of a channel from 1 up; the number is the delivery's tag. An
ack with `multiple` also acks every earlier delivery of the channel *that has no verdict
yet*. So the acks of a finished prefix, the deliveries before the oldest one that is still
open, leave as one command. Two things make that right: a nack of this batch is sent before
the ack that would swallow it, and what comes behind an open delivery is acked by itself.

No I/O here: `Unsettled` works out the commands, the consumer sends them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from enum import Enum

__all__ = ["Command", "Unsettled", "Verdict"]


class Verdict(Enum):
    """What becomes of a delivery."""

    ACK = "ack"
    REQUEUE = "requeue"
    REJECT = "reject"


@dataclass(frozen=True, slots=True)
class Command:
    """One frame for the broker."""

    tag: int
    verdict: Verdict
    multiple: bool = False


class Unsettled:
    """The deliveries of one channel that the broker waits for, and what to tell it."""

    __slots__ = ("_given", "_open", "_order")

    def __init__(self) -> None:
        self._open: set[int] = set()
        # The same tags and some settled ones, oldest first: the oldest open tag is found
        # without sorting, and settled ones leave when they reach the front.
        self._order: deque[int] = deque()
        self._given: list[tuple[int, Verdict]] = []

    def __len__(self) -> int:
        """Return how many deliveries have no verdict yet."""
        return len(self._open)

    def add(self, tag: int) -> None:
        """Take note of a delivery. Tags come in rising order."""
        self._open.add(tag)
        self._order.append(tag)

    def settle(self, tag: int, verdict: Verdict) -> bool:
        """Record a verdict; return False if there is nothing to say it about.

        That is so after `forget`, and for a second verdict on the same delivery: the
        broker answers an unknown tag by closing the channel.
        """
        if tag not in self._open:
            return False
        self._open.remove(tag)
        self._given.append((tag, verdict))
        return True

    def take(self) -> list[Command]:
        """Return the commands for the verdicts since the last call, in sending order."""
        given, self._given = self._given, []
        if not given:
            return []
        order = self._order
        while order and order[0] not in self._open:
            order.popleft()
        acks = sorted(tag for tag, verdict in given if verdict is Verdict.ACK)
        prefix = bisect_left(acks, order[0]) if order else len(acks)
        commands = [Command(tag, verdict) for tag, verdict in given if verdict is not Verdict.ACK]
        if prefix:
            commands.append(Command(acks[prefix - 1], Verdict.ACK, multiple=prefix > 1))
        commands.extend(Command(tag, Verdict.ACK) for tag in acks[prefix:])
        return commands

    def forget(self) -> None:
        """Drop everything: the channel is gone, and the broker delivers again anyway."""
        self._open.clear()
        self._order.clear()
        self._given.clear()
