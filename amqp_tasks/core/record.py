"""What a state store keeps of one task."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from .lifecycle import TaskStatus

__all__ = ["Owed", "TaskRecord", "owner_of"]


class Owed(StrEnum):
    """A publication that the state speaks of and that was not confirmed yet.

    A state is written before the message that goes with it is published, so a crash in
    between leaves the state ahead of the queues. The mark says so: whoever meets it
    publishes again. It goes away when the broker has confirmed.
    """

    PUBLISH = "publish"
    """The first message of a new task, by its producer."""
    RETRY = "retry"
    """The message of the next attempt, by the worker whose attempt failed."""
    ERROR = "error"
    """The message in the error queue."""


@dataclass(slots=True, kw_only=True)
class TaskRecord:
    """The state of one task. Times are seconds since the epoch."""

    task_id: str
    name: str
    """Registered name of the task."""
    job: str
    """The message's body, JSON text."""
    status: TaskStatus = TaskStatus.SCHEDULED
    attempt: int = 1
    """Number of the attempt that runs, or that will run next, or that ran last."""
    fence: int = 0
    """Grows with each claim, never goes back."""
    lease: str = ""
    """Who runs it: the worker's incarnation and the delivery, ``owner/number``."""
    crashes: int = 0
    """Attempts that were started and never settled."""
    created_at: float = 0.0
    updated_at: float = 0.0
    started_at: float | None = None
    """Start of the latest attempt."""
    ended_at: float | None = None
    due: float | None = None
    """When a waiting task is to be started, at the earliest."""
    deadline: float | None = None
    timeout: float | None = None
    """Seconds that one attempt may take, where the caller said."""
    parent: str | None = None
    result: str | None = None
    """JSON text."""
    error: str | None = None
    """The latest failure, JSON text of a `Failure` with attempt and worker."""
    reason: str | None = None
    """Why it was cancelled."""
    cancel: str | None = None
    """Why it shall be cancelled, as long as it runs."""
    owed: Owed | None = None
    nonce: str = ""
    """Tells a producer's repeated write from another producer's."""
    expires_at: float | None = None

    @property
    def owner(self) -> str:
        """Incarnation of the worker that holds, or last held, the lease."""
        return owner_of(self.lease)


def owner_of(lease: str) -> str:
    """Return the incarnation of the worker that a lease belongs to."""
    return lease.rpartition("/")[0]
