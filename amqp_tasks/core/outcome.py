"""How an attempt can end, and why it can be cancelled.

Everything that stops a task cancels its scope with a `CancelReason`. The reason
decides, by the table in `cancelled_outcome`, which outcome the attempt has; the
outcome decides, in `settlement`, what is written and published.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, TypeAlias

__all__ = [
    "CancelReason",
    "Canceled",
    "Failed",
    "Failure",
    "GivenBack",
    "LeaseLost",
    "Outcome",
    "Reason",
    "Succeeded",
    "cancelled_outcome",
]


class CancelReason(StrEnum):
    """Why a task's cancel scope was cancelled."""

    USER = "user"
    """Somebody called `TaskHandle.cancel`."""
    TIMEOUT = "timeout"
    """One attempt took longer than the task's timeout."""
    DEADLINE = "deadline"
    """The absolute time by which the caller needs the result has passed."""
    PARENT = "parent"
    """The task that waits for this one failed, was cancelled or is gone."""
    SHUTDOWN = "shutdown"
    """The worker stops and its grace is over."""
    LEASE_LOST = "lease_lost"
    """Another worker has taken the task over."""
    BLOCKED_LOOP = "blocked_loop"
    """The task captured the event loop."""


class Reason(StrEnum):
    """Why a task failed, where "it raised" is not the whole story."""

    TIMEOUT = "timeout"
    DEADLINE = "deadline"
    BLOCKED_LOOP = "blocked_loop"
    UNDECODABLE = "undecodable"
    UNKNOWN_TASK = "unknown_task"
    BAD_ARGUMENTS = "bad_arguments"
    BAD_RESULT = "bad_result"
    """The task returned what cannot be written as JSON."""
    CORRUPT_STATE = "corrupt_state"
    """What the state store keeps under the task's id is not a task's state."""
    NOT_QUEUED = "not_queued"
    """It never came into the queue; its producer wished to have that on record."""
    CRASHED_WORKER = "crashed_worker"
    """Its worker died under it, `max_crashes` times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What is kept of an exception, in the state and in the error queue."""

    type: str
    """Dotted name of the exception's class."""
    message: str
    traceback: str = ""
    reason: Reason | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The task returned. `result` is its value as JSON text."""

    result: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The attempt did not succeed. `may_retry` is False where trying again is futile."""

    failure: Failure
    may_retry: bool = True


@dataclass(frozen=True, slots=True)
class Canceled:
    """The task was stopped because somebody asked for it."""

    reason: CancelReason


@dataclass(frozen=True, slots=True)
class GivenBack:
    """The worker stops; the attempt does not count and somebody else runs the task."""


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """Somebody else runs the task now; whatever this attempt did is not recorded."""


Outcome: TypeAlias = Succeeded | Failed | Canceled | GivenBack | LeaseLost


def cancelled_outcome(reason: CancelReason, failure: Failure) -> Outcome:
    """Return the outcome of an attempt that was cancelled for `reason`.

    `failure` describes the cancellation, or the error that the task raised while it
    was being cancelled; it is used by the reasons that count as failures.
    """
    match reason:
        case CancelReason.USER | CancelReason.PARENT:
            return Canceled(reason)
        case CancelReason.TIMEOUT | CancelReason.BLOCKED_LOOP:
            return Failed(failure)
        case CancelReason.DEADLINE:
            return Failed(failure, may_retry=False)
        case CancelReason.SHUTDOWN:
            return GivenBack()
        case CancelReason.LEASE_LOST:
            return LeaseLost()
