"""What guillotina_amqp does at the broker, by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import aiormq
from aiormq import spec
from aiormq.abc import AbstractChannel

__all__ = ["declare", "look_into", "publish"]

T = TypeVar("T")


def declare(url: str, name: str) -> None:
    """Declare exchange and queues, all called `name`, with guillotina_amqp's arguments.

    Raises:
        aiormq.exceptions.ChannelPreconditionFailed: they are there, with others.
    """

    async def run(channel: AbstractChannel) -> None:
        back = {"x-dead-letter-exchange": name, "x-dead-letter-routing-key": name}
        queues: dict[str, dict[str, Any]] = {
            f"{name}-error": {"x-message-ttl": 1000 * 60 * 60 * 24 * 7},
            name: {**back, "x-dead-letter-routing-key": f"{name}-error"},
            f"{name}-delay": {**back, "x-message-ttl": 1000 * 60 * 2},
        }
        await channel.exchange_declare(name, exchange_type="direct", durable=True)
        for queue, arguments in queues.items():
            await channel.queue_declare(queue, durable=True, arguments=arguments)
            await channel.queue_bind(queue, name, routing_key=queue)

    _with_channel(url, run)


def publish(url: str, name: str, body: dict[str, Any]) -> None:
    """Publish a message as guillotina_amqp does: JSON, no id, no headers."""

    async def run(channel: AbstractChannel) -> None:
        properties = spec.Basic.Properties(delivery_mode=2)
        await channel.basic_publish(
            json.dumps(body).encode(), exchange=name, routing_key=name, properties=properties
        )

    _with_channel(url, run)


def look_into(url: str, queue: str) -> list[tuple[bytes, dict[str, Any]]]:
    """Return body and headers of each message that waits in a queue, and leave them there."""

    async def run(channel: AbstractChannel) -> list[tuple[bytes, dict[str, Any]]]:
        found = []
        while (message := await channel.basic_get(queue)).delivery_tag is not None:
            found.append((message.body, dict(message.header.properties.headers or {})))
        return found  # closing the channel gives back what was not acknowledged

    return _with_channel(url, run)


def _with_channel(url: str, use: Callable[[AbstractChannel], Awaitable[T]]) -> T:
    async def run() -> T:
        connection = await aiormq.connect(url)
        try:
            return await use(await connection.channel())
        finally:
            await connection.close()

    return asyncio.run(run())
