"""Stop anything: what runs, what waits, and the children of what is gone."""

from __future__ import annotations

import signal
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
import redis

from amqp_tasks import RemoteTaskError, TaskApp, TaskStatus

from ..servers.redis import RedisServer
from . import shop
from .conftest import StartWorker
from .oracle import lines
from .workers import start_python

pytestmark = pytest.mark.anyio


async def test_what_runs_is_stopped_at_once(
    app: TaskApp, start_worker: StartWorker, tmp_path: Path
) -> None:
    # Polling is far away: only an announcement can be as quick as this.
    start_worker("--cancel-poll-interval", "60")
    oracle = tmp_path / "oracle"
    async with app.connect():
        handle = await shop.nap(str(oracle), "nap", 60)
        await lines(oracle, 1, "start")
        assert await handle.cancel()
        assert await handle.join(timeout=10) is TaskStatus.CANCELED
        assert (await handle.state()).reason == "user"
    assert [line[1:] for line in await lines(oracle, 1, "cancelled")] == [["nap", "user"]]


def run(client: redis.Redis, *command: str) -> None:
    client.execute_command(*command)  # type: ignore[no-untyped-call]


@asynccontextmanager
async def without_announcements(server: RedisServer) -> AsyncGenerator[None, None]:
    """Take everybody's permission to subscribe; Redis cuts those who have subscribed."""
    with server.client() as client:
        run(client, "ACL", "SETUSER", "default", "resetchannels")
    try:
        yield
    finally:
        with server.client() as client:
            run(client, "ACL", "SETUSER", "default", "allchannels")


async def test_polling_stops_a_task_when_announcements_are_dead(
    app: TaskApp, start_worker: StartWorker, tmp_path: Path, redis_server: RedisServer
) -> None:
    start_worker("--cancel-poll-interval", "1")
    oracle = tmp_path / "oracle"
    async with app.connect():
        handle = await shop.nap(str(oracle), "nap", 60)
        await lines(oracle, 1, "start")
        async with without_announcements(redis_server):
            began = time.monotonic()
            assert await handle.cancel()
            await lines(oracle, 1, "cancelled")
            assert time.monotonic() - began < 1 + 1 + 3  # and what a busy machine adds
            assert await handle.join(timeout=30) is TaskStatus.CANCELED


async def test_what_waits_never_starts(
    app: TaskApp, start_worker: StartWorker, tmp_path: Path
) -> None:
    start_worker("--max-running-tasks", "1")
    oracle = tmp_path / "oracle"
    async with app.connect():
        failing = await shop.always_fails(str(oracle))
        with anyio.fail_after(30):
            while await failing.status() is not TaskStatus.RETRYING:
                await anyio.sleep(0.01)
        assert await failing.cancel()
        later = await shop.nap.options(countdown=1)(str(oracle), "later", 0)
        assert await later.cancel()
        assert await later.join() is TaskStatus.CANCELED
        behind = await shop.nap.options(countdown=2)(str(oracle), "behind", 0)
        assert await behind.result(timeout=30) == "behind"
        assert await failing.join() is TaskStatus.CANCELED
    assert len(await lines(oracle, 1, "start ")) == len(["failed once", "behind"])


async def test_a_delay_is_held_by_the_broker_while_workers_come_and_go(
    app: TaskApp, start_worker: StartWorker, tmp_path: Path
) -> None:
    oracle = tmp_path / "oracle"
    worker = start_worker()
    async with app.connect():
        began = time.time()
        handle = await shop.nap.options(countdown=6)(str(oracle), "later", 0)
        worker.signal(signal.SIGTERM)
        assert await anyio.to_thread.run_sync(worker.wait) == 0
        start_worker()
        assert await handle.result(timeout=60) == "later"
        started = (await handle.state()).started_at
        assert started is not None
        assert 6 <= started - began < 6 + 3


async def test_one_slot_is_enough_for_a_parent_and_its_ten_children(
    app: TaskApp, start_worker: StartWorker
) -> None:
    start_worker("--max-running-tasks", "1")
    async with app.connect():
        handle = await shop.adds_up(10)
        assert await handle.result(timeout=60) == 2 * sum(range(10))


