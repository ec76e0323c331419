"""What a test does at the broker behind the framework's back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from threading import Thread
from typing import Any, TypeVar

import aiormq
from aiormq import spec
from aiormq.abc import AbstractChannel

from ..servers.rabbitmq import RabbitServer

__all__ = ["Amqp", "Found"]

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """A message that was in a queue."""

    body: bytes
    headers: dict[str, Any]


class Amqp:
    """A plain client, on an event loop of its own in a thread: tests run on Trio, too."""

    def __init__(self, server: RabbitServer) -> None:
        self._url = server.url

    def publish(self, queue: str, body: bytes, headers: dict[str, Any] | None = None) -> None:
        """Publish to a queue through the default exchange; returns when confirmed."""

        async def run(channel: AbstractChannel) -> None:
            properties = spec.Basic.Properties(headers=headers or {}, delivery_mode=2)
            await channel.basic_publish(
                body, routing_key=queue, properties=properties, mandatory=True
            )

        self._with_channel(run)

    def drain(self, queue: str, at_least: int, timeout: float = 30) -> list[Found]:
        """Take all messages out of a queue, when there are enough."""

        async def run(channel: AbstractChannel) -> list[Found]:
            found: list[Found] = []
            async with asyncio.timeout(timeout):
                while True:
                    message = await channel.basic_get(queue, no_ack=True)
                    if message.delivery_tag is not None:
                        headers = dict(message.header.properties.headers or {})
                        found.append(Found(message.body, headers))
                    elif len(found) >= at_least:
                        return found
                    else:
                        await asyncio.sleep(0.05)

        return self._with_channel(run)

    def _with_channel(self, use: Callable[[AbstractChannel], Awaitable[T]]) -> T:
        results: list[T] = []

        async def run() -> None:
            connection = await aiormq.connect(self._url)
            try:
                results.append(await use(await connection.channel()))
            finally:
                await connection.close()

        thread = Thread(target=lambda: asyncio.run(run()))
        thread.start()
        thread.join()
        if not results:
            raise AssertionError("the broker could not be used; see the thread's traceback")
        return results[0]
