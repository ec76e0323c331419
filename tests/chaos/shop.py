"""The tasks of the chaos tests. Each says in the oracle's file what it does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager

import anyio

from amqp_tasks import RetryPolicy, TaskApp, current_attempt

from .oracle import note

# Where the servers are is in the environment.
app = TaskApp()


@contextmanager
def noted(path: str) -> Generator[int, None, None]:
    """Note the start and the end of the attempt; gives its fence."""
    attempt = current_attempt()

    def say(word: str) -> None:
        note(path, word, attempt.task_id, attempt.fence, attempt.number)

    say("start")
    try:
        yield attempt.fence
    except Exception:
        say("fail")
        raise
    except BaseException:
        say("stop")
        raise
    say("end")


@app.task
async def work(path: str, seconds: float) -> int:
    with noted(path) as fence:
        await anyio.sleep(seconds)
    return fence


@app.task
def work_in_thread(path: str, seconds: float) -> int:
    with noted(path) as fence:
        time.sleep(seconds)
    return fence


@app.task(retry=RetryPolicy(max_retries=3, delay=0.3, backoff=1, max_delay=1, jitter=0))
async def fails_at_first(path: str, seconds: float) -> int:
    with noted(path) as fence:
        await anyio.sleep(seconds)
        if current_attempt().number == 1:
            raise LookupError("not there yet")
    return fence


@app.task(retry=RetryPolicy(max_retries=0))
async def kills_its_worker(path: str) -> None:
    with noted(path):
        os.kill(os.getpid(), signal.SIGKILL)
        await anyio.sleep_forever()
