"""The tasks of the end-to-end tests, as a user would write them."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread

from amqp_tasks import MessageType, RetryPolicy, TaskApp, current_attempt

# Where the servers are is in the environment, AMQP_TASKS_BROKER_URL and so on.
app = TaskApp()


def record(path: str, *words: object) -> None:
    """Append a line to a file: an oracle outside of the framework's own state."""
    with Path(path).open("a") as file:  # short appends are atomic
        file.write(" ".join(map(str, words)) + "\n")


@app.task
async def add(a: int, b: int) -> int:
    return a + b


@app.task
async def nap(path: str, name: str, seconds: float) -> str:
    """Say that it starts, sleep, say that it ends."""
    attempt = current_attempt()
    record(path, "start", name, attempt.number, attempt.fence)
    try:
        await anyio.sleep(seconds)
    except BaseException:
        record(path, "cancelled", name, attempt.cancel_reason)
        raise
    record(path, "end", name, attempt.number, attempt.fence)
    return name


@app.task
async def wait_for_file(path: str, name: str, file: str) -> str:
    """Say that it starts, wait until there is a file, say that it ends."""
    attempt = current_attempt()
    record(path, "start", name, attempt.number, attempt.fence)
    while not Path(file).exists():
        await anyio.sleep(0.02)
    record(path, "end", name, attempt.number, attempt.fence)
    return name


@app.task(retry=RetryPolicy(max_retries=3, delay=0.5, backoff=2.0, max_delay=60, jitter=0))
async def always_fails(path: str) -> None:
    record(path, "start", time.time())
    raise LookupError("nothing there, ever")


@app.task
def in_thread(price: Decimal, when: datetime) -> dict[str, Any]:
    time.sleep(0.01)
    return {"price": price * 2, "year": when.year, "pid": os.getpid()}


@app.task
async def count(to: int) -> AsyncIterator[tuple[MessageType, Any]]:
    for number in range(to):
        yield MessageType.DEBUG, f"at {number}"
        yield MessageType.RESULT, number


@app.task
async def returns_what_is_no_json() -> object:
    return object()


@app.task
async def calls_another(a: int) -> int:
    handle = await add(a, 1)
    return await handle.result(timeout=30)


@app.task(retry=RetryPolicy(max_retries=0))
async def takes_its_worker_down() -> None:
    os.kill(os.getpid(), 9)


@app.task
async def with_request(foo: str) -> str:
    """What a message of guillotina_amqp calls."""
    return foo.upper()


async def undecorated(word: str, kw_arg: str = "") -> str:
    return word + kw_arg


@app.task
async def adds_up(children: int) -> int:
    """Have others add, and add up what they say."""
    async with app.remote_task_group() as group:
        handles = [await group.start(add, n, n) for n in range(children)]
    return sum([await handle.result() for handle in handles])


@app.task
async def tree(path: str, depth: int, width: int) -> None:
    """Grow a tree of tasks whose leaves sleep."""
    async with app.remote_task_group() as group:
        for _ in range(width):
            if depth == 1:
                await group.start(nap, path, "leaf", 60)
            else:
                await group.start(tree, path, depth - 1, width)


@app.task(retry=RetryPolicy(max_retries=0))
async def fails_at_once() -> None:
    raise LookupError("never there")


@app.task(process=True, retry=RetryPolicy(max_retries=0))
def burns_a_core(path: str) -> None:
    record(path, "start", os.getpid())
    while True:
        pass


@app.task(retry=RetryPolicy(max_retries=0))
def in_thread_until_cancelled(path: str) -> None:
    record(path, "start")
    try:
        while True:
            anyio.from_thread.check_cancelled()
            time.sleep(0.01)
    except BaseException:
        record(path, "cancelled", current_attempt().cancel_reason)
        raise
