"""A broker, a state store and those who use them, driven one effect at a time.

Queues are lists, the state store is a dictionary that `rules.change` keeps, workers
are generators (`model_worker`). Between any two effects a worker may die, or lose its
connection, its presence or an answer. `World.judge` holds what happened against what was
promised.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from amqp_tasks.core.lifecycle import TaskStatus
from amqp_tasks.core.message import Message, decode
from amqp_tasks.core.operations import (
    REQUESTED,
    Change,
    Claim,
    IsAlive,
    RequestCancel,
    Settle,
)
from amqp_tasks.core.outcome import (
    Canceled,
    CancelReason,
    GivenBack,
    LeaseLost,
    Outcome,
    Succeeded,
)
from amqp_tasks.core.record import TaskRecord
from amqp_tasks.core.rules import change
from amqp_tasks.core.settlement import Publication, Verdict

from .model_worker import (
    MAX_CRASHES,
    MAX_RETRIES,
    TOPOLOGY,
    Run,
    Script,
    Step,
    Worker,
    produce,
)

__all__ = ["Job", "World"]

MAIN, ERROR = TOPOLOGY.main.name, TOPOLOGY.error.name


@dataclass(slots=True)
class Copy:
    """A message in a queue."""

    body: bytes
    headers: dict[str, Any]
    task_id: str
    returns_at: float = 0.0


@dataclass(eq=False, slots=True)
class Job:
    """Something that goes on: a delivery in a worker's hands, a producer's call, a guard."""

    owner: str
    task_id: str
    script: Script
    worker: Worker | None = None
    delivery: Copy | None = None
    """None when there is none, or when the connection it came by is gone."""
    pending: Step | None = None
    started: bool = False
    guarded: Job | None = None
    """The job whose delivery this one replaces."""
    seen_absent: set[str] = field(default_factory=set)
    """Workers whose presence it has looked for and not found."""

    @property
    def running(self) -> bool:
        return isinstance(self.pending, Run)


@dataclass
class World:
    """Everything there is, and what has happened so far."""

    worker_class: type[Worker] = Worker
    now: float = 1_000.0
    main: list[Copy] = field(default_factory=list)
    error: list[Copy] = field(default_factory=list)
    waiting: list[Copy] = field(default_factory=list)
    records: dict[str, TaskRecord] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)
    """Those that live."""
    present: set[str] = field(default_factory=set)
    """Those whose presence is in the store, alive or not."""
    stopping: set[str] = field(default_factory=set)
    jobs: list[Job] = field(default_factory=list)
    serial: int = 0
    store_was_emptied: bool = False

    # What happened, to be judged at the end.
    published: set[str] = field(default_factory=set)
    ends: Counter[str] = field(default_factory=Counter)
    starts: Counter[str] = field(default_factory=Counter)
    excuses: Counter[str] = field(default_factory=Counter)
    """Starts of a task that need not have led to a settlement."""
    touched: set[str] = field(default_factory=set)
    """Tasks that a fault befell, or of which a second message was made."""
    cancel_asked: dict[str, int] = field(default_factory=dict)
    """The fence under which a running task was asked to stop."""

    def clock(self) -> float:
        return self.now

    def next(self) -> int:
        self.serial += 1
        return self.serial

    # Who comes and goes

    def submit(self, wait: float) -> Job:
        task_id = f"t{self.next()}"
        due = self.now + wait if wait else None
        message = Message.compose(task_id=task_id, func="add", due=due)
        job = Job("producer", task_id, produce(message, f"n-{task_id}", self.clock))
        self._start(job)
        return job

    def hire(self) -> Worker:
        worker = self.worker_class(f"w{self.next()}", self.clock)
        self.workers[worker.name] = worker
        self.present.add(worker.name)
        return worker

    def deliver(self, worker: Worker) -> Job:
        copy = self.main.pop(0)
        message = decode(copy.body, copy.headers)
        script = worker.handle(message, f"{worker.name}/{self.next()}")
        job = Job(worker.name, message.task_id, script, worker, copy)
        self._start(job)
        return job

    def crash(self, name: str) -> None:
        for job in self.jobs_of(name):
            self.touched.add(job.task_id)
            self.excuses[job.task_id] += job.started
        self.disconnect(name)
        self.jobs = [job for job in self.jobs if job.owner != name]
        self.workers.pop(name, None)
        self.stopping.discard(name)

    def disconnect(self, name: str) -> None:
        for job in self.jobs_of(name):
            self.touched.add(job.task_id)
            self._give_back(job)

    def lapse(self, name: str) -> None:
        """The presence of a worker goes: it is dead, or was suspended."""
        self.present.discard(name)
        for job in self.jobs_of(name):
            self.touched.add(job.task_id)

    def stop(self, name: str) -> None:
        """Every attempt of this worker is given back; then it leaves."""
        self.stopping.add(name)
        for job in self.jobs_of(name):
            if job.running:
                self.finish(job, GivenBack())
        self._leave(name)

    def expire(self, copy: Copy) -> None:
        """A waiting message has waited long enough."""
        self.waiting.remove(copy)
        self.now = max(self.now, copy.returns_at)
        self.main.append(copy)

    def request_cancel(self, task_id: str) -> None:
        operation = RequestCancel(task_id=task_id, reason="user", now=self.now)
        if self.apply(operation) == REQUESTED:
            self.cancel_asked.setdefault(task_id, self.records[task_id].fence)

    def empty_store(self) -> None:
        """The state store loses all it had; who is present says so again soon."""
        self.records.clear()
        self.cancel_asked.clear()
        self.store_was_emptied = True

    def guard(self, job: Job) -> Job:
        assert isinstance(job.pending, Run)
        assert job.worker is not None
        self.touched.add(job.task_id)
        script = job.worker.guard(job.pending.message)
        guard = Job(job.owner, job.task_id, script, job.worker, guarded=job)
        self._start(guard)
        return guard

    # What goes on

    def perform(self, job: Job, *, answer_lost: bool = False) -> None:
        """Carry out the effect that a job asks for; repeat it later if the answer is lost."""
        self.now += 0.001
        step = job.pending
        assert step is not None
        assert not isinstance(step, Run)
        answer = self._carry_out(job, step)
        if answer_lost and not isinstance(step, Verdict):
            self.touched.add(job.task_id)
        else:
            self._go_on(job, answer)

    def finish(self, job: Job, outcome: Outcome) -> None:
        """User code has ended."""
        if isinstance(outcome, GivenBack):
            self.touched.add(job.task_id)
            self.excuses[job.task_id] += 1
        self._go_on(job, outcome)

    def apply(self, operation: Change, *, heeds_fences: bool = True) -> object:
        """What the state store does; sees to it that an end stays as it is."""
        key = operation.task_id
        before = self.records.get(key)
        if before is not None and (before.expires_at or self.now + 1) <= self.now:
            before = None
        seen = before
        if isinstance(operation, Settle) and before is not None and not heeds_fences:
            lease, fence = operation.lease, operation.fence
            seen = replace(before, status=TaskStatus.RUNNING, lease=lease, fence=fence)
        after, answer = change(seen, operation)
        if before is not None and before.status.ended:
            assert after is not None, f"the end of {key} is gone"
            kept = replace(after, owed=before.owed, expires_at=before.expires_at)
            assert kept == before, f"the end of {key} changed: {before} became {after}"
        elif after is not None and after.status.ended:
            self.ends[key] += 1
        if after is None:
            self.records.pop(key, None)
        else:
            self.records[key] = after
        return answer

    def poll(self, job: Job) -> None:
        """A worker looks whether it still holds a task, and whether to go on with it."""
        assert isinstance(job.pending, Run)
        state = self.records.get(job.task_id)
        if state is not None and state.fence != job.pending.fence:
            self.finish(job, LeaseLost())
        elif state is not None and state.cancel is not None:
            self.finish(job, Canceled(CancelReason(state.cancel)))

    def under_way(self) -> list[str]:
        """Tasks of which there is still a message to deal with."""
        copies = [copy.task_id for copy in (*self.main, *self.waiting)]
        return sorted({*copies, *(job.task_id for job in self.jobs)})

    def jobs_of(self, owner: str) -> list[Job]:
        return [job for job in self.jobs if job.owner == owner]

    def _carry_out(self, job: Job, step: Step) -> object:
        match step:
            case Publication():
                self._publish(step)
                return None
            case Verdict():
                of = job.guarded or job
                if step is Verdict.REQUEUE:
                    self._give_back(of)
                of.delivery = None
                return None
            case Run():
                raise AssertionError("only `finish` ends a run")
            case IsAlive():
                if step.owner not in self.present:
                    job.seen_absent.add(step.owner)
                return step.owner in self.present
            case Claim():
                return self._claim(job, step)
            case _:
                heeds_fences = job.worker is None or job.worker.heeds_fences
                return self.apply(step, heeds_fences=heeds_fences)

    def _claim(self, job: Job, operation: Claim) -> object:
        before = self.records.get(job.task_id)
        answer = self.apply(operation)
        after = self.records[job.task_id]
        if (
            before is not None
            and before.status is after.status is TaskStatus.RUNNING
            and before.lease != after.lease
        ):
            self.touched.add(job.task_id)
            if before.owner in self.workers:
                assert before.owner in job.seen_absent, f"{job.task_id} was taken from the living"
                self.excuses[job.task_id] += 1
        return answer

    def _publish(self, publication: Publication) -> None:
        message = decode(publication.body, publication.headers)
        copy = Copy(publication.body, dict(publication.headers), message.task_id)
        self.published.add(copy.task_id)
        if publication.queue.name == MAIN:
            self.main.append(copy)
        elif publication.queue.name == ERROR:
            self.error.append(copy)
        else:
            copy.returns_at = self.now + publication.queue.arguments["x-message-ttl"] / 1000
            self.waiting.append(copy)

    def _give_back(self, job: Job) -> None:
        if job.delivery is not None:
            self.main.insert(0, job.delivery)
            job.delivery = None

    def _start(self, job: Job) -> None:
        self.jobs.append(job)
        self._go_on(job, None)

    def _go_on(self, job: Job, answer: object) -> None:
        try:
            job.pending = job.script.send(answer)
        except StopIteration:
            self.jobs.remove(job)
            self._leave(job.owner)
        else:
            if isinstance(job.pending, Run):
                self._started(job, job.pending)

    def _started(self, job: Job, run: Run) -> None:
        key, now_held = job.task_id, self.records[job.task_id]
        assert not now_held.status.ended, f"{key} was started although it is {now_held.status}"
        assert now_held.crashes < MAX_CRASHES, f"{key} was started after {now_held.crashes} crashes"
        job.started = True
        self.starts[key] += 1
        asked = self.cancel_asked.get(key, run.fence)
        assert run.fence <= asked, f"{key} was started again after it was asked to stop"
        if job.owner in self.stopping:
            self.finish(job, GivenBack())

    def _leave(self, name: str) -> None:
        if name in self.stopping and not self.jobs_of(name):
            self.stopping.discard(name)
            self.present.discard(name)
            self.workers.pop(name, None)

    # The end

    def drain(self) -> None:
        """Let the faults cease and everything come to its end.

        Raises:
            AssertionError: it does not.
        """
        self.present = set(self.workers)
        healthy = self.hire()
        for _ in range(2_000):
            if self.jobs:
                job = self.jobs[0]
                if job.running:
                    self.finish(job, Succeeded("1"))
                else:
                    self.perform(job)
            elif self.main:
                self.deliver(healthy)
            elif self.waiting:
                self.expire(min(self.waiting, key=lambda copy: copy.returns_at))
            else:
                return
        raise AssertionError(f"never comes to rest: {self.records}")

    def judge(self) -> None:
        """Hold what happened against what was promised."""
        for task_id in self.published:
            self._judge_published(task_id)
        for task_id, state in self.records.items():
            if task_id not in self.published and not state.status.ended:
                assert state.expires_at is not None, f"{task_id} is {state.status} for ever"

    def _judge_published(self, task_id: str) -> None:
        state = self.records.get(task_id)
        if self.store_was_emptied:
            assert self.ends[task_id] >= 1, f"{task_id} never ended: {state}"
            return
        assert state is not None, f"nothing is known of {task_id}"
        assert state.status.ended, f"{task_id} is lost: {state}"
        assert self.ends[task_id] == 1, f"{task_id} ended {self.ends[task_id]} times"
        assert state.owed is None, f"{task_id} still owes a message"
        copies = sum(copy.task_id == task_id for copy in self.error)
        if state.status is TaskStatus.ERRORED:
            assert copies >= 1, f"{task_id} errored and is not in the error queue"
            assert copies == 1 or task_id in self.touched, f"{task_id} is there {copies} times"
        else:
            assert copies == 0, f"{task_id} is {state.status} and in the error queue"
        assert state.attempt <= MAX_RETRIES + 1, f"{task_id} had {state.attempt} attempts"
        bound = MAX_RETRIES + 1 + self.excuses[task_id]
        assert self.starts[task_id] <= bound, f"{task_id} was started {self.starts[task_id]} times"
