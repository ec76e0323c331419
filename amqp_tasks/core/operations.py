"""What can be asked of a state store.

An operation is a value; a store takes a batch of them (`abc.StateStore.apply`) and
answers each with the type that its class names. Operations that change a task touch
that task only and are atomic; `rules` says what they change.

Every operation may be sent twice: a client that lost the answer repeats the question.
A repeated write by the same producer (nonce) or the same delivery (lease) gets the
answer that the first one got.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeAlias, TypeVar

from .lifecycle import Event, TaskStatus
from .record import Owed, TaskRecord, owner_of

__all__ = [
    "YIELDING",
    "AppendEvents",
    "Beat",
    "CancelAnswer",
    "Change",
    "Claim",
    "ClaimAnswer",
    "Create",
    "Created",
    "Discharge",
    "Duplicate",
    "Ended",
    "Granted",
    "Held",
    "IsAlive",
    "Leave",
    "ListTasks",
    "LogEntry",
    "Operation",
    "Owing",
    "Poll",
    "Polled",
    "Read",
    "ReadEvents",
    "Reopen",
    "Reopened",
    "RequestCancel",
    "Revoke",
    "Settle",
    "Settled",
]

R_co = TypeVar("R_co", covariant=True)


class Operation(Generic[R_co]):
    """A question to a state store; `R_co` is the type of the answer."""

    __slots__ = ()


# --------------------------------------------------------------------- producers


@dataclass(frozen=True, slots=True, kw_only=True)
class Create(Operation["Created"]):
    """Write the state of a new task, before its message is published.

    Until `Discharge` the state expires after `ttl` seconds, so that a producer which
    dies in between does not leave a task that is scheduled for ever.
    """

    task_id: str
    name: str
    job: str
    nonce: str
    now: float
    ttl: float = 3600.0
    due: float | None = None
    deadline: float | None = None
    timeout: float | None = None
    parent: str | None = None


@dataclass(frozen=True, slots=True)
class Created:
    """Whether the task is new, and whether its first message is still owed."""

    new: bool
    owed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Discharge(Operation[None]):
    """The publication that the state owed was confirmed."""

    task_id: str
    owed: Owed
    attempt: int
    ttl: float | None
    """Seconds that the state is kept from now on; None keeps it until the task ends."""
    now: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoke(Operation[bool]):
    """Take a new task back: its first message certainly is not in the queue.

    With an `error`, JSON text, the task is kept for `ttl` seconds, as errored. False if it is
    not the task that the producer with this nonce has made, or has gone on.
    """

    task_id: str
    nonce: str
    now: float
    error: str | None = None
    ttl: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reopen(Operation["Reopened"]):
    """Schedule an errored task anew, before its message leaves the error queue.

    It then owes its first message, as a new task does, and until `Discharge` expires after
    `ttl` seconds. A state that is not there (expired, say) is written as a producer would.
    Any other state is left as it is.
    """

    task_id: str
    name: str
    job: str
    nonce: str
    now: float
    ttl: float = 3600.0
    deadline: float | None = None
    timeout: float | None = None
    parent: str | None = None


@dataclass(frozen=True, slots=True)
class Reopened:
    """The status from now on, and whether the first message of a scheduled task is owed."""

    status: TaskStatus
    owed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCancel(Operation["CancelAnswer"]):
    """Cancel what waits; ask the worker of what runs to cancel it."""

    task_id: str
    reason: str
    now: float


class CancelAnswer(str):
    """``unknown``, ``ended``, ``canceled`` (it waited) or ``requested`` (it runs)."""

    __slots__ = ()


UNKNOWN = CancelAnswer("unknown")
ALREADY_ENDED = CancelAnswer("ended")
CANCELED_NOW = CancelAnswer("canceled")
REQUESTED = CancelAnswer("requested")


# ----------------------------------------------------------------------- workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim(Operation["ClaimAnswer"]):
    """Ask for the lease, to start the attempt that a delivery is for."""

    task_id: str
    name: str
    job: str
    attempt: int
    lease: str
    now: float
    ttl: float
    """Seconds that an ended state is kept."""
    lost_lease: str = ""
    """The lease that a claim before this one met, and whose owner is gone; or none."""
    deadline: float | None = None
    timeout: float | None = None
    parent: str | None = None


@dataclass(frozen=True, slots=True)
class Granted:
    """Start. `crashes` attempts before this one never settled."""

    fence: int
    crashes: int


@dataclass(frozen=True, slots=True)
class Held:
    """Somebody runs it. If its owner's presence is gone, claim again and say so."""

    lease: str

    @property
    def owner(self) -> str:
        return owner_of(self.lease)


