"""What follows from the outcome of an attempt: an ordered list of effects.

`settle` is the whole rule. It decides and does nothing; the worker carries the effects
out one after the other, and the broker's verdict on the delivery is always the last. A
crash between any two of them is survivable: the message is redelivered and meets the
state, and the claim (`operations`) tells from there what is left to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final, TypeAlias

from pydantic_core import to_json

from .lifecycle import Event
from .message import Message, clean, error_headers, fitting, passed_on
from .operations import Discharge, Settle
from .outcome import Canceled, Failed, Failure, GivenBack, LeaseLost, Outcome, Succeeded
from .record import Owed
from .retry import RetryPolicy
from .topology import QueueSpec, Topology

__all__ = [
    "Effect",
    "Lease",
    "MarkPublished",
    "Publication",
    "Publish",
    "Rules",
    "Verdict",
    "WriteState",
    "dead_letter",
    "error_text",
    "guard",
    "park",
    "postpone",
    "publish_retry",
    "settle",
    "unreadable",
    "unrecorded",
    "wait_for",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """A message and the queue that it goes to."""

    queue: QueueSpec
    body: bytes
    headers: dict[str, Any]


@dataclass(frozen=True, slots=True)
class WriteState:
    """Write the state. If somebody else holds the lease by now, the delivery is given
    back, as for a lost lease, and nothing else follows."""

    operation: Settle


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish and wait until the broker has confirmed."""

    publication: Publication


@dataclass(frozen=True, slots=True)
class MarkPublished:
    """Tell the state that what it owed is in the queue."""

    operation: Discharge


class Verdict(StrEnum):
    """What the broker is told about the delivery."""

    ACK = "ack"
    REQUEUE = "requeue"


Effect: TypeAlias = WriteState | Publish | MarkPublished | Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to settle an attempt, as the claim granted it."""

    id: str
    fence: int
    worker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What an app says about the settlement of one of its tasks."""

    topology: Topology
    retry: RetryPolicy
    state_ttl: float | None
    """Seconds that an ended state is kept; None: until a copy of the message that is on
    its way has come by, so that it is not run again."""


def settle(
    outcome: Outcome,
    message: Message,
    lease: Lease,
    rules: Rules,
    *,
    now: float,
    spread: float,
) -> tuple[Effect, ...]:
    """Return what to do about an attempt that ended with `outcome`, in this order.

    Args:
        now: seconds since the epoch.
        spread: a random number between -1 and 1, for the jitter of the retry delay.
    """
    write = _writer(message, lease, rules, now)
    match outcome:
        case Succeeded(result):
            return (write(Event.SUCCEED, result=result), Verdict.ACK)
        case Failed(failure, may_retry):
            error = error_text(failure, attempt=message.attempt, worker=lease.worker)
            if may_retry and rules.retry.allows(message.attempt):
                due = now + rules.retry.delay_after(message.attempt, spread)
                again = message.attempt + 1
                state = write(Event.RETRY, attempt=again, error=error, due=due, owed=Owed.RETRY)
                return (state, *publish_retry(message, again, due, rules, now=now))
            reason = failure.reason
            state = write(Event.FAIL, error=error, reason=reason, owed=Owed.ERROR)
            return (state, *dead_letter(message, failure, lease.worker, rules, now=now))
        case Canceled(reason):
            return (write(Event.CANCEL, reason=reason), Verdict.ACK)
        case GivenBack():
            return (write(Event.RELEASE), Verdict.REQUEUE)
        case LeaseLost():
            # Not acked: whoever has the lease may have claimed with a delivery that its
            # broker has taken back since, and then this one is the only copy.
            return (Verdict.REQUEUE,)


def postpone(message: Message, lease: Lease, rules: Rules, *, now: float) -> tuple[Effect, ...]:
    """Return the effects that give back what was claimed, for a moment, unstarted."""
    write = _writer(message, lease, rules, now)
    return (write(Event.RELEASE), Publish(park(message, rules.topology)), Verdict.ACK)


