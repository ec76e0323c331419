"""Tasks that take longer than RabbitMQ lets anybody hold a delivery."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from amqp_tasks import TaskApp, TaskStatus

from ..servers.rabbitmq import RabbitServer
from . import shop
from .conftest import StartWorker
from .oracle import lines

pytestmark = pytest.mark.anyio

CONSUMER_TIMEOUT = 2.0
LONG = 4 * CONSUMER_TIMEOUT
FLAGS = ("--guard-after", "1", "--presence-ttl", "3")


@pytest.fixture(scope="module")
def rabbit_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A RabbitMQ that is less patient than usual, and looks once a second."""
    server = RabbitServer(tmp_path_factory.mktemp("impatient"))
    server.start()
    try:
        for name, ms in (
            ("consumer_timeout", CONSUMER_TIMEOUT * 1000),
            ("channel_tick_interval", 1000),
        ):
            server.evaluate(f"application:set_env(rabbit, {name}, {ms:.0f})")
        yield server
    finally:
        server.stop()


async def test_a_task_may_take_several_times_as_long(
    app: TaskApp, start_worker: StartWorker, tmp_path: Path
) -> None:
    oracle = tmp_path / "oracle"
    worker = start_worker(*FLAGS, "--max-running-tasks", "3")
    async with app.connect():
        long = [await shop.nap(str(oracle), f"{n}", LONG) for n in range(3)]
        waiting = await shop.nap(str(oracle), "waiting", 0)
        assert [await handle.result(timeout=60) for handle in long] == ["0", "1", "2"]
        assert await waiting.result(timeout=30) == "waiting"
    assert len(await lines(oracle, 4, "start")) == 4
    assert "was cancelled" not in worker.output(), "the broker has closed a channel"
    assert worker.terminate() == 0


async def test_without_a_guard_the_broker_takes_the_delivery_away_and_the_task_still_runs_once(
    app: TaskApp, start_worker: StartWorker, tmp_path: Path
) -> None:
    oracle = tmp_path / "oracle"
    worker = start_worker("--guard-after", "3600")
    async with app.connect():
        handle = await shop.nap(str(oracle), "long", LONG)
        assert await handle.result(timeout=60) == "long"
    assert "was cancelled" in worker.output()
    assert len(await lines(oracle, 1, "start")) == 1


async def test_the_task_of_a_worker_that_is_killed_after_its_delivery_was_acked_goes_on_elsewhere(
    app: TaskApp, start_worker: StartWorker, tmp_path: Path
) -> None:
    oracle = tmp_path / "oracle"
    worker = start_worker(*FLAGS)
    async with app.connect():
        may_end = tmp_path / "may-end"
        handle = await shop.wait_for_file(str(oracle), "long", str(may_end))
        await lines(oracle, 1, "start")
        # Whoever can be started has been, and its delivery replaced by a copy.
        follower = await shop.nap(str(oracle), "follower", 2 * CONSUMER_TIMEOUT)
        assert await follower.result(timeout=30) == "follower"
        start_worker(*FLAGS)
        worker.signal(signal.SIGKILL)
        worker.wait()
        may_end.touch()
        assert await handle.result(timeout=60) == "long"
        state = await handle.state()
        assert (state.status, state.attempt) == (TaskStatus.FINISHED, 1)
    first, second = [line for line in await lines(oracle, 3, "start") if line[1] == "long"]
    assert int(first[3]) < int(second[3]), "the fence grows"
    assert len(await lines(oracle, 1, "end long")) == 1
