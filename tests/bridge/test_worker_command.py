"""``g amqp-worker`` as a process: signals, exit codes, flags, metrics; on both event loops."""

from __future__ import annotations

import contextlib
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from amqp_tasks import TaskStatus

from ..chaos.proxy import TcpProxy
from ..servers.process import free_port
from . import worker_site
from .configured import (
    Settings,
    configuration,
    loop,
    on_any_loop,
    one_line,
    queue,
    result,
    state,
    words,
)
from .processes import GuillotinaProcess, eventually

__all__ = ["configuration", "loop"]

StartWorker = Callable[..., GuillotinaProcess]


@pytest.fixture
def start_worker(configuration: Settings, tmp_path: Path) -> Iterator[StartWorker]:
    """Starts ``g amqp-worker``; see to it that it is gone after the test."""
    started: list[GuillotinaProcess] = []

    def start(*flags: str, ready: bool = True, **amqp: Any) -> GuillotinaProcess:
        known = {**configuration, "amqp": {**configuration["amqp"], **amqp}}
        folder = tmp_path / f"worker-{len(started)}"
        worker = GuillotinaProcess(folder, "amqp-worker", known, *flags)
        started.append(worker)
        if ready:
            worker.wait_for_output("worker ")
        return worker

    yield start
    for worker in started:
        worker.kill()


# ------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_tasks_finish(
    start_worker: StartWorker, configuration: Settings, loop: str, number: signal.Signals
) -> None:
    worker = start_worker()
    assert result(configuration, queue(configuration, worker_site.which_loop)) == loop
    task_id = queue(configuration, worker_site.nap, 1.0)
    eventually(lambda: words(configuration) == ["start"])
    worker.signal(number)
    assert worker.wait() == 0
    assert words(configuration) == ["start", "end", "shut down"]
    assert state(configuration, task_id).status is TaskStatus.FINISHED
    assert worker.trouble() == []


def test_a_second_signal_gives_them_back(
    start_worker: StartWorker, configuration: Settings
) -> None:
    worker = start_worker()
    task_id = queue(configuration, worker_site.nap, 600)
    eventually(lambda: words(configuration) == ["start"])
    worker.signal(signal.SIGTERM)
    worker.wait_for_output("SIGTERM: stopping")
    worker.signal(signal.SIGINT)
    assert worker.wait() == 0
    assert words(configuration) == ["start", "shut down"]
    known = state(configuration, task_id)
    assert (known.status, known.attempt) == (TaskStatus.SCHEDULED, 1)
    assert worker.trouble() == []


@on_any_loop
def test_the_grace_is_a_setting(start_worker: StartWorker, configuration: Settings) -> None:
    worker = start_worker(shutdown_grace="0.2")
    queue(configuration, worker_site.nap, 600)
    eventually(lambda: words(configuration) == ["start"])
    assert worker.terminate() == 0
    assert words(configuration) == ["start", "shut down"]


def test_a_signal_while_it_connects_is_heeded(
    start_worker: StartWorker, configuration: Settings
) -> None:
    with TcpProxy(configuration["redis"]["port"]).running() as proxy:
        proxy.black_hole()
        configuration["redis"]["port"] = proxy.port
        worker = start_worker(ready=False, connect_timeout=2, state_timeout=2)
        eventually(lambda: proxy.connections)
        assert worker.terminate() == 0
        assert words(configuration) == ["shut down"]
        assert worker.trouble() == []
        assert "runs tasks" not in worker.output()


# ------------------------------------------------------------------------ servers


@pytest.mark.parametrize("which", ["amqp", "redis"])
def test_servers_that_are_not_there_are_exit_code_1(
    start_worker: StartWorker, configuration: Settings, which: str
) -> None:
    port = configuration[which]["port"] = free_port()
    configuration[which]["password"] = "sesame"
    worker = start_worker(ready=False, connect_timeout=2)
    assert worker.wait() == 1
    line = one_line(worker)
    assert line.startswith("Error: ")
    assert str(port) in line
    assert "sesame" not in line
    assert words(configuration) == ["shut down"]


