"""The index that Redis lists tasks by: it heals, and it does not grow for ever."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
import redis

from amqp_tasks.core.lifecycle import Event, TaskStatus
from amqp_tasks.core.operations import AppendEvents, IsAlive

from ..servers.redis import RedisServer
from .redis_stores import choose_loop, open_own_store, start_server  # noqa: F401  fixtures
from .state_stores import Asker, until

pytestmark = pytest.mark.anyio


def entries(client: redis.Redis) -> dict[str, set[str]]:
    """Return what is in each part of the index that is there."""
    found: dict[str, set[str]] = {}
    for key in client.scan_iter("test:index*", count=1000):
        members: Any = client.zrange(key, 0, -1)
        found[key.decode().removeprefix("test:")] = {each.decode() for each in members}
    return found


async def test_each_task_is_in_its_places(asker: Asker, server: RedisServer) -> None:
    for status in TaskStatus:
        await asker.make(status, status)
    await asker.ask(asker.create("discharged"))
    await asker.ask(asker.discharge("discharged"))
    await asker.ask(asker.create("revoked"))
    await asker.ask(asker.revoke("revoked"))
    with server.client() as client:
        assert entries(client) == {
            "index": {*TaskStatus, "discharged"},
            **{f"index:{status}": {status} for status in TaskStatus},
            "index:scheduled": {"scheduled", "discharged"},
            "index:expiry": {"scheduled", "finished", "errored", "canceled"},
        }


async def test_a_whole_life_in_one_batch(asker: Asker, server: RedisServer) -> None:
    now = asker.clock()
    await asker.store.apply(
        [
            asker.create(),
            asker.claim(now=now),
            asker.settle(int(now * 1000), Event.RELEASE),
            asker.request_cancel(),
            asker.claim(),
            asker.create("gone"),
            asker.revoke("gone"),
        ]
    )
    with server.client() as client:
        assert entries(client) == {
            "index": {"t"},
            "index:canceled": {"t"},
            "index:expiry": {"t"},
        }


async def test_what_has_expired_leaves_the_index(asker: Asker, server: RedisServer) -> None:
    now = asker.clock()
    ids = [f"t{number}" for number in range(1500)]  # more than are looked at in one go
    await asker.store.apply([asker.create(task_id, ttl=0.2, now=now) for task_id in ids])
    for status in (TaskStatus.FINISHED, TaskStatus.RUNNING):
        await asker.make(status, status)
    with server.client() as client:

        async def is_trimmed() -> bool:
            await asker.ask(IsAlive(owner="any operation will do"))
            return len(entries(client)["index"]) == 2

        await until(is_trimmed)
        assert entries(client) == {
            "index": {"finished", "running"},
            "index:finished": {"finished"},
            "index:running": {"running"},
            "index:expiry": {"finished"},
        }


async def test_trimming_spares_what_lives_on(asker: Asker, server: RedisServer) -> None:
    await asker.make(TaskStatus.RUNNING, "runs")
    await asker.make(TaskStatus.FINISHED, "ended")
    with server.client() as client:
        client.zadd("test:index:expiry", {"runs": 1.0, "ended": 1.0})

        async def is_repaired() -> bool:
            await asker.ask(IsAlive(owner="any operation will do"))
            return client.zrangebyscore("test:index:expiry", 0, 1) == []

        await until(is_repaired)
        assert entries(client)["index"] == {"runs", "ended"}
        expires_at = (await asker.read("ended")).expires_at
        assert client.zscore("test:index:expiry", "ended") == expires_at


@pytest.mark.parametrize("status", [None, TaskStatus.SCHEDULED])
async def test_a_page_is_full_although_entries_are_stale(
    asker: Asker, server: RedisServer, status: TaskStatus | None
) -> None:
    ids = [f"t{number:03}" for number in range(300)]
    await asker.store.apply([asker.create(task_id) for task_id in ids])
    gone, left = ids[:250], ids[250:]
    with server.client() as client:
        client.delete(*(f"test:{{{task_id}}}:state" for task_id in gone))
        assert await asker.list_ids(limit=20, status=status) == left[:20]
        assert await asker.list_ids(limit=20, status=status, after=left[19]) == left[20:40]
        parts = ("index", "index:scheduled", "index:expiry")
        assert entries(client) == {part: set(left) for part in parts}


async def test_an_entry_under_a_wrong_status_is_moved(asker: Asker, server: RedisServer) -> None:
    await asker.make(TaskStatus.RUNNING)
    await asker.make(TaskStatus.SCHEDULED, "u")
    with server.client() as client:
        # As if a worker had been cut off between its claim and the index.
        client.zadd("test:index:scheduled", {"t": 0})
        client.delete("test:index:running")
        assert await asker.list_ids(status=TaskStatus.RUNNING) == []
        assert await asker.list_ids(status=TaskStatus.SCHEDULED) == ["u"]
        assert await asker.list_ids(status=TaskStatus.RUNNING) == ["t"]
        assert entries(client)["index:scheduled"] == {"u"}


@pytest.mark.parametrize("status", list(TaskStatus))
async def test_asking_again_heals_the_index(
    asker: Asker, server: RedisServer, status: TaskStatus
) -> None:
    fence = await asker.make(status)
    with server.client() as client:
        before = entries(client)
        client.delete(*(f"test:{name}" for name in before))
        if status in (TaskStatus.SCHEDULED, TaskStatus.RUNNING):
            operation = asker.create() if status is TaskStatus.SCHEDULED else asker.claim()
            await asker.ask(operation)
        else:
            await asker.ask(asker.settle(fence, Event.RETRY, attempt=2))
        assert entries(client) == before


async def test_all_keys_of_a_task_expire_together(asker: Asker, server: RedisServer) -> None:
    fence = await asker.make(TaskStatus.RUNNING)
    await asker.ask(AppendEvents(task_id="t", fence=fence, entries=("1",)))
    with server.client() as client:
        assert client.pttl("test:{t}:state") == client.pttl("test:{t}:events") == -1
        await asker.ask(asker.create("new"))
        await asker.ask(AppendEvents(task_id="new", fence=0, entries=("1",)))
        assert client.pttl("test:{new}:events") > 0
        await asker.make_running("new")
        assert client.pttl("test:{new}:state") == client.pttl("test:{new}:events") == -1
        await asker.ask(asker.settle(fence))
        await asker.make(TaskStatus.FINISHED, "late")
        late = await asker.read("late")
        await asker.ask(AppendEvents(task_id="late", fence=late.fence, entries=("1",)))
        for task_id in ("t", "late"):
            expires_at = (await asker.read(task_id)).expires_at
            assert expires_at is not None
            times = [
                client.execute_command("PEXPIRETIME", f"test:{{{task_id}}}:{name}")  # type: ignore[no-untyped-call]  # it has no types
                for name in ("state", "events")
            ]
            assert times[0] == times[1]
            assert 0 <= times[0] / 1000 - expires_at < 0.0011


async def test_a_revoked_task_leaves_nothing(asker: Asker, server: RedisServer) -> None:
    await asker.ask(asker.create())
    await asker.ask(AppendEvents(task_id="t", fence=0, entries=("1",)))
    await asker.ask(asker.revoke())
    with server.client() as client:
        assert set(client.scan_iter(count=1000)) <= {b"test:check"}


async def test_every_key_begins_with_the_prefix(asker: Asker, server: RedisServer) -> None:
    for status in TaskStatus:
        await asker.make(status, status)
    await asker.ask(IsAlive(owner="w"))
    with server.client() as client:
        assert all(key.startswith(b"test:") for key in client.scan_iter(count=1000))


async def test_lists_and_changes_at_the_same_time(asker: Asker) -> None:
    done = anyio.Event()

    async def work() -> None:
        for number in range(100):
            await asker.make(TaskStatus.FINISHED, f"t{number:03}")
        done.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work)
        while not done.is_set():
            ids = await asker.list_ids(status=TaskStatus.RUNNING)
            assert len(ids) <= 1
            listed = await asker.list_ids(limit=1000)
            assert listed == sorted(listed)
    assert await asker.list_ids(limit=1000) == [f"t{number:03}" for number in range(100)]
