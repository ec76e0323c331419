"""Servers that are killed and brought back, and what a run is told from outside.

- ``AMQP_TASKS_CHAOS_MINUTES``: how long the long form takes; without it only the short
  forms run.
- ``AMQP_TASKS_CHAOS_SEED``: chooses faults, victims and times; printed by each run.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator

import pytest

from ..servers.rabbitmq import RabbitServer
from ..servers.redis import RedisServer
from .fleet import Servers


@pytest.fixture(scope="session")
def both_servers(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[RabbitServer, RedisServer]]:
    """A RabbitMQ and a Redis that nobody else needs."""
    if shutil.which("erl") is None or shutil.which("redis-server") is None:
        pytest.skip("needs Debian's packages rabbitmq-server and redis-server")
    rabbit = RabbitServer(tmp_path_factory.mktemp("rabbitmq"))
    redis = RedisServer(tmp_path_factory.mktemp("redis"), persistent=True)
    try:
        redis.start()
        rabbit.start()
        yield rabbit, redis
    finally:
        rabbit.stop()
        redis.stop()


@pytest.fixture
def servers(both_servers: tuple[RabbitServer, RedisServer]) -> Servers:
    """Those, with names that are this test's own."""
    return Servers(*both_servers, name=f"chaos-{secrets.token_hex(4)}")


@pytest.fixture
def seed() -> int:
    """Printed, for a test that fails to be run again as it was."""
    given = os.environ.get("AMQP_TASKS_CHAOS_SEED")
    seed = int(given) if given else secrets.randbelow(1_000_000)
    print(f"AMQP_TASKS_CHAOS_SEED={seed}")
    return seed


@pytest.fixture
def minutes() -> float:
    """How long the long form may take."""
    minutes = float(os.environ.get("AMQP_TASKS_CHAOS_MINUTES", "0"))
    if not minutes:
        pytest.skip("set AMQP_TASKS_CHAOS_MINUTES: this takes minutes")
    return minutes
