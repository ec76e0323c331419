"""The conformance suite of state stores, second part: what is seen of tasks and workers."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from amqp_tasks.abc import Listener
from amqp_tasks.core.lifecycle import Event, TaskStatus
from amqp_tasks.core.operations import (
    AppendEvents,
    Beat,
    Created,
    Granted,
    IsAlive,
    Leave,
    Operation,
    Poll,
    Polled,
    Read,
    ReadEvents,
)

from ..servers.redis import redis_cluster, redis_server  # noqa: F401  fixtures
from .state_stores import HOUR, ODD_IDS, Asker, choose_backend, choose_case, open_store, until  # noqa: F401  fixtures

pytestmark = pytest.mark.anyio


# ---------------------------------------------------------- poll, log, presence


async def test_poll_of_an_unknown_task(asker: Asker) -> None:
    assert await asker.ask(Poll(task_id="t")) is None


async def test_the_log_of_a_task(asker: Asker) -> None:
    fence = await asker.make(TaskStatus.RUNNING)
    assert await asker.log() == []
    assert await asker.ask(AppendEvents(task_id="t", fence=fence, entries=("1", "2"))) is True
    assert await asker.ask(AppendEvents(task_id="t", fence=fence, entries=())) is True
    assert await asker.ask(AppendEvents(task_id="t", fence=fence, entries=("3",))) is True
    entries = await asker.ask(ReadEvents(task_id="t"))
    assert [entry.data for entry in entries] == ["1", "2", "3"]
    assert await asker.log(limit=2) == ["1", "2"]
    assert await asker.log(after=entries[0].position) == ["2", "3"]
    assert await asker.log(after=entries[0].position, limit=1) == ["2"]
    assert await asker.log(after=entries[2].position) == []
    assert await asker.log(limit=2, newest=True) == ["2", "3"]
    assert await asker.log(limit=9, newest=True) == ["1", "2", "3"]
    assert await asker.log(after=entries[0].position, limit=1, newest=True) == ["3"]
    assert await asker.log(after=entries[1].position, limit=2, newest=True) == ["3"]
    assert await asker.log(after=entries[2].position, newest=True) == []


async def test_a_stale_fence_does_not_log(asker: Asker) -> None:
    assert await asker.ask(AppendEvents(task_id="t", fence=1, entries=("1",))) is False
    fence = await asker.make(TaskStatus.RUNNING)
    assert await asker.ask(AppendEvents(task_id="t", fence=fence - 1, entries=("1",))) is False
    assert await asker.ask(AppendEvents(task_id="t", fence=fence + 1, entries=("1",))) is False
    assert await asker.log() == []


async def test_presence(asker: Asker) -> None:
    assert await asker.ask(IsAlive(owner="w")) is False
    assert await asker.ask(Beat(owner="w", ttl=HOUR, info="{}")) is False
    assert await asker.ask(Beat(owner="w", ttl=HOUR, info="{}")) is True
    assert await asker.ask(IsAlive(owner="w")) is True
    assert await asker.ask(IsAlive(owner="W")) is False
    assert await asker.store.apply([Leave(owner="w"), Leave(owner="w")]) == [None, None]
    assert await asker.ask(IsAlive(owner="w")) is False


async def test_presence_goes_away_by_itself(asker: Asker) -> None:
    await asker.ask(Beat(owner="w", ttl=0.05, info="{}"))

    async def is_dead() -> bool:
        return not await asker.ask(IsAlive(owner="w"))

    await until(is_dead)
    assert await asker.ask(Beat(owner="w", ttl=HOUR, info="{}")) is False


# ------------------------------------------------------------------------ expiry


async def test_a_task_that_was_never_published_expires(asker: Asker) -> None:
    await asker.ask(asker.create(ttl=0.05))
    await until(asker.is_gone)
    assert await asker.list_ids() == []


@pytest.mark.parametrize("event", [Event.SUCCEED, Event.FAIL, Event.CANCEL])
async def test_an_ended_task_expires_with_its_log(asker: Asker, event: Event) -> None:
    fence = await asker.make(TaskStatus.RUNNING)
    await asker.ask(AppendEvents(task_id="t", fence=fence, entries=("1",)))
    await asker.ask(asker.settle(fence, event, ttl=0.2))
    await asker.ask(AppendEvents(task_id="t", fence=fence, entries=("late",)))
    await until(asker.is_gone)
    assert await asker.log() == []
    assert await asker.list_ids() == []
    assert await asker.list_ids(status=TaskStatus.FINISHED) == []


async def test_a_canceled_task_expires(asker: Asker) -> None:
    await asker.ask(asker.create())
    await asker.ask(asker.request_cancel())
    await asker.ask(asker.claim(ttl=0.05))  # its message comes by
    await until(asker.is_gone)


async def test_a_task_canceled_in_place_of_its_dead_worker_expires(asker: Asker) -> None:
    await asker.make(TaskStatus.RUNNING)
    await asker.ask(asker.request_cancel())
    await asker.ask(asker.claim(lease="w2/1", lost_lease="w1/1", ttl=0.05))
    await until(asker.is_gone)


async def test_what_goes_on_no_longer_expires(asker: Asker) -> None:
    for task_id in ("discharged", "claimed"):
        await asker.ask(asker.create(task_id, ttl=1.0))
    await asker.ask(asker.create("witness", ttl=1.1))
    await asker.ask(asker.discharge("discharged"))
    await asker.ask(asker.claim("claimed"))
    await until(lambda: asker.is_gone("witness"))
    for task_id in ("discharged", "claimed"):
        assert (await asker.read(task_id)).expires_at is None
    assert await asker.list_ids() == ["claimed", "discharged"]


# ----------------------------------------------------------------------- listing


async def test_listing_by_status(asker: Asker) -> None:
    for status in TaskStatus:
        await asker.make(status, f"is-{status}")
    assert await asker.list_ids() == sorted(f"is-{status}" for status in TaskStatus)
    for status in TaskStatus:
        assert await asker.list_ids(status=status) == [f"is-{status}"]
        assert await asker.list_ids(status=status, prefix="is-x") == []


async def test_listing_follows_a_task_through_its_life(asker: Asker) -> None:
    async def listed() -> list[TaskStatus]:
        return [status for status in TaskStatus if await asker.list_ids(status=status)]

    await asker.ask(asker.create())
    assert await listed() == [TaskStatus.SCHEDULED]
    fence = await asker.make_running()
    assert await listed() == [TaskStatus.RUNNING]
    await asker.ask(asker.settle(fence, Event.RELEASE))
    assert await listed() == [TaskStatus.SCHEDULED]
    fence = await asker.make_running(lease="w1/2")
    await asker.ask(asker.settle(fence, Event.RETRY, lease="w1/2", attempt=2))
    assert await listed() == [TaskStatus.RETRYING]
    fence = await asker.make_running(lease="w1/3", attempt=2)
    await asker.ask(asker.settle(fence, lease="w1/3", attempt=2))
    assert await listed() == [TaskStatus.FINISHED]


async def test_listing_in_pages(asker: Asker) -> None:
    ids = [f"task-{n:03}" for n in range(25)]
    await asker.store.apply([asker.create(task_id) for task_id in reversed(ids)])
    assert await asker.list_ids(limit=10) == ids[:10]
    assert await asker.list_ids(limit=10, after=ids[9]) == ids[10:20]
    assert await asker.list_ids(limit=10, after=ids[19]) == ids[20:]
    assert await asker.list_ids(limit=10, after=ids[24]) == []
    assert await asker.list_ids(limit=25) == ids
    assert await asker.list_ids(after="task-0095") == ids[10:]
    assert await asker.list_ids(limit=0) == []


async def test_listing_odd_ids_by_prefix(asker: Asker) -> None:
    ids = sorted({*ODD_IDS, *(f"{each}{other}" for each in ODD_IDS for other in ("x", "ÿ", "{}"))})
    await asker.store.apply([asker.create(task_id) for task_id in ids])
    assert await asker.list_ids(limit=1000) == ids
    for prefix in ODD_IDS:
        expected = [task_id for task_id in ids if task_id.startswith(prefix)]
        assert await asker.list_ids(prefix=prefix, limit=1000) == expected
        for after in ("", prefix, f"{prefix}x", f"{prefix}\U0010ffff", "m"):
            assert await asker.list_ids(prefix=prefix, after=after, limit=1000) == [
                task_id for task_id in expected if task_id > after
            ]


# -------------------------------------------------------------------- announcing


async def test_every_end_is_announced_once(asker: Asker) -> None:
    async with asker.store.listen() as listener:
        for task_id in ("a", "b", "c", "last"):
            await listener.subscribe(f"ended:{task_id}")
        fence = await asker.make(TaskStatus.RUNNING, "a")
        settle = asker.settle(fence, task_id="a")
        assert await asker.ask(settle) == await asker.ask(settle) == "written"
        await asker.ask(asker.create("b"))
        for _ in range(2):
            await asker.ask(asker.request_cancel("b"))
        await asker.make(TaskStatus.RUNNING, "c")
        await asker.ask(asker.request_cancel("c"))
        for _ in range(2):
            await asker.ask(asker.claim("c", lease="w2/1", lost_lease="w1/1"))
        await asker.make(TaskStatus.ERRORED, "last")
        assert await _heard(listener, 4) == [
            ("ended:a", "finished"),
            ("ended:b", "canceled"),
            ("ended:c", "canceled"),
            ("ended:last", "errored"),
        ]


async def test_what_does_not_end_is_not_announced(asker: Asker) -> None:
    async with asker.store.listen() as listener:
        for topic in ("ended:t", "ended:last", "cancel:w1"):
            await listener.subscribe(topic)
        await asker.make(TaskStatus.RETRYING)
        await asker.ask(asker.settle(0, task_id="t"))  # stale
        await asker.ask(asker.create("new"))
        await asker.ask(asker.revoke("new"))
        await asker.ask(asker.settle(5, task_id="last"))  # a store that was emptied
        assert await _heard(listener, 1) == [("ended:last", "finished")]


async def test_cancel_requests_are_announced_to_the_owner(asker: Asker) -> None:
    async with asker.store.listen() as listener:
        await listener.subscribe("cancel:w{1} ü")
        await asker.make_running("tä{sk}", lease="w{1} ü/4")
        await asker.make_running("of another worker", lease="w2/1")
        await asker.ask(asker.request_cancel("of another worker"))
        for _ in range(2):
            await asker.ask(asker.request_cancel("tä{sk}"))
        assert await _heard(listener, 2) == [("cancel:w{1} ü", "tä{sk}")] * 2
        await listener.subscribe("cancel:a/b")
        await asker.make_running("of an owner with a slash", lease="a/b/3")
        await asker.ask(asker.request_cancel("of an owner with a slash"))
        assert await _heard(listener, 1) == [("cancel:a/b", "of an owner with a slash")]


async def test_subscriptions_come_and_go(asker: Asker) -> None:
    async with asker.store.listen() as listener:
        await listener.unsubscribe("ended:never subscribed")
        for task_id in ("a", "b", "c"):
            await listener.subscribe(f"ended:{task_id}")
        await listener.subscribe("ended:b")
        await listener.unsubscribe("ended:b")
        for task_id in ("b", "c"):
            await asker.make(TaskStatus.FINISHED, task_id)
        assert await _heard(listener, 1) == [("ended:c", "finished")]
        for task_id in ("a", "b", "c"):
            await listener.unsubscribe(f"ended:{task_id}")
        await listener.subscribe("ended:d")
        for task_id in ("a", "d"):
            await asker.make(TaskStatus.FINISHED, task_id)
        assert await _heard(listener, 1) == [("ended:d", "finished")]


async def test_listeners_do_not_disturb_each_other(asker: Asker) -> None:
    async with asker.store.listen() as first:
        async with asker.store.listen() as second:
            await first.subscribe("ended:t")
            await second.subscribe("ended:t")
            await asker.make(TaskStatus.FINISHED)
            assert await _heard(second, 1) == [("ended:t", "finished")]
        await asker.make(TaskStatus.FINISHED, "u")
        assert await _heard(first, 1) == [("ended:t", "finished")]


async def test_a_listener_without_topics_waits(asker: Asker) -> None:
    async with asker.store.listen() as listener:
        async with anyio.create_task_group() as tasks:
            heard: list[tuple[str, str]] = []

            async def hear() -> None:
                heard.extend(await _heard(listener, 1))

            tasks.start_soon(hear)
            await anyio.wait_all_tasks_blocked()
            assert heard == []
            await listener.subscribe("ended:t")
            await asker.make(TaskStatus.FINISHED)
        assert heard == [("ended:t", "finished")]


async def test_an_error_in_the_block_comes_out_as_it_is(asker: Asker) -> None:
    with pytest.raises(LookupError, match=r"^mine$"):
        async with asker.store.listen():
            raise LookupError("mine")


async def test_leaving_by_cancellation(asker: Asker) -> None:
    with anyio.CancelScope() as scope:
        async with asker.store.listen() as listener:
            await listener.subscribe("ended:t")
            scope.cancel()
            await _heard(listener, 1)
    assert scope.cancelled_caught
    await asker.make(TaskStatus.FINISHED)


async def _heard(listener: Listener, count: int) -> list[tuple[str, str]]:
    """Return the next `count` announcements."""
    heard: list[tuple[str, str]] = []
    with anyio.fail_after(20):
        async for announcement in listener:
            heard.append(announcement)
            if len(heard) == count:
                break
    return heard


# ----------------------------------------------------------------------- batches


async def test_a_batch_is_answered_in_order(asker: Asker) -> None:
    fence = int(asker.clock() * 1000) + 10_000
    now = fence / 1000
    operations: list[Operation[Any]] = [
        Read(task_id="t"),
        asker.create(),
        asker.discharge(),
        Beat(owner="w1", ttl=HOUR, info="{}"),
        asker.claim(now=now),
        asker.request_cancel(),
        Poll(task_id="t"),
        AppendEvents(task_id="t", fence=int(now * 1000), entries=("1",)),
        IsAlive(owner="w1"),
        asker.settle(int(now * 1000), Event.CANCEL, reason="user"),
    ]
    assert list(await asker.store.apply(operations)) == [
        None,
        Created(new=True, owed=True),
        None,
        False,
        Granted(int(now * 1000), 0),
        "requested",
        Polled(int(now * 1000), "user"),
        True,
        True,
        "written",
    ]
    assert await asker.list_ids() == await asker.list_ids(status=TaskStatus.CANCELED) == ["t"]


async def test_an_empty_batch(asker: Asker) -> None:
    assert list(await asker.store.apply([])) == []


async def test_tasks_do_not_touch_each_other(asker: Asker) -> None:
    ids = ["a", "a{", "a}", "{a}", "a%", "A", "a ", " a"]
    await asker.store.apply([asker.create(each, nonce=each) for each in ids])
    for task_id in ids:
        assert (await asker.read(task_id)).nonce == task_id


async def test_many_at_once(asker: Asker) -> None:
    granted: dict[str, int] = {}

    async def run(worker: str, task_id: str) -> None:
        answer = await asker.ask(asker.claim(task_id, lease=f"{worker}/1"))
        if isinstance(answer, Granted):
            granted[task_id] = granted.get(task_id, 0) + 1

    async with anyio.create_task_group() as tasks:
        for number in range(40):
            for worker in ("w1", "w2"):
                tasks.start_soon(run, worker, f"t{number}")
    assert granted == {f"t{number}": 1 for number in range(40)}


async def test_an_address_for_people(asker: Asker) -> None:
    assert asker.store.address.partition("://")[0] in ("memory", "redis")
