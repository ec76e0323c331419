"""Queues in memory."""

# One thing in four classes: they know each other's insides.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.lowlevel

from ...core.settlement import Publication
from ...core.topology import QueueSpec
from ...exceptions import BrokerRefused, BrokerUnavailable, PublishFailed, QueueMismatch

__all__ = ["MemoryBroker"]


@dataclass(slots=True)
class _Stored:
    """A message in a queue, or out on delivery."""

    number: int
    body: bytes
    headers: Mapping[str, Any]
    expires_at: float
    redelivered: bool = False

    def __lt__(self, other: _Stored) -> bool:
        return self.number < other.number


@dataclass(slots=True)
class _Queue:
    spec: QueueSpec
    ready: list[_Stored] = field(default_factory=list)
    """A heap by number: what is given back goes to where it was."""

    def argument(self, name: str) -> Any:
        return self.spec.arguments.get(name)


class MemoryBroker:
    """Queues with time to live, dead letters, prefetch and redelivery.

    Args:
        clock: returns the time in seconds; the same clock as its user's.
    """

    address = "memory://"

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._queues: dict[str, _Queue] = {}
        self._numbers = itertools.count(1)
        self._sessions: set[_MemorySession] = set()

    @asynccontextmanager
    async def session(self) -> AsyncGenerator[_MemorySession, None]:
        """Open a session; there is nothing that could refuse it."""
        await anyio.lowlevel.checkpoint()
        session = _MemorySession(self)
        self._sessions.add(session)
        try:
            yield session
        finally:
            session.close("closed")

    def drop_sessions(self) -> None:
        """Cut all sessions, as a broker's crash does; what was unacked comes back."""
        for session in list(self._sessions):
            session.close("the connection was cut")

    def delete_queue(self, name: str) -> None:
        """Delete a queue with what is in it; its consumers are cancelled."""
        del self._queues[name]
        for session in self._sessions:
            session.cancel_consumers(name)

    def depth(self, queue: str) -> int:
        """Return the number of messages that are ready in `queue`."""
        self._expire()
        return len(self._queues[queue].ready) if queue in self._queues else 0

    def messages(self, queue: str) -> list[tuple[bytes, Mapping[str, Any]]]:
        """Return body and headers of all messages that are ready in `queue`."""
        self._expire()
        return [(stored.body, stored.headers) for stored in sorted(self._queues[queue].ready)]

    def _declare(self, spec: QueueSpec) -> None:
        existing = self._queues.setdefault(spec.name, _Queue(spec)).spec
        for name in {*spec.arguments, *existing.arguments}:
            ours, theirs = spec.arguments.get(name), existing.arguments.get(name)
            if ours != theirs:
                raise QueueMismatch(
                    f"queue {spec.name!r} exists with {name}={theirs!r}; this app wants {ours!r}. "
                    "Change the setting, use another queue, or delete the queue when it is empty"
                )

    def _route(self, queue: str, body: bytes, headers: Mapping[str, Any]) -> bool:
        target = self._queues.get(queue)
        if target is None:
            return False
        ttl = target.argument("x-message-ttl")
        expires_at = math.inf if ttl is None else self._clock() + ttl / 1000
        heapq.heappush(target.ready, _Stored(next(self._numbers), body, headers, expires_at))
        self._wake()
        return True

    def _dead_letter(self, queue: _Queue, stored: _Stored, reason: str) -> None:
        key = queue.argument("x-dead-letter-routing-key")
        if key is not None:
            death = {"x-death": [{"queue": queue.spec.name, "reason": reason}]}
            self._route(key, stored.body, {**stored.headers, **death})

    def _give_back(self, queue_name: str, stored: _Stored) -> None:
        queue = self._queues.get(queue_name)
        if queue is not None:
            stored.redelivered = True
            heapq.heappush(queue.ready, stored)

    def _expire(self) -> None:
        now = self._clock()
        for queue in list(self._queues.values()):
            while queue.ready and queue.ready[0].expires_at <= now:
                self._dead_letter(queue, heapq.heappop(queue.ready), "expired")

    def _seconds_to_next_expiry(self) -> float:
        heads = (queue.ready[0].expires_at for queue in self._queues.values() if queue.ready)
        return min(heads, default=math.inf) - self._clock()

    def _wake(self) -> None:
        for session in self._sessions:
            session.wake()


