"""When an event loop counts as captured: a decision about times that were read elsewhere.

Somebody looks at the loop again and again, by some clock, and notes how often it has
beaten and which task it runs. The loop is captured when for `timeout` seconds it has not
beaten, one and the same task has had it all the time, and whoever looks was never late
himself. So three things are no capture:

- many short steps that together keep the loop from beating: that is load, and no task's
  fault more than another's;
- a process that was suspended, or had no processor: then the looks are late, too, and
  one look after a long silence says nothing about what was in between;
- a thread that waits for a processor, on a busy machine: such time does not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from ..core.outcome import Failure, Reason
from ..exceptions import LoopBlocked
from .attempt import Attempt

__all__ = ["Capture", "Limits", "Sight", "Verdict", "judge", "look"]

LOOKS: Final = 10
"""Looks, and beats, within the timeout."""

LONGEST_PAUSE: Final = 0.5
"""Seconds between two of them at most, however long the timeout."""

LATE: Final = 4
"""Pauses after which a look is so late that nothing is known about the time before it."""


class Verdict(Enum):
    """What there is to do about a loop."""

    FREE = auto()
    CAPTURED = auto()
    HOPELESS = auto()
    """Captured, and the grace is over."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds: how long a task may keep the loop, and how long it may take to let go."""

    timeout: float
    grace: float

    @property
    def pause(self) -> float:
        """Seconds between two looks, and between two beats."""
        return min(self.timeout / LOOKS, LONGEST_PAUSE)

    def is_late(self, gap: float) -> bool:
        """True if a look tells nothing about the `gap` seconds since the one before it."""
        return gap > LATE * self.pause


@dataclass(frozen=True, slots=True)
class Sight:
    """What was seen at one look."""

    at: float
    """When, by a clock on which only time passes that the loop's thread could use."""
    beats: int
    """How often the loop had beaten."""
    task: object | None
    """What had the loop; None if that is not known."""
    since: float
    """Since when it is certain to have had it, without a beat."""


def look(
    before: Sight | None,
    *,
    at: float,
    beats: int,
    task: object | None,
    is_late: bool = False,
) -> Sight:
    """Return what is seen now, after what was seen before."""
    if (
        before is None
        or beats != before.beats
        or is_late
        or (before.task is not None and task is not before.task)
    ):
        return Sight(at=at, beats=beats, task=task, since=at)
    return Sight(at=at, beats=beats, task=task, since=before.since)


def judge(sight: Sight, limits: Limits) -> Verdict:
    """Return what a sight means."""
    seconds = sight.at - sight.since
    if seconds < limits.timeout:
        return Verdict.FREE
    return Verdict.CAPTURED if seconds < limits.timeout + limits.grace else Verdict.HOPELESS


@dataclass(frozen=True, slots=True)
class Capture:
    """A loop that was captured, and by whom."""

    beats: int
    task: object | None
    attempt: Attempt | None
    """None if what has the loop is no task of ours, or is not known."""
    seconds: float
    stack: str
    """Of the loop's thread, as text."""

    @property
    def key(self) -> tuple[int, Attempt | None]:
        """The same for all captures that are one, whoever saw them."""
        return self.beats, self.attempt

    def is_seen_in(self, sight: Sight) -> bool:
        """True if it still goes on."""
        return sight.beats == self.beats and sight.task is self.task

    def failure(self) -> Failure:
        """Return what is kept of it, as the failure of its attempt."""
        return Failure(
            type=f"{LoopBlocked.__module__}.{LoopBlocked.__qualname__}",
            message=f"the task captured the event loop for {self.seconds:.1f} s "
            "(auto_kill_timeout)",
            traceback=self.stack,
            reason=Reason.BLOCKED_LOOP,
        )
