"""The error queue as a library: looked at, replayed, dropped."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest

from amqp_tasks import (
    ArgumentsError,
    BrokerRefused,
    BrokerUnavailable,
    DecodeError,
    ErrorLetter,
    Replayed,
    RetryPolicy,
    StateStoreUnavailable,
    TaskApp,
    TaskCanceled,
    TaskStatus,
)
from amqp_tasks.core.message import Message
from amqp_tasks.core.operations import Discharge, Operation, Reopen, RequestCancel
from amqp_tasks.core.record import Owed
from amqp_tasks.core.settlement import Publication
from amqp_tasks.drivers.memory import MemoryBroker, MemoryStore
from amqp_tasks.runtime import errors as runtime_errors

from ..runtime.harness import (
    EPOCH,
    MakeApp,
    depth,
    error_messages,
    memory,
    now,
    record_of,
    rewire,
    ticks,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]

NO_RETRIES = RetryPolicy(max_retries=0)


class Faults:
    """What the task does: fail while `broken`, and note that it ran."""

    def __init__(self) -> None:
        self.broken = True
        self.runs: list[str] = []


faults = Faults()


@pytest.fixture(autouse=True)
def new_faults() -> None:
    global faults
    faults = Faults()


async def work(word: str) -> str:
    faults.runs.append(word)
    if faults.broken:
        raise LookupError(f"no {word}\nfound")
    return word.upper()


async def other(word: str) -> str:
    return await work(word)


async def fail(app: TaskApp, *words: str, func: Any = work) -> None:
    """Have a task fail for each word, one after the other; the word is its id."""
    task = app.task(retry=NO_RETRIES)(func)
    async with app.worker():
        for word in words:
            handle = await app.add_task(task, word, task_id=word)
            assert await handle.join(timeout=60) is TaskStatus.ERRORED


async def work_off(app: TaskApp) -> None:
    """Run a worker until nothing is left to run."""
    async with app.worker():
        await anyio.sleep(30)


async def read(app: TaskApp) -> list[ErrorLetter]:
    async with app.error_queue() as queue:
        return [letter async for letter in queue]


async def replay_all(app: TaskApp) -> list[Replayed]:
    async with app.error_queue() as queue:
        return [await queue.replay(letter) async for letter in queue]


async def put(app: TaskApp, body: bytes, **headers: Any) -> None:
    """Put a message into the error queue behind everybody's back."""
    topology = app._servers("test").topology
    async with memory(app)[0].session() as session:
        await session.declare(topology.exchange, topology.always())
        letter = Publication(queue=topology.error, body=body, headers=headers)
        await session.publish(topology.exchange, letter, 1.0)


def ids(letters: Sequence[ErrorLetter]) -> list[str | None]:
    return [letter.task_id for letter in letters]


# ------------------------------------------------------------------------ looking


async def test_letters_say_what_failed_why_where_and_when(app: TaskApp) -> None:
    await fail(app, "a", "b")
    letters = await read(app)
    assert ids(letters) == ["a", "b"]
    assert [letter.position for letter in letters] == [1, 2]
    first = letters[0]
    assert (first.name, first.reason, first.type) == (
        f"{__name__}.work",
        "exception",
        "LookupError",
    )
    assert first.message == "no a\nfound"
    assert "in work" in first.traceback
    assert (first.attempt, first.problem, first.deadline) == (1, None, None)
    assert first.worker == record_of(app, "a").owner
    assert first.at is not None
    assert EPOCH <= first.at <= now()
    assert (first.body, first.headers) == error_messages(app)[0]


async def test_looking_removes_nothing_and_keeps_the_order(app: TaskApp) -> None:
    await fail(app, *"abcde")
    before = error_messages(app)
    for _ in range(3):
        assert ids(await read(app)) == list("abcde")
        assert error_messages(app) == before
    async with app.error_queue() as queue:
        assert (queue.name, queue.total) == ("shop-error", 5)
        async for letter in queue:
            if letter.task_id == "b":
                break
        await anyio.sleep(1)
        assert depth(app, "-error") == 0, "nobody else sees them meanwhile"
    assert error_messages(app) == before


