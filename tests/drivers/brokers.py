"""What the tests of brokers share: a broker with a topology of the test's own, and its ends."""

from __future__ import annotations

import asyncio
import gc
import secrets
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiormq
import anyio
import anyio.to_thread
import pytest

from amqp_tasks.abc import Broker, BrokerSession, Delivery
from amqp_tasks.core.settlement import Publication
from amqp_tasks.core.topology import LADDER_MS, QueueSpec, QueueType, Topology
from amqp_tasks.drivers.memory import MemoryBroker
from amqp_tasks.drivers.rabbitmq import RabbitBroker

from ..conftest import IO_LOOPS, REAL_CLOCKS, VIRTUAL_CLOCKS
from ..servers.rabbitmq import RabbitServer

__all__ = [
    "LIMIT",
    "MemoryRig",
    "RabbitRig",
    "Rig",
    "choose_backend",
    "choose_case",
    "choose_real_backend",
    "make_broker",
    "nothing_left",
    "open_rabbit",
    "open_rig",
    "take",
]

LIMIT = 20.0
"""Seconds after which a test gives up. Nothing waits for them to pass."""


@dataclass
class Rig:
    """A broker, the queues of one test, and what a test does to them from outside."""

    broker: Broker
    topology: Topology

    def message(
        self, body: bytes = b"{}", queue: QueueSpec | None = None, **headers: Any
    ) -> Publication:
        """Return a publication, to the main queue if none is given."""
        return Publication(queue=queue or self.topology.main, body=body, headers=headers)

    async def publish(self, session: BrokerSession, *bodies: bytes) -> None:
        """Publish to the main queue, one after the other."""
        for body in bodies:
            await session.publish(self.topology.exchange, self.message(body), LIMIT)

    async def declare(self, session: BrokerSession) -> None:
        await session.declare(self.topology.exchange, self.topology.always())

    async def bodies(self, session: BrokerSession, queue: str, count: int) -> list[bytes]:
        """Take that many messages from a queue, ack them, and return their bodies."""
        async with session.consume(queue, count) as deliveries:
            taken = await take(deliveries, count)
        for delivery in taken:
            delivery.ack()
        return [delivery.body for delivery in taken]

    async def drop_connections(self) -> None:
        raise NotImplementedError

    async def delete_queue(self, name: str) -> None:
        raise NotImplementedError


@dataclass
class MemoryRig(Rig):
    broker: MemoryBroker

    async def drop_connections(self) -> None:
        self.broker.drop_sessions()

    async def delete_queue(self, name: str) -> None:
        self.broker.delete_queue(name)


@dataclass
class RabbitRig(Rig):
    broker: RabbitBroker
    server: RabbitServer

    async def drop_connections(self) -> None:
        await anyio.to_thread.run_sync(self.server.close_connections, "cut by the test")

    async def delete_queue(self, name: str) -> None:
        await self.delete([name])

    async def delete(self, queues: Sequence[str], *, exchange: bool = False) -> None:
        """Delete queues, those that are there, and the exchange if it is said so."""
        async with aiormq.connect(self.server.url) as connection:
            channel = await connection.channel()
            for name in queues:
                await channel.queue_delete(name)
            if exchange:
                await channel.exchange_delete(self.topology.exchange)

    async def delete_all(self) -> None:
        topology = self.topology
        steps = [topology.step(step).name for step in LADDER_MS]
        always = [queue.name for queue in topology.always()]
        await self.delete([*always, *steps], exchange=True)


async def take(deliveries: AsyncIterator[Delivery], count: int) -> list[Delivery]:
    """Return the next `count` deliveries."""
    with anyio.fail_after(LIMIT):
        return [await anext(deliveries) for _ in range(count)]


def topology_for_test(queue_type: QueueType) -> Topology:
    name = f"test-{secrets.token_hex(4)}"
    return Topology(exchange=name, queue=name, queue_type=queue_type, delayed_ttl_ms=300)


# ---------------------------------------------------------------------- fixtures

