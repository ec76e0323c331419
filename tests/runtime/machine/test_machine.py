"""Whatever befalls whole workers: every task that was accepted ends, once.

The rules write down moves; `teardown` plays them in a `World` of its own under a virtual
clock, lets the faults cease, and holds what happened against the `Ledger`. So an example is
data, the same on every run, and shrinks like data.

``AMQP_TASKS_EXAMPLES=5000 pytest tests/runtime/machine`` plays other and more games than the
usual ones.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeAlias

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from ...conftest import VIRTUAL_CLOCKS
from .ledger import KINDS
from .lines import Fault, Trap
from .programs import QUEUE
from .world import Limits, Move, World, play

EXAMPLES = int(os.environ.get("AMQP_TASKS_EXAMPLES", "0"))

KIND = st.sampled_from(sorted(KINDS))
PICK = st.sampled_from(range(4))
SECONDS = st.sampled_from([0.0, 0.3, 2.0, 6.0, 9.0])
SERVERS = st.sampled_from(["broker", "store", "both"])
Wait: TypeAlias = tuple[int, float]
WAIT: st.SearchStrategy[Wait] = st.sampled_from(
    [
        *[(turns, 0.0) for turns in (0, 1, 2, 3, 5, 8, 13, 21, 34)],
        *[(0, seconds) for seconds in (0.05, 0.3, 1.0, 2.5, 7.0, 20.0)],
    ]
)
"""How much passes after a move: turns of the loop, or seconds."""
CUTS = [Fault.CUT_BEFORE, Fault.CUT_AFTER]
ENDS = st.sampled_from([Fault.CRASH_BEFORE, Fault.CRASH_BEFORE, Fault.CRASH_AFTER, *CUTS])
LOSSES = st.sampled_from([Fault.LOSE_QUESTION, Fault.LOSE_ANSWER, Fault.DELAY])
REFUSALS = st.one_of(LOSSES, st.just(Fault.REFUSE))
STEPS = st.sampled_from(["Claim", "Settle", "Discharge", "publish", "verdict", "deliver"])
COPIES = st.sampled_from([f"{QUEUE}-wait-5000", f"{QUEUE}-error"])
"""Queues of messages that stand for another one, which is acked next."""
QUESTIONS = st.sampled_from(["Create", "Claim", "Settle", "Discharge", "Poll", "store"])
FEW = st.sampled_from(range(3))
PAUSE = st.sampled_from([0.0, 2.0])
TRAP = st.one_of(
    st.builds(Trap, fault=ENDS, where=STEPS, calls=FEW),
    st.builds(Trap, fault=ENDS, where=COPIES, calls=st.just(0)),
    st.builds(Trap, fault=ENDS, where=st.just("any"), calls=st.sampled_from(range(20))),
    st.builds(Trap, fault=LOSSES, where=QUESTIONS, calls=FEW, pause=PAUSE),
    st.builds(Trap, fault=REFUSALS, where=st.just("publish"), calls=FEW, pause=PAUSE),
)
LIMITS = st.sampled_from(
    [
        *[Limits()] * 6,
        Limits(countdown=0.5),
        Limits(countdown=12.0),
        Limits(timeout=1.0),
        Limits(timeout=20.0),
        Limits(deadline=3.0),
    ]
)
Task: TypeAlias = tuple[str, float, Limits]
TASK: st.SearchStrategy[Task] = st.tuples(KIND, SECONDS, LIMITS)
Turn: TypeAlias = tuple[Task | None, Wait, Wait]
TURN: st.SearchStrategy[Turn] = st.tuples(st.one_of(st.none(), TASK), WAIT, WAIT)
"""What goes on besides: a task that is queued perhaps, time before the move and after it."""
MAX_TASKS = 8


class Machine(RuleBasedStateMachine):
    """Producers, workers, and all that can befall them, written down."""

    backend = "asyncio-virtual"
    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[Move] = []
        self.seed = 0
        self.tasks = 0

    def note(self, move: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self.moves.append(lambda world: move(world, *args, **kwargs))

    def submit(self, task: Task) -> None:
        if self.tasks < MAX_TASKS:
            self.tasks += 1
            self.note(World.submit, *task)

    def turn(self, turn: Turn, move: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Queue a task, wait, do something, and wait again.

        All rules come down to this: hypothesis leaves some out of each run, and those that
        it leaves in should have something to disturb.
        """
        task, before, after = turn
        if task is not None:
            self.submit(task)
            self.note(World.advance, *before)
        self.note(move, *args, **kwargs)
        self.note(World.fill_up)
        self.note(World.advance, *after)

    @initialize(
        seed=st.integers(0, 2**16),
        workers=st.integers(1, 3),
        tasks=st.lists(TASK, min_size=1, max_size=3),
        wait=WAIT,
    )
    def begin(self, seed: int, workers: int, tasks: list[Task], wait: Wait) -> None:
        self.seed = seed
        self.note(World.fill_up, workers)
        for task in tasks:
            self.submit(task)
        self.note(World.advance, *wait)

    # What is meant to happen

    @rule(turn=TURN)
    def nothing(self, turn: Turn) -> None:
        self.turn(turn, World.advance, 1, 0.0)

    @rule(turn=TURN)
    def start_worker(self, turn: Turn) -> None:
        self.turn(turn, World.start_worker)

    @rule(pick=PICK, grace=st.sampled_from([0.0, 1.0, 30.0]), turn=TURN)
    def stop(self, pick: int, grace: float, turn: Turn) -> None:
        self.turn(turn, World.stop, pick, grace)

    @rule(pick=st.sampled_from(range(MAX_TASKS)), turn=TURN)
    def cancel(self, pick: int, turn: Turn) -> None:
        self.turn(turn, World.cancel, pick)

    # What befalls them

    @rule(pick=PICK, turn=TURN)
    def crash(self, pick: int, turn: Turn) -> None:
        self.turn(turn, World.crash, pick)

    @rule(pick=PICK, trap=TRAP, turn=TURN)
    def trap(self, pick: int, trap: Trap, turn: Turn) -> None:
        self.turn(turn, World.trap, pick, trap)

    @rule(pick=PICK, turn=TURN)
    def redeliver(self, pick: int, turn: Turn) -> None:
        self.turn(turn, World.redeliver, pick)

    @rule(pick=PICK, turn=TURN)
    def expire_presence(self, pick: int, turn: Turn) -> None:
        self.turn(turn, World.expire_presence, pick)

    @rule(pick=PICK, seconds=st.sampled_from([7.0, 8.5, 10.0, 14.0]), turn=TURN)
    def isolate(self, pick: int, seconds: float, turn: Turn) -> None:
        self.turn(turn, World.isolate, pick, seconds)

    @rule(pick=PICK, what=SERVERS, turn=TURN)
    def part(self, pick: int, what: str, turn: Turn) -> None:
        self.turn(turn, World.part, pick, broker=what != "store", store=what != "broker")

    @rule(what=SERVERS, turn=TURN)
    def part_all(self, what: str, turn: Turn) -> None:
        self.turn(turn, World.part_all, broker=what != "store", store=what != "broker")

    @rule(pick=PICK, turn=TURN)
    def deafen(self, pick: int, turn: Turn) -> None:
        self.turn(turn, World.deafen, pick)

    @rule(turn=TURN)
    def heal(self, turn: Turn) -> None:
        self.turn(turn, World.heal)

    # What is left

    def teardown(self) -> None:
        ledger = play(self.moves, self.seed, VIRTUAL_CLOCKS[self.backend]())
        self.seen.update(ledger.seen)
        assert not ledger.violations, "\n".join([*ledger.violations, "", *ledger.log])


