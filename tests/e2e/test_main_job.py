"""The main job, end to end: enqueue, run, retry, look up; a worker process, real servers."""

from __future__ import annotations

import itertools
import json
import os
import signal
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import pytest

from amqp_tasks import (
    ArgumentsError,
    RemoteTaskError,
    TaskApp,
    TaskCanceled,
    TaskStatus,
)

from ..servers.rabbitmq import RabbitServer
from . import shop
from .amqp import Amqp
from .conftest import StartWorker
from .oracle import lines

pytestmark = pytest.mark.anyio

MANY = int(os.environ.get("AMQP_TASKS_TEST_MANY", "2000"))


async def test_many_tasks_all_finish_with_the_right_results(
    app: TaskApp, start_worker: StartWorker
) -> None:
    start_worker()
    limit = anyio.CapacityLimiter(200)
    results: dict[int, int] = {}

    async def one(number: int) -> None:
        async with limit:
            handle = await shop.add(number, number)
        results[number] = await handle.result(timeout=120)

    async with app.connect(), anyio.create_task_group() as tasks:
        for number in range(MANY):
            tasks.start_soon(one, number)
    assert results == {number: 2 * number for number in range(MANY)}


async def test_values_travel_by_annotation(app: TaskApp, start_worker: StartWorker) -> None:
    worker = start_worker()
    async with app.connect():
        handle = await shop.in_thread(Decimal("1.50"), datetime(2026, 5, 4, tzinfo=UTC))
        result = await handle.result(timeout=30)
        assert result == {"price": "3.00", "year": 2026, "pid": worker.pid}
        with pytest.raises(ArgumentsError, match="price='no number'"):
            await shop.in_thread("no number", datetime.now(UTC))  # type: ignore[arg-type]


