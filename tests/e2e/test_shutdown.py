"""A worker that is told to stop loses nothing and counts nothing."""

from __future__ import annotations

import signal
from pathlib import Path

import anyio
import pytest

from amqp_tasks import TaskApp, TaskStatus

from . import shop
from .conftest import StartWorker
from .oracle import lines

pytestmark = pytest.mark.anyio


async def test_what_runs_may_finish_within_the_grace(
    app: TaskApp, start_worker: StartWorker, tmp_path: Path
) -> None:
    oracle = tmp_path / "oracle"
    worker = start_worker("--max-running-tasks", "2")
    async with app.connect():
        running = [await shop.nap(str(oracle), f"{n}", 1.5) for n in range(2)]
        waiting = await shop.nap(str(oracle), "waiting", 0)
        await lines(oracle, 2, "start")
        worker.signal(signal.SIGTERM)
        assert [await handle.result(timeout=30) for handle in running] == ["0", "1"]
        assert await anyio.to_thread.run_sync(worker.wait) == 0
        assert await waiting.status() is TaskStatus.SCHEDULED
        start_worker()
        assert await waiting.result(timeout=30) == "waiting"


@pytest.mark.parametrize("again", [False, True], ids=["grace is over", "second signal"])
async def test_what_still_runs_is_given_back_uncounted(
    app: TaskApp, start_worker: StartWorker, tmp_path: Path, again: bool
) -> None:
    oracle = tmp_path / "oracle"
    grace = "60" if again else "0.5"
    worker = start_worker("--shutdown-grace", grace)
    async with app.connect():
        handle = await shop.nap(str(oracle), "long", 5)
        await lines(oracle, 1, "start")
        worker.signal(signal.SIGTERM)
        if again:
            worker.wait_for_output("SIGTERM: stopping")
            worker.signal(signal.SIGTERM)
        assert await anyio.to_thread.run_sync(worker.wait) == 0
        assert [line[1:] for line in await lines(oracle, 1, "cancelled")] == [["long", "shutdown"]]
        state = await handle.state()
        assert (state.status, state.attempt) == (TaskStatus.SCHEDULED, 1)
        start_worker()
        assert await handle.result(timeout=60) == "long"
        assert (await handle.state()).attempt == 1


async def test_a_worker_that_is_killed_takes_its_processes_with_it(
    app: TaskApp, start_worker: StartWorker, tmp_path: Path
) -> None:
    oracle = tmp_path / "oracle"
    worker = start_worker()
    async with app.connect():
        handle = await shop.burns_a_core(str(oracle))
        [[_, pid]] = await lines(oracle, 1, "start")
        worker.signal(signal.SIGKILL)
        with anyio.fail_after(10):
            while Path(f"/proc/{pid}").exists():
                await anyio.sleep(0.05)
        await handle.cancel()


async def test_replacing_workers_under_load_loses_and_fails_nothing(
    app: TaskApp, start_worker: StartWorker, tmp_path: Path
) -> None:
    oracle = tmp_path / "oracle"
    flags = ("--max-running-tasks", "10", "--shutdown-grace", "0.1")
    worker = start_worker(*flags)
    async with app.connect():
        handles = [await shop.nap(str(oracle), f"{n}", 0.3) for n in range(200)]
        for _ in range(3):
            successor = start_worker(*flags)
            worker.signal(signal.SIGTERM)
            assert await anyio.to_thread.run_sync(worker.wait) == 0
            worker = successor
        for number, handle in enumerate(handles):
            assert await handle.result(timeout=120) == f"{number}"
        assert {(await handle.state()).attempt for handle in handles} == {1}
    assert len(await lines(oracle, 200, "end")) == 200
