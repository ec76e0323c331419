"""Rounds of everything that can become of a task: nothing is kept, neither then nor at the end.

The worker runs in the test's own process, so that its objects can be counted.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import anyio
import anyio.to_thread
import pytest
import trio.lowlevel

from amqp_tasks import MessageType, PublishFailed, RetryPolicy, TaskApp, TaskHandle

from ..servers.rabbitmq import RabbitServer

pytestmark = pytest.mark.anyio

TASKS = 500
"""Per round."""
AT_ONCE = 50
FEW = 8
"""Objects of one class that may be more than a round before: what each loop, queue and
cache has had last is different every time. Of each kind of task there are more."""

app = TaskApp(state_ttl=5)
NO_RETRY = RetryPolicy(max_retries=0)


@app.task
async def succeed(number: int) -> int:
    return number


@app.task
def succeed_in_thread(number: int) -> int:
    return number


@app.task(retry=NO_RETRY)
async def fail() -> None:
    raise LookupError("as it should")


@app.task(retry=RetryPolicy(max_retries=1, delay=0))
async def fail_twice() -> None:
    raise LookupError("as it should")


@app.task(retry=NO_RETRY, timeout=0.01)
async def time_out() -> None:
    await anyio.sleep_forever()


@app.task
async def sleep() -> None:
    await anyio.sleep_forever()


@app.task
async def narrate() -> AsyncIterator[tuple[MessageType, Any]]:
    yield MessageType.DEBUG, "begun"
    yield MessageType.RESULT, 1


@app.task(retry=RetryPolicy(max_retries=5, delay=0.1))
async def lead() -> int:
    async with app.remote_task_group() as group:
        children = [await group.start(succeed, number) for number in range(2)]
    return sum([await child.result() for child in children])


async def queue_one(number: int) -> None:
    """Queue a task, of a kind that follows from its number, and wait for its end."""
    match number % 50:
        case 0 | 1:
            handle: TaskHandle[Any] = await fail()
        case 2:
            handle = await fail_twice()
        case 3:
            handle = await time_out()
        case 4:
            handle = await sleep()
            await handle.cancel()
        case 5:
            handle = await lead()
        case 6:
            handle = await narrate()
        case 7:
            handle = await succeed_in_thread(number)
        case _:
            handle = await succeed(number)
    await handle.join(timeout=60)


@dataclass(frozen=True)
class Census:
    """What there is in this process while a worker has nothing to do."""

    objects: Counter[str]
    """Of the package's classes, and tasks of either event loop that have not ended."""
    threads: Counter[str]
    descriptors: Counter[str]


def take_census() -> Census:
    gc.collect()
    names = map(_counted_as, gc.get_objects())
    return Census(
        objects=Counter(name for name in names if name is not None),
        threads=threads(),
        descriptors=descriptors(),
    )


def _counted_as(thing: object) -> str | None:
    kind = type(thing)  # and not `isinstance`, which asks whatever poses as something else
    if issubclass(kind, asyncio.Task):
        task = cast("asyncio.Task[Any]", thing)
        return None if task.done() else f"asyncio: {task.get_name()[:4]}"
    if kind is trio.lowlevel.Task:
        live = cast("trio.lowlevel.Task", thing).coro.cr_frame is not None
        return "trio" if live else None
    module = str(kind.__module__)  # Cython's types have something else there
    return f"{module}.{kind.__name__}" if module.startswith("amqp_") else None


def threads() -> Counter[str]:
    """Count the threads, without those that the backends keep for the next to need one."""
    names = [thread.name for thread in threading.enumerate()]
    return Counter(name for name in names if not name.startswith(("AnyIO", "Trio")))


def descriptors() -> Counter[str]:
    """Count the open files and sockets of this process, by kind."""
    kinds: list[str] = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one with which they are listed
            kinds.append(str(descriptor.readlink()).partition(":")[0])
    return Counter(kinds)


def grown(before: Census, after: Census) -> dict[str, int]:
    """Return what there is more of than before, and by how much; nothing if it is few."""
    more = (after.objects - before.objects) + (after.threads - before.threads)
    sockets = after.descriptors - before.descriptors
    return {name: count for name, count in (more + sockets).items() if count > FEW}


async def settled_census(before: Census) -> Census:
    """Take a census when all is settled: the last acks leave after a task's end is known."""
    census = take_census()
    with anyio.move_on_after(10):
        while grown(before, census):
            await anyio.sleep(0.2)
            census = take_census()
    return census


async def run_round(server: RabbitServer | None) -> None:
    """Queue tasks and wait for them; in the middle of it the server's connections are cut."""
    numbers, middle = iter(range(TASKS)), anyio.Event()

    async def keep_queueing() -> None:
        for number in numbers:
            if number == TASKS // 2:
                middle.set()
            try:
                await queue_one(number)
            except PublishFailed:  # the connection was cut just then
                continue

    async with anyio.create_task_group() as callers:
        for _ in range(AT_ONCE):
            callers.start_soon(keep_queueing)
        if server is not None:
            await middle.wait()
            await anyio.to_thread.run_sync(server.close_connections, "a test cuts them")


async def test_rounds_of_everything_leave_nothing_behind(
    env: dict[str, str],
    rabbit_server: RabbitServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)  # it keeps whatever is logged
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    app.configure()
    async with app.worker():
        pass  # libuv opens a pipe once in a process, and keeps it
    before = take_census()
    async with app.worker():
        # The first round fills caches and pools.
        await run_round(rabbit_server)
        await anyio.sleep(0.5)
        first = take_census()
        await run_round(rabbit_server)
        second = await settled_census(first)
        blocks = sys.getallocatedblocks()
        await run_round(None)
        third = await settled_census(second)
        blocks = sys.getallocatedblocks() - blocks
    after = take_census()
    assert grown(first, second) == {}
    assert grown(second, third) == {}
    assert first.threads == second.threads == third.threads
    # A task that is kept takes dozens. `benchmarks/leaks.py` looks closer, for longer.
    assert blocks < 10 * TASKS
    assert after.threads == before.threads
    assert after.descriptors == before.descriptors
    left = after.objects - before.objects
    assert not [name for name in left if name.startswith(("asyncio", "trio"))], left
