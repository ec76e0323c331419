"""What is done on one connection to RabbitMQ."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio

from ...core.settlement import Publication
from ...core.topology import QueueSpec
from .consumer import Consumer, RabbitDelivery
from .declarations import Declarations
from .link import GOODBYE, Link
from .publisher import Publisher

__all__ = ["RabbitSession"]


class RabbitSession:
    """A session; see `abc.BrokerSession`. `RabbitBroker.session` makes them."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._declarations = Declarations(link)
        self._publisher = Publisher(link, self._declarations)
        self._consumers: dict[Consumer, asyncio.Task[None]] = {}

    async def declare(self, exchange: str, queues: Sequence[QueueSpec]) -> None:
        """See `abc.BrokerSession.declare`."""
        await self._declarations.declare(exchange, queues)

    async def publish(self, exchange: str, publication: Publication, timeout: float) -> None:
        """See `abc.BrokerSession.publish`.

        Cancelling it does not take the message back: it may be in the queue.
        """
        await self._publisher.publish(exchange, publication, timeout)

    @asynccontextmanager
    async def consume(
        self, queue: str, prefetch: int
    ) -> AsyncGenerator[AsyncIterator[RabbitDelivery]]:
        """See `abc.BrokerSession.consume`.

        Raises:
            BrokerRefused: there is no such queue, or this user may not.
            BrokerUnavailable: the connection was lost.
        """
        doing = f"cannot consume from queue {queue!r} at {self._link.address}"
        self._link.check_open(doing)
        consumer = Consumer(self._link, queue, prefetch)
        running = self._link.spawn(consumer.run())
        self._consumers[consumer] = running
        running.add_done_callback(lambda _: self._consumers.pop(consumer))
        try:
            await consumer.started.wait()
            if consumer.error is not None:
                raise self._link.failure(consumer.error, doing) from consumer.error
            yield consumer
        finally:
            consumer.leave()
            # If the broker takes its time, this goes on without us.
            with anyio.move_on_after(GOODBYE, shield=True):
                await consumer.left.wait()

    async def count(self, queue: str) -> int:
        """See `abc.BrokerSession.count`."""
        return await self._declarations.count(queue)

    async def is_blocked(self) -> bool:
        """See `abc.BrokerSession.is_blocked`."""
        return await self._link.is_blocked()

    async def wait_closed(self) -> str:
        """See `abc.BrokerSession.wait_closed`."""
        await self._link.lost.wait()
        return self._link.reason

    async def flush(self) -> None:
        """Send the verdicts given so far, and wait until the broker has heard them."""
        for consumer in self._consumers:
            consumer.finish()
        if self._consumers:
            await asyncio.wait(self._consumers.values())
