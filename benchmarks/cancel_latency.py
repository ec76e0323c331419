"""How long a cancel request takes to reach a running task.

Needs a RabbitMQ and a Redis, named by AMQP_TASKS_BROKER_URL and AMQP_TASKS_STATE_URL::

    python benchmarks/cancel_latency.py [--backend trio] [--cancels 200] [--poll-only]

Prints the median and the worst of the times from the call of ``handle.cancel()`` to the
moment at which the task's scope is cancelled. ``--poll-only`` takes away the permission to
subscribe in Redis meanwhile, so that polling alone does it; the ratio of the two runs is
what announcements are worth.
"""

from __future__ import annotations

import argparse
import statistics
import time
from uuid import uuid4

import anyio
import redis

from amqp_tasks import TaskApp

NAME = f"benchmark-{uuid4().hex[:8]}"
app = TaskApp(queue=NAME, exchange=NAME, state_prefix=f"{NAME}:")
stopped: dict[str, float] = {}
running: set[str] = set()


@app.task
async def nap(name: str) -> None:
    running.add(name)
    try:
        await anyio.sleep_forever()
    finally:
        stopped[name] = time.perf_counter()


async def measure(cancels: int) -> list[float]:
    latencies: list[float] = []
    async with app.worker(), app.connect():
        for number in range(cancels):
            name = str(number)
            handle = await nap(name)
            while name not in running:
                await anyio.sleep(0.001)
            # Not in step with the polling.
            await anyio.sleep((number % 10) / 100)
            began = time.perf_counter()
            await handle.cancel()
            while name not in stopped:
                await anyio.sleep(0.0005)
            latencies.append(stopped[name] - began)
            await handle.join(timeout=30)
    return latencies


def allow_announcements(allowed: bool) -> None:
    with redis.Redis.from_url(app.settings.state_url) as client:
        channels = "allchannels" if allowed else "resetchannels"
        client.execute_command("ACL", "SETUSER", "default", channels)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    parser.add_argument("--cancels", type=int, default=200)
    parser.add_argument("--poll-only", action="store_true")
    options = parser.parse_args()
    allow_announcements(not options.poll_only)
    try:
        seconds = anyio.run(measure, options.cancels, backend=options.backend)
    finally:
        allow_announcements(True)
    print(
        f"{options.backend}, {'polling alone' if options.poll_only else 'announced'}: "
        f"{len(seconds)} cancels, median {statistics.median(seconds) * 1000:.1f} ms, "
        f"worst {max(seconds) * 1000:.1f} ms"
    )
