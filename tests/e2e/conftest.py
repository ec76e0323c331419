"""Real servers, real processes, both backends."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from amqp_tasks import TaskApp

from ..conftest import REAL_CLOCKS
from ..servers.rabbitmq import RabbitServer, rabbit_server
from ..servers.redis import RedisServer, redis_server
from . import shop
from .workers import WorkerProcess

__all__ = ["rabbit_server", "redis_server"]

StartWorker = Callable[..., WorkerProcess]


@pytest.fixture(params=["asyncio", "trio"])
def backend(request: pytest.FixtureRequest) -> str:
    """The event loop of both the worker process and the producer."""
    name: str = request.param
    return name


@pytest.fixture
def anyio_backend(backend: str) -> tuple[str, dict[str, Any]]:
    return REAL_CLOCKS[backend]()


@pytest.fixture
def env(rabbit_server: RabbitServer, redis_server: RedisServer) -> dict[str, str]:
    """Settings for one test: the servers are everybody's, the names its own."""
    name = f"test-{secrets.token_hex(4)}"
    return {
        "AMQP_TASKS_BROKER_URL": rabbit_server.url,
        "AMQP_TASKS_STATE_URL": redis_server.url,
        "AMQP_TASKS_EXCHANGE": name,
        "AMQP_TASKS_QUEUE": name,
        "AMQP_TASKS_STATE_PREFIX": f"{name}:",
    }


@pytest.fixture
def app(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> TaskApp:
    """The shop's app, with this test's settings."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    shop.app.configure()
    return shop.app


@pytest.fixture
def start_worker(env: dict[str, str], backend: str, tmp_path: Path) -> Iterator[StartWorker]:
    """Starts worker processes, and sees to it that they are gone after the test."""
    workers: list[WorkerProcess] = []
    numbers = itertools.count()  # several may be started at once, in threads

    def start(*flags: str, **more_env: str) -> WorkerProcess:
        log = tmp_path / f"worker-{next(numbers)}.log"
        worker = WorkerProcess(log, {**env, **more_env}, "--backend", backend, *flags)
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        worker.close()
