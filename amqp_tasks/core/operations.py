"""What can be asked of a state store, and the rules by which it answers.

An operation is a value; a store takes a batch of them (`abc.StateStore.apply`) and
answers each with the type that its class names. Operations that change a task touch
that task only and are atomic. `change` is their rule book: a pure function from the
record before to the record after. The in-memory store calls it; the Redis scripts say
the same in Lua, and the conformance suite holds the two against each other.

Every operation may be sent twice: a client that lost the answer repeats the question.
A repeated write by the same producer (nonce) or the same delivery (lease) gets the
answer that the first one got.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Generic, TypeAlias, TypeVar

from .lifecycle import Event, TaskStatus, advance, sources, target
from .record import Owed, TaskRecord

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
    "RequestCancel",
    "Revoke",
    "Settle",
    "Settled",
    "change",
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

    False if it is not the task that the producer with this nonce has made, or has gone on.
    """

    task_id: str
    nonce: str
    now: float


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
    presumed_dead: str | None = None
    """The owner that a claim before this one met, and whose presence is gone."""
    deadline: float | None = None
    parent: str | None = None


@dataclass(frozen=True, slots=True)
class Granted:
    """Start. `crashes` attempts before this one never settled."""

    fence: int
    crashes: int


@dataclass(frozen=True, slots=True)
class Held:
    """`owner` runs it. If its presence is gone, claim again and say so."""

    owner: str


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
    """The state is ahead of the queues: publish what it owes, then drop the message."""

    owed: Owed
    attempt: int
    due: float | None
    error: str | None


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
    ttl: float
    """Seconds that an ended state is kept."""
    result: str | None = None
    error: str | None = None
    reason: str | None = None
    due: float | None = None
    owed: Owed | None = None


YIELDING: Final = frozenset({Event.RETRY, Event.RELEASE})
"""Events to which a cancel request is preferred that came while the attempt was ending:
nobody would look for it any more, and a task that shall be cancelled does not go on."""


FAR: Final = 1e9
"""Seconds, thirty years: a message that is due later than that is not waited for."""


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
    """Read a task's log after `after` (a position; None from the beginning)."""

    task_id: str
    after: str | None = None
    limit: int = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ListTasks(Operation[Sequence[str]]):
    """List ids in their order: those that begin with `prefix`, after `after`."""

    prefix: str = ""
    status: TaskStatus | None = None
    after: str | None = None
    limit: int = 100


# ------------------------------------------------------------------------- rules

Change: TypeAlias = Create | Discharge | Revoke | RequestCancel | Claim | Settle
"""The operations that change a task's record."""


def change(record: TaskRecord | None, operation: Change) -> tuple[TaskRecord | None, object]:
    """Return the record after `operation`, and the answer to it.

    `record` is not modified. A record whose time is over counts as not there; whoever
    calls sees to that.
    """
    match operation:
        case Create():
            return _create(record, operation)
        case Discharge():
            return _discharge(record, operation)
        case Revoke():
            return _revoke(record, operation)
        case RequestCancel():
            return _request_cancel(record, operation)
        case Claim():
            return _claim(record, operation)
        case Settle():
            return _settle(record, operation)


def _create(record: TaskRecord | None, op: Create) -> tuple[TaskRecord, Created]:
    if record is not None:
        owed = record.owed is Owed.PUBLISH
        return record, Created(new=record.nonce == op.nonce, owed=owed)
    fresh = TaskRecord(
        task_id=op.task_id,
        name=op.name,
        job=op.job,
        created_at=op.now,
        updated_at=op.now,
        due=op.due,
        deadline=op.deadline,
        parent=op.parent,
        owed=Owed.PUBLISH,
        nonce=op.nonce,
        expires_at=op.now + op.ttl,
    )
    return fresh, Created(new=True, owed=True)


def _discharge(record: TaskRecord | None, op: Discharge) -> tuple[TaskRecord | None, None]:
    if record is None or record.owed is not op.owed or record.attempt != op.attempt:
        return record, None
    expires_at = None if op.ttl is None else op.now + op.ttl
    if record.status.ended:
        expires_at = record.expires_at
    return replace(record, owed=None, expires_at=expires_at), None


def _revoke(record: TaskRecord | None, op: Revoke) -> tuple[TaskRecord | None, bool]:
    if record is None:
        return None, True
    if (
        record.status is TaskStatus.SCHEDULED
        and record.owed is Owed.PUBLISH
        and record.nonce == op.nonce
    ):
        return None, True
    return record, False


