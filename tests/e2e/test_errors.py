"""``python -m amqp_tasks errors``: what it shows, what it does, and killed in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from amqp_tasks import TaskApp, TaskHandle, TaskStatus
from amqp_tasks.runtime import errors as runtime_errors

from ..servers.rabbitmq import RabbitServer
from . import faulty
from .amqp import Amqp
from .conftest import StartWorker
from .oracle import lines
from .workers import ROOT, environment, run_python, start_python

pytestmark = pytest.mark.anyio

APP = ("--app", "tests.e2e.faulty:app")
MANY = 200

Errors = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def app(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> TaskApp:
    """The app of the tasks that fail, with this test's settings."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    faulty.app.configure()
    return faulty.app


@pytest.fixture
def start_faulty(start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch) -> StartWorker:
    def start(*flags: str) -> Any:
        return start_worker("--app", "tests.e2e.faulty:app", *flags)  # the last one counts

    return start


@pytest.fixture
def errors(env: dict[str, str]) -> Errors:
    """Run a command."""

    def run(command: str, *arguments: str, **more_env: str) -> subprocess.CompletedProcess[str]:
        words = ("-m", "amqp_tasks", "errors", command, *APP, *arguments)
        return run_python(*words, env={**env, **more_env})

    return run


def letters(errors: Errors, *flags: str) -> list[dict[str, Any]]:
    done = errors("list", "--json", *flags)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def ids(found: Sequence[dict[str, Any]]) -> list[str]:
    return [letter["task_id"] for letter in found]


async def fail(task: Any, path: Path, *names: str) -> list[TaskHandle[str]]:
    """Have a task fail for each name, which is its id; one after the other."""
    handles = []
    for name in names:
        handle = await task.options(task_id=name)(str(path), name)
        assert await handle.join(timeout=60) is TaskStatus.ERRORED
        handles.append(handle)
    return handles


async def letters_when(app: TaskApp, errors: Errors, count: int) -> list[dict[str, Any]]:
    """Return the letters when there are as many: a state is written before its letter."""
    with anyio.fail_after(30):
        while len(await ids_in_queue(app)) != count:
            await anyio.sleep(0.1)
    return await anyio.to_thread.run_sync(letters, errors)


async def ids_in_queue(app: TaskApp) -> list[str | None]:
    """The ids of all letters; a process for each look would take a second."""
    async with app.error_queue() as queue:
        return [letter.task_id async for letter in queue]


# ------------------------------------------------------------------- what people do


@pytest.mark.parametrize("backend", ["asyncio"])  # the worker's is all the same here
async def test_look_replay_and_drop(
    app: TaskApp,
    start_faulty: StartWorker,
    errors: Errors,
    rabbit_server: RabbitServer,
    tmp_path: Path,
) -> None:
    start_faulty()
    path, queue = tmp_path / "oracle", app.settings.queue
    async with app.connect():
        await fail(faulty.work, path, "a", "b", "c")
        others = await fail(faulty.other, path, "x", "y", "z")
        Amqp(rabbit_server).publish(queue, b"\xff\x1b no JSON")
        found = await letters_when(app, errors, 7)
    assert ids(found) == ["a", "b", "c", "x", "y", "z", None]
    first = found[0]
    assert first["name"] == "tests.e2e.faulty.work"
    assert (first["type"], first["message"]) == ("LookupError", "a is not there\nsecond line")
    assert (first["reason"], first["attempt"], first["problem"]) == ("exception", 1, None)
    assert abs(first["at"] - time.time()) < 60
    assert found[-1]["reason"] == "undecodable"
    assert ids(letters(errors, "--task", "tests.e2e.faulty.other")) == ["x", "y", "z"]
    assert ids(letters(errors, "--limit", "2")) == ["a", "b"]
    assert letters(errors) == found, "looking changes nothing"

    table = errors("list")
    rows = table.stdout.splitlines()
    assert (table.returncode, len(rows)) == (0, 8)
    assert rows[1].split()[:2] == ["1", "a"]
    assert "LookupError: a is not there" in rows[1]
    assert "second line" not in table.stdout
    limited = errors("list", "--limit", "2")
    assert "there are more" in limited.stderr
    assert len(limited.stdout.splitlines()) == 3

    shown = errors("show", "b")
    assert shown.returncode == 0
    for part in ("in work", "second line", "tests.e2e.faulty.work", '"args"', "task-attempt: 1"):
        assert part in shown.stdout
    assert "x1b" not in shown.stdout

    # Some by id, some by name.
    faulty.repair(path)
    done = errors("replay", "b", "no such")
    assert done.returncode == 1
    assert "replayed 1 of 7 letters" in done.stderr
    assert "'no such'" in done.stderr
    done = errors("replay", "--task", "tests.e2e.faulty.other")
    assert (done.returncode, done.stdout) == (0, "")
    assert "replayed 3 of 6 letters" in done.stderr
    async with app.connect():
        for handle in others:
            assert await handle.join(timeout=30) is TaskStatus.FINISHED
        assert await app.handle("b").result(timeout=30) == "b"
        assert (await app.handle("b").state()).attempt == 1
    assert ids(letters(errors)) == ["a", "c", None]

    # What is none of ours is refused by name, and goes by its number only.
    done = errors("replay", "--all")
    assert done.returncode == 1
    assert "letter 3 stays: the body is not JSON" in done.stderr
    assert "replayed 2 of 3 letters" in done.stderr
    assert len(await lines(path, 6, "end")) == 6
    done = errors("drop", "--position", "2")
    assert (done.returncode, "nothing" in done.stderr) == (1, True)
    done = errors("drop", "--position", "1")
    assert (done.returncode, "dropped 1 of 1" in done.stderr) == (0, True)
    done = errors("list")
    assert (done.returncode, done.stdout) == (0, "")
    assert "no letters" in done.stderr
    for command in ("replay", "drop"):
        done = errors(command, "--all")
        assert done.returncode == 1
        assert "nothing in" in done.stderr