async def test_an_empty_queue_has_no_letters_and_a_missing_one_is_named(app: TaskApp) -> None:
    with pytest.raises(BrokerRefused, match="shop-error"):
        await read(app)
    async with app.worker():
        pass
    assert await read(app) == []
    async with app.error_queue() as queue:
        for _ in range(2):
            with pytest.raises(StopAsyncIteration):
                await anext(queue)


async def test_letters_that_come_while_it_is_read_are_left_for_the_next_time(app: TaskApp) -> None:
    await fail(app, "a")
    async with app.error_queue() as queue:
        await put(app, b"late")
        assert ids([letter async for letter in queue]) == ["a"]
    assert len(await read(app)) == 2


async def test_letters_that_expire_while_it_is_read_are_not_waited_for(make_app: MakeApp) -> None:
    app = make_app(errored_ttl_ms=60_000)
    await fail(app, *"abcd")
    broker = memory(app)[0]

    class Counting(MemoryBroker):
        def depth(self, queue: str) -> int:
            found = super().depth(queue)
            return found + 3 if found else 0  # three have expired since

    counting = Counting(now)
    counting._queues = broker._queues
    rewire(app, broker=counting)
    with anyio.fail_after(10):
        assert ids(await read(app)) == list("abcd")


async def test_a_connection_that_is_lost_is_reported_and_loses_no_letter(app: TaskApp) -> None:
    await fail(app, "a", "b")
    before = error_messages(app)

    async def cut_off() -> None:
        async with app.error_queue() as queue:
            memory(app)[0].drop_sessions()
            async for letter in queue:
                await queue.drop(letter)
            await anyio.sleep(60)

    with pytest.raises(BrokerUnavailable, match="shop-error"):
        await cut_off()
    assert error_messages(app) == before


@pytest.mark.parametrize("count", range(25))
async def test_whoever_is_cancelled_in_any_phase_leaves_the_letters_as_they_were(
    app: TaskApp, count: int
) -> None:
    await fail(app, *"abc")
    before = error_messages(app)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read, app)
        await ticks(count)
        tasks.cancel_scope.cancel()
    assert error_messages(app) == before
    assert not memory(app)[0]._sessions


async def test_more_than_a_page_is_read_in_order_and_given_back_in_order(
    app: TaskApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_errors, "PAGE", 4)
    monkeypatch.setattr(runtime_errors, "MAX_HELD", 12)
    for number in range(20):
        await put(app, b"%d" % number)
    before = error_messages(app)
    async with app.error_queue() as queue:
        assert (queue.total, queue.unseen) == (20, 0)
        bodies = [letter.body async for letter in queue]
        assert bodies == [b"%d" % number for number in range(12)]
        assert queue.unseen == 8
    assert error_messages(app) == before
    # What gets its verdict makes room for what is behind it.
    async with app.error_queue() as queue:
        async for letter in queue:
            if int(letter.body) % 3:
                await queue.drop(letter)
        assert queue.unseen == 0
    assert [body for body, _ in error_messages(app)] == [b"%d" % n for n in range(0, 20, 3)]


async def test_what_is_no_message_of_ours_says_so_and_can_only_be_dropped(app: TaskApp) -> None:
    async with app.worker():
        await _publish_raw(app, b"\xff no JSON")
        await anyio.sleep(1)
    await put(app, b'{"task_id": "known", "func": 7}', **{"error-at": "soon", "error-attempt": "x"})
    async with app.error_queue() as queue:
        first, second = [letter async for letter in queue]
        assert (first.task_id, first.name, first.reason) == (None, None, "undecodable")
        assert first.problem is not None
        assert "not JSON" in first.problem
        assert (second.task_id, second.reason) == ("known", "unknown")
        assert (second.at, second.attempt, second.worker) == (None, None, None)
        for letter in (first, second):
            with pytest.raises(DecodeError, match=r"not JSON|func=7"):
                await queue.replay(letter)
        await queue.drop(first)
    assert ids(await read(app)) == ["known"]


