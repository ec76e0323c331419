"""``python -m amqp_tasks worker``: what it says, and how it ends."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from amqp_tasks import Settings

from ..servers.process import free_port
from ..servers.rabbitmq import RabbitServer
from .conftest import StartWorker
from .workers import run_python

APP = ("--app", "tests.e2e.shop:app")


def run_worker(env: dict[str, str], *flags: str) -> tuple[int, str]:
    """Run a worker that cannot start; return its exit code and what it said."""
    done = run_python("-m", "amqp_tasks", "worker", *flags, env=env)
    assert done.stdout == ""
    return done.returncode, done.stderr


def one_line(text: str) -> str:
    (line,) = text.splitlines()
    assert line.startswith("Error: ")
    return line


def test_help_documents_every_setting_with_its_variable_and_default() -> None:
    done = run_python("-m", "amqp_tasks", "worker", "--help", env={})
    assert done.returncode == 0
    text = re.sub(r"\s+", " ", done.stdout)
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')} " in text
        assert f"[AMQP_TASKS_{name.upper()}; default: " in text
    assert "--on-blocked-loop [interrupt|kill] " in text
    for code in ("0 stopped", "1 the broker", "2 wrong usage"):
        assert code in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_what_it_connected_to_and_stops_on_a_signal(
    start_worker: StartWorker, env: dict[str, str], number: signal.Signals
) -> None:
    worker = start_worker()
    worker.signal(number)
    assert worker.wait() == 0
    first = worker.output().splitlines()[0]
    assert env["AMQP_TASKS_QUEUE"] in first
    assert "amqp://guest:***@127.0.0.1" in first
    assert env["AMQP_TASKS_STATE_URL"] in first
    assert "Traceback" not in worker.output()


def test_servers_that_cannot_be_used_are_exit_code_1(
    env: dict[str, str], rabbit_server: RabbitServer
) -> None:
    nobody = free_port()
    broker, state = "--broker-url", "--state-url"
    cases = {
        (broker, f"amqp://guest:sesame@127.0.0.1:{nobody}/"): f"127.0.0.1:{nobody}",
        (broker, rabbit_server.url_for(password="wr0ng")): "guest",
        (broker, rabbit_server.url_for(vhost="no-such-host")): "no-such-host",
        (state, f"redis://:sesame@127.0.0.1:{nobody}/0"): f"127.0.0.1:{nobody}",
        ("--queue-type", "classic"): "x-queue-type",
        ("--errored-ttl-ms", "1000"): "x-message-ttl",
    }
    rabbit_server_has_the_queues = run_python(
        "-c",
        "import anyio, tests.e2e.shop as shop\n"
        "async def main():\n"
        "    async with shop.app.connect(): pass\n"
        "anyio.run(main)",
        env=env,
    )
    assert rabbit_server_has_the_queues.returncode == 0, rabbit_server_has_the_queues.stderr
    for flags, named in cases.items():
        code, said = run_worker(env, *APP, *flags)
        assert code == 1, said
        line = one_line(said)
        assert named in line
        assert "sesame" not in line
        assert "wr0ng" not in line


def test_wrong_usage_is_exit_code_2(env: dict[str, str], tmp_path: Path) -> None:
    cases = {
        ("--app", "no.such.module:app"): "no.such.module",
        ("--app", "tests.e2e.shop:nothing"): "nothing",
        ("--app", "tests.e2e.shop:add"): "must be a TaskApp",
        ("--app", ":app"): "module:attribute",
        (*APP, "--heartbeat", "soon"): "--heartbeat='soon'",
        (*APP, "--max-running-tasks", "0"): "--max-running-tasks='0'",
        (*APP, "--broker-url", "http://me:sesame@host"): "amqp://",
        (*APP, "--broker-url", "memory://"): "both",
    }
    for flags, named in cases.items():
        code, said = run_worker(env, *flags)
        assert code == 2, said
        assert named in one_line(said)
        assert "sesame" not in said
    code, said = run_worker({**env, "AMQP_TASKS_STATE_TTL": "-1"}, *APP)
    assert code == 2
    assert "AMQP_TASKS_STATE_TTL='-1'" in one_line(said)


def test_a_traceback_of_the_start_is_shown_at_level_debug_only(env: dict[str, str]) -> None:
    flags = (*APP, "--broker-url", f"amqp://127.0.0.1:{free_port()}/")
    assert "Traceback" not in run_worker(env, *flags)[1]
    assert "Traceback" in run_worker(env, *flags, "--log-level", "debug")[1]


def test_a_script_queues_its_own_tasks_and_a_worker_imports_them(
    env: dict[str, str], tmp_path: Path
) -> None:
    script = tmp_path / "own_tasks.py"
    script.write_text(
        "import anyio\n"
        "from amqp_tasks import add_task, default_app, task\n"
        "\n"
        "@task\n"
        "async def my_func(foo, kw_arg=''):\n"
        "    return foo + kw_arg\n"
        "\n"
        "async def main():\n"
        "    async with default_app.connect(), default_app.worker():\n"
        "        print(my_func.name, await my_func.func('here and now'))\n"
        "        handle = await my_func('bar')\n"
        "        print(await handle.result(timeout=30))\n"
        "        handle = await add_task(my_func, 'foobar', kw_arg='blah')\n"
        "        print(await handle.result(timeout=30))\n"
        "\n"
        "if __name__ == '__main__':\n"
        "    anyio.run(main)\n"
    )
    done = run_python(str(script), env=env, cwd=tmp_path)
    assert done.stdout.splitlines() == ["own_tasks.my_func here and now", "bar", "foobarblah"]
    assert done.stderr == ""
