"""Publishing with confirms."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from typing import Final

from aiormq import Channel
from aiormq import exceptions as amqp

from ...core.settlement import Publication
from ...exceptions import BrokerError, PublishFailed
from .declarations import Declarations
from .link import Link
from .wire import Properties

__all__ = ["Publisher"]

_FRAME_OVERHEAD: Final = 32
"""Bytes of a header frame that are not properties; rather more than there are."""


class _Unroutable(Exception):
    """The broker has no such queue, or no such exchange, any more."""


class Publisher:
    """Publishes on one channel, and on a new one when that is gone."""

    def __init__(self, link: Link, declarations: Declarations) -> None:
        self._link = link
        self._declarations = declarations
        self._channel: Channel | None = None
        self._opening: asyncio.Task[Channel] | None = None
        # aiormq tells returned messages apart by their ids: two of the same in flight,
        # and the wrong one fails. So every publish has an id of its own.
        prefix = secrets.token_hex(6)
        self._ids = (f"{prefix}-{number:x}" for number in itertools.count(1))

    async def publish(self, exchange: str, publication: Publication, timeout: float) -> None:
        """Publish and return when it is confirmed; see `abc.BrokerSession.publish`."""
        deadline = asyncio.get_running_loop().time() + timeout
        doing = f"cannot publish to queue {publication.queue.name!r} at {self._link.address}"
        try:
            await self._try(exchange, publication, deadline, doing)
        except _Unroutable:
            # Somebody deleted the queue after this session declared it. Once more: it
            # would be lost otherwise, and nothing says that it comes to pass again.
            try:
                await self._try(exchange, publication, deadline, doing)
            except _Unroutable as error:
                raise PublishFailed(f"{doing}: {error}", maybe=False) from error

    async def _try(
        self, exchange: str, publication: Publication, deadline: float, doing: str
    ) -> None:
        properties = self._properties(publication, doing)
        channel = await self._prepare(exchange, publication, deadline, doing)
        task = asyncio.current_task()
        assert task is not None
        cancels = task.cancelling()
        try:
            await channel.basic_publish(
                publication.body,
                exchange=exchange,
                routing_key=publication.queue.name,
                properties=properties,
                mandatory=True,
                timeout=deadline - asyncio.get_running_loop().time(),
                wait=False,
            )
        except asyncio.CancelledError as error:
            # aiormq reports a lost connection like this. It is a cancellation of this
            # task only if somebody has asked for one meanwhile.
            if task.cancelling() > cancels or not channel.is_closed:
                raise
            raise PublishFailed(str(self._link.failure(error, doing)), maybe=True) from error
        except Exception as error:
            raise await self._failure(error, channel, exchange, publication, doing) from error

    def _properties(self, publication: Publication, doing: str) -> Properties:
        try:
            properties = Properties(publication.headers, next(self._ids))
        except (TypeError, ValueError) as error:
            raise PublishFailed(f"{doing}: {error}", maybe=False) from error
        size = len(properties.marshal()) + _FRAME_OVERHEAD
        limit = self._link.connection.connection_tune.frame_max
        if 0 < limit < size:
            # The broker would close the connection, and so it would again and again.
            raise PublishFailed(
                f"{doing}: its headers take {size} bytes; {limit} are possible", maybe=False
            )
        return properties

    async def _prepare(
        self, exchange: str, publication: Publication, deadline: float, doing: str
    ) -> Channel:
        """Return a channel to publish on, with the queue declared."""
        queue = publication.queue
        channel = self._channel
        # Nothing may be awaited between this check and the publish, which puts its frames
        # into the queue in its first step: what is sent on a closed channel makes RabbitMQ
        # close the connection.
        if self._is_usable(channel) and self._declarations.has(exchange, queue):
            assert channel is not None
            return channel
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    self._link.check_open(doing)
                    await self._declarations.ensure(exchange, queue)
                    channel = await self._open_channel(doing)
                    if self._is_usable(channel) and self._declarations.has(exchange, queue):
                        return channel
        except TimeoutError as error:
            raise PublishFailed(f"{doing}: {await self._slow()}", maybe=False) from error
        except BrokerError as error:
            raise PublishFailed(str(error), maybe=False) from error

    def _is_usable(self, channel: Channel | None) -> bool:
        # aiormq's reader removes a channel when the broker's channel.close comes in. That
        # is some passes of the loop before `is_closed`, and before the answer to it leaves.
        return (
            channel is not None
            and self._link.connection.channels.get(channel.number) is channel
            and not channel.is_closed
        )

    async def _open_channel(self, doing: str) -> Channel:
        if self._channel is not None and self._is_usable(self._channel):
            return self._channel
        if self._opening is None or self._opening.done():
            self._opening = self._link.spawn(self._link.channel(confirms=True))
        self._channel = await self._link.outcome(self._opening, doing)
        return self._channel

    async def _failure(
        self,
        error: Exception,
        channel: Channel,
        exchange: str,
        publication: Publication,
        doing: str,
    ) -> Exception:
        """Return what a publish that raised `error` raises, and tell whether it may be queued."""
        # With one publish in flight, the channel's end is the answer to that one.
        alone = len(channel.confirmations) <= 1
        match error:
            case amqp.PublishError():
                self._declarations.forget(exchange, publication.queue)
                return _Unroutable("the broker has no such queue")
            case amqp.DeliveryError():
                return PublishFailed(f"{doing}: the broker did not take it", maybe=False)
            case amqp.ChannelNotFoundEntity():
                self._declarations.forget(exchange)
                if alone:
                    return _Unroutable(str(error))
            case TimeoutError():
                return PublishFailed(f"{doing}: {await self._slow()}", maybe=True)
            case amqp.ChannelInvalidStateError() | TypeError() | ValueError():
                # aiormq found out before it had sent anything.
                return PublishFailed(str(self._link.failure(error, doing)), maybe=False)
            case _:
                pass
        certain = alone and isinstance(error, amqp.ChannelClosed)
        return PublishFailed(str(self._link.failure(error, doing)), maybe=not certain)

    async def _slow(self) -> str:
        if await self._link.is_blocked():
            return "no confirm in time: the broker takes no messages (memory or disk alarm)"
        return "no confirm in time"
