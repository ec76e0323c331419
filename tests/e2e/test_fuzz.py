"""Whatever is in the queue: it ends in the error queue with a reason, and the worker goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import TypeVar

import aiormq
import anyio
import anyio.to_thread
import pytest
from aiormq.abc import AbstractChannel

from amqp_tasks import TaskApp

from ..servers.rabbitmq import RabbitServer
from . import shop
from .amqp import Amqp, Found
from .conftest import StartWorker
from .hostile import (
    UNDECODABLE_PROPERTIES,
    Hostile,
    RawProperties,
    call,
    hostile_messages,
    legal_messages,
)
from .workers import WorkerProcess

pytestmark = pytest.mark.anyio

T = TypeVar("T")

MB = 1_000_000
GROWTH_MB = 90
"""By which a worker's memory may exceed what it was after its first huge message: less than
one such message, though many came after it."""


@pytest.fixture
def amqp(rabbit_server: RabbitServer) -> Amqp:
    return Amqp(rabbit_server)


@pytest.fixture
def send(app: TaskApp, rabbit_server: RabbitServer) -> Callable[..., Awaitable[None]]:
    """Publishes messages to the app's queue; returns when the broker has them all."""

    async def publish_all(messages: Sequence[Hostile]) -> None:
        async def run(channel: AbstractChannel) -> None:
            for one in messages:
                await channel.basic_publish(
                    one.body, routing_key=app.settings.queue, properties=one.sent_with
                )

        await anyio.to_thread.run_sync(_with_channel, rabbit_server, run)

    return publish_all


def _with_channel(server: RabbitServer, use: Callable[[AbstractChannel], Awaitable[T]]) -> T:
    async def run() -> T:
        connection = await aiormq.connect(server.url)
        try:
            return await use(await connection.channel())
        finally:
            await connection.close()

    return asyncio.run(run())


async def count_ready(server: RabbitServer, queue: str) -> int:
    """Return how many messages of a queue are not out on delivery."""

    async def run(channel: AbstractChannel) -> int:
        return (await channel.queue_declare(queue, passive=True)).message_count or 0

    return await anyio.to_thread.run_sync(_with_channel, server, run)


async def check_goes_on(worker: WorkerProcess) -> None:
    """A good task is run, and by the same process as ever."""
    handle = await shop.in_thread(Decimal(1), datetime(2026, 5, 4, tzinfo=UTC))
    assert (await handle.result(timeout=30))["pid"] == worker.pid


async def check_nothing_is_left(worker: WorkerProcess, server: RabbitServer, queue: str) -> None:
    """What had no verdict would be in the queue again when the worker has gone."""
    assert await anyio.to_thread.run_sync(worker.terminate) == 0
    assert await count_ready(server, queue) == 0


def reasons(dead: Sequence[Found]) -> dict[str, str]:
    return {one.headers["case"]: one.headers["error-reason"] for one in dead}


async def test_what_cannot_be_run_is_in_the_error_queue_with_its_reason(
    app: TaskApp,
    start_worker: StartWorker,
    amqp: Amqp,
    rabbit_server: RabbitServer,
    send: Callable[..., Awaitable[None]],
) -> None:
    messages = hostile_messages()
    # Each has an id of its own, where it has one at all.
    numbered = [
        Hostile(one.name, one.body.replace(b'"?"', b'"id-%d"' % n), one.reason, one.sent_with)
        for n, one in enumerate(messages)
    ]
    queue = app.settings.queue
    worker = start_worker("--serve", "tests.e2e.shop")
    async with app.connect():
        await send(numbered)
        dead = await anyio.to_thread.run_sync(amqp.drain, f"{queue}-error", len(messages))
        await check_goes_on(worker)
    assert reasons(dead) == {one.name: one.reason for one in numbered}
    bodies = {one.headers["case"]: one.body for one in dead}
    assert bodies == {one.name: one.body for one in numbered}
    await check_nothing_is_left(worker, rabbit_server, queue)


async def test_what_looks_odd_and_is_legal_runs(
    app: TaskApp,
    start_worker: StartWorker,
    rabbit_server: RabbitServer,
    send: Callable[..., Awaitable[None]],
) -> None:
    messages = legal_messages()
    worker = start_worker()
    async with app.connect():
        await send(messages)
        await check_goes_on(worker)
        for one in messages:
            assert await _result_of(app, one.name) == 3, one.name
        await check_goes_on(worker)
    assert await count_ready(rabbit_server, f"{app.settings.queue}-error") == 0
    await check_nothing_is_left(worker, rabbit_server, app.settings.queue)


