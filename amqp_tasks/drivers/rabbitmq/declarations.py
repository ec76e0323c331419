"""Which exchanges and queues a session has declared, and how that is done."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from aiormq import Channel
from aiormq import exceptions as amqp

from ...core.topology import QueueSpec
from .errors import mismatch
from .link import Link

__all__ = ["Declarations"]


class Declarations:
    """Declares exchanges and queues, on channels that serve for nothing else."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._done: dict[tuple[str, str], QueueSpec] = {}
        self._running: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def declare(self, exchange: str, queues: Sequence[QueueSpec]) -> None:
        """Declare all of them now.

        Raises:
            QueueMismatch: one exists with other arguments.
            BrokerRefused: not allowed, or the broker does not take the arguments.
            BrokerUnavailable: the connection was lost.
        """
        doing = f"cannot declare the queues of exchange {exchange!r} at {self._link.address}"
        self._link.check_open(doing)
        await self._link.outcome(self._link.spawn(self._declare(exchange, queues)), doing)

    async def count(self, queue: str) -> int:
        """Return how many messages of a queue are ready.

        Raises:
            BrokerRefused: there is no such queue, or not allowed.
            BrokerUnavailable: the connection was lost.
        """
        doing = f"cannot count the messages of queue {queue!r} at {self._link.address}"
        self._link.check_open(doing)
        return await self._link.outcome(self._link.spawn(self._count(queue)), doing)

    def has(self, exchange: str, queue: QueueSpec) -> bool:
        """Tell whether this session has declared the queue, with these arguments."""
        return self._done.get((exchange, queue.name)) == queue

    async def ensure(self, exchange: str, queue: QueueSpec) -> None:
        """Declare the queue unless that was done. All who ask meanwhile wait for one call.

        Raises:
            as `declare`.
        """
        doing = f"cannot declare queue {queue.name!r} at {self._link.address}"
        key = (exchange, queue.name)
        while not self.has(exchange, queue):
            self._link.check_open(doing)
            running = self._running.get(key)
            if running is None or running.done():
                running = self._link.spawn(self._declare(exchange, [queue]))
                self._running[key] = running
            await self._link.outcome(running, doing)

    def forget(self, exchange: str, queue: QueueSpec | None = None) -> None:
        """Take note that the queue, or the whole exchange, is gone."""
        for key in list(self._done):
            if key[0] == exchange and (queue is None or key[1] == queue.name):
                del self._done[key]

    async def _count(self, queue: str) -> int:
        # The broker closes the channel if there is no such queue.
        channel = await self._link.channel(confirms=False)
        try:
            found = await channel.queue_declare(queue, passive=True)
        finally:
            await channel.close(amqp.ChannelClosed(200, "no longer needed"))
        return found.message_count or 0

    async def _declare(self, exchange: str, queues: Sequence[QueueSpec]) -> None:
        # A channel of their own: the broker answers a declaration that it does not like by
        # closing the channel, and requeues whatever was delivered on it.
        channel = await self._link.channel(confirms=False)
        try:
            await self._declare_exchange(channel, exchange)
            for queue in queues:
                await self._declare_queue(channel, exchange, queue)
        finally:
            await channel.close(amqp.ChannelClosed(200, "no longer needed"))

    async def _declare_exchange(self, channel: Channel, exchange: str) -> None:
        ours = {"type": "direct", "durable": True, "auto_delete": False, "internal": False}
        try:
            await channel.exchange_declare(exchange, exchange_type="direct", durable=True)
        except Exception as error:
            raise self._failure(error, "exchange", exchange, ours) from error

    async def _declare_queue(self, channel: Channel, exchange: str, queue: QueueSpec) -> None:
        durable = not queue.exclusive
        ours = {"durable": durable, "exclusive": queue.exclusive, "auto_delete": False}
        ours |= queue.arguments
        try:
            await channel.queue_declare(
                queue.name,
                durable=durable,
                exclusive=queue.exclusive,
                arguments=dict(queue.arguments),
            )
            await channel.queue_bind(queue.name, exchange, routing_key=queue.name)
        except Exception as error:
            raise self._failure(error, "queue", queue.name, ours) from error
        self._done[exchange, queue.name] = queue

    def _failure(
        self, error: Exception, kind: str, name: str, ours: Mapping[str, Any]
    ) -> Exception:
        if isinstance(error, amqp.ChannelPreconditionFailed):
            known = mismatch(str(error), name, ours)
            if known is not None:
                return known
        return self._link.failure(error, f"cannot declare {kind} {name!r}")
