"""What the tests of the Redis store alone share: a server and a store for each."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from amqp_tasks.drivers.redis import RedisStore

from ..conftest import IO_LOOPS, REAL_CLOCKS
from ..servers.redis import RedisServer
from .state_stores import Asker

__all__ = ["LONG", "SHORT", "choose_loop", "make_store", "open_own_store", "start_server"]

LONG = 20.0
"""Seconds that are more than enough."""
SHORT = 0.8
"""Seconds after which a test of a timeout goes on."""


@pytest.fixture(name="anyio_backend", params=IO_LOOPS)
def choose_loop(request: pytest.FixtureRequest) -> Any:
    backend: Callable[[], Any] = REAL_CLOCKS[request.param]
    return backend()


@pytest.fixture(name="server")
def start_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of this test alone, which may do with it what it likes."""
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.stop()


def make_store(url: str, *, timeout: float = LONG) -> RedisStore:
    return RedisStore(url, prefix="test:", timeout=timeout, connect_timeout=timeout)


@pytest.fixture(name="asker")
async def open_own_store(server: RedisServer) -> AsyncIterator[Asker]:
    store = make_store(server.url)
    async with store.open():
        yield Asker(store, time.time)
