"""Tasks that capture the event loop, each in a way of its own, and one that does not."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import threading
import time
from pathlib import Path
from typing import NoReturn

import anyio

from amqp_tasks import RetryPolicy, TaskApp, current_attempt

from .shop import record

# Where the servers are is in the environment.
app = TaskApp()

once = app.task(retry=RetryPolicy(max_retries=0))
"""Makes a task that is not tried again."""


@app.task
async def innocent(oracle: str, name: str, door: str) -> int:
    """Do no harm until a file is there; return the process that it ended in."""
    record(oracle, "start", name, os.getpid())
    while not Path(door).exists():
        await anyio.sleep(0.05)
    record(oracle, "end", name, os.getpid())
    return os.getpid()


@app.task(retry=RetryPolicy(max_retries=1, delay=0.25, jitter=0))
async def sleep_at_first(oracle: str) -> int:
    """Sleep, without letting go of the loop, in the first attempt only."""
    attempt = current_attempt()
    if attempt.number == 1:
        try:
            time.sleep(60)
        finally:
            record(oracle, "left", attempt.cancel_reason)
    return attempt.number


@once
async def spin(oracle: str) -> NoReturn:
    while True:
        pass


@once
async def wait_for_lock(oracle: str) -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


@once
async def match(oracle: str) -> None:
    """Let a regular expression run away. It keeps the GIL as it does."""
    re.match(r"(a+)+$", "a" * 40 + "b")


@once
async def sleep_in_child(oracle: str) -> None:
    async def child() -> None:
        time.sleep(60)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(child)


@once
async def swallow_exceptions(oracle: str) -> NoReturn:
    while True:
        try:
            time.sleep(60)
        except Exception:
            record(oracle, "swallowed")


@once
async def swallow_everything(oracle: str) -> NoReturn:
    while True:
        try:
            time.sleep(60)
        except BaseException:
            record(oracle, "swallowed")


@once
async def swallow_everything_and_match(oracle: str) -> NoReturn:
    """Be interrupted where other threads can run, and go on where they cannot."""
    try:
        time.sleep(60)
    except BaseException:
        record(oracle, "swallowed")
    while True:
        try:
            re.match(r"(a+)+$", "a" * 40 + "b")
        except BaseException:
            record(oracle, "swallowed")


@once
async def swallow_and_let_go(oracle: str) -> NoReturn:
    """Let the loop beat in between, where no cancellation comes through."""
    while True:
        try:
            time.sleep(60)
        except BaseException:
            record(oracle, "let go")
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.3)


@once
async def deadlock_in_c(oracle: str) -> None:
    """Wait in C, without the GIL, where no signal is heeded: for a mutex that is locked."""
    _lock_twice(ctypes.CDLL(None))


@app.task
async def deadlock_with_gil(oracle: str) -> str:
    """The same and the GIL is kept; but only the first time."""
    if "deadlocked" in Path(oracle).read_text():
        return "went through"
    record(oracle, "deadlocked")
    _lock_twice(ctypes.PyDLL(None))
    return "unlocked"


def _lock_twice(libc: ctypes.CDLL) -> None:
    mutex = ctypes.create_string_buffer(256)  # a mutex of zeros is one that is unlocked
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


@once
async def sleep_for(oracle: str, seconds: float) -> str:
    """Sleep, without letting go of the loop, and live through it."""
    record(oracle, "asleep")
    time.sleep(seconds)
    record(oracle, "awake")
    return "slept well"


@once
async def compute(oracle: str, seconds: float) -> float:
    """Take that much computing time; return how long it was by the clock on the wall."""
    began, end = time.monotonic(), time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return time.monotonic() - began


def _compute(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


class _Lingering:
    """Garbage that takes a while to collect: it is in a cycle, and has a finalizer."""

    def __init__(self, keeps_gil: bool) -> None:
        self._itself = self
        self._keeps_gil = keeps_gil

    def __del__(self) -> None:
        if self._keeps_gil:
            ctypes.PyDLL(None).usleep(100_000)
            return
        _compute(0.1)


@once
async def collect_garbage(oracle: str, keeps_gil: bool) -> float:
    """Compute, have a garbage collection take long, compute; return its seconds."""
    for _ in range(25):
        _Lingering(keeps_gil)
    _compute(0.4)
    began = time.monotonic()
    gc.collect()
    took = time.monotonic() - began
    _compute(0.4)
    return took
