"""Workers as plain data: generators that ask for one effect after the other.

The rules are the real ones: `settle` and its neighbours decide what follows from what.
What a faulty worker does differently is a subclass of `Worker`: see `FAULTS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from amqp_tasks.core.message import Message
from amqp_tasks.core.operations import (
    STALE,
    WRITTEN,
    Change,
    Claim,
    Create,
    Discharge,
    Duplicate,
    Ended,
    Granted,
    Held,
    IsAlive,
    Owing,
)
from amqp_tasks.core.outcome import Failed, Failure, LeaseLost, Outcome, Reason
from amqp_tasks.core.record import Owed
from amqp_tasks.core.retry import RetryPolicy
from amqp_tasks.core.settlement import (
    Effect,
    Lease,
    MarkPublished,
    Publication,
    Publish,
    Rules,
    Verdict,
    WriteState,
    dead_letter,
    guard,
    park,
    publish_retry,
    settle,
    wait_for,
)
from amqp_tasks.core.topology import Topology

__all__ = [
    "FAULTS",
    "MAX_CRASHES",
    "MAX_RETRIES",
    "TOPOLOGY",
    "KeepsStatesShortly",
    "Run",
    "Script",
    "Step",
    "Worker",
    "produce",
]

MAX_RETRIES = 1
MAX_CRASHES = 2
TOPOLOGY = Topology(exchange="x", queue="main", queue_type="classic")
RULES = Rules(
    topology=TOPOLOGY,
    retry=RetryPolicy(max_retries=MAX_RETRIES, delay=2.0),
    state_ttl=1e6,
)


@dataclass(frozen=True, slots=True)
class Run:
    """The worker runs user code now, until it hears how that ended."""

    message: Message
    fence: int


Step: TypeAlias = Change | IsAlive | Publication | Verdict | Run
Script: TypeAlias = Generator[Step, Any, None]
Clock: TypeAlias = Callable[[], float]


class Worker:
    """How a worker reacts to a delivery, as it should."""

    rules = RULES
    heeds_fences = True

    def __init__(self, name: str, clock: Clock) -> None:
        self.name = name
        self.clock = clock

    def handle(self, message: Message, lease: str) -> Script:
        if message.due is not None and message.due > self.clock():
            yield wait_for(message, TOPOLOGY, now=self.clock())
            yield Verdict.ACK
            return
        answer = yield from self.claim(message, lease)
        match answer:
            case Granted(fence, crashes):
                granted = Lease(id=lease, fence=fence, worker=self.name)
                yield from self.attempt(message, granted, crashes)
            case Held():
                yield from self.held(message)
            case Owing():
                yield from self.owing(message, answer)
            case Ended() | Duplicate():
                yield Verdict.ACK

    def claim(self, message: Message, lease: str) -> Generator[Step, Any, object]:
        lost_lease = ""
        while True:
            answer = yield Claim(
                task_id=message.task_id,
                name=message.func,
                job=message.body.decode(),
                attempt=message.attempt,
                lease=lease,
                now=self.clock(),
                ttl=self.rules.state_ttl or 0.0,
                lost_lease=lost_lease,
            )
            if not isinstance(answer, Held) or (yield from self.is_alive(answer.owner)):
                return answer
            lost_lease = answer.lease

    def is_alive(self, owner: str) -> Generator[Step, Any, bool]:
        alive: bool = yield IsAlive(owner=owner)
        return alive

    def held(self, message: Message) -> Script:
        yield park(message, TOPOLOGY)
        yield Verdict.ACK

    def owing(self, message: Message, answer: Owing) -> Script:
        if answer.owed is Owed.RETRY:
            due, now = answer.due, self.clock()
            yield from self.carry_out(
                publish_retry(message, answer.attempt, due, self.rules, now=now)
            )
        else:
            known = json.loads(answer.error or "{}")
            failure = Failure(type=known["type"], message=known["message"])
            effects = dead_letter(message, failure, self.name, self.rules, now=self.clock())
            yield from self.carry_out(effects)

    def attempt(self, message: Message, lease: Lease, crashes: int) -> Script:
        outcome: Outcome
        if self.too_many(crashes):
            failure = Failure(type="Crash", message="", reason=Reason.CRASHED_WORKER)
            outcome = Failed(failure, may_retry=False)
        else:
            outcome = yield Run(message, lease.fence)
        yield from self.carry_out(self.settlement(outcome, message, lease))

    def too_many(self, crashes: int) -> bool:
        return crashes >= MAX_CRASHES

    def settlement(self, outcome: Outcome, message: Message, lease: Lease) -> Iterable[Effect]:
        return settle(outcome, message, lease, self.rules, now=self.clock(), spread=0.0)

    def carry_out(self, effects: Iterable[Effect]) -> Script:
        for effect in effects:
            match effect:
                case WriteState(operation):
                    answer = yield operation
                    if answer == STALE:
                        yield from self.taken_over()
                        return
                    if answer != WRITTEN:
                        yield Verdict.ACK
                        return
                case Publish(publication):
                    yield publication
                case MarkPublished(discharge):
                    yield discharge
                case Verdict():
                    yield effect

    def taken_over(self) -> Script:
        """Somebody else holds the task now: the same as when that was seen earlier."""
        message = Message(task_id="", func="")
        lease = Lease(id="", fence=0, worker=self.name)
        (verdict,) = settle(LeaseLost(), message, lease, self.rules, now=self.clock(), spread=0.0)
        assert isinstance(verdict, Verdict)
        yield verdict

    def guard(self, message: Message) -> Script:
        """What replaces a delivery that would be held for too long."""
        yield guard(message, TOPOLOGY)
        yield Verdict.ACK


def produce(message: Message, nonce: str, clock: Clock) -> Script:
    created = yield Create(
        task_id=message.task_id,
        name=message.func,
        job="{}",
        nonce=nonce,
        now=clock(),
        due=message.due,
    )
    if created.owed:
        yield wait_for(message, TOPOLOGY, now=clock())
        yield Discharge(
            task_id=message.task_id, owed=Owed.PUBLISH, attempt=1, ttl=None, now=clock()
        )


class KeepsStatesShortly(Worker):
    """A worker of an app whose retries wait for longer than states are kept."""

    rules = Rules(
        topology=TOPOLOGY,
        retry=RetryPolicy(max_retries=MAX_RETRIES, delay=60.0),
        state_ttl=20.0,
    )


# ------------------------------------------------------------------------ faults


class AcksBeforePublishing(Worker):
    def settlement(self, outcome: Outcome, message: Message, lease: Lease) -> Iterable[Effect]:
        *before, verdict = super().settlement(outcome, message, lease)
        return (*before[:1], verdict, *before[1:])


class AcksBeforeWriting(Worker):
    def settlement(self, outcome: Outcome, message: Message, lease: Lease) -> Iterable[Effect]:
        *effects, verdict = super().settlement(outcome, message, lease)
        return (verdict, *effects)


class AcksWhatShutdownStopped(Worker):
    def settlement(self, outcome: Outcome, message: Message, lease: Lease) -> Iterable[Effect]:
        effects = super().settlement(outcome, message, lease)
        return (Verdict.ACK if effect is Verdict.REQUEUE else effect for effect in effects)


class AcksWhatIsHeld(Worker):
    def held(self, message: Message) -> Script:
        yield Verdict.ACK


class AcksBeforeItsGuardIsThere(Worker):
    def guard(self, message: Message) -> Script:
        copy, verdict = super().guard(message)
        yield verdict
        yield copy


class ForgetsWhatIsOwed(Worker):
    def owing(self, message: Message, answer: Owing) -> Script:
        yield Verdict.ACK


class IgnoresFences(Worker):
    heeds_fences = False


class PresumesEverybodyDead(Worker):
    def is_alive(self, owner: str) -> Generator[Step, Any, bool]:
        yield from ()
        return False


class StartsWhatKillsWorkers(Worker):
    def too_many(self, crashes: int) -> bool:
        return False


FAULTS: list[type[Worker]] = [
    AcksBeforePublishing,
    AcksBeforeWriting,
    AcksWhatShutdownStopped,
    AcksWhatIsHeld,
    AcksBeforeItsGuardIsThere,
    ForgetsWhatIsOwed,
    IgnoresFences,
    PresumesEverybodyDead,
    StartsWhatKillsWorkers,
]
