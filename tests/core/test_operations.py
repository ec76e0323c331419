"""The rule book of the state store: every branch of `change`, and the laws above them."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from amqp_tasks.core.lifecycle import TRANSITIONS, Event, TaskStatus, sources
from amqp_tasks.core.operations import (
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
from amqp_tasks.core.record import Owed, TaskRecord
from amqp_tasks.core.rules import change

SETTLING = [event for event in Event if event not in (Event.CLAIM, Event.REOPEN)]
"""The events that a worker settles with."""
NOW = 1_763_900_000.0
DAY = 86_400.0
FENCE = 7
S = TaskStatus


def record(status: TaskStatus = S.RUNNING, **known: Any) -> TaskRecord:
    """A task that worker w1 has claimed, unless `known` says otherwise."""
    lease = "" if status is S.SCHEDULED else "w1/1"
    defaults: dict[str, Any] = {"task_id": "t", "name": "add", "job": "{}", "status": status}
    return TaskRecord(**{**defaults, "lease": lease, "fence": FENCE if lease else 0, **known})


def create(**known: Any) -> Create:
    defaults: dict[str, Any] = {
        "task_id": "t",
        "name": "add",
        "job": "{}",
        "nonce": "n",
        "now": NOW,
    }
    return Create(**{**defaults, **known})


def claim(**known: Any) -> Claim:
    defaults: dict[str, Any] = {"task_id": "t", "name": "add", "job": "{}"}
    more: dict[str, Any] = {"attempt": 1, "lease": "w2/1", "now": NOW, "ttl": DAY}
    return Claim(**{**defaults, **more, **known})


def settle(event: Event = Event.SUCCEED, **known: Any) -> Settle:
    defaults: dict[str, Any] = {"task_id": "t", "name": "add", "lease": "w1/1", "fence": FENCE}
    more: dict[str, Any] = {"event": event, "attempt": 1, "now": NOW, "ttl": DAY}
    return Settle(**{**defaults, **more, **known})


def discharge(owed: Owed, **known: Any) -> Discharge:
    more: dict[str, Any] = {"attempt": 1, "ttl": None, "now": NOW}
    return Discharge(**{"task_id": "t", "owed": owed, **more, **known})


def cancel(**known: Any) -> RequestCancel:
    return RequestCancel(**{"task_id": "t", "reason": "user", "now": NOW, **known})


def revoke(**known: Any) -> Revoke:
    return Revoke(**{"task_id": "t", "nonce": "n", "now": NOW, **known})


def reopen(**known: Any) -> Reopen:
    defaults: dict[str, Any] = {"task_id": "t", "name": "add", "job": "{}", "nonce": "r"}
    return Reopen(**{**defaults, "now": NOW, **known})


def after(before: TaskRecord | None, *operations: Change) -> TaskRecord:
    """The record that these operations leave."""
    for operation in operations:
        before, _ = change(before, operation)
    assert before is not None
    return before


# ------------------------------------------------------------------------- create


def test_create_writes_a_scheduled_task_that_owes_its_message_and_expires() -> None:
    state, answer = change(
        None, create(due=NOW + 5, deadline=NOW + 9, timeout=3.0, parent="p", ttl=60.0)
    )
    assert answer == Created(new=True, owed=True)
    assert state == TaskRecord(
        task_id="t",
        name="add",
        job="{}",
        created_at=NOW,
        updated_at=NOW,
        due=NOW + 5,
        deadline=NOW + 9,
        timeout=3.0,
        parent="p",
        owed=Owed.PUBLISH,
        nonce="n",
        expires_at=NOW + 60,
    )


def test_create_of_a_task_that_is_there_changes_nothing() -> None:
    before = after(None, create())
    assert change(before, create(nonce="other")) == (before, Created(new=False, owed=True))
    published = after(before, discharge(Owed.PUBLISH))
    assert change(published, create(nonce="other")) == (published, Created(new=False, owed=False))


@pytest.mark.parametrize("status", S)
def test_create_never_touches_another_ones_task(status: TaskStatus) -> None:
    before = record(status, nonce="other")
    assert change(before, create()) == (before, Created(new=False, owed=False))


# ---------------------------------------------------------------------- discharge


def test_discharge_of_the_first_message_lets_the_state_live() -> None:
    state = after(None, create(), discharge(Owed.PUBLISH))
    assert (state.owed, state.expires_at) == (None, None)


def test_discharge_can_give_the_state_another_time_to_live() -> None:
    state = after(None, create(), discharge(Owed.PUBLISH, ttl=30.0))
    assert (state.owed, state.expires_at) == (None, NOW + 30)


def test_discharge_of_an_ended_task_leaves_its_expiry() -> None:
    before = record(S.ERRORED, owed=Owed.ERROR, expires_at=NOW + 5)
    state = after(before, discharge(Owed.ERROR, ttl=DAY))
    assert (state.owed, state.expires_at) == (None, NOW + 5)


@pytest.mark.parametrize(
    "before",
    [
        None,
        record(),
        record(S.RETRYING, owed=Owed.RETRY, attempt=3),
        record(S.ERRORED, owed=Owed.ERROR, attempt=2),
    ],
    ids=["unknown", "owes nothing", "owes another attempt", "owes something else"],
)
def test_discharge_of_what_is_not_owed_changes_nothing(before: TaskRecord | None) -> None:
    assert change(before, discharge(Owed.RETRY, attempt=2)) == (before, None)


# ------------------------------------------------------------------------- revoke


def test_revoke_takes_a_new_task_back() -> None:
    assert change(after(None, create()), revoke()) == (None, True)


@pytest.mark.parametrize(
    "before",
    [
        after(None, create(), discharge(Owed.PUBLISH)),
        after(None, create(nonce="other")),
        after(None, create(), claim()),
        after(None, create(), cancel()),
    ],
    ids=["published", "another producer's", "claimed", "canceled"],
)
def test_revoke_leaves_alone_what_others_know_of(before: TaskRecord) -> None:
    assert change(before, revoke()) == (before, False)


def test_revoke_with_an_error_keeps_the_task_as_errored() -> None:
    gone = {"error": "{}", "ttl": 60.0}
    kept, answer = change(after(None, create()), revoke(**gone))
    assert isinstance(kept, TaskRecord)
    assert answer is True
    assert (kept.status, kept.reason, kept.error) == (TaskStatus.ERRORED, "not_queued", "{}")
    assert (kept.owed, kept.expires_at) == (None, NOW + 60)
    assert change(kept, revoke(**gone)) == (kept, True)
    assert change(kept, revoke(nonce="other", **gone)) == (kept, False)
    assert change(kept, revoke()) == (kept, False)


def test_revoke_repeated_answers_as_the_first() -> None:
    gone, first = change(after(None, create()), revoke())
    assert change(gone, revoke()) == (gone, first)


# ----------------------------------------------------------------- request cancel


def test_cancel_of_an_unknown_task_writes_nothing() -> None:
    assert change(None, cancel()) == (None, UNKNOWN)


@pytest.mark.parametrize("status", [S.FINISHED, S.ERRORED, S.CANCELED])
def test_cancel_of_an_ended_task_changes_nothing(status: TaskStatus) -> None:
    assert change(record(status), cancel()) == (record(status), ALREADY_ENDED)


@pytest.mark.parametrize("status", [S.SCHEDULED, S.RETRYING])
def test_cancel_ends_what_waits(status: TaskStatus) -> None:
    state, answer = change(record(status, owed=Owed.RETRY, due=NOW - 1), cancel())
    assert answer == CANCELED_NOW
    assert state is not None
    assert (state.status, state.reason, state.ended_at) == (S.CANCELED, "user", NOW)
    assert (state.owed, state.cancel) == (None, None)
    assert state.expires_at is None, "kept until its message has come by"
    seen, _ = change(state, claim(attempt=state.attempt))
    assert seen is not None
    assert seen.expires_at == NOW + DAY


def test_cancel_of_what_runs_is_a_request_to_its_worker() -> None:
    state, answer = change(record(), cancel())
    assert answer == REQUESTED
    assert state == record(cancel="user")


def test_of_two_cancel_requests_the_first_one_counts() -> None:
    assert after(record(), cancel(), cancel(reason="parent")) == record(cancel="user")


@pytest.mark.parametrize("status", [S.SCHEDULED, S.RETRYING])
def test_the_end_of_a_canceled_task_is_known_when_its_message_comes_back(
    status: TaskStatus,
) -> None:
    # A state that is forgotten while the message waits makes the claim start it after all.
    due = NOW + 30 * DAY
    expires_at = after(record(status, due=due), cancel()).expires_at
    assert expires_at is None or expires_at > due + 1


def test_a_copy_of_an_earlier_attempt_does_not_let_a_canceled_task_be_forgotten() -> None:
    # The message that must not start it is the later one, and that may wait for long yet.
    state = after(record(S.RETRYING, attempt=2, due=NOW + 30 * DAY), cancel(), claim(attempt=1))
    assert state.expires_at is None or state.expires_at > NOW + 30 * DAY


@pytest.mark.parametrize(
    "canceled",
    [record(cancel="user"), after(record(cancel="user"), claim(lost_lease="w1/1"))],
    ids=["requested", "by whom presumed its worker dead"],
)
def test_a_retry_of_a_canceled_task_is_not_published_or_outlived_by_the_state(
    canceled: TaskRecord,
) -> None:
    due = NOW + 30 * DAY
    state, answer = change(
        canceled, settle(Event.RETRY, attempt=2, due=due, owed=Owed.RETRY, error="{}")
    )
    assert state is not None
    assert state.status is S.CANCELED
    assert answer != WRITTEN or state.expires_at is None or state.expires_at > due


# -------------------------------------------------------------------------- claim


def test_claim_of_a_task_nobody_knows_makes_its_state_from_the_message() -> None:
    operation = claim(attempt=2, deadline=NOW + 9, timeout=3.0, parent="p")
    state, answer = change(None, operation)
    assert state is not None
    assert answer == Granted(state.fence, 0)
    assert (state.status, state.attempt, state.lease) == (S.RUNNING, 2, "w2/1")
    assert (state.name, state.job, state.parent) == ("add", "{}", "p")
    assert (state.created_at, state.started_at, state.deadline) == (NOW, NOW, NOW + 9)
    assert state.expires_at is None


@pytest.mark.parametrize("status", [S.SCHEDULED, S.RETRYING])
def test_claim_of_what_waits_is_granted(status: TaskStatus) -> None:
    before = record(status, owed=Owed.PUBLISH, due=NOW, expires_at=NOW + 5)
    state, answer = change(before, claim())
    assert state is not None
    assert answer == Granted(state.fence, 0)
    assert (state.status, state.lease, state.owner) == (S.RUNNING, "w2/1", "w2")
    assert (state.owed, state.due, state.expires_at) == (None, None, None)


def test_claim_gives_a_fence_that_grows_even_if_the_store_was_emptied() -> None:
    forgotten = after(None, claim())
    assert forgotten.fence >= NOW * 1000
    later = after(record(S.RETRYING, fence=forgotten.fence + 10**9), claim())
    assert later.fence > forgotten.fence + 10**9
    assert after(None, claim(now=NOW + 1)).fence > forgotten.fence


def test_claim_by_the_same_delivery_gets_the_same_answer() -> None:
    state, first = change(record(S.SCHEDULED), claim())
    assert change(state, claim(now=NOW + 1)) == (state, first)


def test_claim_of_what_runs_names_its_owner() -> None:
    assert change(record(), claim()) == (record(), Held("w1/1"))


def test_claim_by_another_delivery_to_the_same_worker_is_held_as_well() -> None:
    assert change(record(), claim(lease="w1/2")) == (record(), Held("w1/1"))


def test_claim_that_presumes_somebody_else_dead_is_held() -> None:
    assert change(record(), claim(lost_lease="w0/1")) == (record(), Held("w1/1"))


def test_claim_from_the_dead_is_granted_and_counted_as_a_crash() -> None:
    state, answer = change(record(crashes=1), claim(lost_lease="w1/1"))
    assert state is not None
    assert answer == Granted(state.fence, 2)
    assert (state.status, state.lease, state.crashes) == (S.RUNNING, "w2/1", 2)
    assert state.fence > FENCE


def test_claim_from_the_dead_honours_their_cancel_request() -> None:
    state, answer = change(record(cancel="user"), claim(lost_lease="w1/1"))
    assert answer == Ended(S.CANCELED)
    assert state is not None
    assert (state.status, state.reason, state.cancel) == (S.CANCELED, "user", None)
    assert state.expires_at == NOW + DAY


@pytest.mark.parametrize("status", [S.FINISHED, S.ERRORED, S.CANCELED])
@pytest.mark.parametrize("attempt", [1, 2, 3])
def test_claim_of_an_ended_task_says_so(status: TaskStatus, attempt: int) -> None:
    before = record(status, attempt=2, expires_at=NOW + 5)
    assert change(before, claim(attempt=attempt)) == (before, Ended(status))


def test_claim_of_an_errored_task_whose_message_is_owed_says_what_to_publish() -> None:
    before = record(S.ERRORED, attempt=2, owed=Owed.ERROR, error="{}", expires_at=NOW + 5)
    assert change(before, claim(attempt=2)) == (before, Owing(Owed.ERROR, 2, None, "{}", "w1/1"))
    assert change(before, claim(attempt=1)) == (before, Ended(S.ERRORED))


def test_claim_for_the_attempt_before_says_that_the_next_message_is_owed() -> None:
    before = record(S.RETRYING, attempt=3, owed=Owed.RETRY, due=NOW + 8, error="{}")
    assert change(before, claim(attempt=2)) == (before, Owing(Owed.RETRY, 3, NOW + 8, "{}", "w1/1"))
    assert change(before, claim(attempt=1)) == (before, Duplicate(3))


@pytest.mark.parametrize("status", [S.SCHEDULED, S.RUNNING, S.RETRYING])
def test_claim_for_an_earlier_attempt_is_a_duplicate(status: TaskStatus) -> None:
    before = record(status, attempt=2)
    assert change(before, claim(attempt=1, lost_lease="w1/1")) == (before, Duplicate(2))


@pytest.mark.parametrize("status", [S.SCHEDULED, S.RETRYING])
def test_claim_for_a_later_attempt_brings_the_state_up_to_it(status: TaskStatus) -> None:
    assert after(record(status), claim(attempt=4)).attempt == 4


# ------------------------------------------------------------------------- settle


def test_settle_records_a_result() -> None:
    state, answer = change(record(error="{}"), settle(result="42"))
    assert answer == WRITTEN
    assert state is not None
    assert (state.status, state.result, state.error) == (S.FINISHED, "42", "{}")
    assert (state.ended_at, state.expires_at) == (NOW, NOW + DAY)


@pytest.mark.parametrize("result", ["0", '""', "[]", "null", "false"])
def test_settle_keeps_results_that_are_false(result: str) -> None:
    assert after(record(), settle(result=result)).result == result


def test_settle_records_an_error_and_what_it_owes() -> None:
    operation = settle(Event.FAIL, error="{}", reason="timeout", owed=Owed.ERROR)
    state = after(record(), operation)
    assert (state.status, state.error, state.reason) == (S.ERRORED, "{}", "timeout")
    assert (state.owed, state.ended_at, state.expires_at) == (Owed.ERROR, NOW, NOW + DAY)


def test_settle_records_the_next_attempt_and_when_it_is_due() -> None:
    operation = settle(Event.RETRY, attempt=2, due=NOW + 8, error="{}", owed=Owed.RETRY)
    state = after(record(), operation)
    assert (state.status, state.attempt, state.due) == (S.RETRYING, 2, NOW + 8)
    assert (state.owed, state.ended_at, state.expires_at) == (Owed.RETRY, None, None)


def test_settle_records_a_cancellation_and_its_reason() -> None:
    state = after(record(cancel="user"), settle(Event.CANCEL, reason="user"))
    assert (state.status, state.reason, state.cancel) == (S.CANCELED, "user", None)


def test_settle_gives_a_task_back_without_counting_the_attempt() -> None:
    state = after(record(crashes=1), settle(Event.RELEASE))
    assert (state.status, state.attempt, state.crashes) == (S.SCHEDULED, 1, 1)
    assert after(state, claim()).crashes == 1
    assert (state.ended_at, state.expires_at) == (None, None)


@pytest.mark.parametrize(
    ("event", "attempt"), [(Event.RELEASE, 1), (Event.RETRY, 2)], ids=["release", "retry"]
)
def test_a_requested_cancel_is_not_forgotten_when_the_attempt_ends_first(
    event: Event, attempt: int
) -> None:
    # Whoever asked was told "requested"; no further attempt may start.
    left = after(record(), cancel(), settle(event, attempt=attempt, owed=None))
    _, answer = change(left, claim(attempt=attempt))
    assert answer == Ended(S.CANCELED)


@pytest.mark.parametrize("stale", [{"lease": "w2/1"}, {"lease": "w1/2"}, {"fence": FENCE - 1}])
@pytest.mark.parametrize("event", SETTLING)
def test_settle_with_a_stale_lease_writes_nothing(event: Event, stale: dict[str, Any]) -> None:
    before = record()
    assert change(before, settle(event, **stale)) == (before, STALE)


@pytest.mark.parametrize("event", SETTLING)
@pytest.mark.parametrize("requested", [None, "user"], ids=["", "cancel requested"])
def test_settle_repeated_answers_as_the_first(event: Event, requested: str | None) -> None:
    attempt = 2 if event is Event.RETRY else 1
    state, first = change(record(cancel=requested), settle(event, attempt=attempt))
    assert first == WRITTEN or requested
    assert change(state, settle(event, attempt=attempt, now=NOW + 1)) == (state, first)


def test_settle_does_not_overwrite_an_end_with_another() -> None:
    before = after(record(), settle())
    assert change(before, settle(Event.FAIL)) == (before, STALE)
    assert change(before, settle(Event.RETRY, attempt=2)) == (before, STALE)


def test_settle_into_an_emptied_store_writes_the_state_anew() -> None:
    state, answer = change(None, settle(result="42"))
    assert answer == WRITTEN
    assert state is not None
    assert (state.task_id, state.name, state.status) == ("t", "add", S.FINISHED)
    assert (state.result, state.fence, state.lease) == ("42", FENCE, "w1/1")
    assert state.expires_at == NOW + DAY


def test_a_state_written_anew_gets_its_job_back_with_the_next_claim() -> None:
    for event, attempt in [(Event.RELEASE, 1), (Event.RETRY, 2)]:
        state = after(None, settle(event, attempt=attempt), claim(attempt=attempt, parent="p"))
        assert (state.job, state.parent) == ("{}", "p")


# ------------------------------------------------------------------------- reopen


def test_reopen_schedules_an_errored_task_anew_and_keeps_its_fence() -> None:
    failed = after(
        record(crashes=2, attempt=4, created_at=NOW - 9, started_at=NOW - 5, parent="p"),
        settle(Event.FAIL, attempt=4, error='"boom"', reason="timeout", owed=Owed.ERROR),
    )
    state, answer = change(failed, reopen(now=NOW + 1, deadline=NOW + 60, timeout=4.0, ttl=30.0))
    assert answer == Reopened(S.SCHEDULED, owed=True)
    assert state == TaskRecord(
        task_id="t",
        name="add",
        job="{}",
        fence=FENCE,
        created_at=NOW - 9,
        started_at=NOW - 5,
        updated_at=NOW + 1,
        deadline=NOW + 60,
        timeout=4.0,
        owed=Owed.PUBLISH,
        nonce="r",
        expires_at=NOW + 31,
    )
    published = after(state, discharge(Owed.PUBLISH))
    assert (published.owed, published.expires_at) == (None, None)
    _, granted = change(published, claim(now=0.001))
    assert granted == Granted(FENCE + 1, 0)


def test_reopen_of_what_is_not_known_writes_it_as_a_producer_would() -> None:
    known: dict[str, Any] = {"nonce": "n", "deadline": NOW + 9, "parent": "p", "ttl": 60.0}
    state, answer = change(None, reopen(**known))
    assert answer == Reopened(S.SCHEDULED, owed=True)
    assert state == after(None, create(**known))


@pytest.mark.parametrize("status", sorted(set(S) - {S.ERRORED}))
def test_reopen_leaves_alone_what_is_not_errored(status: TaskStatus) -> None:
    before = record(status)
    assert change(before, reopen()) == (before, Reopened(status, owed=False))


def test_reopen_again_says_whether_the_message_is_still_owed() -> None:
    state = after(record(S.ERRORED), reopen())
    for other in (reopen(), reopen(nonce="another")):
        assert change(state, other) == (state, Reopened(S.SCHEDULED, owed=True))
    published = after(state, discharge(Owed.PUBLISH))
    assert change(published, reopen()) == (published, Reopened(S.SCHEDULED, owed=False))


def test_who_failed_a_task_cannot_settle_it_once_more_when_it_was_reopened() -> None:
    fail = settle(Event.FAIL, error='"boom"')
    state = after(record(), fail, reopen())
    assert change(state, fail) == (state, STALE)
    assert change(state, discharge(Owed.ERROR)) == (state, None)


def test_no_producer_takes_back_what_was_reopened() -> None:
    state = after(record(S.ERRORED, nonce="n"), reopen())
    assert change(state, revoke()) == (state, False)


# --------------------------------------------------------------------------- laws

LEASES = st.sampled_from(["w1/1", "w1/2", "w2/1"])
SMALL = st.integers(1, 4)
MOMENTS = st.floats(min_value=0, max_value=1e4)
TEXTS = st.none() | st.sampled_from(["a", "b"])
OWED = st.none() | st.sampled_from(Owed)


@st.composite
def records(draw: st.DrawFn) -> TaskRecord | None:
    if draw(st.integers(0, 9)) == 0:
        return None
    status = draw(st.sampled_from(S))
    ended_at = draw(MOMENTS) if status.ended else None
    return TaskRecord(
        task_id="t",
        name="add",
        job="{}",
        status=status,
        attempt=draw(SMALL),
        fence=draw(st.integers(0, 3)),
        lease=draw(LEASES) if status is S.RUNNING else draw(st.just("") | LEASES),
        crashes=draw(SMALL),
        created_at=draw(MOMENTS),
        updated_at=draw(MOMENTS),
        ended_at=ended_at,
        due=draw(st.none() | MOMENTS),
        result=draw(TEXTS),
        error=draw(TEXTS),
        reason=draw(TEXTS),
        cancel=draw(st.none() | st.just("user")) if status is S.RUNNING else None,
        owed=draw(OWED),
        nonce=draw(st.sampled_from(["n", "m"])),
        expires_at=draw(st.none() | MOMENTS),
    )


SETTLES = st.builds(
    settle,
    st.sampled_from(SETTLING),
    lease=LEASES,
    fence=st.integers(0, 3),
    attempt=SMALL,
    now=MOMENTS,
    owed=OWED,
)
CLAIMS = st.builds(
    claim,
    attempt=SMALL,
    lease=LEASES,
    now=MOMENTS,
    lost_lease=st.sampled_from(["", "w1/1", "w1/2", "w2/1"]),
)
OTHERS: list[st.SearchStrategy[Any]] = [
    st.builds(create, nonce=st.sampled_from(["n", "m"]), now=MOMENTS),
    st.builds(discharge, st.sampled_from(Owed), attempt=SMALL, ttl=st.none() | MOMENTS),
    st.builds(revoke, nonce=st.sampled_from(["n", "m"]), error=st.none() | st.just("{}")),
    st.builds(reopen, nonce=st.sampled_from(["n", "m"]), now=MOMENTS),
    st.builds(cancel, now=MOMENTS),
]
CHANGES: st.SearchStrategy[Change] = st.one_of(CLAIMS, SETTLES, *OTHERS)


@given(before=records(), operation=CHANGES)
def test_an_operation_is_answered_with_its_own_type_and_spares_its_input(
    before: TaskRecord | None, operation: Change
) -> None:
    kinds: dict[type[Change], type[object] | tuple[type[object], ...]] = {
        Create: Created,
        Discharge: type(None),
        Revoke: bool,
        Reopen: Reopened,
        RequestCancel: CancelAnswer,
        Claim: (Granted, Held, Ended, Duplicate, Owing),
        Settle: Settled,
    }
    copy = None if before is None else replace(before)
    _, answer = change(before, operation)
    assert isinstance(answer, kinds[type(operation)])
    assert before == copy


@given(before=records(), operation=CHANGES)
def test_every_change_of_status_is_in_the_table(
    before: TaskRecord | None, operation: Change
) -> None:
    state, _ = change(before, operation)
    if before is None or state is None or state.status is before.status:
        return
    status = before.status
    if isinstance(operation, Settle):
        if operation.fence > before.fence:
            # The store has forgotten the claim that this settles.
            status = TRANSITIONS[status][Event.CLAIM]
        assert status in sources(operation.event)
    assert state.status in TRANSITIONS[status].values()


@given(before=records(), operations=st.lists(CHANGES, max_size=6))
def test_a_fence_never_goes_back_and_grows_with_every_new_lease(
    before: TaskRecord | None, operations: list[Change]
) -> None:
    for operation in operations:
        state, _ = change(before, operation)
        if before is not None and state is not None:
            assert state.fence >= before.fence
            if state.lease not in (before.lease, ""):
                assert state.fence > before.fence
        before = state


@given(before=records(), operation=CHANGES)
def test_ended_states_keep_everything_but_what_they_owe_and_when_they_expire(
    before: TaskRecord | None, operation: Change
) -> None:
    assume(before is not None and before.status.ended)
    assume(not isinstance(operation, Reopen))  # the one exception
    state, _ = change(before, operation)
    assert before is not None
    assert state is not None
    differing = {
        each.name
        for each in fields(TaskRecord)
        if getattr(state, each.name) != getattr(before, each.name)
    }
    assert differing <= {"owed", "expires_at"}


@given(before=records(), operation=CHANGES, later=st.floats(min_value=0, max_value=100))
def test_a_write_that_is_repeated_answers_as_the_first_and_changes_nothing_more(
    before: TaskRecord | None, operation: Change, later: float
) -> None:
    assume(not isinstance(operation, Revoke | RequestCancel))
    state, first = change(before, operation)
    again = replace(operation, now=operation.now + later)
    repeated, second = change(state, again)
    assert second == first
    if first != STALE and not isinstance(operation, Discharge):
        assert repeated == state


@given(before=records(), operation=SETTLES)
def test_a_lease_that_another_one_followed_writes_nothing(
    before: TaskRecord | None, operation: Settle
) -> None:
    assume(before is not None)
    state, answer = change(before, operation)
    assert before is not None
    if operation.fence < before.fence or (
        operation.fence == before.fence and operation.lease != before.lease
    ):
        assert answer == STALE
        assert state == before
    elif answer == STALE and state != before:
        # Its own lease, but a cancel request was there first.
        assert before.cancel is not None
        assert operation.event in YIELDING
        assert state is not None
        assert (state.status, state.reason) == (S.CANCELED, before.cancel)


@given(before=records(), operation=CLAIMS)
def test_a_granted_claim_holds_the_lease_and_takes_it_from_the_dead_only(
    before: TaskRecord | None, operation: Claim
) -> None:
    state, answer = change(before, operation)
    if not isinstance(answer, Granted):
        return
    assert state is not None
    assert (state.status, state.lease, state.fence) == (S.RUNNING, operation.lease, answer.fence)
    if before is not None and before.status is S.RUNNING and before.lease != operation.lease:
        assert before.lease == operation.lost_lease
        crashed = operation.attempt == before.attempt and before.owner != state.owner
        assert state.crashes == before.crashes + crashed
        assert before.cancel is None
    if before is not None:
        assert state.attempt >= before.attempt


@given(before=records(), operation=CHANGES)
def test_what_waits_or_runs_does_not_expire_and_what_has_ended_does(
    before: TaskRecord | None, operation: Change
) -> None:
    state, _ = change(before, operation)
    if state is None or (before is not None and state.status is before.status):
        return
    unpublished = state.status is S.SCHEDULED and state.owed is Owed.PUBLISH
    its_message_waits = isinstance(operation, RequestCancel)
    expires = (state.status.ended and not its_message_waits) or unpublished
    assert (state.expires_at is not None) == expires
    assert (state.ended_at is not None) == state.status.ended


def test_a_copy_from_before_a_replay_does_not_take_the_task_from_the_living() -> None:
    """It is for a later attempt than the one that runs, which has begun from the first anew."""
    assert change(record(attempt=1), claim(attempt=4, lease="w3/1")) == (
        record(attempt=1),
        Held("w1/1"),
    )


@pytest.mark.parametrize(
    ("lease", "owner"), [("w1/1", "w1"), ("host/7/1", "host/7"), ("", ""), ("w1", "")]
)
def test_the_owner_is_the_lease_without_its_number(lease: str, owner: str) -> None:
    assert record(lease=lease).owner == owner