def test_servers_that_are_lost_for_long_are_exit_code_1(
    start_worker: StartWorker, configuration: Settings
) -> None:
    with TcpProxy(configuration["amqp"]["port"]).running() as proxy:
        configuration["amqp"]["port"] = proxy.port
        worker = start_worker(reconnect_timeout=0.3)
        proxy.refuse()
        proxy.cut()
        assert worker.wait() == 1
    errors = [line for line in worker.output().splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert "reconnect_timeout=0.3" in errors[0]
    assert words(configuration) == ["shut down"]
    assert worker.trouble() == []


# ------------------------------------------------------------------------ usage


@on_any_loop
@pytest.mark.parametrize(
    ("flags", "amqp", "named"),
    [
        (("--max-running-tasks", "0"), {}, "--max-running-tasks=0"),
        (("--auto-kill-timeout", "nan"), {}, "--auto-kill-timeout=nan"),
        ((), {"heartbeat": "soon"}, "amqp.heartbeat='soon'"),
        ((), {"port": "x"}, "amqp.port='x'"),
        ((), {"persistent_manager": "memory"}, "amqp.persistent_manager='memory'"),
    ],
)
def test_wrong_settings_are_exit_code_2(
    start_worker: StartWorker,
    configuration: Settings,
    flags: tuple[str, ...],
    amqp: dict[str, Any],
    named: str,
) -> None:
    worker = start_worker(*flags, ready=False, **amqp)
    assert worker.wait() == 2
    line = one_line(worker)
    assert line.startswith("Error: ")
    assert named in line
    assert words(configuration) == ["shut down"]


@on_any_loop
@pytest.mark.parametrize(
    "flags", [("--max-runing-tasks", "3"), ("--max-running-tasks", "x"), ("--auto-kill-timeout",)]
)
def test_wrong_flags_are_exit_code_2(start_worker: StartWorker, flags: tuple[str, ...]) -> None:
    worker = start_worker(*flags, ready=False)
    assert worker.wait() == 2
    assert flags[0] in worker.output().splitlines()[-1]


@on_any_loop
def test_help_documents_it(start_worker: StartWorker) -> None:
    worker = start_worker("--help", ready=False)
    assert worker.wait() == 0
    for said in ("usage: g amqp-worker", "Exit codes:", "amqp.auto_kill_timeout", "SECONDS"):
        assert said in worker.output()


# ------------------------------------------------------------------------ flags


@on_any_loop
def test_the_flag_limits_tasks(start_worker: StartWorker, configuration: Settings) -> None:
    worker = start_worker("--max-running-tasks", "1")
    ids = [queue(configuration, worker_site.nap, 0.3) for _ in range(2)]
    for task_id in ids:
        result(configuration, task_id)
    assert words(configuration) == ["start", "end", "start", "end"]
    assert worker.terminate() == 0


@pytest.mark.parametrize(
    ("flags", "amqp"), [(("--auto-kill-timeout", "0.5"), {}), ((), {"auto_kill_timeout": "0.5"})]
)
def test_a_task_that_captures_the_loop_is_stopped(
    start_worker: StartWorker,
    configuration: Settings,
    flags: tuple[str, ...],
    amqp: dict[str, Any],
) -> None:
    worker = start_worker(*flags, max_task_retries=0, **amqp)
    task_id = queue(configuration, worker_site.block, 30)
    with contextlib.suppress(Exception):
        result(configuration, task_id)
    known = state(configuration, task_id)
    assert (known.status, known.reason) == (TaskStatus.ERRORED, "blocked_loop")
    assert "worker_site" in str(known.error)
    result(configuration, queue(configuration, worker_site.which_loop))  # the others go on
    assert worker.terminate() == 0
    assert words(configuration) == ["start", "shut down"]


def test_a_worker_that_cannot_go_on_is_exit_code_3(
    start_worker: StartWorker, configuration: Settings
) -> None:
    worker = start_worker("--auto-kill-timeout", "0.5", on_blocked_loop="kill")
    queue(configuration, worker_site.block, 30)
    assert worker.wait() == 3


@pytest.mark.parametrize("seconds", ["0", "-1"])
def test_the_watchdog_can_be_turned_off(
    start_worker: StartWorker, configuration: Settings, seconds: str
) -> None:
    worker = start_worker("--auto-kill-timeout", seconds, auto_kill_timeout=0.3)
    task_id = queue(configuration, worker_site.block, 1.5)
    result(configuration, task_id)
    assert words(configuration) == ["start", "end"]
    assert worker.terminate() == 0


# ------------------------------------------------------------------------ metrics


def metrics(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def test_metrics_are_served_while_it_works(
    start_worker: StartWorker, configuration: Settings
) -> None:
    port = free_port()
    worker = start_worker("--metrics-server", "--port", str(port))
    eventually(lambda: "metrics at" in worker.output())
    result(configuration, queue(configuration, worker_site.which_loop))
    queue(configuration, worker_site.nap, 1)
    eventually(lambda: "amqp_running_jobs 1.0" in metrics(port))
    name = "tests.bridge.worker_site.which_loop"
    labels = f'container_id="",dotted_name="{name}",final_status="finished"'
    assert f"amqp_job_duration_count{{{labels}}} 1.0" in metrics(port)
    assert "amqp_schedule_errors_total 0.0" in metrics(port)
    assert worker.terminate() == 0
    assert worker.trouble() == []
    with pytest.raises(urllib.error.URLError):
        metrics(port)


@on_any_loop
def test_metrics_are_where_the_configuration_says(
    start_worker: StartWorker, configuration: Settings
) -> None:
    configuration["port"] = free_port()
    worker = start_worker("--metrics-server")
    eventually(lambda: "metrics at http://127.0.0.1:" in worker.output())
    assert "amqp_running_jobs 0.0" in metrics(configuration["port"])
    assert worker.terminate() == 0


@on_any_loop
def test_there_are_none_without_the_flag(
    start_worker: StartWorker, configuration: Settings
) -> None:
    configuration["port"] = free_port()
    start_worker()
    with pytest.raises(urllib.error.URLError):
        metrics(configuration["port"])


@on_any_loop
def test_an_address_that_is_taken_is_exit_code_1(
    start_worker: StartWorker, configuration: Settings
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        worker = start_worker("--metrics-server", "--port", str(port), ready=False)
        assert worker.wait() == 1
    line = one_line(worker)
    assert line.startswith(f"Error: metrics cannot be served at 127.0.0.1:{port}: ")
    assert words(configuration) == ["shut down"]
