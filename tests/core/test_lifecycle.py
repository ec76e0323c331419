"""The table of states, looked at from every side."""

from __future__ import annotations

from itertools import product

import pytest

from amqp_tasks.core.lifecycle import (
    ENDED,
    TRANSITIONS,
    Event,
    TaskStatus,
    advance,
    sources,
    target,
)
from amqp_tasks.exceptions import IllegalTransition

PAIRS = list(product(TaskStatus, Event))
LEGAL = {
    ("scheduled", "claim"): "running",
    ("scheduled", "fail"): "errored",
    ("scheduled", "cancel"): "canceled",
    ("running", "claim"): "running",
    ("running", "succeed"): "finished",
    ("running", "retry"): "retrying",
    ("running", "fail"): "errored",
    ("running", "cancel"): "canceled",
    ("running", "release"): "scheduled",
    ("retrying", "claim"): "running",
    ("retrying", "fail"): "errored",
    ("retrying", "cancel"): "canceled",
    ("errored", "reopen"): "scheduled",
}
"""Written out once more, so that the table cannot change by accident."""


@pytest.mark.parametrize(("status", "event"), PAIRS)
def test_each_pair_leads_where_the_rules_say_or_nowhere(status: TaskStatus, event: Event) -> None:
    expected = LEGAL.get((str(status), str(event)))
    if expected is not None:
        assert advance(status, event) is TaskStatus(expected)
    else:
        with pytest.raises(IllegalTransition):
            advance(status, event)


@pytest.mark.parametrize(
    ("status", "event"), [pair for pair in PAIRS if pair[1] not in TRANSITIONS[pair[0]]]
)
def test_an_illegal_event_is_refused_with_both_names_and_what_is_possible(
    status: TaskStatus, event: Event
) -> None:
    with pytest.raises(IllegalTransition) as caught:
        advance(status, event)
    said, _, possible = str(caught.value).partition(";")
    assert str(event) in said
    assert str(status) in said
    assert all(str(other) in possible for other in TRANSITIONS[status])
    assert TRANSITIONS[status] or "ended" in possible
    assert caught.value.__suppress_context__  # no KeyError above what people read


def test_the_table_has_a_row_for_every_status() -> None:
    assert set(TRANSITIONS) == set(TaskStatus)


@pytest.mark.parametrize("status", TaskStatus)
def test_ended_states_absorb_but_for_a_replay_and_no_other_does(status: TaskStatus) -> None:
    leads_out = TRANSITIONS[status].keys() - {Event.REOPEN}
    assert status.ended == (status in ENDED) == (not leads_out)


def test_what_is_errored_and_nothing_else_can_be_reopened() -> None:
    assert sources(Event.REOPEN) == {TaskStatus.ERRORED}


@pytest.mark.parametrize(("status", "event"), PAIRS)
def test_sources_and_target_say_what_advance_does(status: TaskStatus, event: Event) -> None:
    if status in sources(event):
        assert advance(status, event) is target(event)
    else:
        with pytest.raises(IllegalTransition):
            advance(status, event)


@pytest.mark.parametrize("event", Event)
def test_an_event_leads_to_one_state_wherever_it_comes_from(event: Event) -> None:
    assert {advance(status, event) for status in sources(event)} == {target(event)}


def test_every_state_is_reached_from_scheduled_and_each_of_the_others_can_end() -> None:
    assert reachable(TaskStatus.SCHEDULED) == set(TaskStatus)
    for status in set(TaskStatus) - ENDED:
        assert reachable(status) >= ENDED


@pytest.mark.parametrize("status", TaskStatus)
def test_only_a_running_task_succeeds_retries_or_is_released(status: TaskStatus) -> None:
    possible = TRANSITIONS[status].keys() & {Event.SUCCEED, Event.RETRY, Event.RELEASE}
    assert bool(possible) == (status is TaskStatus.RUNNING)


def test_names_are_spelt_as_guillotina_amqp_spells_them() -> None:
    assert {"scheduled", "running", "finished", "errored", "canceled"} <= set(TaskStatus)


def reachable(start: TaskStatus) -> set[TaskStatus]:
    seen, todo = {start}, [start]
    while todo:
        for following in TRANSITIONS[todo.pop()].values():
            if following not in seen:
                seen.add(following)
                todo.append(following)
    return seen