async def test_a_failing_task_is_retried_with_its_delays_and_then_in_the_error_queue(
    app: TaskApp, start_worker: StartWorker, rabbit_server: RabbitServer, tmp_path: Path
) -> None:
    start_worker()
    oracle = tmp_path / "oracle"
    async with app.connect():
        handle = await shop.always_fails(str(oracle))
        await lines(oracle, 1)
        with anyio.fail_after(10):
            while await handle.status() is not TaskStatus.RETRYING:
                await anyio.sleep(0.01)
        with pytest.raises(RemoteTaskError) as caught:
            await handle.result(timeout=60)
        state = await handle.state()
    assert caught.value.type == "LookupError"
    assert "nothing there, ever" in caught.value.traceback
    assert "in always_fails" in caught.value.traceback
    times = [float(line[1]) for line in await lines(oracle, 4)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(gaps) == 3
    for gap, delay in zip(gaps, (0.5, 1.0, 2.0), strict=True):
        assert delay <= gap < delay + 1
    assert (state.status, state.attempt) == (TaskStatus.ERRORED, 4)
    (dead,) = Amqp(rabbit_server).drain(f"{app.settings.queue}-error", 1)
    assert json.loads(dead.body)["task_id"] == handle.task_id
    assert dead.headers["error-type"] == "LookupError"
    assert "in always_fails" in dead.headers["error-traceback"]
    assert dead.headers["error-attempt"] == 4


async def test_a_killed_workers_tasks_are_finished_by_another_each_recorded_once(
    app: TaskApp, start_worker: StartWorker, tmp_path: Path
) -> None:
    oracle = tmp_path / "oracle"
    flags = ("--max-running-tasks", "25", "--presence-ttl", "2")
    first = start_worker(*flags)
    async with app.connect():
        handles = [await shop.nap(str(oracle), f"nap-{n}", 1.0) for n in range(50)]
        await lines(oracle, 10, "start")
        first.signal(signal.SIGKILL)
        first.wait()
        start_worker(*flags)
        for number, handle in enumerate(handles):
            assert await handle.result(timeout=60) == f"nap-{number}"
        states = [await handle.state() for handle in handles]
    assert {state.status for state in states} == {TaskStatus.FINISHED}
    assert {state.attempt for state in states} == {1}, "a crash is not a counted attempt"
    ends = [line[1] for line in await lines(oracle, 50, "end")]
    assert sorted(ends) == sorted({f"nap-{n}" for n in range(50)})


async def test_a_message_of_guillotina_amqp_runs(
    app: TaskApp, start_worker: StartWorker, rabbit_server: RabbitServer
) -> None:
    start_worker()
    body = {
        "func": "tests.e2e.shop.with_request",
        "args": ["bar"],
        "kwargs": {},
        "db_id": "db",
        "container_id": "container",
        "req_data": {"url": "http://localhost/db/container", "headers": {}, "method": "POST"},
        "task_id": "task:db-container-0815",
    }
    async with app.connect():
        Amqp(rabbit_server).publish(app.settings.queue, json.dumps(body).encode())
        handle = app.handle("task:db-container-0815")
        with anyio.fail_after(30):
            while not (await _statuses(app)):
                await anyio.sleep(0.05)
        assert await handle.result(timeout=30) == "BAR"
        state = await handle.state()
    assert state.job["container_id"] == "container"
    assert state.job["req_data"]["method"] == "POST"


async def _statuses(app: TaskApp) -> list[TaskStatus]:
    return [state.status for state in await app.list_tasks()]


async def test_what_cannot_be_run_goes_to_the_error_queue_with_the_reason(
    app: TaskApp, start_worker: StartWorker, rabbit_server: RabbitServer
) -> None:
    start_worker()
    amqp, queue = Amqp(rabbit_server), app.settings.queue
    call: dict[str, Any] = {"args": [], "kwargs": {}}
    async with app.connect():
        amqp.publish(queue, b"\xff\x00 no JSON")
        amqp.publish(queue, json.dumps({**call, "func": "os.getcwd", "task_id": "u"}).encode())
        bad = {"func": "tests.e2e.shop.add", "args": [1, "x"], "kwargs": {}, "task_id": "b"}
        amqp.publish(queue, json.dumps(bad).encode())
        stuck = await shop.returns_what_is_no_json()
        with pytest.raises(RemoteTaskError) as no_json:
            await stuck.result(timeout=30)
        assert no_json.value.reason == "bad_result"
        dead = amqp.drain(f"{queue}-error", 4)
        with pytest.raises(RemoteTaskError) as unknown:
            await app.handle("u").result(timeout=10)
        assert unknown.value.reason == "unknown_task"
        with pytest.raises(RemoteTaskError) as arguments:
            await app.handle("b").result(timeout=10)
        assert arguments.value.reason == "bad_arguments"
        assert await (await shop.add(1, 1)).result(timeout=30) == 2
    reasons = sorted(message.headers["error-reason"] for message in dead)
    assert reasons == ["bad_arguments", "bad_result", "undecodable", "unknown_task"]


async def test_generators_threads_and_tasks_that_call_tasks(
    app: TaskApp, start_worker: StartWorker
) -> None:
    start_worker("--max-running-tasks", "4")
    async with app.connect():
        counting = await shop.count(3)
        assert await counting.result(timeout=30) == [0, 1, 2]
        log = (await counting.state()).eventlog
        assert [entry["message"] for entry in log] == ["at 0", 0, "at 1", 1, "at 2", 2]
        assert await (await shop.calls_another(41)).result(timeout=30) == 42


async def test_a_task_id_stands_for_one_task(
    app: TaskApp, start_worker: StartWorker, tmp_path: Path
) -> None:
    start_worker()
    oracle = tmp_path / "oracle"
    async with app.connect():
        first = await app.add_task(shop.nap, str(oracle), "one", 0.2, task_id="order-7 ü{}")
        again = await app.add_task(shop.nap, str(oracle), "two", 0.2, task_id="order-7 ü{}")
        assert first == again
        assert await again.result(timeout=30) == "one"
        later = await app.add_task(shop.nap, str(oracle), "three", 0.2, task_id="order-7 ü{}")
        assert await later.result(timeout=30) == "one"
    assert len(await lines(oracle, 1, "start")) == 1


async def test_cancelling_stops_what_runs_and_what_waits(
    app: TaskApp, start_worker: StartWorker, tmp_path: Path
) -> None:
    start_worker("--max-running-tasks", "1")
    oracle = tmp_path / "oracle"
    async with app.connect():
        running = await shop.nap(str(oracle), "running", 60)
        await lines(oracle, 1, "start")
        waiting = await shop.nap(str(oracle), "waiting", 60)
        assert await waiting.cancel() is True
        assert await running.cancel() is True
        assert await running.join(timeout=10) is TaskStatus.CANCELED
        with pytest.raises(TaskCanceled):
            await waiting.result(timeout=10)
        assert await running.cancel() is False
        assert await (await shop.add(1, 2)).result(timeout=30) == 3
    assert [line[1:] for line in await lines(oracle, 1, "cancelled")] == [["running", "user"]]
    assert [line[1] for line in await lines(oracle, 1, "start")] == ["running"]
