"""What the tests of guillotina's commands share: a configuration, and a look from outside."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from amqp_tasks import TaskApp, TaskHandle
from guillotina_bridge.settings import read_settings

from .processes import GuillotinaProcess

__all__ = [
    "LOOPS",
    "Settings",
    "configuration",
    "loop",
    "on_any_loop",
    "one_line",
    "queue",
    "result",
    "state",
    "words",
]

Settings = dict[str, Any]

LOOPS = {"asyncio": "asyncio.DefaultEventLoopPolicy", "uvloop": None}
"""The setting `loop_policy`; guillotina's default is uvloop."""

on_any_loop = pytest.mark.parametrize("loop", ["uvloop"], indirect=True)
"""For what is decided without a loop."""


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def configuration(server_settings: Settings, loop: str, tmp_path: Path) -> Settings:
    policy = LOOPS[loop]
    return {
        "applications": ["tests.bridge.worker_site"],
        "databases": {"db": {"storage": "DUMMY"}},
        "root_user": {"password": ""},  # nobody is to log in, and hashing it takes a while
        "jwt": {"secret": secrets.token_hex(32)},
        "site_oracle": str(tmp_path / "oracle"),
        **({} if policy is None else {"loop_policy": policy}),
        **server_settings,
    }


def words(configuration: Settings) -> list[str]:
    """What was written down, in its order."""
    oracle = Path(configuration["site_oracle"])
    return oracle.read_text().split("\n")[:-1] if oracle.exists() else []


def ask(configuration: Settings, do: Callable[[TaskApp], Any]) -> Any:
    """Do something with an app that is connected to the same servers."""

    async def main() -> Any:
        app = TaskApp(**read_settings(configuration).app_keywords)
        async with app.connect():
            return await do(app)

    return anyio.run(main)


def queue(configuration: Settings, function: Callable[..., Any], *args: Any) -> str:
    async def add(app: TaskApp) -> str:
        handle: TaskHandle[Any] = await app.add_task(function, *args)
        return handle.task_id

    task_id: str = ask(configuration, add)
    return task_id


def result(configuration: Settings, task_id: str) -> Any:
    return ask(configuration, lambda app: app.handle(task_id).result(timeout=30))


def state(configuration: Settings, task_id: str) -> Any:
    return ask(configuration, lambda app: app.handle(task_id).state())


def one_line(worker: GuillotinaProcess) -> str:
    """The one line that it has printed."""
    [line] = worker.output().splitlines()
    return line
