"""The rules by which a state store answers: a pure function from record to record.

The in-memory store calls `change`; the Redis scripts say the same in Lua, and the
conformance suite holds the two against each other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from .lifecycle import Event, TaskStatus, advance, sources, target
from .operations import (
    ALREADY_ENDED,
    CANCELED_NOW,
    REQUESTED,
    STALE,
    UNKNOWN,
    WRITTEN,
    YIELDING,
    CancelAnswer,
    Change,
    Claim,
    ClaimAnswer,
    Create,
    Created,
    Discharge,
    Duplicate,
    Ended,
    Granted,
    Held,
    Owing,
    Reopen,
    Reopened,
    RequestCancel,
    Revoke,
    Settle,
    Settled,
)
from .outcome import Reason
from .record import Owed, TaskRecord, owner_of

__all__ = ["change"]

FAR: Final = 1e9
"""Seconds, thirty years: a message that is due later than that is not waited for."""


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
        case Reopen():
            return _reopen(record, operation)
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
        timeout=op.timeout,
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
    if record.nonce == op.nonce:
        if record.status is TaskStatus.SCHEDULED and record.owed is Owed.PUBLISH:
            return (None if op.error is None else _never_queued(record, op)), True
        if record.reason == Reason.NOT_QUEUED and op.error is not None:
            return record, True
    return record, False


def _never_queued(record: TaskRecord, op: Revoke) -> TaskRecord:
    return replace(
        record,
        status=advance(record.status, Event.FAIL),
        error=op.error,
        reason=Reason.NOT_QUEUED,
        owed=None,
        updated_at=op.now,
        ended_at=op.now,
        expires_at=op.now + op.ttl,
    )


def _reopen(record: TaskRecord | None, op: Reopen) -> tuple[TaskRecord, Reopened]:
    if record is not None and record.status not in sources(Event.REOPEN):
        first = record.status is TaskStatus.SCHEDULED and record.owed is Owed.PUBLISH
        return record, Reopened(record.status, first)
    reopened = TaskRecord(
        task_id=op.task_id,
        name=op.name,
        job=op.job,
        status=target(Event.REOPEN),
        # Of the life before, what happened when, and the fence, which only grows. Not the
        # lease: whoever held it might settle once more.
        fence=0 if record is None else record.fence,
        created_at=op.now if record is None else record.created_at,
        started_at=None if record is None else record.started_at,
        updated_at=op.now,
        deadline=op.deadline,
        timeout=op.timeout,
        parent=op.parent,
        owed=Owed.PUBLISH,
        nonce=op.nonce,
        expires_at=op.now + op.ttl,
    )
    return reopened, Reopened(reopened.status, True)


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
            timeout=op.timeout,
            parent=op.parent,
        )
    if record.status.ended:
        return _claim_of_ended(record, op)
    if op.attempt < record.attempt:
        if record.owed is Owed.RETRY and op.attempt == record.attempt - 1:
            return record, _owing(record)
        return record, Duplicate(record.attempt)
    crashed = False
    if record.status is TaskStatus.RUNNING:
        if record.lease == op.lease:
            return record, Granted(record.fence, record.crashes)
        if op.lost_lease != (record.lease or None):
            return record, Held(record.lease)
        # Who takes a lease of his own again has not died under it; and if there is a message
        # for a later attempt, this one was settled, and the store has lost that.
        crashed = record.attempt == op.attempt and record.owner != owner_of(op.lease)
        if record.cancel is not None:
            canceled = _canceled(record, record.cancel, now=op.now, ttl=op.ttl)
            return canceled, Ended(canceled.status)
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


def _owing(record: TaskRecord) -> Owing:
    assert record.owed is not None
    due = record.due if record.owed is Owed.RETRY else None
    return Owing(record.owed, record.attempt, due, record.error, record.lease)


def _claim_of_ended(record: TaskRecord, op: Claim) -> tuple[TaskRecord, ClaimAnswer]:
    if record.owed is Owed.ERROR and record.attempt == op.attempt:
        return record, _owing(record)
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
        # Those before this attempt, which took no worker down.
        crashes=0 if op.event is Event.RETRY else record.crashes,
        ended_at=op.now if status.ended else None,
        expires_at=op.now + op.ttl if status.ended and op.ttl is not None else None,
    )
    return settled, WRITTEN
