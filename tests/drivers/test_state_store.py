"""The conformance suite of state stores, first part: what changes a task."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from amqp_tasks.core.lifecycle import Event, TaskStatus, target
from amqp_tasks.core.operations import (
    AppendEvents,
    Beat,
    Created,
    Duplicate,
    Ended,
    Granted,
    Held,
    IsAlive,
    Owing,
    Poll,
    Polled,
    Reopened,
)
from amqp_tasks.core.record import Owed, TaskRecord

from ..servers.redis import redis_cluster, redis_server  # noqa: F401  fixtures
from .state_stores import HOUR, ODD_IDS, Asker, choose_backend, choose_case, open_store  # noqa: F401  fixtures

pytestmark = pytest.mark.anyio


# ------------------------------------------------------------------------ create


async def test_create_writes_a_record(asker: Asker) -> None:
    op = asker.create(due=12.5, deadline=1e9 / 3, timeout=0.1, parent="p")
    assert await asker.ask(op) == Created(new=True, owed=True)
    assert await asker.read() == TaskRecord(
        task_id="t",
        name=op.name,
        job=op.job,
        created_at=op.now,
        updated_at=op.now,
        due=12.5,
        deadline=1e9 / 3,
        timeout=0.1,
        parent="p",
        owed=Owed.PUBLISH,
        nonce="n1",
        expires_at=op.now + 3600,
    )


async def test_create_repeated_by_its_producer(asker: Asker) -> None:
    first = asker.create()
    await asker.ask(first)
    again = replace(first, now=first.now + 1, name="other")
    assert await asker.ask(again) == Created(new=True, owed=True)
    assert (await asker.read()).name == first.name
    await asker.ask(asker.discharge())
    assert await asker.ask(again) == Created(new=True, owed=False)


async def test_create_by_another_producer(asker: Asker) -> None:
    await asker.ask(asker.create())
    assert await asker.ask(asker.create(nonce="n2")) == Created(new=False, owed=True)
    await asker.ask(asker.discharge())
    assert await asker.ask(asker.create(nonce="n2")) == Created(new=False, owed=False)


async def test_any_id_and_text_comes_back_as_it_was(asker: Asker) -> None:
    for text in ("", *ODD_IDS):
        await asker.ask(asker.create(text, name=text, job=text or "{}", parent=text))
        fence = await asker.make_running(text, lease=f"{text}/1")
        assert await asker.ask(AppendEvents(task_id=text, fence=fence, entries=(text,)))
        record = await asker.read(text)
        assert record.task_id == record.name == record.parent == text
        assert record.job == (text or "{}")
        assert record.owner == text
        assert await asker.log(text) == [text]
        assert await asker.ask(Beat(owner=text, ttl=HOUR, info=text)) is False
        assert await asker.ask(IsAlive(owner=text))
    assert await asker.list_ids(limit=100) == sorted(["", *ODD_IDS])


async def test_times_come_back_exactly(asker: Asker) -> None:
    for value in (0.1, 1 / 3, 1e-9, 1e22, 5e-324, -1.5, 2.0**53 + 2, math.pi):
        await asker.ask(asker.create(repr(value), due=value, deadline=value))
        record = await asker.read(repr(value))
        assert (record.due, record.deadline) == (value, value)


# ------------------------------------------------------------- discharge, revoke


async def test_discharge(asker: Asker) -> None:
    await asker.ask(asker.create())
    op = asker.discharge()
    assert await asker.store.apply([op]) == [None]
    record = await asker.read()
    assert (record.owed, record.expires_at) == (None, None)
    await asker.ask(replace(op, ttl=5.0))  # owes nothing any more
    assert await asker.read() == record


async def test_discharge_with_a_time_to_live(asker: Asker) -> None:
    await asker.ask(asker.create())
    op = asker.discharge(ttl=60.25)
    await asker.ask(op)
    assert (await asker.read()).expires_at == op.now + 60.25


async def test_discharge_of_what_is_not_owed_changes_nothing(asker: Asker) -> None:
    await asker.ask(asker.discharge())
    assert await asker.is_gone()
    await asker.ask(asker.create())
    before = await asker.read()
    await asker.ask(asker.discharge(owed=Owed.RETRY))
    await asker.ask(asker.discharge(attempt=2))
    assert await asker.read() == before


async def test_discharge_leaves_the_expiry_of_an_ended_task(asker: Asker) -> None:
    await asker.make(TaskStatus.ERRORED)
    before = await asker.read()
    assert before.owed is Owed.ERROR
    await asker.ask(asker.discharge(owed=Owed.ERROR))
    assert await asker.read() == replace(before, owed=None)


async def test_reopen_schedules_anew_what_is_errored(asker: Asker) -> None:
    fence = await asker.make(TaskStatus.ERRORED)
    before = await asker.read()
    op = asker.reopen(
        name="mail.other", job='{"again": 1}', deadline=1e10 / 3, timeout=0.7, ttl=60.25
    )
    assert await asker.ask(op) == Reopened(TaskStatus.SCHEDULED, owed=True)
    assert await asker.read() == TaskRecord(
        task_id="t",
        name="mail.other",
        job='{"again": 1}',
        fence=fence,
        created_at=before.created_at,
        started_at=before.started_at,
        updated_at=op.now,
        deadline=1e10 / 3,
        timeout=0.7,
        owed=Owed.PUBLISH,
        nonce="r1",
        expires_at=op.now + 60.25,
    )
    assert await asker.list_ids(status=TaskStatus.SCHEDULED) == ["t"]
    assert await asker.list_ids(status=TaskStatus.ERRORED) == []
    # Asked again after a lost answer.
    assert await asker.ask(op) == Reopened(TaskStatus.SCHEDULED, owed=True)
    await asker.ask(asker.discharge())
    assert await asker.ask(op) == Reopened(TaskStatus.SCHEDULED, owed=False)
    assert (await asker.read()).expires_at is None
    assert await asker.make_running(lease="w2/1") > fence


async def test_reopen_of_what_is_not_there_makes_it(asker: Asker) -> None:
    op = asker.reopen(parent="p")
    assert await asker.ask(op) == Reopened(TaskStatus.SCHEDULED, owed=True)
    record = await asker.read()
    assert (record.created_at, record.fence, record.parent) == (op.now, 0, "p")
    assert (record.owed, record.expires_at) == (Owed.PUBLISH, op.now + 3600)
    assert await asker.list_ids() == ["t"]


@pytest.mark.parametrize("status", sorted(set(TaskStatus) - {TaskStatus.ERRORED}))
async def test_reopen_leaves_the_others_alone(asker: Asker, status: TaskStatus) -> None:
    await asker.make(status)
    if status is TaskStatus.SCHEDULED:
        await asker.ask(asker.discharge())
    before = await asker.read()
    assert await asker.ask(asker.reopen()) == Reopened(status, owed=False)
    assert await asker.read() == before


async def test_revoke(asker: Asker) -> None:
    await asker.ask(asker.create())
    assert await asker.ask(asker.revoke())
    assert await asker.is_gone()
    assert await asker.list_ids() == []
    assert await asker.ask(asker.revoke()), "asked again after a lost answer, it is gone as well"


async def test_revoke_refuses_what_is_not_this_producers_or_is_on_its_way(asker: Asker) -> None:
    await asker.ask(asker.create())
    assert await asker.ask(asker.revoke(nonce="n2")) is False
    await asker.ask(asker.discharge())
    assert await asker.ask(asker.revoke()) is False
    await asker.make_running()
    assert await asker.ask(asker.revoke()) is False
    assert not await asker.is_gone()


# ---------------------------------------------------------------- request cancel


async def test_cancel_of_an_unknown_task(asker: Asker) -> None:
    assert await asker.ask(asker.request_cancel()) == "unknown"
    assert await asker.is_gone()


@pytest.mark.parametrize("status", [TaskStatus.SCHEDULED, TaskStatus.RETRYING])
async def test_cancel_of_what_waits(asker: Asker, status: TaskStatus) -> None:
    await asker.make(status)
    before = await asker.read()
    op = asker.request_cancel()
    assert await asker.ask(op) == "canceled"
    assert await asker.read() == replace(
        before,
        status=TaskStatus.CANCELED,
        reason="user",
        owed=None,
        updated_at=op.now,
        ended_at=op.now,
        expires_at=None,
    )
    assert await asker.ask(op) == "ended"
    claim = asker.claim(attempt=before.attempt)
    assert await asker.ask(claim) == Ended(TaskStatus.CANCELED)
    due = max(claim.now, before.due or 0)
    assert (await asker.read()).expires_at == due + HOUR, "its message has come by"


async def test_cancel_of_what_runs_is_asked_of_its_worker(asker: Asker) -> None:
    fence = await asker.make(TaskStatus.RUNNING)
    assert await asker.ask(Poll(task_id="t")) == Polled(fence, None)
    assert await asker.ask(asker.request_cancel()) == "requested"
    assert await asker.ask(asker.request_cancel(reason="parent")) == "requested"
    assert await asker.ask(Poll(task_id="t")) == Polled(fence, "user")  # the first one counts
    assert (await asker.read()).status is TaskStatus.RUNNING


async def test_an_empty_reason_gives_way_to_another(asker: Asker) -> None:
    await asker.make(TaskStatus.RUNNING)
    await asker.ask(asker.request_cancel(reason=""))
    assert (await asker.read()).cancel == ""
    await asker.ask(asker.request_cancel(reason="user"))
    assert (await asker.read()).cancel == "user"


@pytest.mark.parametrize("status", [TaskStatus.FINISHED, TaskStatus.ERRORED, TaskStatus.CANCELED])
async def test_cancel_of_what_has_ended(asker: Asker, status: TaskStatus) -> None:
    await asker.make(status)
    before = await asker.read()
    assert await asker.ask(asker.request_cancel()) == "ended"
    assert await asker.read() == before


# ------------------------------------------------------------------------- claim


async def test_claim_starts_what_is_scheduled(asker: Asker) -> None:
    await asker.ask(asker.create(due=1.0))
    before = await asker.read()
    op = asker.claim()
    answer = await asker.ask(op)
    assert answer == Granted(fence=int(op.now * 1000), crashes=0)
    assert await asker.read() == replace(
        before,
        status=TaskStatus.RUNNING,
        fence=int(op.now * 1000),
        lease="w1/1",
        started_at=op.now,
        updated_at=op.now,
        due=None,
        owed=None,
        expires_at=None,
    )
    assert await asker.ask(replace(op, now=op.now + 1)) == answer  # the same delivery, again


async def test_claim_of_an_unknown_task_makes_it(asker: Asker) -> None:
    op = asker.claim(attempt=3, deadline=2e9, timeout=0.3, parent="p")
    assert await asker.ask(op) == Granted(fence=int(op.now * 1000), crashes=0)
    assert await asker.read() == TaskRecord(
        task_id="t",
        name=op.name,
        job=op.job,
        status=TaskStatus.RUNNING,
        attempt=3,
        fence=int(op.now * 1000),
        lease="w1/1",
        created_at=op.now,
        updated_at=op.now,
        started_at=op.now,
        deadline=2e9,
        timeout=0.3,
        parent="p",
    )


async def test_claim_of_a_later_attempt(asker: Asker) -> None:
    fence = await asker.make(TaskStatus.RETRYING)
    later = await asker.ask(asker.claim(attempt=2, lease="w2/9"))
    assert isinstance(later, Granted)
    assert later.fence > fence
    record = await asker.read()
    assert (record.attempt, record.error) == (2, '"boom"')


async def test_the_fence_grows_when_the_clock_does_not(asker: Asker) -> None:
    op = asker.claim()
    first = await asker.ask(op)
    second = await asker.ask(replace(op, lease="w2/1", lost_lease="w1/1", now=op.now - 100))
    assert isinstance(first, Granted)
    assert second == Granted(first.fence + 1, 1)


async def test_claim_of_a_later_attempt_than_the_one_that_is_said_to_run(asker: Asker) -> None:
    """The store was set back: what it says of the attempt before was over long ago."""
    fence = await asker.make_running(lease="w1/1")
    assert await asker.ask(asker.claim(attempt=2, lease="w2/1")) == Held("w1/1")
    answer = await asker.ask(asker.claim(attempt=2, lease="w2/1", lost_lease="w1/1"))
    assert isinstance(answer, Granted)
    assert answer.fence > fence
    assert answer.crashes == 0
    assert (await asker.read()).attempt == 2


async def test_claim_of_what_another_holds(asker: Asker) -> None:
    await asker.make(TaskStatus.RUNNING)
    before = await asker.read()
    assert await asker.ask(asker.claim(lease="w2/1")) == Held("w1/1")
    assert await asker.ask(asker.claim(lease="w2/1", lost_lease="w3/1")) == Held("w1/1")
    assert await asker.read() == before


@pytest.mark.parametrize(("lease", "owner"), [("a/b/7", "a/b"), ("x", ""), ("/1", "")])
async def test_the_owner_is_what_precedes_the_last_slash(
    asker: Asker, lease: str, owner: str
) -> None:
    await asker.make_running(lease=lease)
    answer = await asker.ask(asker.claim(lease="w2/1"))
    assert answer == Held(lease)
    assert answer.owner == owner
    taken = await asker.ask(asker.claim(lease="w2/1", lost_lease=lease))
    assert isinstance(taken, Granted)


async def test_claim_from_a_dead_owner_counts_a_crash(asker: Asker) -> None:
    await asker.make(TaskStatus.RUNNING)
    for crashes in range(1, 4):
        op = asker.claim(lease=f"w{crashes + 1}/1", lost_lease=f"w{crashes}/1")
        answer = await asker.ask(op)
        assert isinstance(answer, Granted)
        assert answer.crashes == crashes
        assert await asker.ask(op) == answer


async def test_claim_from_a_dead_owner_of_what_shall_be_cancelled(asker: Asker) -> None:
    await asker.make(TaskStatus.RUNNING)
    await asker.ask(asker.request_cancel())
    before = await asker.read()
    op = asker.claim(lease="w2/1", lost_lease="w1/1")
    assert await asker.ask(op) == Ended(TaskStatus.CANCELED)
    assert await asker.read() == replace(
        before,
        status=TaskStatus.CANCELED,
        reason="user",
        cancel=None,
        updated_at=op.now,
        ended_at=op.now,
        expires_at=op.now + HOUR,
    )
    assert await asker.ask(op) == Ended(TaskStatus.CANCELED)


@pytest.mark.parametrize("status", [TaskStatus.FINISHED, TaskStatus.ERRORED, TaskStatus.CANCELED])
async def test_claim_of_what_has_ended(asker: Asker, status: TaskStatus) -> None:
    await asker.make(status)
    await asker.ask(asker.discharge(owed=Owed.ERROR))
    before = await asker.read()
    assert await asker.ask(asker.claim(lease="w2/1")) == Ended(status)
    assert await asker.ask(asker.claim(attempt=9)) == Ended(status)
    assert await asker.read() == before


async def test_claim_meets_an_error_that_was_not_published(asker: Asker) -> None:
    await asker.make(TaskStatus.ERRORED)
    assert await asker.ask(asker.claim()) == Owing(Owed.ERROR, 1, None, '"boom"', "w1/1")
    assert await asker.ask(asker.claim(attempt=2)) == Ended(TaskStatus.ERRORED)


async def test_an_owed_error_has_no_due(asker: Asker) -> None:
    fence = await asker.make(TaskStatus.RUNNING)
    await asker.ask(asker.settle(fence, Event.FAIL, owed=Owed.ERROR, due=1.0))
    assert await asker.ask(asker.claim()) == Owing(Owed.ERROR, 1, None, None, "w1/1")


async def test_claim_meets_a_retry_that_was_not_published(asker: Asker) -> None:
    fence = await asker.make(TaskStatus.RUNNING)
    settle = asker.settle(fence, Event.RETRY, attempt=2, owed=Owed.RETRY, due=0.1, error='"e"')
    await asker.ask(settle)
    assert await asker.ask(asker.claim(attempt=1)) == Owing(Owed.RETRY, 2, 0.1, '"e"', "w1/1")
    assert await asker.ask(asker.claim(attempt=0)) == Duplicate(2)
    await asker.ask(asker.discharge(owed=Owed.RETRY, attempt=2))
    assert await asker.ask(asker.claim(attempt=1)) == Duplicate(2)
    await asker.make_running(attempt=2, lease="w2/2")
    assert await asker.ask(asker.claim(attempt=1)) == Duplicate(2)


async def test_claim_meets_an_owed_retry_without_due_and_error(asker: Asker) -> None:
    fence = await asker.make(TaskStatus.RUNNING)
    await asker.ask(asker.settle(fence, Event.RETRY, attempt=2, owed=Owed.RETRY))
    assert await asker.ask(asker.claim(attempt=1)) == Owing(Owed.RETRY, 2, None, None, "w1/1")


# ------------------------------------------------------------------------ settle


@pytest.mark.parametrize(
    ("event", "status", "fields"),
    [
        (Event.SUCCEED, TaskStatus.FINISHED, {"result": "0"}),
        (Event.SUCCEED, TaskStatus.FINISHED, {"result": ""}),
        (Event.SUCCEED, TaskStatus.FINISHED, {}),
        (Event.RETRY, TaskStatus.RETRYING, {"due": 7.25, "owed": Owed.RETRY, "error": '"e"'}),
        (Event.FAIL, TaskStatus.ERRORED, {"owed": Owed.ERROR, "error": '"e"'}),
        (Event.CANCEL, TaskStatus.CANCELED, {"reason": "user"}),
        (Event.RELEASE, TaskStatus.SCHEDULED, {}),
    ],
)
async def test_settle(
    asker: Asker, event: Event, status: TaskStatus, fields: dict[str, Any]
) -> None:
    fence = await asker.make(TaskStatus.RUNNING)
    before = await asker.read()
    op = asker.settle(fence, event, attempt=2 if event is Event.RETRY else 1, **fields)
    assert await asker.ask(op) == "written"
    expected = replace(
        before,
        status=status,
        attempt=op.attempt,
        updated_at=op.now,
        cancel=None,
        ended_at=op.now if status.ended else None,
        expires_at=op.now + HOUR if status.ended else None,
        **fields,
    )
    assert await asker.read() == expected
    assert await asker.ask(replace(op, now=op.now + 1)) == "written"
    assert await asker.read() == expected


@pytest.mark.parametrize("event", sorted(set(Event) - {Event.CLAIM, Event.REOPEN}))
async def test_a_cancel_request_wins_over_going_on(asker: Asker, event: Event) -> None:
    fence = await asker.make(TaskStatus.RUNNING)
    await asker.ask(asker.request_cancel(reason="parent"))
    op = asker.settle(fence, event, attempt=2 if event is Event.RETRY else 1)
    going_on = event in (Event.RETRY, Event.RELEASE)
    answer = "stale" if going_on else "written"
    assert await asker.ask(op) == answer
    record = await asker.read()
    if going_on:
        assert (record.status, record.reason) == (TaskStatus.CANCELED, "parent")
        assert record.expires_at == op.now + HOUR
    else:
        assert record.status is target(event)
    assert record.cancel is None
    assert await asker.ask(op) == answer
    assert await asker.read() == record


async def test_settle_keeps_the_latest_error_and_nothing_else(asker: Asker) -> None:
    fence = await asker.make(TaskStatus.RUNNING)
    fields: dict[str, Any] = {"due": 1.0, "result": "1", "reason": "r", "owed": Owed.RETRY}
    await asker.ask(asker.settle(fence, Event.RETRY, attempt=2, error='"e"', **fields))
    fence = await asker.make_running(attempt=2, lease="w1/2")
    await asker.ask(asker.settle(fence, attempt=2, lease="w1/2"))
    record = await asker.read()
    assert (record.due, record.result, record.reason, record.owed) == (None, None, None, None)
    assert record.error == '"e"'


async def test_settle_of_what_waits_forgets_what_was_owed(asker: Asker) -> None:
    fence = await asker.make(TaskStatus.RUNNING)
    await asker.ask(asker.settle(fence, Event.RETRY, attempt=2, due=1.0, owed=Owed.RETRY))
    assert await asker.ask(asker.settle(fence, Event.FAIL, attempt=2)) == "written"
    record = await asker.read()
    assert (record.due, record.owed) == (None, None)


async def test_settle_with_another_lease_or_fence_is_stale(asker: Asker) -> None:
    fence = await asker.make(TaskStatus.RUNNING)
    before = await asker.read()
    assert await asker.ask(asker.settle(fence, lease="w1/2")) == "stale"
    assert await asker.ask(asker.settle(fence - 1)) == "stale"
    assert await asker.ask(asker.settle(fence + 1)) == "stale"
    assert await asker.read() == before


async def test_a_zombie_does_not_overwrite_its_successor(asker: Asker) -> None:
    zombie = await asker.make(TaskStatus.RUNNING)
    fence = await asker.make_running(lease="w2/1", lost_lease="w1/1")
    assert await asker.ask(asker.settle(zombie, result='"old"')) == "stale"
    assert await asker.ask(asker.settle(fence, lease="w2/1", result='"new"')) == "written"
    assert await asker.ask(asker.settle(zombie, result='"old"')) == "stale"
    assert (await asker.read()).result == '"new"'


async def test_settle_of_what_has_ended_otherwise_is_stale(asker: Asker) -> None:
    fence = await asker.make(TaskStatus.FINISHED)
    before = await asker.read()
    assert await asker.ask(asker.settle(fence, Event.FAIL)) == "stale"
    assert await asker.ask(asker.settle(fence, Event.SUCCEED, attempt=2)) == "stale"
    assert await asker.read() == before


async def test_settle_of_what_could_not_start(asker: Asker) -> None:
    await asker.ask(asker.create())
    op = asker.settle(0, Event.FAIL, lease="", error='"no such task"')
    assert await asker.ask(op) == "written"
    record = await asker.read()
    assert (record.status, record.error) == (TaskStatus.ERRORED, '"no such task"')
    assert record.expires_at == op.now + HOUR


async def test_settle_after_the_store_was_emptied(asker: Asker) -> None:
    op = asker.settle(77, result="1", attempt=2)
    assert await asker.ask(op) == "written"
    assert await asker.read() == TaskRecord(
        task_id="t",
        name=op.name,
        job="",
        status=TaskStatus.FINISHED,
        attempt=2,
        fence=77,
        lease="w1/1",
        created_at=op.now,
        updated_at=op.now,
        ended_at=op.now,
        result="1",
        expires_at=op.now + HOUR,
    )
