"""Queues: their names, their arguments, and how a wait is cut into steps."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from amqp_tasks.core.topology import DELIVERY_LIMIT, LADDER_MS, QueueSpec, Topology, ladder_step

DAY_MS = 86_400_000
SLACK_MS = LADDER_MS[0]
"""How late a wait may end, what its steps take beyond their time aside."""
EXTRA_MS = 20
"""What a step may take beyond its time in these tests: expiry, routing, a worker's turn."""
CLASSIC = Topology(exchange="x", queue="q", queue_type="classic")
QUORUM = Topology(exchange="x", queue="q", queue_type="quorum")
AT_LEAST_ONCE = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}


# ------------------------------------------------------------------------ queues


def test_classic_queues_have_exactly_the_arguments_of_guillotina_amqp() -> None:
    assert CLASSIC.main == QueueSpec(
        "q", {"x-dead-letter-exchange": "x", "x-dead-letter-routing-key": "q-error"}
    )
    assert CLASSIC.delay == QueueSpec(
        "q-delay",
        {
            "x-dead-letter-exchange": "x",
            "x-dead-letter-routing-key": "q",
            "x-message-ttl": 120_000,
        },
    )
    assert CLASSIC.error == QueueSpec("q-error", {"x-message-ttl": 604_800_000})


@pytest.mark.parametrize("step_ms", LADDER_MS)
def test_each_step_of_the_ladder_has_a_queue_that_holds_a_message_that_long(step_ms: int) -> None:
    assert CLASSIC.step(step_ms) == QueueSpec(
        f"q-wait-{step_ms}",
        {
            "x-dead-letter-exchange": "x",
            "x-dead-letter-routing-key": "q",
            "x-message-ttl": step_ms,
        },
    )


ALWAYS_QUORUM = {"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT}


def test_quorum_queues_that_dead_letter_do_so_at_least_once() -> None:
    same = [
        (CLASSIC.main, QUORUM.main),
        (CLASSIC.delay, QUORUM.delay),
        *((CLASSIC.step(step), QUORUM.step(step)) for step in LADDER_MS),
    ]
    for classic, quorum in same:
        assert quorum.name == classic.name
        assert quorum.arguments == {
            **classic.arguments,
            **AT_LEAST_ONCE,
            **ALWAYS_QUORUM,
        }


def test_the_quorum_error_queue_dead_letters_nowhere() -> None:
    assert QUORUM.error.name == CLASSIC.error.name
    assert QUORUM.error.arguments == {**CLASSIC.error.arguments, **ALWAYS_QUORUM}


def test_ttls_are_as_configured() -> None:
    topology = Topology(exchange="x", queue="q", delayed_ttl_ms=7, errored_ttl_ms=9)
    assert topology.delay.arguments["x-message-ttl"] == 7
    assert topology.error.arguments["x-message-ttl"] == 9


@pytest.mark.parametrize("topology", [CLASSIC, QUORUM], ids=lambda each: each.queue_type)
def test_a_queue_is_declared_before_those_that_dead_letter_to_it(topology: Topology) -> None:
    seen: set[str] = set()
    for spec in topology.always():
        to = spec.arguments.get("x-dead-letter-routing-key")
        assert to is None or to in seen
        seen.add(spec.name)
    assert seen == {"q", "q-delay", "q-error"}


def test_what_waits_comes_back_to_the_main_queue_and_what_failed_does_not() -> None:
    for spec in (QUORUM.delay, *map(QUORUM.step, LADDER_MS)):
        assert spec.arguments["x-dead-letter-routing-key"] == QUORUM.main.name
    assert "x-dead-letter-exchange" not in QUORUM.error.arguments
    assert "x-message-ttl" not in QUORUM.main.arguments


def test_the_configured_delay_has_its_own_queue_and_any_other_takes_the_ladder() -> None:
    topology = Topology(exchange="x", queue="q", delayed_ttl_ms=90_000)
    now = 1_763_900_000.123
    assert topology.waiting_room(90_000) == topology.delay
    assert topology.waiting_room(((now + 90.0) - now) * 1000) == topology.delay
    assert topology.waiting_room(89_999) == topology.step(60_000)
    assert topology.waiting_room(90_001) == topology.step(60_000)
    assert topology.waiting_room(0.1) == topology.step(250)


# ------------------------------------------------------------------------ ladder


def hops(wait_ms: float, extra_ms: list[float]) -> tuple[list[int], float]:
    """Return the steps that a wait takes, and by how much it ends late (early: below 0)."""
    steps: list[int] = []
    remaining = wait_ms
    while remaining > 0:
        step = ladder_step(remaining)
        remaining -= step + extra_ms[len(steps) % len(extra_ms)]
        steps.append(step)
    return steps, -remaining


def most_hops(wait_ms: float) -> float:
    """The longest step as often as it fits, and of each other one fewer than make the next."""
    ratios = [longer / shorter for shorter, longer in pairwise(LADDER_MS)]
    return wait_ms / LADDER_MS[-1] + sum(ratio - 1 for ratio in ratios) + 1


WAITS_MS = (
    st.floats(min_value=0, max_value=30 * DAY_MS)
    | st.integers(0, 30 * DAY_MS)
    | st.builds(
        lambda steps, off: max(0, sum(steps) + off),
        st.lists(st.sampled_from(LADDER_MS), max_size=12),
        st.integers(-600, 600),
    )
)
EXTRAS_MS = st.lists(st.floats(min_value=0, max_value=EXTRA_MS), min_size=1, max_size=8)


@given(wait_ms=WAITS_MS, extra_ms=EXTRAS_MS)
@example(wait_ms=30 * DAY_MS, extra_ms=[0.0])
@example(wait_ms=30 * DAY_MS, extra_ms=[float(EXTRA_MS)])
@example(wait_ms=43_199_749, extra_ms=[0.0])
@example(wait_ms=43_199_749, extra_ms=[float(EXTRA_MS)])
def test_a_wait_never_ends_early_at_most_one_smallest_step_late_and_in_few_hops(
    wait_ms: float, extra_ms: list[float]
) -> None:
    steps, late = hops(wait_ms, extra_ms)
    assert late >= 0
    if steps:
        assert late <= SLACK_MS + extra_ms[(len(steps) - 1) % len(extra_ms)] + 1e-3
    assert len(steps) <= most_hops(wait_ms)


def test_no_wait_up_to_30_days_takes_more_than_90_hops() -> None:
    assert most_hops(30 * DAY_MS) <= 90
    assert most_hops(DAY_MS / 2) <= 31


@given(wait_ms=WAITS_MS)
def test_the_largest_steps_come_first(wait_ms: float) -> None:
    steps, _ = hops(wait_ms, [0.0])
    assert steps == sorted(steps, reverse=True)


@given(wait_ms=WAITS_MS)
def test_no_step_but_the_longest_is_taken_more_than_five_times(wait_ms: float) -> None:
    steps, _ = hops(wait_ms, [float(EXTRA_MS)])
    assert all(steps.count(step) <= 5 for step in LADDER_MS[:-1])


@pytest.mark.parametrize("step_ms", LADDER_MS)
def test_a_wait_of_one_step_takes_that_step(step_ms: int) -> None:
    assert ladder_step(step_ms) == step_ms
    assert ladder_step(step_ms - SLACK_MS) == step_ms


@given(wait_ms=st.floats(max_value=0, allow_infinity=False))
def test_a_wait_that_is_over_still_has_a_step(wait_ms: float) -> None:
    assert ladder_step(wait_ms) == LADDER_MS[0]