def publish_retry(
    message: Message, attempt: int, due: float | None, rules: Rules, *, now: float
) -> tuple[Effect, ...]:
    """Return the effects that bring the next attempt on its way, then drop the message."""
    again = message.for_attempt(attempt, due=due)
    return (
        Publish(wait_for(again, rules.topology, now=now)),
        MarkPublished(
            Discharge(task_id=message.task_id, owed=Owed.RETRY, attempt=attempt, ttl=None, now=now)
        ),
        Verdict.ACK,
    )


def dead_letter(
    message: Message, failure: Failure, worker: str, rules: Rules, *, now: float
) -> tuple[Effect, ...]:
    """Return the effects that bring a message to the error queue, then drop it."""
    publish, verdict = unrecorded(message, failure, worker, rules.topology, now=now)
    discharge = Discharge(
        task_id=message.task_id,
        owed=Owed.ERROR,
        attempt=message.attempt,
        ttl=rules.state_ttl,
        now=now,
    )
    return (publish, MarkPublished(discharge), verdict)


def unrecorded(
    message: Message, failure: Failure, worker: str, topology: Topology, *, now: float
) -> tuple[Effect, Effect]:
    """Return the effects that bring a message to the error queue, and touch no state."""
    why = error_headers(failure, attempt=message.attempt, worker=worker, at=now)
    headers = fitting({**message.headers(), **why})
    letter = Publication(queue=topology.error, body=message.body, headers=headers)
    return (Publish(letter), Verdict.ACK)


def unreadable(
    body: bytes,
    headers: Mapping[str, Any],
    failure: Failure,
    worker: str,
    topology: Topology,
    *,
    now: float,
) -> tuple[Effect, ...]:
    """Return the effects for what came from the queue and is no message of ours."""
    why = error_headers(failure, attempt=1, worker=worker, at=now)
    kept = passed_on(headers)
    return (
        Publish(Publication(queue=topology.error, body=body, headers=fitting({**kept, **why}))),
        Verdict.ACK,
    )


def wait_for(message: Message, topology: Topology, *, now: float) -> Publication:
    """Return the publication that makes `message` come back when it is due, or earlier."""
    wait_ms = max(0.0, (message.due or now) - now) * 1000
    queue = topology.waiting_room(wait_ms) if wait_ms > 0 else topology.main
    return Publication(queue=queue, body=message.body, headers=message.headers())


PARK_MS: Final = (1_000, 5_000)
PARKED_SHORTLY: Final = 10
"""A parked copy comes back every second at first, because the common case is a worker
that has just died; after ten times less often, because then the task is a long one."""


def park(message: Message, topology: Topology) -> Publication:
    """Return the publication of a copy that waits while the task is being run."""
    step = PARK_MS[message.parked >= PARKED_SHORTLY]
    again = message.parked_again()
    return Publication(queue=topology.step(step), body=again.body, headers=again.headers())


def guard(message: Message, topology: Topology) -> Publication:
    """Return the publication of a copy that keeps a task whose delivery is acked early.

    It comes back now and then, finds the task running, and waits again; or finds its
    worker gone, and the task starts anew.
    """
    return park(message.parked_again(PARKED_SHORTLY), topology)


def _writer(message: Message, lease: Lease, rules: Rules, now: float) -> Callable[..., WriteState]:
    blank = Settle(
        task_id=message.task_id,
        name=message.func,
        lease=lease.id,
        fence=lease.fence,
        event=Event.SUCCEED,
        attempt=message.attempt,
        now=now,
        ttl=rules.state_ttl,
    )

    def write(event: Event, **fields: Any) -> WriteState:
        return WriteState(replace(blank, event=event, **fields))

    return write


def error_text(failure: Failure, *, attempt: int, worker: str) -> str:
    """Return what a state keeps of a failure, as JSON text."""
    known = {
        key: clean(value) if isinstance(value, str) else value
        for key, value in failure.as_dict().items()
    }
    return to_json({**known, "attempt": attempt, "worker": worker}).decode()