def _request_cancel(
    record: TaskRecord | None, op: RequestCancel
) -> tuple[TaskRecord | None, CancelAnswer]:
    if record is None:
        return None, UNKNOWN
    if record.status.ended:
        return record, ALREADY_ENDED
    if record.status is TaskStatus.RUNNING:
        return replace(record, cancel=record.cancel or op.reason), REQUESTED
    # Its message comes by one day. Were the state forgotten before, it would be run: so it
    # is kept until then, and the claim that finds it ended lets it expire.
    return _canceled(record, op.reason, now=op.now, ttl=None), CANCELED_NOW


def _canceled(record: TaskRecord, reason: str, *, now: float, ttl: float | None) -> TaskRecord:
    return replace(
        record,
        status=advance(record.status, Event.CANCEL),
        reason=reason,
        cancel=None,
        owed=None,
        updated_at=now,
        ended_at=now,
        expires_at=None if ttl is None else now + ttl,
    )


def _claim(record: TaskRecord | None, op: Claim) -> tuple[TaskRecord, ClaimAnswer]:
    if record is None:
        # The store was emptied, or the message comes from guillotina_amqp: it carries
        # all that is needed.
        record = TaskRecord(
            task_id=op.task_id,
            name=op.name,
            job=op.job,
            attempt=op.attempt,
            created_at=op.now,
            deadline=op.deadline,
            parent=op.parent,
        )
    if record.status.ended:
        return _claim_of_ended(record, op)
    if op.attempt < record.attempt:
        if record.owed is Owed.RETRY and op.attempt == record.attempt - 1:
            return record, Owing(Owed.RETRY, record.attempt, record.due, record.error)
        return record, Duplicate(record.attempt)
    if record.status is TaskStatus.RUNNING:
        if record.lease == op.lease:
            return record, Granted(record.fence, record.crashes)
        if record.owner != op.presumed_dead:
            return record, Held(record.owner)
        if record.cancel is not None:
            canceled = _canceled(record, record.cancel, now=op.now, ttl=op.ttl)
            return canceled, Ended(canceled.status)
    crashed = record.status is TaskStatus.RUNNING
    claimed = replace(
        record,
        status=advance(record.status, Event.CLAIM),
        attempt=op.attempt,
        # At least the time in milliseconds, so that it grows even when the store was
        # emptied and has forgotten the fences before.
        fence=max(record.fence + 1, int(op.now * 1000)),
        lease=op.lease,
        # A state that was written anew by a settlement knew neither of these.
        job=record.job or op.job,
        parent=(op.parent or None) if record.parent is None else record.parent,
        crashes=record.crashes + crashed,
        started_at=op.now,
        updated_at=op.now,
        due=None,
        owed=None,
        expires_at=None,
    )
    return claimed, Granted(claimed.fence, claimed.crashes)


def _claim_of_ended(record: TaskRecord, op: Claim) -> tuple[TaskRecord, ClaimAnswer]:
    if record.owed is Owed.ERROR and record.attempt == op.attempt:
        return record, Owing(Owed.ERROR, record.attempt, None, record.error)
    if record.expires_at is None:
        # This may be the copy of an earlier attempt, while the one that is due still waits.
        due = record.due or 0.0
        start = due if op.now < due < op.now + FAR else op.now
        record = replace(record, expires_at=start + op.ttl)
    return record, Ended(record.status)


def _settle(record: TaskRecord | None, op: Settle) -> tuple[TaskRecord | None, Settled]:
    if record is None:
        record = TaskRecord(
            task_id=op.task_id,
            name=op.name,
            job="",
            status=TaskStatus.RUNNING,
            attempt=op.attempt,
            fence=op.fence,
            lease=op.lease,
            created_at=op.now,
        )
    if record.lease != op.lease or record.fence != op.fence:
        return record, STALE
    if record.status not in sources(op.event):
        repeated = record.status is target(op.event) and record.attempt == op.attempt
        return record, WRITTEN if repeated else STALE
    if record.cancel is not None and op.event in YIELDING:
        # Stale, so that nothing is published that would outlive this state.
        return _canceled(record, record.cancel, now=op.now, ttl=op.ttl), STALE
    status = target(op.event)
    settled = replace(
        record,
        status=status,
        attempt=op.attempt,
        updated_at=op.now,
        due=op.due,
        result=op.result,
        error=op.error if op.error is not None else record.error,
        reason=op.reason,
        cancel=None,
        owed=op.owed,
        ended_at=op.now if status.ended else None,
        expires_at=op.now + op.ttl if status.ended else None,
    )
    return settled, WRITTEN