@dataclass(frozen=True, slots=True)
class Ended:
    """The task has ended; the message has no work left to do."""

    status: TaskStatus


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A later attempt was started already, so this message's successor is on its way."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Owing:
    """The state is ahead of the queues: publish what it owes, then drop the message.

    Unless the owner of `lease`, who settled it, lives: it is about to publish itself.
    """

    owed: Owed
    attempt: int
    due: float | None
    error: str | None
    lease: str

    @property
    def owner(self) -> str:
        return owner_of(self.lease)


ClaimAnswer: TypeAlias = Granted | Held | Ended | Duplicate | Owing


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle(Operation["Settled"]):
    """Write how an attempt ended; refused unless `lease` and `fence` are current.

    A state that is not there (the store was emptied) is written anew: an end that
    nobody else can know must not be lost.
    """

    task_id: str
    name: str
    lease: str
    fence: int
    event: Event
    attempt: int
    """The attempt that the state speaks of from now on."""
    now: float
    ttl: float | None
    """Seconds that an ended state is kept; None keeps it until a copy of the message that
    is on its way has come by."""
    result: str | None = None
    error: str | None = None
    reason: str | None = None
    due: float | None = None
    owed: Owed | None = None


YIELDING: Final = frozenset({Event.RETRY, Event.RELEASE})
"""Events to which a cancel request is preferred that came while the attempt was ending:
nobody would look for it any more, and a task that shall be cancelled does not go on."""


class Settled(str):
    """``written``; or ``stale``: somebody else holds the task, or it was canceled instead."""

    __slots__ = ()


WRITTEN = Settled("written")
STALE = Settled("stale")


@dataclass(frozen=True, slots=True, kw_only=True)
class Poll(Operation["Polled | None"]):
    """Ask, for a task that runs here, who holds it and whether to cancel it."""

    task_id: str


@dataclass(frozen=True, slots=True)
class Polled:
    fence: int
    cancel: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendEvents(Operation[bool]):
    """Append to a task's log; False if `fence` is stale and nothing was written."""

    task_id: str
    fence: int
    entries: tuple[str, ...]
    """Each a JSON text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat(Operation[bool]):
    """Say that a worker is alive for `ttl` seconds more; False if it was presumed dead."""

    owner: str
    ttl: float
    info: str
    """What the worker tells about itself, JSON text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IsAlive(Operation[bool]):
    """Ask whether a worker's presence is there."""

    owner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave(Operation[None]):
    """Take a worker's presence away: it is gone, and its leases are free."""

    owner: str


# ----------------------------------------------------------------------- readers


@dataclass(frozen=True, slots=True, kw_only=True)
class Read(Operation[TaskRecord | None]):
    """Read a task's state."""

    task_id: str


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One entry of a task's log. `position` can be given to `ReadEvents.after`."""

    position: str
    data: str
    """JSON text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadEvents(Operation[Sequence[LogEntry]]):
    """Read a task's log after `after` (a position; None from the beginning).

    If there are more than `limit` entries, the first ones are the answer; or the newest ones,
    in their order as well.
    """

    task_id: str
    after: str | None = None
    limit: int = 1000
    newest: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ListTasks(Operation[Sequence[str]]):
    """List ids in their order: those that begin with `prefix`, after `after`."""

    prefix: str = ""
    status: TaskStatus | None = None
    after: str | None = None
    limit: int = 100


Change: TypeAlias = Create | Discharge | Revoke | Reopen | RequestCancel | Claim | Settle
"""The operations that change a task's record; `rules.change` says how."""
