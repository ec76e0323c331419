"""Whether a worker process keeps anything of the tasks that it has run.

Needs a RabbitMQ and a Redis, named by AMQP_TASKS_BROKER_URL and AMQP_TASKS_STATE_URL::

    python benchmarks/leaks.py [--backend trio] [--tasks 200000] [--samples 5]

Starts a worker process, sends tasks that do nothing through it, and looks at it from
outside (memory, threads, file descriptors, sockets) and from inside (tasks of both event
loops, objects) at equal distances. The last line but one says by how much its memory has
grown during the second half. Then the worker gets a SIGTERM; it has to exit with 0, and to
say nothing of tasks, exceptions or connections that nobody took care of. The exit code is 1
if it was otherwise. What a task leaves in Redis expires after `STATE_TTL` seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import trio.lowlevel

from amqp_tasks import TaskApp

STATE_TTL = 20
AT_ONCE = 200
"""Calls that are queued at the same time."""
BATCH = 2_000
"""Tasks that are queued before those of the batch before have all been run: what waits is
in the broker's memory, and the producer must not outrun the worker without end."""
COMPLAINTS = re.compile(r"never retrieved|was destroyed|unclosed|never awaited|Traceback")

app = TaskApp(state_ttl=STATE_TTL)
done = 0


@app.task
async def nothing() -> None:
    global done
    done += 1


@app.task
async def count_done() -> int:
    return done


@app.task
async def look_inside() -> dict[str, int]:
    """Return how many tasks (of asyncio, on both loops, and of Trio) and objects there are."""
    gc.collect()
    objects = gc.get_objects()
    return {
        "tasks": sum(map(_is_live_task, objects)),
        "objects": len(objects),
    }


def _is_live_task(thing: object) -> bool:
    if isinstance(thing, asyncio.Task):
        return not thing.done()
    return isinstance(thing, trio.lowlevel.Task) and thing.coro.cr_frame is not None


def look_at(pid: int) -> dict[str, int]:
    """Return what the system knows of a process; memory in KiB."""
    process = Path(f"/proc/{pid}")
    status = dict(
        line.split(":", 1) for line in (process / "status").read_text("ascii").splitlines()
    )
    targets: list[str] = []
    for descriptor in (process / "fd").iterdir():
        try:
            targets.append(str(descriptor.readlink()))
        except FileNotFoundError:
            continue  # closed since it was listed
    return {
        "rss": int(status["VmRSS"].split()[0]),
        "threads": int(status["Threads"]),
        "fds": len(targets),
        "sockets": sum(target.startswith("socket:") for target in targets),
    }


class Row(dict[str, int]):
    """A sample: figures by name, and how many tasks had been run."""


async def sample(pid: int, tasks: int, seconds: float) -> Row:
    inside = await (await look_inside()).result(timeout=60)
    row = Row(done=tasks, seconds=round(seconds), **look_at(pid), **inside)
    print("  ".join(f"{name} {value:>9,}" for name, value in row.items()), flush=True)
    return row


async def run_tasks(count: int, before: int) -> None:
    """Have `count` tasks run, by a worker that has run `before`."""
    queued = before
    while queued < before + count:
        more = min(BATCH, before + count - queued)
        async with anyio.create_task_group() as callers:
            for _ in range(AT_ONCE):
                callers.start_soon(_call, range(more // AT_ONCE))
            callers.start_soon(_call, range(more % AT_ONCE))
        queued += more
        await _until_done(queued - BATCH)
    await _until_done(queued)


async def _call(numbers: range) -> None:
    for _ in numbers:
        await nothing()


async def _until_done(count: int) -> None:
    while await (await count_done()).result(timeout=60) < count:
        await anyio.sleep(0.05)


async def measure(pid: int, tasks: int, samples: int) -> list[Row]:
    began, rows, step = time.monotonic(), [], tasks // (samples - 1)
    async with app.connect():
        rows.append(await sample(pid, 0, 0))
        for number in range(samples - 1):
            await run_tasks(step, number * step)
            rows.append(await sample(pid, (number + 1) * step, time.monotonic() - began))
    return rows


def start_worker(backend: str, log: Path) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-W", "always", "-m", "amqp_tasks", "worker"]
    with log.open("wb") as output:
        return subprocess.Popen(
            [*command, "--app", "benchmarks.leaks:app", "--backend", backend],
            env={**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"},
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def stop_worker(worker: subprocess.Popen[bytes], log: Path) -> bool:
    """Return whether it went as it should."""
    worker.send_signal(signal.SIGTERM)
    code = worker.wait(60)
    complaints = [line for line in log.read_text().splitlines() if COMPLAINTS.search(line)]
    print(f"after SIGTERM: exit code {code}, {len(complaints)} complaints in its output")
    print(*complaints, sep="\n", end="\n" if complaints else "")
    return code == 0 and not complaints


def main(backend: str, tasks: int, samples: int) -> int:
    name = f"benchmark-{uuid4().hex[:8]}"
    os.environ |= {"AMQP_TASKS_QUEUE": name, "AMQP_TASKS_EXCHANGE": name}
    os.environ |= {"AMQP_TASKS_STATE_PREFIX": f"{name}:"}
    app.configure()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "worker.log"
        worker = start_worker(backend, log)
        try:
            run: Callable[..., Any] = anyio.run
            rows = run(measure, worker.pid, tasks, samples, backend_options={"use_uvloop": True})
            middle, last = rows[samples // 2], rows[-1]
            ratio, more = last["rss"] / middle["rss"], last["rss"] - middle["rss"]
            print(
                f"{backend}: {last['done']:,} tasks in {last['seconds']:,} s; during the last "
                f"{last['done'] - middle['done']:,} memory grew to {ratio:.3f} times what it was "
                f"({more:+,} KiB)"
            )
            return 0 if stop_worker(worker, log) else 1
        finally:
            worker.kill()
            worker.wait()


if __name__ == "__main__":
    # The worker imports this module; so do we, that tasks have the same names in both.
    sys.path.insert(0, str(Path(__file__).parents[1]))
    leaks = importlib.import_module("benchmarks.leaks")

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=["asyncio", "uvloop", "trio"], default="asyncio")
    parser.add_argument("--tasks", type=int, default=200_000)
    parser.add_argument("--samples", type=int, default=5)
    options = parser.parse_args()
    sys.exit(leaks.main(options.backend, options.tasks, options.samples))
