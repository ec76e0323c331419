"""The plain model: what is promised for each task, and what has happened to it.

Everything is noted when it happens: changes of states by the store, starts and ends of
user code by the tasks themselves. What must never be is noted as a violation on the spot;
`Ledger.judge` adds what must not be in the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from amqp_tasks import Attempt, TaskStatus
from amqp_tasks.core.lifecycle import Event
from amqp_tasks.core.operations import (
    REQUESTED,
    WRITTEN,
    CancelAnswer,
    Change,
    Claim,
    Granted,
    RequestCancel,
    Settle,
)
from amqp_tasks.core.outcome import CancelReason
from amqp_tasks.core.record import TaskRecord, owner_of

__all__ = ["KINDS", "MAX_CRASHES", "MAX_RETRIES", "Host", "Ledger", "Run", "Task"]

MAX_RETRIES: Final = 2
MAX_CRASHES: Final = 3

FINISHED, ERRORED, CANCELED = TaskStatus.FINISHED, TaskStatus.ERRORED, TaskStatus.CANCELED

KINDS: Mapping[str, frozenset[TaskStatus]] = {
    "nap": frozenset({FINISHED}),
    "log": frozenset({FINISHED}),
    "flaky": frozenset({FINISHED}),
    "doomed": frozenset({ERRORED}),
    "futile": frozenset({ERRORED}),
    "stubborn": frozenset({FINISHED}),
    "tidy": frozenset({FINISHED}),
    "hang": frozenset(),
    "kill": frozenset({ERRORED}),
    # It fails when the servers do, and then three times perhaps.
    "wait": frozenset({FINISHED, ERRORED}),
}
"""How each kind of task may end if nobody cancels it, there is no limit to its time, and no
more than `MAX_CRASHES` of its workers die."""

NO_FAILURE: Final = frozenset(
    {CancelReason.USER, CancelReason.PARENT, CancelReason.SHUTDOWN, CancelReason.LEASE_LOST}
)
"""Why user code may be stopped without an attempt being counted."""


class Host(Protocol):
    """A worker, as the ledger sees it."""

    name: str

    @property
    def is_dead(self) -> bool: ...

    @property
    def has_left(self) -> bool: ...

    def was_in_trouble(self, since: float) -> bool:
        """Whether its presence may be gone, because of a fault after `since`."""
        ...


@dataclass(eq=False, slots=True)
class Run:
    """A call of a task's function."""

    number: int
    fence: int
    host: Host
    began: float
    is_running: bool = True


@dataclass(slots=True)
class Task:
    """What was asked for, and what came of it."""

    task_id: str
    kind: str
    has_limit: bool = False
    """Whether there is a timeout or a deadline."""
    accepted: bool = False
    runs: list[Run] = field(default_factory=list)
    failures: int = 0
    """Calls of the function that may count as failed attempts."""
    releases: int = 0
    takeovers: int = 0
    ends: int = 0
    cancel_asked: bool = False

    def possible_ends(self) -> frozenset[TaskStatus]:
        ends = set(KINDS[self.kind])
        if self.cancel_asked:
            ends.add(CANCELED)
        if self.has_limit or self.takeovers >= MAX_CRASHES:
            ends.add(ERRORED)
        return frozenset(ends)