SETTINGS = settings(
    max_examples=EXAMPLES or 40,
    stateful_step_count=15,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    # Shrinking takes minutes; whoever has a failing example adds `Phase.shrink`.
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    """The runtime has much to say about faults, and the ledger says it shorter."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


OFTEN = {
    *("Claim Granted", "Claim Held", "Claim Ended", "takeover"),
    *("succeed", "retry", "fail", "cancel", "release"),
    *("RequestCancel canceled", "RequestCancel requested", "RequestCancel ended"),
}
"""What the usual games cannot be without."""


@pytest.mark.patience(300 + 10 * EXAMPLES)
@pytest.mark.parametrize("backend", VIRTUAL_CLOCKS)
def test_every_accepted_task_ends_once(backend: str) -> None:
    seen: Counter[str] = Counter()
    machine = type("Machine", (Machine,), {"backend": backend, "seen": seen})
    run_state_machine_as_test(machine, settings=SETTINGS)
    assert EXAMPLES or seen.keys() >= OFTEN


@pytest.mark.parametrize("backend", VIRTUAL_CLOCKS)
def test_a_game_is_the_same_whenever_it_is_played(backend: str) -> None:
    machine = Machine()
    quick, slow = Limits(), Limits(countdown=0.5)
    machine.begin(7, 3, [("wait", 9.0, quick), ("nap", 9.0, quick), ("doomed", 0.3, slow)], (3, 0))
    machine.trap(1, Trap(Fault.CRASH_AFTER, "Settle", 0), (("kill", 0.0, quick), (5, 0.0), (0, 1)))
    machine.redeliver(0, (("hang", 0.0, quick), (0, 0.3), (2, 0.0)))
    machine.isolate(1, 10.0, (("tidy", 2.0, quick), (1, 0.0), (0, 0.3)))
    machine.stop(0, 0.0, (None, (0, 0.0), (0, 2.5)))
    first, second = (play(machine.moves, machine.seed, VIRTUAL_CLOCKS[backend]()) for _ in range(2))
    assert [_nameless(line) for line in first.log] == [_nameless(line) for line in second.log]
    assert len(first.log) > 100


def _nameless(line: str) -> str:
    """Return a line of the log without what is new each time: incarnations, addresses."""
    return re.sub(r"-[0-9]+-[0-9a-f]{8}\b|\b[0-9a-f]{12}\b|0x[0-9a-f]+|<Task .*", "", line)