async def _publish_raw(app: TaskApp, body: bytes) -> None:
    topology = app._servers("test").topology
    async with memory(app)[0].session() as session:
        publication = Publication(queue=topology.main, body=body, headers={})
        await session.publish(topology.exchange, publication, 1.0)


async def test_the_whole_traceback_comes_from_the_state_while_it_is_there(app: TaskApp) -> None:
    async def ask() -> tuple[str, str]:
        async with app.error_queue() as queue:
            letter = await anext(queue)
            return letter.traceback, await queue.traceback(letter)

    task = app.task(retry=NO_RETRIES)(deep)
    async with app.worker():
        handle = await app.add_task(task, 60)
        await handle.join(timeout=60)
    short, whole = await ask()
    assert len(short) == 8_000
    assert len(whole) > 8_000
    assert whole.endswith(short)
    await anyio.sleep(app.settings.state_ttl + 1)
    assert await ask() == (short, short)


async def deep(depth: int) -> None:
    try:
        if depth:
            await deep(depth - 1)
        else:
            raise LookupError("deep down")
    except LookupError as error:
        raise LookupError("x" * 100) from error


# ---------------------------------------------------------------------- replaying


async def test_a_replayed_task_starts_anew(app: TaskApp) -> None:
    await fail(app, "a")
    before = record_of(app, "a")
    faults.broken = False
    assert await replay_all(app) == [Replayed(queued=True)]
    assert depth(app, "-error") == 0
    state = record_of(app, "a")
    assert (state.status, state.attempt, state.owed) == (TaskStatus.SCHEDULED, 1, None)
    assert (state.error, state.reason, state.ended_at, state.expires_at) == (None,) * 4
    assert state.fence == before.fence
    await work_off(app)
    state = record_of(app, "a")
    assert (state.status, state.result, state.attempt) == (TaskStatus.FINISHED, '"A"', 1)
    assert state.fence > before.fence
    assert faults.runs == ["a", "a"]


async def test_a_replayed_task_has_all_its_retries_again(make_app: MakeApp) -> None:
    app = make_app()
    task = app.task(retry=RetryPolicy(max_retries=2, delay=1, jitter=0))(work)
    async with app.worker():
        handle = await app.add_task(task, "a", task_id="a")
        assert await handle.join(timeout=60) is TaskStatus.ERRORED
        (letter,) = await read(app)
        assert letter.attempt == 3
        await replay_all(app)
        assert await handle.join(timeout=60) is TaskStatus.ERRORED
    (letter,) = await read(app)
    assert letter.attempt == 3
    assert faults.runs == ["a"] * 6


async def test_headers_about_the_error_are_gone_and_those_of_others_are_kept(app: TaskApp) -> None:
    await fail(app, "seen")
    message = Message.compose(
        task_id="t",
        func=f"{__name__}.work",
        args=["t"],
        extra={"db_id": "db"},
        attempt=4,
        due=now() - 5,
        parked=3,
        timeout=9.0,
        parent="p",
        parent_owner="gone",
        foreign={"traceparent": "00-1"},
    )
    await put(app, message.body, **message.headers(), **{"error-reason": "timeout"})
    faults.broken = False
    await replay_all(app)
    (_, (body, headers)) = memory(app)[0].messages("shop")
    assert body == message.body
    assert headers == {
        "task-attempt": 1,
        "task-timeout": "9.0",
        "task-parent": "p",
        "traceparent": "00-1",
    }
    await work_off(app)
    assert record_of(app, "t").status is TaskStatus.FINISHED