CASES: dict[str, tuple[QueueType, Callable[[], Any]]] = {
    "memory-asyncio": ("quorum", VIRTUAL_CLOCKS["asyncio-virtual"]),
    "memory-trio": ("classic", VIRTUAL_CLOCKS["trio-virtual"]),
    "rabbit-quorum-asyncio": ("quorum", REAL_CLOCKS["asyncio"]),
    "rabbit-quorum-uvloop": ("quorum", REAL_CLOCKS["uvloop"]),
    "rabbit-classic-asyncio": ("classic", REAL_CLOCKS["asyncio"]),
    "rabbit-classic-uvloop": ("classic", REAL_CLOCKS["uvloop"]),
}
"""The broker in memory runs under virtual clocks, the one with a server in real time."""


@pytest.fixture(name="case", params=CASES)
def choose_case(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(name="anyio_backend")
def choose_backend(case: str) -> Any:
    return CASES[case][1]()


@pytest.fixture(name="anyio_backend", params=IO_LOOPS)
def choose_real_backend(request: pytest.FixtureRequest) -> Any:
    return REAL_CLOCKS[request.param]()


@pytest.fixture(name="rig")
async def open_rig(case: str, request: pytest.FixtureRequest) -> AsyncGenerator[Rig]:
    """A broker of each kind, with nothing declared."""
    topology = topology_for_test(CASES[case][0])
    if case.startswith("memory"):
        yield MemoryRig(MemoryBroker(anyio.current_time), topology)
        return
    server: RabbitServer = request.getfixturevalue("rabbit_server")
    async with _rabbit(server, topology, request.getfixturevalue("caplog")) as rig:
        yield rig


@pytest.fixture(name="rabbit")
async def open_rabbit(
    rabbit_server: RabbitServer, caplog: pytest.LogCaptureFixture
) -> AsyncGenerator[RabbitRig]:
    """A RabbitMQ with nothing declared."""
    async with _rabbit(rabbit_server, topology_for_test("quorum"), caplog) as rig:
        yield rig


@asynccontextmanager
async def _rabbit(
    server: RabbitServer, topology: Topology, caplog: pytest.LogCaptureFixture
) -> AsyncGenerator[RabbitRig]:
    rig = RabbitRig(make_broker(server), topology, server)
    with nothing_left(caplog):
        yield rig
    await rig.delete_all()


def make_broker(server: RabbitServer, **options: Any) -> RabbitBroker:
    usual = {"url": server.url, "heartbeat": 10, "connect_timeout": LIMIT}
    return RabbitBroker(**{**usual, **options})


@contextmanager
def nothing_left(caplog: pytest.LogCaptureFixture) -> Generator[None]:
    """Check that no task, socket or thread is left after the block, and no complaint."""
    before = _leavings()
    yield
    gc.collect()  # what was not awaited, not retrieved or not closed complains now
    after = _leavings()
    assert after <= before, sorted(map(str, after - before))
    said = [r.getMessage() for r in caplog.records if r.name.startswith(("aiormq", "asyncio"))]
    assert not said, said


def _leavings() -> set[object]:
    """Return the tasks, sockets and threads that there are, without those of AnyIO's tests."""
    tasks = {
        task
        for task in asyncio.all_tasks()
        if not getattr(task.get_coro(), "__qualname__", "").startswith("TestRunner.")
    }
    # An event loop keeps its threads for host names until it is closed.
    theirs = ("AnyIO worker thread", "asyncio_", "uvloop_")
    threads = {t for t in threading.enumerate() if not t.name.startswith(theirs)}
    return {*tasks, *threads, *_tcp_sockets()}


def _tcp_sockets() -> set[str]:
    """Return the TCP sockets of this process. (uvloop makes others, for signals.)"""
    mine = set()
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            mine.add(str(fd.readlink()))
    connections = Path("/proc/self/net/tcp").read_text().splitlines()[1:]
    return mine & {f"socket:[{line.split()[9]}]" for line in connections}
