"""Tasks that capture the event loop of a real worker, four innocent ones beside them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from amqp_tasks import TaskApp, TaskHandle, TaskState, TaskStatus
from amqp_tasks.runtime.interrupt import MOST_INTERRUPTS

from . import blockers
from .conftest import StartWorker
from .oracle import lines
from .workers import WorkerProcess, run_python

pytestmark = pytest.mark.anyio

TIMEOUT, GRACE = 1.0, 0.5
FLAGS = (
    *("--app", "tests.e2e.blockers:app", "--auto-kill-timeout", f"{TIMEOUT}"),
    *("--cancel-grace", f"{GRACE}"),
)
SLACK = 4.0
"""Seconds that a busy machine, settling, and the end of a process may take in addition."""

STARVED = 12.0
"""So many more where the GIL is kept: that is timed by computing time, for which others vie."""

Blocker = Callable[[str], Any]


@pytest.fixture
def app(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> TaskApp:
    """The blockers' app, with this test's settings."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    blockers.app.configure()
    return blockers.app


class Scene:
    """Four innocent tasks that run until they are let go, and what all tasks wrote down."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.oracle = folder / "oracle"
        self.innocents: list[TaskHandle[int]] = []
        self._door = folder / "door"

    async def begin(self) -> None:
        for number in range(4):
            handle = await blockers.innocent(str(self.oracle), f"{number}", str(self._door))
            self.innocents.append(handle)
        await lines(self.oracle, 4, "start")

    async def finish(self) -> list[int]:
        """Let the innocent go; return the processes that they ended in."""
        self._door.touch()
        pids = [await handle.result(timeout=30) for handle in self.innocents]
        for handle in self.innocents:
            state = await handle.state()
            assert (state.status, state.attempt) == (TaskStatus.FINISHED, 1)
        assert len(await lines(self.oracle, 4, "end")) == 4
        return pids

    async def words(self, word: str, at_least: int = 1) -> list[list[str]]:
        return await lines(self.oracle, at_least, word)


@pytest.fixture
async def scene(tmp_path: Path, app: TaskApp) -> AsyncIterator[Scene]:
    async with app.connect():
        yield Scene(tmp_path / "scene")


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """Fail a block that takes longer, to be measured and not merely to be stopped."""
    began = time.monotonic()
    with anyio.fail_after(seconds + 30):
        yield
    took = time.monotonic() - began
    print(f"took {took:.2f} s")
    assert took <= seconds


def assert_blamed(state: TaskState, place: str) -> None:
    """The state of a task names it as the one that captured the loop, and says where."""
    assert state.error is not None
    assert state.error["type"] == "amqp_tasks.exceptions.LoopBlocked"
    assert state.error["reason"] == "blocked_loop"
    assert f"in {place}\n" in state.error["traceback"]
    entry = next(entry for entry in state.eventlog if entry["kind"] == "blocked_loop")
    assert entry["attempt"] == 1
    assert f"in {place}\n" in entry["message"]["stack"]
    assert entry["message"]["seconds"] >= TIMEOUT - 0.01


def assert_named(worker: WorkerProcess, task_id: str, place: str) -> None:
    """So does the log."""
    text = worker.output()
    named = [line for line in text.splitlines() if task_id in line and "captured the event" in line]
    assert named, text
    assert f"in {place}\n" in text


INTERRUPTIBLE: dict[Blocker, str] = {
    blockers.spin: "spin",
    blockers.wait_for_lock: "wait_for_lock",
    blockers.match: "match",
    blockers.sleep_in_child: "child",
    blockers.swallow_exceptions: "swallow_exceptions",
}


@pytest.mark.parametrize("backend", ["asyncio", "uvloop", "trio"], indirect=True)
async def test_whoever_captures_the_loop_is_interrupted_and_the_others_go_on(
    scene: Scene, start_worker: StartWorker
) -> None:
    worker = start_worker(*FLAGS)
    await scene.begin()
    for task, place in INTERRUPTIBLE.items():
        async with within(TIMEOUT + SLACK + (STARVED if task is blockers.match else 0)):
            handle = await task(str(scene.oracle))
            assert await handle.join() is TaskStatus.ERRORED
        state = await handle.state()
        assert state.reason == "blocked_loop"
        assert_blamed(state, place)
        assert_named(worker, handle.task_id, place)
    async with within(TIMEOUT + SLACK):
        retried = await blockers.sleep_at_first(str(scene.oracle))
        assert await retried.result() == 2
    assert_blamed(await retried.state(), "sleep_at_first")
    assert await scene.words("left") == [["left", "blocked_loop"]]
    assert await scene.finish() == [worker.pid] * 4
    assert worker.output().count("free again") == len(INTERRUPTIBLE) + 1
    assert await anyio.to_thread.run_sync(worker.terminate) == 0


KILL = ("--on-blocked-loop", "kill")

HOPELESS: list[tuple[Blocker, str, float, tuple[str, ...]]] = [
    # what it does, where it is found, seconds to the exit, flags
    (blockers.swallow_everything, "swallow_everything", TIMEOUT + GRACE, ()),
    (
        blockers.swallow_everything_and_match,
        "swallow_everything_and_match",
        TIMEOUT + GRACE + STARVED,
        (),
    ),
    (blockers.swallow_and_let_go, "swallow_and_let_go", 4 * (TIMEOUT + 0.3) + GRACE, ()),
    (blockers.deadlock_in_c, "_lock_twice", TIMEOUT + GRACE, ()),
    (blockers.sleep_at_first, "sleep_at_first", TIMEOUT, KILL),
    (blockers.match, "match", TIMEOUT + STARVED, KILL),
]


async def test_if_nothing_helps_the_worker_ends_and_only_the_culprit_is_blamed(
    scene: Scene, start_worker: StartWorker
) -> None:
    """Six workers, one after the other, take the same four innocent tasks."""
    worker = start_worker(*FLAGS, *HOPELESS[0][3])
    await scene.begin()
    for number, (blocker, place, seconds, _) in enumerate(HOPELESS, 1):
        await lines(scene.oracle, 4 * number, "start")
        async with within(seconds + SLACK):
            culprit = await blocker(str(scene.oracle))
            assert await anyio.to_thread.run_sync(worker.wait) == 3, place
        assert_named(worker, culprit.task_id, place)
        state = await culprit.state()
        if blocker is blockers.sleep_at_first:
            assert (state.status, state.attempt) == (TaskStatus.RETRYING, 2)
        else:
            assert (state.status, state.attempt) == (TaskStatus.ERRORED, 1)
            assert state.reason == "blocked_loop"
        assert_blamed(state, place)
        for handle in scene.innocents:
            assert await handle.status() is TaskStatus.SCHEDULED
        flags = HOPELESS[number][3] if number < len(HOPELESS) else ()
        worker = start_worker(*FLAGS, *flags)
    assert len(await scene.words("let go")) == MOST_INTERRUPTS
    assert await scene.finish() == [worker.pid] * 4


async def test_without_the_gil_the_process_ends_and_others_take_over(
    scene: Scene, start_worker: StartWorker
) -> None:
    flags = ("--heartbeat", "1", "--presence-ttl", "2")
    worker = start_worker(*FLAGS, *flags)
    await scene.begin()
    async with within(3 * 1 + SLACK):
        culprit = await blockers.deadlock_with_gil(str(scene.oracle))
        assert await anyio.to_thread.run_sync(worker.wait) == 1
    assert "Timeout (0:00:03)!" in worker.output()
    assert " in _lock_twice\n" in worker.output()
    successor = start_worker(*FLAGS, *flags)
    assert await culprit.result(timeout=30) == "went through"
    await scene.words("start", 8)
    assert await scene.finish() == [successor.pid] * 4


async def test_outside_of_the_main_thread_it_says_so_names_and_exits(
    scene: Scene, env: dict[str, str], backend: str
) -> None:
    culprit = await blockers.sleep_at_first(str(scene.oracle))
    script = (
        "import logging, threading, anyio, tests.e2e.blockers as blockers\n"
        "logging.basicConfig()\n"
        f"blockers.app.configure(auto_kill_timeout={TIMEOUT}, cancel_grace={GRACE})\n"
        f"work = lambda: anyio.run(blockers.app.run_worker, backend={backend!r})\n"
        "thread = threading.Thread(target=work)\n"
        "thread.start()\n"
        "thread.join()\n"
    )
    done = await anyio.to_thread.run_sync(lambda: run_python("-c", script, env=env))
    assert done.returncode == 3, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "can interrupt nobody" in line]
    assert "main thread" in line
    assert f"<Attempt 1 of {culprit.task_id!r}" in done.stderr
    state = await culprit.state()
    assert (state.status, state.attempt) == (TaskStatus.RETRYING, 2)
    assert_blamed(state, "sleep_at_first")


# ------------------------------------------------------------- nobody is to blame

SUSPENDED = 20.0


class Theatre:
    """Several workers at the same time, each with a queue, and a client, of its own."""

    def __init__(self, start_worker: StartWorker, folder: Path, queue: str) -> None:
        self._start = start_worker
        self._folder = folder
        self._queue = queue

    @asynccontextmanager
    async def play(self, backend: str, name: str, *flags: str) -> AsyncIterator[Play]:
        app = TaskApp()
        app.configure(queue=f"{self._queue}-{backend}-{name}")
        app_flags = (*FLAGS, "--backend", backend, "--queue", app.settings.queue, *flags)
        worker = await anyio.to_thread.run_sync(lambda: self._start(*app_flags))
        async with app.connect():
            yield Play(app, worker, str(self._folder / f"{backend}-{name}"))
        assert await anyio.to_thread.run_sync(worker.terminate) == 0
        output = worker.output()
        blamed = [line for line in output.splitlines() if "captured the event loop" in line]
        assert not [line for line in blamed if "a garbage collection" not in line], output
        assert "lost the connection" not in output


@dataclass(frozen=True)
class Play:
    app: TaskApp
    worker: WorkerProcess
    oracle: str

    async def run(self, task: Callable[..., Any], *args: object) -> Any:
        handle = await self.app.add_task(task, self.oracle, *args)
        result = await handle.result(timeout=60)
        assert (await handle.state()).attempt == 1
        return result

    async def words(self, word: str) -> None:
        await lines(Path(self.oracle), 1, word)


async def suspend(theatre: Theatre, backend: str) -> None:
    """Stop a worker in which a task has kept the loop for half of what it may."""
    flags = ("--heartbeat", "60", "--presence-ttl", "60")
    async with (
        theatre.play(backend, "suspended", *flags) as play,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(play.run, blockers.sleep_for, TIMEOUT / 2)
        await play.words("asleep")
        play.worker.signal(signal.SIGSTOP)
        await anyio.sleep(SUSPENDED)
        play.worker.signal(signal.SIGCONT)


async def block(theatre: Theatre, backend: str) -> None:
    """Let a task keep the loop for several AMQP heartbeats, and the watchdog be off."""
    flags = ("--heartbeat", "5", "--auto-kill-timeout", "0")
    async with theatre.play(backend, "blocked", *flags) as play:
        assert await play.run(blockers.sleep_for, SUSPENDED) == "slept well"


async def burden(theatre: Theatre, backend: str) -> None:
    """Let tasks work, and garbage be collected, on a machine that is busy otherwise."""
    # The last resort would come after 9 s, if it were not put off.
    flags = ("--cancel-grace", "5", "--heartbeat", "3")
    async with theatre.play(backend, "burdened", *flags) as play:
        with busy_machine():
            taken = [await play.run(blockers.compute, TIMEOUT / 2) for _ in range(3)]
        assert max(taken) > TIMEOUT, "the machine was not busy"
        for keeps_gil in (False, True):
            assert await play.run(blockers.collect_garbage, keeps_gil) > 2 * TIMEOUT


@contextmanager
def busy_machine() -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("backend", ["both"], indirect=True)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_nobody_is_interrupted_who_does_not_capture_the_loop(
    start_worker: StartWorker, env: dict[str, str], app: TaskApp, tmp_path: Path
) -> None:
    theatre = Theatre(start_worker, tmp_path, env["AMQP_TASKS_QUEUE"])
    async with anyio.create_task_group() as tasks:
        for backend in ("asyncio", "trio"):
            for act in (suspend, block, burden):
                tasks.start_soon(act, theatre, backend)