async def test_a_deadline_that_is_over_is_dropped_and_said_to_be(app: TaskApp) -> None:
    task = app.task(retry=NO_RETRIES)(work)
    async with app.worker():
        for word, seconds in (("past", 5.0), ("ahead", 5000.0)):
            deadline = datetime.fromtimestamp(now() + seconds, UTC)
            handle = await task.options(task_id=word, deadline=deadline)(word)
            assert await handle.join(timeout=60) is TaskStatus.ERRORED
    await anyio.sleep(60)
    faults.broken = False
    assert await replay_all(app) == [
        Replayed(queued=True, deadline_dropped=True),
        Replayed(queued=True, deadline_dropped=False),
    ]
    assert record_of(app, "past").deadline is None
    assert record_of(app, "ahead").deadline is not None
    await work_off(app)
    assert sorted(faults.runs) == ["ahead", "ahead", "past", "past"]
    assert record_of(app, "past").status is TaskStatus.FINISHED


async def test_a_task_whose_state_has_expired_is_made_as_a_producer_would(app: TaskApp) -> None:
    await fail(app, "a")
    await anyio.sleep(app.settings.state_ttl + 1)
    assert await read(app)
    assert await app_state(app, "a") is None
    faults.broken = False
    assert await replay_all(app) == [Replayed(queued=True)]
    state = record_of(app, "a")
    assert (state.status, state.owed, state.expires_at) == (TaskStatus.SCHEDULED, None, None)
    assert state.name == f"{__name__}.work"
    await work_off(app)
    assert record_of(app, "a").status is TaskStatus.FINISHED


async def app_state(app: TaskApp, task_id: str) -> Any:
    store = memory(app)[1]
    await store.apply([])
    return store._records.get(task_id)


async def test_of_two_letters_of_one_task_one_is_replayed(app: TaskApp) -> None:
    await fail(app, "a")
    ((body, headers),) = error_messages(app)
    await put(app, body, **headers)
    faults.broken = False
    async with app.error_queue() as queue, anyio.create_task_group() as tasks:
        async for letter in queue:
            tasks.start_soon(queue.replay, letter)
    assert (depth(app), depth(app, "-error")) == (1, 0)
    await work_off(app)
    assert faults.runs == ["a", "a"]


async def test_a_canceled_task_is_refused_by_name_and_its_letter_stays(app: TaskApp) -> None:
    await fail(app, "a")
    letters = error_messages(app)
    await replay_all(app)
    await put(app, letters[0][0], **letters[0][1])  # as if killed before the last step
    async with app.connect():
        assert await app.handle("a").cancel()
    async with app.error_queue() as queue:
        with pytest.raises(TaskCanceled, match="'a'"):
            await queue.replay(await anext(queue))
    assert ids(await read(app)) == ["a"]
    await work_off(app)
    assert faults.runs == ["a"], "canceled it stays"


async def test_a_letter_gets_one_verdict(app: TaskApp) -> None:
    await fail(app, "a", "b")
    async with app.error_queue() as queue:
        first, second = [letter async for letter in queue]
        await queue.drop(first)
        await queue.replay(second)
        for letter in (first, second):
            with pytest.raises(ArgumentsError, match=f"letter {letter.position} "):
                await queue.replay(letter)
            with pytest.raises(ArgumentsError):
                await queue.drop(letter)
    assert record_of(app, "a").status is TaskStatus.ERRORED


async def test_what_the_broker_moved_here_is_waited_for_by_its_state(app: TaskApp) -> None:
    """Its task has not failed: replaying must not take it for one that was replayed."""
    task = app.task(work)
    faults.broken = False
    async with app.connect():
        await app.add_task(task, "a", task_id="a")
    async with memory(app)[0].session() as session, session.consume("shop", 1) as deliveries:
        (await anext(deliveries)).reject()
    (letter,) = await read(app)
    assert (letter.reason, letter.task_id, letter.problem) == ("rejected", "a", None)
    assert "by the broker" in letter.message
    assert await replay_all(app) == [Replayed(queued=True)]
    await work_off(app)
    assert record_of(app, "a").status is TaskStatus.FINISHED
    assert faults.runs == ["a"]


