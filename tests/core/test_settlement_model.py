"""Whatever happens between any two effects: no task is lost, none ends twice.

The machine plays producers, workers and everything that can befall them against the model
in `model_world`, then lets the faults cease and looks at what is left. That it would
see a mistake is proved by workers that make one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from amqp_tasks.core.outcome import Failed, Failure, Outcome, Succeeded

from .model_worker import FAULTS, KeepsStatesShortly, Worker
from .model_world import Job, World

T = TypeVar("T")

PICK = st.sampled_from(range(6))
EFFECTS = st.sampled_from([9, 3, 2, 1, 1, 0])
"""How many effects are carried out in one go: no settlement has more than four."""
OUTCOMES = st.sampled_from(
    [
        Succeeded("1"),
        Failed(Failure(type="ValueError", message="wrong")),
        Failed(Failure(type="ValueError", message="futile"), may_retry=False),
    ]
)
THEN = st.sampled_from(
    [
        *["nothing"] * 4,
        *["guard the delivery"] * 2,
        "lose the answer",
        "crash",
        "crash and be noticed",
        "disconnect",
        "suspend",
    ]
)
Move: TypeAlias = tuple[int, Outcome, int, str]
MOVE: st.SearchStrategy[Move] = st.tuples(PICK, OUTCOMES, EFFECTS, THEN)
MAX_TASKS = 2
MAX_WORKERS = 3


def one_of(choices: Sequence[T], pick: int) -> T:
    return choices[pick % len(choices)]


class Machine(RuleBasedStateMachine):
    """Producers, workers, and all that can befall them."""

    worker_class: type[Worker] = Worker

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.worker_class)

    @property
    def running(self) -> list[Job]:
        """What runs user code."""
        return [job for job in self.world.jobs if job.running]

    @property
    def workers(self) -> list[str]:
        """Those who are not about to leave."""
        return [name for name in self.world.workers if name not in self.world.stopping]

    @property
    def busy(self) -> list[str]:
        """Those of them who have something in hand."""
        return [name for name in self.workers if self.world.jobs_of(name)]

    # What is meant to happen

    @initialize()
    def begin(self) -> None:
        self.carry_on(self.world.submit(0.0), 3, "nothing")

    @rule(move=MOVE)
    def go_on(self, move: Move) -> None:
        """Something gets further: a delivery is taken, what runs ends, a settlement goes on.

        All rules end with this: hypothesis leaves some out of each run, and those that it
        leaves in should have something to disturb.
        """
        pick, outcome, effects, then = move
        jobs, waiting = self.world.jobs, self.world.waiting
        if jobs and (pick % 2 or not (self.world.main or waiting)):
            job = one_of(jobs, pick // 2)
            if job.running:
                self.world.finish(job, outcome)
            self.carry_on(job, effects, then)
        elif self.world.main or waiting:
            if not self.world.main:
                self.let_return(pick // 2)
            if not self.world.main:
                return
            while len(self.workers) < MAX_WORKERS:
                self.world.hire()
            worker = self.world.workers[one_of(self.workers, pick // 2)]
            self.carry_on(self.world.deliver(worker), effects, then)
        else:
            self.carry_on(self.world.submit(0.0), effects, then)

    @precondition(lambda self: len(self.world.under_way()) < MAX_TASKS)
    @rule(wait=st.sampled_from([0.0, 60.0]), effects=EFFECTS, then=THEN, move=MOVE)
    def submit(self, wait: float, effects: int, then: str, move: Move) -> None:
        """Somebody enqueues a task that is due in `wait` seconds."""
        self.carry_on(self.world.submit(wait), effects, then)
        self.go_on(move)

    @precondition(lambda self: self.world.waiting)
    @rule(pick=PICK, move=MOVE)
    def expire(self, pick: int, move: Move) -> None:
        """A waiting message returns, whatever else there is to do."""
        self.let_return(pick)
        self.go_on(move)

    @precondition(lambda self: self.running)
    @rule(pick=PICK, move=MOVE)
    def poll(self, pick: int, move: Move) -> None:
        """A worker looks whether to go on with what it runs."""
        self.world.poll(one_of(self.running, pick))
        self.go_on(move)

    @precondition(lambda self: self.world.under_way())
    @rule(pick=PICK, move=MOVE)
    def cancel(self, pick: int, move: Move) -> None:
        """Somebody wants a task to stop."""
        self.world.request_cancel(one_of(self.world.under_way(), pick))
        self.go_on(move)

    def let_return(self, pick: int) -> None:
        self.world.expire(one_of(self.world.waiting, pick))

    def carry_on(self, job: Job, effects: int, then: str) -> None:
        for _ in range(effects):
            if job in self.world.jobs and not job.running:
                self.world.perform(job)
        if then == "guard the delivery" and job.running:
            self.world.perform(self.world.guard(job))
        if then == "lose the answer" and job in self.world.jobs and not job.running:
            self.world.perform(job, answer_lost=True)
        if then in ("crash", "crash and be noticed"):
            self.world.crash(job.owner)
        if then in ("disconnect", "suspend"):
            self.world.disconnect(job.owner)
        if then in ("crash and be noticed", "suspend"):
            self.world.lapse(job.owner)

    # What befalls them

    @precondition(lambda self: self.busy)
    @rule(pick=PICK, move=MOVE)
    def lapse(self, pick: int, move: Move) -> None:
        """The presence of a worker goes although it lives."""
        self.world.lapse(one_of(self.busy, pick))
        self.go_on(move)

    @precondition(lambda self: self.busy)
    @rule(pick=PICK, move=MOVE)
    def stop(self, pick: int, move: Move) -> None:
        """A worker is told to stop."""
        self.world.stop(one_of(self.busy, pick))
        self.go_on(move)

    @precondition(lambda self: self.world.present != set(self.world.workers))
    @rule(dead_ones_too=st.booleans(), move=MOVE)
    def time_passes(self, dead_ones_too: bool, move: Move) -> None:
        """Those who live renew their presence; that of the dead goes, perhaps."""
        living = set(self.world.workers)
        self.world.present = living if dead_ones_too else self.world.present | living
        self.go_on(move)

    # What is left

    def teardown(self) -> None:
        self.world.drain()
        self.world.judge()


class StoreIsEmptied(Machine):
    @rule(move=MOVE)
    def empty_store(self, move: Move) -> None:
        """The state store loses all it had."""
        self.world.empty_store()
        self.go_on(move)


class StatesExpire(Machine):
    """Time that is long against the life of a state passes only while nothing else does:
    no worker is away, and no effect under way, for as long as that."""

    worker_class = KeepsStatesShortly

    def let_return(self, pick: int) -> None:
        world = self.world
        for job in self.running:
            world.poll(job)
        if not world.main and len(self.running) == len(world.jobs):
            world.expire(min(world.waiting, key=lambda copy: copy.returns_at))


SETTINGS = settings(
    max_examples=150,
    stateful_step_count=20,
    deadline=None,
    # Shrinking a run takes minutes; whoever has a failing one adds `Phase.shrink`.
    phases=[Phase.reuse, Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
HUNT = settings(
    SETTINGS,
    max_examples=2_000,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    print_blob=False,
)


def test_no_task_is_lost_and_none_ends_twice() -> None:
    run_state_machine_as_test(Machine, settings=SETTINGS)


def test_no_task_is_lost_with_the_store() -> None:
    run_state_machine_as_test(StoreIsEmptied, settings=SETTINGS)


def test_what_has_ended_does_not_start_again_when_its_state_has_expired() -> None:
    run_state_machine_as_test(StatesExpire, settings=SETTINGS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_worker_with_a_fault_is_found_out(fault: type[Worker]) -> None:
    faulty = type("Faulty", (Machine,), {"worker_class": fault})
    with pytest.raises(AssertionError):
        run_state_machine_as_test(faulty, settings=HUNT)


# --------------------------------------------------------------------- named cases


def through(world: World, job: Job, effects: int = 20) -> None:
    for _ in range(effects):
        if job in world.jobs and not job.running:
            world.perform(job)


@pytest.mark.parametrize("leave", [World.stop, World.crash], ids=["stops", "crashes"])
def test_the_only_copy_of_a_task_is_not_dropped_by_who_lost_its_lease(
    leave: Callable[[World, str], None],
) -> None:
    world = World()
    through(world, world.submit(0.0))
    taker, holder = world.hire(), world.hire()
    # The taker's connection is lost before it has claimed: the message goes to the holder.
    late = world.deliver(taker)
    world.disconnect(taker.name)
    held = world.deliver(holder)
    through(world, held)
    assert held.running
    # The holder is suspended; the taker sees it absent, takes over, and leaves in its turn.
    # It had no delivery to give back: the only one is the holder's.
    world.lapse(holder.name)
    through(world, late)
    assert late.running
    leave(world, taker.name)
    if late in world.jobs:
        through(world, late)
    world.finish(held, Succeeded("1"))
    world.drain()
    world.judge()


def test_a_task_that_is_not_acked_outlives_a_store_that_forgets_its_last_writes() -> None:
    # As when it restarts from a file that is a second old, or fails over to a replica.
    world = World()
    through(world, world.submit(0.0))
    before = dict(world.records)
    job = world.deliver(world.hire())
    through(world, job)
    assert job.running
    world.records = before
    world.finish(job, Succeeded("1"))
    world.drain()
    world.judge()