@pytest.mark.parametrize("backend", ["asyncio"])
async def test_drop_asks_on_a_terminal(
    app: TaskApp,
    start_faulty: StartWorker,
    errors: Errors,
    env: dict[str, str],
    rabbit_server: RabbitServer,
    tmp_path: Path,
) -> None:
    start_faulty()
    amqp = Amqp(rabbit_server)
    async with app.connect():
        await fail(faulty.work, tmp_path / "oracle", "a", "b")
        amqp.publish(app.settings.queue, b"\xff")
        await letters_when(app, errors, 3)
    arguments = ("drop", *APP, "--task", "tests.e2e.faulty.work")
    assert "work" in on_a_terminal(env, "n\n", *arguments)
    assert len(letters(errors)) == 3
    done = errors("drop", "--position", "1")
    assert done.returncode == 1
    assert "drop it by its id" in done.stderr
    assert "dropped 2" in on_a_terminal(env, "y\n", *arguments)
    assert "dropped 1" in on_a_terminal(env, "", "drop", *APP, "--undecodable", "--yes")
    assert letters(errors) == []


def on_a_terminal(env: dict[str, str], typed: str, *arguments: str) -> str:
    """Run a command whose standard input is a terminal; return what it says."""
    ours, theirs = os.openpty()
    try:
        os.write(ours, typed.encode())
        done = subprocess.run(
            [sys.executable, "-m", "amqp_tasks", "errors", *arguments],
            env=environment(env),
            cwd=ROOT,
            stdin=theirs,
            capture_output=True,
            text=True,
            timeout=60,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    return done.stdout + done.stderr


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
@pytest.mark.parametrize("backend", ["asyncio"])
async def test_letters_of_several_pages_are_given_back_in_their_order(
    app: TaskApp, rabbit_server: RabbitServer, queue_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_errors, "PAGE", 40)
    # As small beside a page as it is: what is read ahead is held as well.
    monkeypatch.setattr(runtime_errors, "BATCH", 4)
    monkeypatch.setattr(runtime_errors, "MAX_HELD", 120)
    monkeypatch.setenv("AMQP_TASKS_QUEUE_TYPE", queue_type)
    app.configure()
    async with app.connect():
        pass  # declares the queues
    bodies = [b"%d" % number for number in range(130)]
    await anyio.to_thread.run_sync(
        publish_all, rabbit_server, app.settings.queue + "-error", bodies
    )
    for count in (7, 60, 130, 130):
        seen: list[bytes] = []
        async with app.error_queue() as queue:
            assert queue.total == 130
            async for letter in queue:
                seen.append(letter.body)
                if len(seen) == count:
                    break
            assert queue.unseen == (10 if count == 130 else 0)
        assert seen == bodies[: min(count, 120)]
    async with app.error_queue() as queue:
        async for letter in queue:
            if int(letter.body) % 2:
                await queue.drop(letter)
        assert queue.unseen == 0
    async with app.error_queue() as queue:
        rest = [letter.body async for letter in queue]
    if queue_type == "quorum":
        # RabbitMQ 3.10 may put what it gets back of a full page, some of which was acked
        # since, behind the next page. Nothing is lost or doubled by that.
        rest.sort(key=int)
    assert rest == bodies[::2]


def publish_all(server: RabbitServer, queue: str, bodies: Sequence[bytes]) -> None:
    amqp = Amqp(server)
    for body in bodies:
        amqp.publish(queue, body)


def test_what_is_wrong_has_its_exit_code(
    errors: Errors, env: dict[str, str], rabbit_server: RabbitServer
) -> None:
    for command, arguments in {"replay": (), "drop": ("a", "--all"), "show": ()}.items():
        done = errors(command, *arguments)
        assert done.returncode == 2
        assert "Usage" in done.stderr
    done = errors("list", "--app", "no.such:app")
    assert (done.returncode, "no.such" in done.stderr) == (2, True)
    done = errors("list", "--queue-type", "brown")
    assert (done.returncode, "--queue-type='brown'" in done.stderr) == (2, True)
    # Looking for a queue does not make it.
    for _ in range(2):
        done = errors("list")
        assert done.returncode == 3
        assert f"{env['AMQP_TASKS_QUEUE']}-error" in done.stderr
    done = errors("list", "--broker-url", rabbit_server.url_for(password="wr0ng"))
    assert (done.returncode, "wr0ng" in done.stderr) == (3, False)
    for command in ("list", "show", "replay", "drop"):
        done = errors(command, "--help")
        text = " ".join(done.stdout.split())
        assert "65,000" in text
        assert "Exit codes: 0 done 1 nothing matches" in text


# --------------------------------------------------------------- killed on the way


@pytest.mark.parametrize("backend", ["asyncio"])
async def test_a_killed_replay_neither_loses_nor_doubles(
    app: TaskApp,
    start_faulty: StartWorker,
    errors: Errors,
    env: dict[str, str],
    tmp_path: Path,
) -> None:
    start_faulty("--max-running-tasks", "50")
    # The first state reopened, and next to nothing published; some; some have run.
    moments = ((1, 0), (60, 0), (150, 0), (0, 1))
    middle = 0
    async with app.connect():
        # Which moment is hit is up to the machine: again, until one was in the middle.
        for turn, (reopened, ran) in enumerate(moments * 5):
            if turn >= len(moments) and middle:
                break
            path = tmp_path / f"oracle-{turn}"
            names = [f"{turn}-{number}" for number in range(MANY)]
            await fail_at_once(path, names)
            await letters_when(app, errors, MANY)
            faulty.repair(path)
            replay = ("-m", "amqp_tasks", "errors", "replay", "--all", *APP)
            with start_python(*replay, env=env) as process, anyio.fail_after(60):
                while not await has_come(app, path, f"{turn}-", reopened, ran):
                    await anyio.sleep(0.001)
                process.send_signal(signal.SIGKILL)
                code = await anyio.to_thread.run_sync(process.wait)
            left = await each_is_left_or_ran(app, path, names)
            print(f"turn {turn}: exit {code}, {left} left, {count_ends(path)} ran")
            middle += 0 < left < MANY or 0 < count_ends(path) < MANY
            done = await anyio.to_thread.run_sync(errors, "replay", "--all")
            assert done.returncode == (0 if left else 1), done.stderr
            await all_ran_once(app, path, names)
            assert letters(errors) == []
    assert middle, "no replay was killed in the middle"


async def fail_at_once(path: Path, names: Sequence[str]) -> None:
    async with anyio.create_task_group() as tasks:
        for name in names:
            tasks.start_soon(fail, faulty.work, path, name)


async def has_come(app: TaskApp, path: Path, prefix: str, reopened: int, ran: int) -> bool:
    """Tell whether that many states are not errored any more, or that many tasks have run."""
    if ran:
        return count_ends(path) >= ran
    errored = await app.list_tasks(prefix=prefix, status=TaskStatus.ERRORED, limit=MANY)
    return len(errored) <= MANY - reopened


async def each_is_left_or_ran(app: TaskApp, path: Path, names: Sequence[str]) -> int:
    """Wait until each task has a letter or has run, in none more than once; count letters."""
    with anyio.fail_after(60):
        while True:
            left = await ids_in_queue(app)
            ran = [line[1] for line in await lines(path, 0, "end")]
            assert max(Counter(left).values(), default=1) == 1
            assert max(Counter(ran).values(), default=1) == 1
            if {*left, *ran} == set(names):
                return len(left)
            await anyio.sleep(0.1)


async def all_ran_once(app: TaskApp, path: Path, names: Sequence[str]) -> None:
    for name in names:
        assert await app.handle(name).join(timeout=60) is TaskStatus.FINISHED
    # Behind all copies that there may be of the others.
    last = await faulty.work(str(path), "last")
    assert await last.result(timeout=60) == "last"
    ends = {line[1]: line[2:] for line in await lines(path, MANY + 1, "end")}
    assert count_ends(path) == len(ends) == MANY + 1
    assert set(ends) == {*names, "last"}
    assert {attempt for attempt, _ in ends.values()} == {"1"}


def count_ends(path: Path) -> int:
    return path.read_text().count("end ") if path.exists() else 0