# ------------------------------------------------------------- killed on the way


class DyingStore(MemoryStore):
    """Whoever asks it for the `countdown`-th time is not there any more."""

    countdown = -1

    async def apply(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        mine = [each for each in operations if isinstance(each, Reopen | Discharge)]
        if mine and self.countdown >= 0:
            self.countdown -= 1
            if self.countdown < 0:
                raise StateStoreUnavailable("memory://: cut off")
        return await super().apply(operations)


STEPS = ["reopened", "published", "discharged"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("meanwhile", ["nothing", "it runs", "it fails", "the store is emptied"])
async def test_killed_after_any_step_a_replay_neither_loses_nor_doubles(
    app: TaskApp, step: str, meanwhile: str
) -> None:
    await fail(app, "a")
    await interrupted_replay(app, step)
    assert depth(app, "-error") == 1
    assert depth(app) == (step != "reopened")
    faults.broken = meanwhile == "it fails"
    if meanwhile in ("it runs", "it fails"):
        await work_off(app)
    elif meanwhile == "the store is emptied":
        memory(app)[1].clear()
    ran_before = len(faults.runs) - 1
    faults.broken = False
    await replay_all(app)
    assert depth(app, "-error") == 0
    await work_off(app)
    assert record_of(app, "a").status is TaskStatus.FINISHED
    succeeded = len(faults.runs) - 1 - (ran_before if meanwhile == "it fails" else 0)
    assert succeeded == 1


async def interrupted_replay(app: TaskApp, step: str) -> None:
    """Do what a replay does, up to and with `step`; then give the letter back."""
    topology = app._servers("test").topology
    store = memory(app)[1]
    async with app.error_queue() as queue:
        letter = await anext(queue)
        reopen = Reopen(
            task_id="a", name=f"{__name__}.work", job=letter.body.decode(), nonce="x", now=now()
        )
        await store.apply([reopen])
        if step == "reopened":
            return
        async with memory(app)[0].session() as session:
            again = Publication(queue=topology.main, body=letter.body, headers={"task-attempt": 1})
            await session.publish(topology.exchange, again, 1.0)
        if step == "published":
            return
        done = Discharge(task_id="a", owed=Owed.PUBLISH, attempt=1, ttl=None, now=now())
        await store.apply([done])


@pytest.mark.parametrize("countdown", range(4))
async def test_a_store_that_is_cut_off_in_any_step_leaves_the_letter_to_be_replayed(
    app: TaskApp, countdown: int
) -> None:
    store = DyingStore(now)
    rewire(app, store=store)
    await fail(app, "a", "b")
    faults.broken = False
    store.countdown = countdown
    with pytest.raises(StateStoreUnavailable):
        await replay_all(app)
    store.countdown = -1
    assert depth(app, "-error") == (2 if countdown < 2 else 1)
    await replay_all(app)
    await work_off(app)
    assert depth(app, "-error") == 0
    assert sorted(faults.runs) == ["a", "a", "b", "b"]


@pytest.mark.parametrize("count", range(0, 60, 3))
async def test_a_replay_that_is_cancelled_in_any_phase_loses_and_doubles_nothing(
    app: TaskApp, count: int
) -> None:
    await fail(app, *"abc")
    faults.broken = False
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(replay_all, app)
        await ticks(count)
        tasks.cancel_scope.cancel()
    await replay_all(app)
    await work_off(app)
    assert depth(app, "-error") == 0
    assert sorted(faults.runs) == sorted("aabbcc")


async def test_a_task_that_is_canceled_before_its_message_is_published_does_not_run(
    app: TaskApp,
) -> None:
    await fail(app, "a")
    await interrupted_replay(app, "published")
    await memory(app)[1].apply([RequestCancel(task_id="a", reason="user", now=now())])
    await work_off(app)
    assert faults.runs == ["a"]
    assert record_of(app, "a").status is TaskStatus.CANCELED