async def test_a_tree_is_cancelled_at_its_root(
    app: TaskApp, start_worker: StartWorker, tmp_path: Path
) -> None:
    start_worker()
    oracle = tmp_path / "oracle"
    async with app.connect():
        root = await shop.tree(str(oracle), 3, 3)
        await lines(oracle, 27, "start")
        assert await root.cancel()
        stopped = await lines(oracle, 27, "cancelled")
        assert {line[2] for line in stopped} == {"parent"}
        assert await root.join(timeout=30) is TaskStatus.CANCELED


PARENT = """
import sys
import anyio
from tests.e2e import shop

async def main():
    async with shop.app.connect(), shop.app.remote_task_group() as group:
        await group.start(shop.nap, sys.argv[1], "child", 60)

anyio.run(main)
"""


async def test_the_child_of_a_dead_parent_is_cancelled(
    app: TaskApp, start_worker: StartWorker, env: dict[str, str], tmp_path: Path
) -> None:
    start_worker("--cancel-poll-interval", "0.5")
    oracle = tmp_path / "oracle"
    with start_python(
        "-c", PARENT, str(oracle), env={**env, "AMQP_TASKS_PRESENCE_TTL": "2"}
    ) as parent:
        await lines(oracle, 1, "start")
        parent.kill()
        killed = time.monotonic()
        assert [line[1:] for line in await lines(oracle, 1, "cancelled")] == [["child", "parent"]]
        assert time.monotonic() - killed < 10
    async with app.connect():
        (child,) = await app.list_tasks()
        assert await app.handle(child.task_id).join(timeout=10) is TaskStatus.CANCELED


async def test_a_failing_child_cancels_the_others_and_tells_its_parent(
    app: TaskApp, start_worker: StartWorker, tmp_path: Path
) -> None:
    start_worker()
    oracle = tmp_path / "oracle"
    async with app.connect():
        with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012  one block, as users have it
            async with app.remote_task_group() as group:
                sleeping = await group.start(shop.nap, str(oracle), "nap", 60)
                await lines(oracle, 1, "start")
                await group.start(shop.fails_at_once)
        assert await sleeping.status() is TaskStatus.CANCELED
        (error,) = caught.value.exceptions
        assert isinstance(error, RemoteTaskError)
        assert (error.type, error.message) == ("LookupError", "never there")
        assert "in fails_at_once" in error.traceback


async def test_events_are_followed_while_the_task_runs(
    app: TaskApp, start_worker: StartWorker
) -> None:
    start_worker()
    async with app.connect():
        handle = await shop.count(3)
        seen = [event async for event in handle.events()]
        assert [event.message for event in seen] == ["at 0", 0, "at 1", 1, "at 2", 2]
        rest = [event.message async for event in handle.events(after=seen[3].position)]
        assert rest == ["at 2", 2]


async def test_a_thread_stops_where_it_looks(
    app: TaskApp, start_worker: StartWorker, tmp_path: Path
) -> None:
    start_worker()
    oracle = tmp_path / "oracle"
    async with app.connect():
        handle = await shop.in_thread_until_cancelled(str(oracle))
        await lines(oracle, 1, "start")
        assert await handle.cancel()
        assert await handle.join(timeout=30) is TaskStatus.CANCELED
    assert [line[1] for line in await lines(oracle, 1, "cancelled")] == ["user"]


async def test_a_process_is_killed_while_it_burns_a_core(
    app: TaskApp, start_worker: StartWorker, tmp_path: Path
) -> None:
    start_worker()
    oracle = tmp_path / "oracle"
    async with app.connect():
        burning = await shop.burns_a_core(str(oracle))
        ((_, pid),) = await lines(oracle, 1, "start")
        assert await (await shop.add(1, 2)).result(timeout=30) == 3
        assert await burning.cancel()
        assert await burning.join(timeout=30) is TaskStatus.CANCELED
        with anyio.fail_after(10):
            while is_running(pid):
                await anyio.sleep(0.02)


def is_running(pid: str) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
