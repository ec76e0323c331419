"""One consumer on a channel of its own, from its start until its last delivery is settled."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Any

from aiormq import Channel, spec
from aiormq import exceptions as amqp
from aiormq.abc import DeliveredMessage

from .acks import Command, Unsettled, Verdict
from .link import Link

__all__ = ["Consumer", "RabbitDelivery"]


class RabbitDelivery:
    """A delivery; see `abc.Delivery`."""

    __slots__ = ("_consumer", "_tag", "body", "headers", "redelivered")

    def __init__(self, consumer: Consumer, tag: int, message: DeliveredMessage) -> None:
        self._consumer = consumer
        self._tag = tag
        self.body: bytes = message.body
        self.headers: Mapping[str, Any] = message.header.properties.headers or {}
        self.redelivered = bool(message.redelivered)

    def ack(self) -> None:
        self._consumer.settle(self._tag, Verdict.ACK)

    def requeue(self) -> None:
        self._consumer.settle(self._tag, Verdict.REQUEUE)

    def reject(self) -> None:
        self._consumer.settle(self._tag, Verdict.REJECT)


class Consumer:
    """Iterates over what a queue delivers.

    `run` is the task behind it, and alone talks to the broker. Everything else here only
    takes notes and wakes it: verdicts come from anywhere, deliveries from the channel's
    reader, where an RPC would wait for itself.
    """

    def __init__(self, link: Link, queue: str, prefetch: int) -> None:
        self.started = asyncio.Event()
        self.left = asyncio.Event()
        self.error: BaseException | None = None
        self._link = link
        self._queue = queue
        self._prefetch = prefetch
        self._arrived = asyncio.Event()
        self._buffer: deque[RabbitDelivery] = deque()
        self._unsettled = Unsettled()
        self._wake = asyncio.Event()
        self._ended = False  # no more deliveries for the iterator
        self._leaving = False  # its block is being left
        self._finishing = False  # its session is being closed
        self._cancelled = False  # the broker sends no more
        self._closed = False  # the channel is gone

    # For the task that iterates

    def __aiter__(self) -> Consumer:
        return self

    async def __anext__(self) -> RabbitDelivery:
        while True:
            if self._ended:
                raise StopAsyncIteration
            if self._buffer:
                return self._buffer.popleft()
            self._arrived.clear()
            await self._arrived.wait()

    def settle(self, tag: int, verdict: Verdict) -> None:
        if self._unsettled.settle(tag, verdict):
            self._wake.set()

    def leave(self) -> None:
        """Ask `run` to cancel the consumer and to give back what nobody took."""
        self._leaving = True
        self._end()

    def finish(self) -> None:
        """Ask `run` to send the verdicts that it has, and to end."""
        self._finishing = True
        self._end()

    # For the session

    async def run(self) -> None:
        """Consume; return when everything that was taken has a verdict, or all is lost."""
        try:
            channel = await self._link.channel(confirms=False)
            channel.closing.add_done_callback(self._on_channel_closed)
            channel.on_consumer_cancel_callbacks.add(self._on_cancelled_by_broker)
            await channel.basic_qos(prefetch_count=self._prefetch)
            consuming = await channel.basic_consume(self._queue, self._on_message)
            self.started.set()
            await self._serve(channel, consuming.consumer_tag or "")
            # The broker's answer comes after it has dealt with what was sent before it.
            await channel.close(amqp.ChannelClosed(200, "no longer needed"))
        except BaseException as error:
            self.error = error
            raise
        finally:
            self._on_channel_closed()
            self.started.set()
            self.left.set()

    async def _serve(self, channel: Channel, consumer_tag: str) -> None:
        while not self._closed:
            await self._wake.wait()
            # All verdicts given in one pass of the event loop leave together.
            self._wake.clear()
            if self._leaving and not self.left.is_set():
                await self._leave(channel, consumer_tag)
            await self._send(channel)
            if self._finishing or (self._leaving and not self._unsettled):
                return

    async def _leave(self, channel: Channel, consumer_tag: str) -> None:
        if not self._cancelled:
            # With an answer: deliveries may come until then, and must not be forgotten
            # on this channel, which lives on. (aiormq drops what comes after a cancel
            # with `nowait`, and the broker would wait for a verdict.)
            await channel.basic_cancel(consumer_tag)
            self._cancelled = True
        while self._buffer:
            self._buffer.popleft().requeue()
        await self._send(channel)
        self.left.set()

    async def _send(self, channel: Channel) -> None:
        try:
            for command in self._unsettled.take():
                await _tell(channel, command)
        except amqp.ChannelInvalidStateError:
            pass  # The channel is gone; the broker delivers them again.

    async def _on_message(self, message: DeliveredMessage) -> None:
        tag = message.delivery_tag
        if tag is None or self._closed:
            return
        self._unsettled.add(tag)
        self._buffer.append(RabbitDelivery(self, tag, message))
        self._arrived.set()

    def _on_cancelled_by_broker(self, _: spec.Basic.Cancel) -> None:
        """The queue was deleted, for one. What was taken can still be acked."""
        self._cancelled = True
        self._end()

    def _on_channel_closed(self, _: object = None) -> None:
        self._closed = True
        self._unsettled.forget()
        self._buffer.clear()
        self._end()

    def _end(self) -> None:
        self._ended = True
        self._arrived.set()
        self._wake.set()


async def _tell(channel: Channel, command: Command) -> None:
    # `wait=False`: nobody has to know when it left, and waiting for that would stop
    # aiormq's writer until the socket has room.
    if command.verdict is Verdict.ACK:
        await channel.basic_ack(command.tag, multiple=command.multiple, wait=False)
    else:
        requeue = command.verdict is Verdict.REQUEUE
        await channel.basic_nack(command.tag, requeue=requeue, wait=False)
