"""``g serve`` as a process: its start without servers, and as a worker; on both event loops."""

from __future__ import annotations

import contextlib
import secrets
import signal
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
from .processes import Browser, GuillotinaProcess, eventually

__all__ = ["configuration", "loop"]

StartServer = Callable[..., GuillotinaProcess]

OF_GUILLOTINA = "Timeout for Command._run_async"
"""Its command waits for all tasks that are left, and takes itself for one."""


@pytest.fixture
def start_server(configuration: Settings, tmp_path: Path) -> Iterator[StartServer]:
    """Starts ``g serve``; sees to it that it is gone after the test."""
    started: list[GuillotinaProcess] = []

    def start(*, ready: bool = True, **amqp: Any) -> GuillotinaProcess:
        configuration.update(host="127.0.0.1", port=free_port())
        configuration["amqp"].update(amqp)
        server = GuillotinaProcess(tmp_path / f"server-{len(started)}", "serve", configuration)
        started.append(server)
        if ready:
            server.wait_until(lambda: Browser(configuration["port"]).answers("/"))
        return server

    yield start
    for server in started:
        server.kill()


def stopped(server: GuillotinaProcess) -> list[str]:
    """Stop it with a signal, and return what went wrong."""
    server.signal(signal.SIGTERM)
    # uvicorn has drained when it sends the signal to itself once more.
    assert server.wait(60) in (0, -signal.SIGTERM)
    return [line for line in server.trouble() if OF_GUILLOTINA not in line]


def test_as_a_worker_it_drains(
    start_server: StartServer,
    configuration: Settings,
    loop: str,
) -> None:
    server = start_server(embedded_worker=True)
    assert result(configuration, queue(configuration, worker_site.which_loop)) == loop
    task_id = queue(configuration, worker_site.nap, 1.0)
    eventually(lambda: words(configuration) == ["start"])
    assert stopped(server) == []
    assert words(configuration) == ["start", "end", "shut down"]
    assert state(configuration, task_id).status is TaskStatus.FINISHED


def test_as_a_worker_it_has_the_watchdog(
    start_server: StartServer,
    configuration: Settings,
) -> None:
    server = start_server(embedded_worker=True, auto_kill_timeout=0.5, max_task_retries=0)
    task_id = queue(configuration, worker_site.block, 30)
    with contextlib.suppress(Exception):
        result(configuration, task_id)
    known = state(configuration, task_id)
    assert (known.status, known.reason) == (TaskStatus.ERRORED, "blocked_loop")
    assert Browser(configuration["port"]).answers("/")
    assert stopped(server) == []
    assert words(configuration) == ["start", "shut down"]


@pytest.mark.parametrize("embedded", [False, True])
def test_without_servers_it_says_so_in_one_line_and_ends(
    start_server: StartServer,
    configuration: Settings,
    embedded: bool,
) -> None:
    port = configuration["amqp"]["port"] = free_port()
    configuration["amqp"]["password"] = "sesame"
    server = start_server(ready=False, embedded_worker=embedded)
    assert server.wait() == 1
    line = one_line(server)
    assert line.startswith("Error: ")
    assert str(port) in line
    assert "sesame" not in line


@on_any_loop
@pytest.mark.parametrize(
    ("amqp", "named"),
    [
        ({"heartbeat": "soon"}, "amqp.heartbeat='soon'"),
        ({"persistent_manager": "memory"}, "amqp.embedded_worker"),
    ],
)
def test_wrong_settings_are_exit_code_2(
    start_server: StartServer, amqp: dict[str, Any], named: str
) -> None:
    server = start_server(ready=False, **amqp)
    assert server.wait() == 2
    assert named in one_line(server)


@pytest.mark.parametrize(
    ("which", "away", "back"),
    [
        ("amqp", "cannot connect, tried again: ", "connected to amqp://"),
        ("redis", "; tried again in the background", "the servers can be used now"),
    ],
)
def test_a_producer_can_go_on_without_servers(
    start_server: StartServer, configuration: Settings, which: str, away: str, back: str
) -> None:
    with TcpProxy(configuration[which]["port"]).running() as proxy:
        proxy.refuse()
        configuration[which]["port"] = proxy.port
        server = start_server(on_broker_down="retry")
        assert f"{proxy.port}" in server.output()
        assert away in server.output()
        proxy.restore()
        eventually(lambda: back in server.output())
        assert stopped(server) == []


def test_in_memory_it_needs_no_server(
    start_server: StartServer,
    configuration: Settings,
) -> None:
    name = secrets.token_hex(4)
    server = start_server(persistent_manager="memory", embedded_worker="true", queue=name)
    [warning] = [line for line in server.output().splitlines() if "end with it" in line]
    assert "RabbitMQ at 127.0.0.1" in warning
    assert stopped(server) == []