class Ledger:
    """What is known of all tasks.

    Args:
        clock: seconds, for the log.
        host: returns the worker of an incarnation.
    """

    def __init__(self, clock: Callable[[], float], host: Callable[[str], Host]) -> None:
        self.tasks: dict[str, Task] = {}
        self.log: list[str] = []
        self.violations: list[str] = []
        self.seen: Counter[str] = Counter()
        """What has happened at all, by name; so that nobody takes an empty game for a good one."""
        self._clock = clock
        self._host = host

    def note(self, what: str) -> None:
        self.log.append(f"{self._clock():9.3f}  {what}")

    def expect(self, condition: object, violation: str) -> None:
        if not condition:
            self.violations.append(violation)
            self.note(f"VIOLATION: {violation}")

    def submitted(self, task_id: str, kind: str, *, has_limit: bool = False) -> None:
        self.note(f"{task_id} ({kind}) is submitted")
        self.tasks.setdefault(task_id, Task(task_id, kind)).has_limit |= has_limit

    def accepted(self, task_id: str) -> None:
        self.note(f"{task_id} is accepted")
        self.tasks[task_id].accepted = True

    # ------------------------------------------------------------------- user code

    def entered(self, attempt: Attempt) -> Callable[[BaseException | None], None]:
        """A task's function was called. Call the result with how it ended."""
        task, host = self.tasks[attempt.task_id], self._host(attempt.worker)
        run = Run(attempt.number, attempt.fence, host, self._clock())
        if not host.is_dead:
            self._judge_start(task, run)
            task.runs.append(run)

        def left(error: BaseException | None) -> None:
            run.is_running = False
            if host.is_dead:
                return
            why = attempt.cancel_reason or ""
            self.note(f"{task.task_id} ended on {host.name}: {error!r} {why}")
            if error is not None and attempt.cancel_reason not in NO_FAILURE:
                task.failures += 1

        return left

    def _judge_start(self, task: Task, run: Run) -> None:
        who = f"{task.task_id}, attempt {run.number}, fence {run.fence}, on {run.host.name}"
        self.note(f"{who} begins")
        self.expect(not run.host.has_left, f"{who}: begins on a worker that has left")
        for other in task.runs:
            self.expect(other.fence != run.fence, f"{who}: begins again under the same fence")
            if other.is_running and not other.host.is_dead:
                self.expect(
                    other.fence < run.fence, f"{who}: begins after it began under {other.fence}"
                )
                self.expect(
                    other.host.was_in_trouble(other.began),
                    f"{who}: begins while it runs on {other.host.name}, which is well",
                )

    # ---------------------------------------------------------------------- states

    def changed(
        self,
        operation: Change,
        before: TaskRecord | None,
        after: TaskRecord | None,
        answer: object,
    ) -> None:
        """The state of a task may have changed."""
        kind, task_id = type(operation).__name__, operation.task_id
        self.note(f"{task_id}: {kind} {_brief(operation)}-> {answer} {_short(after)}")
        task = self.tasks[task_id]
        self.seen[f"{kind} {answer if isinstance(answer, str) else type(answer).__name__}"] += 1
        if before is not None:
            self._judge_change(task, before, after)
        ended_before = before is not None and before.status.ended
        if after is not None and after.status.ended and not ended_before:
            task.ends += 1
            self.expect(task.ends == 1, f"{task_id} ends again: {_short(after)}")
        match operation:
            case Claim() if isinstance(answer, Granted):
                self._granted(task, operation, before)
            case Settle() if answer == WRITTEN:
                task.releases += operation.event is Event.RELEASE
                self.seen[operation.event] += 1
                self._judge_settlement(task, operation, before)
            case RequestCancel() if answer in (CancelAnswer("canceled"), REQUESTED):
                task.cancel_asked = True

    def _judge_change(self, task: Task, before: TaskRecord, after: TaskRecord | None) -> None:
        who = task.task_id
        if after is None:
            self.expect(not task.accepted, f"{who} is forgotten after it was accepted")
            return
        if before.status.ended:
            kept = replace(after, owed=before.owed, expires_at=before.expires_at)
            self.expect(
                kept == before, f"the end of {who} changed: {_short(before)} to {_short(after)}"
            )
        self.expect(after.fence >= before.fence, f"the fence of {who} goes back to {after.fence}")
        self.expect(
            before.attempt <= after.attempt <= before.attempt + 1,
            f"{who} goes from attempt {before.attempt} to {after.attempt}",
        )

    def _granted(self, task: Task, claim: Claim, before: TaskRecord | None) -> None:
        who = f"{task.task_id}, attempt {claim.attempt}, by {claim.lease}"
        if before is None or before.lease == claim.lease:
            return  # new to the store; or the same question again
        self.expect(not before.cancel, f"{who}: is started although it shall be cancelled")
        self.expect(claim.attempt <= MAX_RETRIES + 1, f"{who}: is started, and that is too often")
        self.expect(
            claim.attempt <= task.failures + 1,
            f"{who}: is an attempt too many, it failed {task.failures} times",
        )
        if before.status is TaskStatus.RUNNING:
            task.takeovers += 1
            self.seen["takeover"] += 1
            self._judge_takeover(task, claim, before)

    def _judge_takeover(self, task: Task, claim: Claim, before: TaskRecord) -> None:
        host = self._host(before.owner)
        who = f"{task.task_id}, attempt {claim.attempt}, by {claim.lease}"
        if before.owner == owner_of(claim.lease):
            # A claim of its own that it had given up; what it runs, it does not take again.
            runs = [run for run in task.runs if run.host is host and run.is_running]
            self.expect(not runs, f"{who}: is taken from itself, and runs there")
            return
        self.expect(
            host.is_dead or host.has_left or host.was_in_trouble(before.started_at or 0.0),
            f"{who}: is taken from {host.name}, which is well",
        )

    def _judge_settlement(self, task: Task, settle: Settle, before: TaskRecord | None) -> None:
        who = f"{task.task_id}: {settle.event} under fence {settle.fence}"
        if before is None:
            self.expect(not task.accepted, f"{who}: nothing was known about it")
            return
        held = before.lease == settle.lease and before.fence == settle.fence
        self.expect(held, f"{who}: written by who does not hold it")
        if settle.event is Event.SUCCEED:
            self.expect(
                settle.result == f'"{task.kind}"', f"{who}: with the result {settle.result}"
            )

    # ------------------------------------------------------------------------- end

    def judge(
        self, records: Mapping[str, TaskRecord], letters: Sequence[str], left: Mapping[str, int]
    ) -> None:
        """Hold what there is in the end against what was promised.

        Args:
            records: what the store knows.
            letters: ids of the tasks in the error queue.
            left: queues other than that, and how many messages are in them.
        """
        self.expect(not left, f"messages are left: {dict(left)}")
        copies = Counter(letters)
        for task in self.tasks.values():
            record = records.get(task.task_id)
            if task.accepted:
                self._judge_end(task, record)
            elif record is not None and not record.status.ended:
                # Its producer died: it may be forgotten, but not stay like this for ever.
                self.expect(
                    record.expires_at is not None, f"{task.task_id} is {record.status} for ever"
                )
            is_errored = record is not None and record.status is ERRORED
            self.expect(
                bool(copies[task.task_id]) == is_errored,
                f"{task.task_id} is in the error queue {copies[task.task_id]} times: "
                f"{_short(record)}",
            )

    def _judge_end(self, task: Task, record: TaskRecord | None) -> None:
        who = f"{task.task_id} ({task.kind})"
        if record is None:
            self.expect(False, f"nothing is known of {who}")
            return
        self.expect(record.status.ended, f"{who} does not end: {_short(record)}")
        self.expect(record.owed is None, f"{who} still owes a message: {_short(record)}")
        self.expect(
            record.status in task.possible_ends(),
            f"{who} is {record.status} ({record.reason}); it should be one of "
            f"{sorted(task.possible_ends())}",
        )
        starts = len(task.runs)
        bound = 1 + min(task.failures, MAX_RETRIES) + task.releases + task.takeovers
        self.expect(starts <= bound, f"{who} was started {starts} times, not at most {bound}")


def _short(record: TaskRecord | None) -> str:
    if record is None:
        return "(no state)"
    text = f"({record.status}, attempt {record.attempt}, fence {record.fence}, {record.lease}"
    for name in ("crashes", "cancel", "reason", "owed", "expires_at"):
        value = getattr(record, name)
        text += f", {name} {value}" if value else ""
    return text + ")"


def _brief(operation: Change) -> str:
    match operation:
        case Claim():
            lost = f"lost={operation.lost_lease} " if operation.lost_lease else ""
            return f"attempt={operation.attempt} lease={operation.lease} {lost}"
        case Settle():
            return f"{operation.event} attempt={operation.attempt} lease={operation.lease} "
        case _:
            return ""
