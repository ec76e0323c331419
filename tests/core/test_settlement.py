"""The table of settlements, row by row: what follows from an outcome, and in which order."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amqp_tasks.core.lifecycle import Event
from amqp_tasks.core.message import Message, decode, error_headers
from amqp_tasks.core.operations import Settle
from amqp_tasks.core.outcome import (
    Canceled,
    CancelReason,
    Failed,
    Failure,
    GivenBack,
    LeaseLost,
    Outcome,
    Reason,
    Succeeded,
    cancelled_outcome,
)
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
    unreadable,
    wait_for,
)
from amqp_tasks.core.topology import LADDER_MS, Topology

NOW = 1_763_900_000.0
TOPOLOGY = Topology(exchange="x", queue="q", delayed_ttl_ms=120_000)
RULES = Rules(
    topology=TOPOLOGY,
    retry=RetryPolicy(max_retries=2, delay=10.0, backoff=2.0, jitter=0.1),
    state_ttl=60.0,
)
LEASE = Lease(id="w1/7", fence=42, worker="w1")
FAILURE = Failure(type="builtins.ValueError", message="wrong", traceback="Traceback ...\nwrong")
BODY = b'{"func": "add", "args": [1], "kwargs": {}, "task_id": "t", "db_id": "db"}'


def call(**headers: Any) -> Message:
    return decode(BODY, {"task-attempt": 1, "traceparent": "00-1-2-03", **headers})


def settled(outcome: Outcome, message: Message | None = None) -> tuple[Effect, ...]:
    return settle(outcome, message or call(), LEASE, RULES, now=NOW, spread=0.0)


def written(effects: tuple[Effect, ...]) -> Settle:
    (operation,) = [effect.operation for effect in effects if isinstance(effect, WriteState)]
    return operation


def published(effects: tuple[Effect, ...]) -> Publication:
    (publication,) = [effect.publication for effect in effects if isinstance(effect, Publish)]
    return publication


def kinds(effects: tuple[Effect, ...]) -> list[object]:
    return [effect if isinstance(effect, Verdict) else type(effect) for effect in effects]


# --------------------------------------------------------------------------- rows


def test_succeeded_writes_the_result_and_acks() -> None:
    effects = settled(Succeeded("0"))
    assert kinds(effects) == [WriteState, Verdict.ACK]
    state = written(effects)
    assert (state.event, state.result, state.attempt) == (Event.SUCCEED, "0", 1)
    assert (state.owed, state.error, state.reason) == (None, None, None)


def test_failed_with_retries_left_writes_the_next_attempt_then_publishes_it_then_acks() -> None:
    effects = settled(Failed(FAILURE))
    assert kinds(effects) == [WriteState, Publish, MarkPublished, Verdict.ACK]
    state = written(effects)
    assert (state.event, state.attempt, state.due) == (Event.RETRY, 2, NOW + 10)
    assert state.owed is Owed.RETRY
    assert json.loads(state.error or "") == {
        "type": "builtins.ValueError",
        "message": "wrong",
        "traceback": "Traceback ...\nwrong",
        "reason": None,
        "attempt": 1,
        "worker": "w1",
    }


def test_the_next_attempt_is_the_same_call_and_waits_until_it_is_due() -> None:
    again = published(settled(Failed(FAILURE), call(**{"task-parent": "p", "task-attempt": 2})))
    assert again.queue == TOPOLOGY.step(15_000)
    assert again.body == BODY
    assert decode(again.body, again.headers) == call(
        **{"task-attempt": 3, "task-due": NOW + 20, "task-parent": "p"}
    )


def test_failed_with_no_retry_left_writes_the_error_then_dead_letters_then_acks() -> None:
    effects = settled(Failed(FAILURE), call(**{"task-attempt": 3}))
    assert kinds(effects) == [WriteState, Publish, MarkPublished, Verdict.ACK]
    state = written(effects)
    assert (state.event, state.attempt, state.due) == (Event.FAIL, 3, None)
    assert state.owed is Owed.ERROR
    assert json.loads(state.error or "")["traceback"] == "Traceback ...\nwrong"
    letter = published(effects)
    assert letter.queue == TOPOLOGY.error
    assert letter.body == BODY
    assert decode(letter.body, letter.headers) == call(**{"task-attempt": 3})
    why = error_headers(FAILURE, attempt=3, worker="w1", at=NOW)
    assert letter.headers == {**call(**{"task-attempt": 3}).headers(), **why}


@pytest.mark.parametrize("reason", Reason)
def test_what_is_futile_to_retry_is_dead_lettered_at_once_with_its_reason(reason: Reason) -> None:
    effects = settled(Failed(Failure(type="E", message="no", reason=reason), may_retry=False))
    assert kinds(effects) == [WriteState, Publish, MarkPublished, Verdict.ACK]
    assert (written(effects).event, written(effects).reason) == (Event.FAIL, reason)
    assert published(effects).queue == TOPOLOGY.error
    assert published(effects).headers["error-reason"] == reason


@pytest.mark.parametrize("reason", [CancelReason.USER, CancelReason.PARENT])
def test_canceled_writes_the_reason_and_acks(reason: CancelReason) -> None:
    effects = settled(cancelled_outcome(reason, FAILURE))
    assert kinds(effects) == [WriteState, Verdict.ACK]
    assert (written(effects).event, written(effects).reason) == (Event.CANCEL, reason)


@pytest.mark.parametrize("reason", [CancelReason.TIMEOUT, CancelReason.BLOCKED_LOOP])
def test_a_timeout_and_a_blocked_loop_are_retried_as_if_it_had_raised(
    reason: CancelReason,
) -> None:
    failure = Failure(type="TimeoutError", message="too long", reason=Reason(reason))
    effects = settled(cancelled_outcome(reason, failure))
    assert written(effects).event is Event.RETRY
    assert json.loads(written(effects).error or "")["reason"] == reason
    last = settled(cancelled_outcome(reason, failure), call(**{"task-attempt": 3}))
    assert (written(last).event, written(last).reason) == (Event.FAIL, reason)
    assert published(last).headers["error-reason"] == reason


def test_past_its_deadline_a_task_is_not_retried() -> None:
    failure = Failure(type="TimeoutError", message="too late", reason=Reason.DEADLINE)
    effects = settled(cancelled_outcome(CancelReason.DEADLINE, failure))
    assert written(effects).event is Event.FAIL
    assert published(effects).headers["error-reason"] == "deadline"


def test_shutdown_gives_the_task_back_without_counting_the_attempt() -> None:
    message = call(**{"task-attempt": 2})
    effects = settled(cancelled_outcome(CancelReason.SHUTDOWN, FAILURE), message)
    assert kinds(effects) == [WriteState, Verdict.REQUEUE]
    state = written(effects)
    assert (state.event, state.attempt) == (Event.RELEASE, 2)
    assert (state.error, state.due, state.owed) == (None, None, None)


def test_who_lost_the_lease_records_nothing() -> None:
    (verdict,) = settled(cancelled_outcome(CancelReason.LEASE_LOST, FAILURE))
    assert isinstance(verdict, Verdict)


@pytest.mark.parametrize("reason", CancelReason)
def test_every_cancel_reason_has_an_outcome(reason: CancelReason) -> None:
    kind = {
        CancelReason.USER: Canceled,
        CancelReason.PARENT: Canceled,
        CancelReason.TIMEOUT: Failed,
        CancelReason.DEADLINE: Failed,
        CancelReason.BLOCKED_LOOP: Failed,
        CancelReason.SHUTDOWN: GivenBack,
        CancelReason.LEASE_LOST: LeaseLost,
    }[reason]
    assert isinstance(cancelled_outcome(reason, FAILURE), kind)


def test_what_cannot_be_read_goes_to_the_error_queue_as_it_came() -> None:
    failure = Failure(type="DecodeError", message="no JSON", reason=Reason.UNDECODABLE)
    came = {"x-death": [{"count": 1}], "x-delivery-count": 3, "tenant": "a", "error-type": "old"}
    effects = unreadable(b"\xff", came, failure, "w1", TOPOLOGY, now=NOW)
    assert kinds(effects) == [Publish, Verdict.ACK]
    letter = published(effects)
    assert (letter.queue, letter.body) == (TOPOLOGY.error, b"\xff")
    why = error_headers(failure, attempt=1, worker="w1", at=NOW)
    assert letter.headers == {"tenant": "a", **why}


# -------------------------------------------------------------------------- order

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
FAILURES = st.builds(
    Failure,
    type=TEXT,
    message=TEXT,
    traceback=TEXT,
    reason=st.none() | st.sampled_from(Reason),
)
OUTCOMES: st.SearchStrategy[Outcome] = st.one_of(
    st.builds(Succeeded, TEXT),
    st.builds(Failed, FAILURES, may_retry=st.booleans()),
    st.builds(cancelled_outcome, st.sampled_from(CancelReason), FAILURES),
)
RANKS: dict[type[Effect], int] = {WriteState: 0, Publish: 1, MarkPublished: 2, Verdict: 3}


@given(
    outcome=OUTCOMES,
    attempt=st.integers(1, 5),
    retries=st.none() | st.integers(0, 4),
    spread=st.floats(-1, 1),
)
def test_state_first_then_publication_then_its_mark_and_the_verdict_last(
    outcome: Outcome, attempt: int, retries: int | None, spread: float
) -> None:
    rules = Rules(topology=TOPOLOGY, retry=RetryPolicy(max_retries=retries), state_ttl=60.0)
    message = call(**{"task-attempt": attempt})
    effects = settle(outcome, message, LEASE, rules, now=NOW, spread=spread)
    ranks = [RANKS[type(effect)] for effect in effects]
    assert ranks == sorted(set(ranks))
    assert ranks[-1] == RANKS[Verdict]
    # Whatever the state owes is published and marked as published, and nothing else is.
    owed = None if isinstance(outcome, LeaseLost) else written(effects).owed
    marks = [effect.operation for effect in effects if isinstance(effect, MarkPublished)]
    assert [(mark.owed, mark.attempt) for mark in marks] == (
        [] if owed is None else [(owed, written(effects).attempt)]
    )
    assert (RANKS[Publish] in ranks) == (owed is not None)


@given(outcome=OUTCOMES)
def test_every_write_carries_the_lease(outcome: Outcome) -> None:
    for effect in settled(outcome):
        if isinstance(effect, WriteState):
            state = effect.operation
            assert (state.lease, state.fence) == ("w1/7", 42)
            assert (state.task_id, state.name, state.now, state.ttl) == ("t", "add", NOW, 60.0)


@given(outcome=OUTCOMES)
def test_the_body_never_changes(outcome: Outcome) -> None:
    for effect in settled(outcome):
        if isinstance(effect, Publish):
            assert effect.publication.body == BODY


def test_a_failure_whose_text_is_not_utf_8_is_settled_like_any_other() -> None:
    # How Python spells the name of a file that is not UTF-8, in any FileNotFoundError.
    failure = Failure(type="FileNotFoundError", message="no such file: \udcff", traceback="\udcff")
    effects = settled(Failed(failure, may_retry=False))
    assert json.loads(written(effects).error or "")["type"] == "FileNotFoundError"


# --------------------------------------------------------- what is owed, and waiting


def test_an_interrupted_retry_is_taken_up_where_it_was() -> None:
    whole = settled(Failed(FAILURE))
    rest = publish_retry(call(), 2, NOW + 10, RULES, now=NOW)
    assert rest == whole[1:]


def test_an_interrupted_dead_letter_is_taken_up_where_it_was() -> None:
    message = call(**{"task-attempt": 3})
    assert (
        dead_letter(message, FAILURE, "w1", RULES, now=NOW) == settled(Failed(FAILURE), message)[1:]
    )


def test_a_retry_that_is_overdue_goes_to_the_main_queue() -> None:
    effects = publish_retry(call(), 2, NOW - 1, RULES, now=NOW)
    assert published(effects).queue == TOPOLOGY.main


@pytest.mark.parametrize(
    ("wait", "queue"),
    [
        (None, TOPOLOGY.main),
        (-5.0, TOPOLOGY.main),
        (0.0, TOPOLOGY.main),
        (0.001, TOPOLOGY.step(250)),
        (1.0, TOPOLOGY.step(1_000)),
        (120.0, TOPOLOGY.delay),
        (119.0, TOPOLOGY.step(60_000)),
        (86_400.0, TOPOLOGY.step(43_200_000)),
    ],
)
def test_a_message_waits_in_the_largest_step_that_fits(wait: float | None, queue: object) -> None:
    message = call().for_attempt(2, due=None if wait is None else NOW + wait)
    publication = wait_for(message, TOPOLOGY, now=NOW)
    assert publication.queue == queue
    assert publication.headers == message.headers()
    assert publication.body == BODY


@given(wait=st.floats(min_value=-1e5, max_value=1e7))
def test_a_wait_is_never_longer_than_asked_for_by_more_than_the_smallest_step(wait: float) -> None:
    message = call().for_attempt(2, due=NOW + wait)
    publication = wait_for(message, TOPOLOGY, now=NOW)
    held_ms = publication.queue.arguments.get("x-message-ttl", 0)
    assert held_ms <= max(0.0, wait * 1000 + LADDER_MS[0] + 1)
    assert (publication.queue == TOPOLOGY.main) == (message.due is not None and message.due <= NOW)


def test_a_parked_copy_is_the_same_message_but_for_how_often_it_was_parked() -> None:
    message = call(**{"task-attempt": 2, "task-due": NOW})
    for _ in range(30):
        copy = park(message, TOPOLOGY)
        assert copy.body == BODY
        again = decode(copy.body, copy.headers)
        assert again.parked == message.parked + 1
        assert again.for_attempt(2, due=NOW) == message.for_attempt(2, due=NOW)
        assert copy.queue in [TOPOLOGY.step(step) for step in LADDER_MS]
        message = again


def test_a_parked_copy_comes_back_soon_at_first_and_less_often_later() -> None:
    first = park(call(), TOPOLOGY).queue.arguments["x-message-ttl"]
    later = park(call().parked_again(100), TOPOLOGY).queue.arguments["x-message-ttl"]
    assert first < later <= 60_000
    assert guard(call(), TOPOLOGY).queue.arguments["x-message-ttl"] == later


def test_the_next_attempt_does_not_inherit_how_often_the_last_was_parked() -> None:
    assert decode(BODY, park(call(), TOPOLOGY).headers).for_attempt(2, due=None).parked == 0