class _MemorySession:
    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._consumers: set[_MemoryConsumer] = set()
        self._exclusive: set[str] = set()
        self._closed = anyio.Event()
        self._reason = ""

    async def declare(self, exchange: str, queues: Sequence[QueueSpec]) -> None:
        await anyio.lowlevel.checkpoint()
        self._check_open()
        for spec in queues:
            self._broker._declare(spec)
            if spec.exclusive:
                self._exclusive.add(spec.name)

    async def publish(self, exchange: str, publication: Publication, timeout: float) -> None:
        await anyio.lowlevel.checkpoint()
        if self._reason:
            raise PublishFailed(f"memory://: {self._reason}", maybe=False)
        try:
            self._broker._declare(publication.queue)
        except QueueMismatch as error:
            raise PublishFailed(str(error), maybe=False) from error
        self._broker._route(publication.queue.name, publication.body, publication.headers)

    @asynccontextmanager
    async def consume(
        self, queue: str, prefetch: int
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        await anyio.lowlevel.checkpoint()
        self._check_open()
        consumer = _MemoryConsumer(self._broker, queue, prefetch)
        self._consumers.add(consumer)
        try:
            yield consumer
        finally:
            consumer.cancel()

    async def count(self, queue: str) -> int:
        await anyio.lowlevel.checkpoint()
        self._check_open()
        if queue not in self._broker._queues:
            raise BrokerRefused(f"memory://: cannot count queue {queue!r}: there is no such queue")
        return self._broker.depth(queue)

    async def is_blocked(self) -> bool:
        await anyio.lowlevel.checkpoint()
        return False

    async def wait_closed(self) -> str:
        await self._closed.wait()
        return self._reason

    def close(self, reason: str) -> None:
        if self._reason:
            return
        self._reason = reason
        self._broker._sessions.discard(self)
        for name in self._exclusive:
            self._broker._queues.pop(name, None)
        for consumer in self._consumers:
            consumer.cancel()
            consumer.give_all_back()
        self._closed.set()
        self._broker._wake()

    def cancel_consumers(self, queue: str) -> None:
        for consumer in self._consumers:
            if consumer.queue == queue:
                consumer.cancel()

    def wake(self) -> None:
        for consumer in self._consumers:
            consumer.wake()

    def _check_open(self) -> None:
        if self._reason:
            raise BrokerUnavailable(f"memory://: {self._reason}")


class _MemoryConsumer:
    def __init__(self, broker: MemoryBroker, queue: str, prefetch: int) -> None:
        self.queue = queue
        self._broker = broker
        self._prefetch = prefetch
        self._unacked: dict[int, _Stored] = {}
        self._cancelled = False
        self._changed = anyio.Event()

    def __aiter__(self) -> _MemoryConsumer:
        return self

    async def __anext__(self) -> Delivery:
        await anyio.lowlevel.checkpoint()
        while not self._cancelled:
            self._broker._expire()
            queue = self._broker._queues.get(self.queue)
            if queue is not None and queue.ready and len(self._unacked) < self._prefetch:
                stored = heapq.heappop(queue.ready)
                self._unacked[stored.number] = stored
                return Delivery(self, stored)
            self._changed = anyio.Event()
            with anyio.move_on_after(max(0.0, self._broker._seconds_to_next_expiry())):
                await self._changed.wait()
        raise StopAsyncIteration

    def settle(self, stored: _Stored) -> bool:
        """Forget a delivery; False if it was taken away before."""
        if self._unacked.pop(stored.number, None) is None:
            return False
        self.wake()
        return True

    def cancel(self) -> None:
        self._cancelled = True
        self.wake()

    def give_all_back(self) -> None:
        for stored in self._unacked.values():
            self._broker._give_back(self.queue, stored)
        self._unacked.clear()

    def wake(self) -> None:
        self._changed.set()


@dataclass(frozen=True, slots=True)
class Delivery:
    """A delivery of `MemoryBroker`; see `abc.Delivery`."""

    _consumer: _MemoryConsumer
    _stored: _Stored

    @property
    def body(self) -> bytes:
        return self._stored.body

    @property
    def headers(self) -> Mapping[str, Any]:
        return self._stored.headers

    @property
    def redelivered(self) -> bool:
        return self._stored.redelivered

    def ack(self) -> None:
        self._consumer.settle(self._stored)

    def requeue(self) -> None:
        if self._consumer.settle(self._stored):
            broker = self._consumer._broker
            broker._give_back(self._consumer.queue, self._stored)
            broker._wake()

    def reject(self) -> None:
        if self._consumer.settle(self._stored):
            broker = self._consumer._broker
            queue = broker._queues.get(self._consumer.queue)
            if queue is not None:
                broker._dead_letter(queue, self._stored, "rejected")