async def _result_of(app: TaskApp, task_id: str) -> object:
    """Return the result of a task whose state is written when it is started."""
    handle = app.handle(task_id)
    with anyio.fail_after(30):
        while not await app.list_tasks(prefix=task_id, limit=1):
            await anyio.sleep(0.02)
    return await handle.result(timeout=30)


async def test_headers_that_steer_the_broker_are_not_sent_again(
    app: TaskApp,
    start_worker: StartWorker,
    amqp: Amqp,
    rabbit_server: RabbitServer,
) -> None:
    queue = app.settings.queue
    copies = f"{queue}-copies"
    worker = start_worker()
    await anyio.to_thread.run_sync(
        _with_channel, rabbit_server, lambda channel: channel.queue_declare(copies)
    )
    steering = {"CC": [copies], "BCC": [copies], "x-death": [{"queue": queue}], "x-delay": 9}
    body = call("steered", func="tests.e2e.shop.fails_at_once", args=[])
    async with app.connect():
        amqp.publish(queue, body, {**steering, "kept": "yes"})
        amqp.publish(queue, b"no JSON", {**steering, "kept": "yes"})
        dead = await anyio.to_thread.run_sync(amqp.drain, f"{queue}-error", 2)
        await check_goes_on(worker)
    assert sorted(one.headers["error-reason"] for one in dead) == ["exception", "undecodable"]
    assert [one.headers["kept"] for one in dead] == ["yes", "yes"]
    assert not [key for one in dead for key in one.headers if key in steering]
    # Those of the test's own two publications, and none of those to the error queue.
    assert len(amqp.drain(copies, 2)) == 2
    await check_nothing_is_left(worker, rabbit_server, queue)


@pytest.mark.parametrize("name", UNDECODABLE_PROPERTIES)
async def test_properties_that_cannot_be_decoded(
    app: TaskApp,
    start_worker: StartWorker,
    amqp: Amqp,
    send: Callable[..., Awaitable[None]],
    name: str,
) -> None:
    worker = start_worker()
    async with app.connect():
        await send([Hostile(name, call("x"), properties=UNDECODABLE_PROPERTIES[name])])
        (dead,) = await anyio.to_thread.run_sync(
            lambda: amqp.drain(f"{app.settings.queue}-error", 1)
        )
        await check_goes_on(worker)
    assert dead.body == call("x")
    assert dead.headers["error-reason"] == "undecodable"


@pytest.mark.parametrize("due", ["1e308", "1.7976931348623157e308"])
async def test_a_time_in_the_farthest_future(
    app: TaskApp, start_worker: StartWorker, amqp: Amqp, due: str
) -> None:
    worker = start_worker()
    async with app.connect():
        amqp.publish(app.settings.queue, call("x"), {"task-due": due})
        await check_goes_on(worker)
        await check_goes_on(worker)


async def test_huge_messages_do_not_stay_in_memory(
    app: TaskApp,
    start_worker: StartWorker,
    rabbit_server: RabbitServer,
    send: Callable[..., Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bodies up to 100 MB; RabbitMQ takes 128 MiB by default."""
    # Kept on disk once and not three times, which is what takes the time here.
    monkeypatch.setenv("AMQP_TASKS_QUEUE_TYPE", "classic")
    app.configure()
    queue = app.settings.queue
    # One after the other: the memory needed is that of as many as run at the same time.
    worker = start_worker("--max-running-tasks", "1", "--queue-type", "classic")
    transient = RawProperties(b"\x00\x00")
    huge = [
        Hostile("noise", b"\xff" * 100 * MB, properties=transient),
        Hostile("one text", call("?", args=["x" * 100 * MB]), properties=transient),
        Hostile("nested", b"[" * 100 * MB, properties=transient),
    ]
    large = [call(f"large-{n}", args=["x" * 5 * MB]) for n in range(10)]
    large += [b"{" + b'"a":1,' * MB for _ in range(10)]
    async with app.connect():
        sizes: list[int] = []
        for number, one in enumerate(huge, 1):
            await send([one])
            await until_count(rabbit_server, f"{queue}-error", number)
            await check_goes_on(worker)
            sizes.append(resident_mb(worker))
        await send([Hostile("large", body, properties=transient) for body in large])
        await until_count(rabbit_server, f"{queue}-error", len(huge) + len(large))
        await check_goes_on(worker)
        sizes.append(resident_mb(worker))
    print(f"memory after each: {sizes} MB")
    assert max(sizes) <= sizes[0] + GROWTH_MB
    await check_nothing_is_left(worker, rabbit_server, queue)


async def until_count(server: RabbitServer, queue: str, count: int) -> None:
    with anyio.fail_after(60):
        while await count_ready(server, queue) < count:
            await anyio.sleep(0.1)


def resident_mb(worker: WorkerProcess) -> int:
    status = Path(f"/proc/{worker.pid}/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) // 1_000
