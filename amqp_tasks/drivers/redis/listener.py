"""Announcements over Redis's pub/sub, on a connection that comes back by itself.

redis-py's own ``PubSub`` reconnects in the middle of other calls and never notices a link
that is silently dead, so this reads a connection itself. A silent link is asked with a
PING, and given up when that is not answered either.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator
from typing import Any, Final, NoReturn

import anyio
from redis.exceptions import ResponseError

from ...core.retry import RetryPolicy
from .keys import from_bytes, to_bytes
from .link import CONNECTION_LOST, Connection, RedisLink, pack, send

__all__ = ["RedisListener"]

_log = logging.getLogger(__name__)

BUFFER: Final = 10_000
"""Announcements that may wait to be read; more are dropped, as announcements may be."""

BACKOFF: Final = RetryPolicy(max_retries=None, delay=0.1, backoff=2.0, max_delay=5.0, jitter=0.5)
"""The pauses between attempts to connect."""

_PING: Final = pack((b"PING",))


class RedisListener:
    """A `Listener` whose connection is kept up by `run`.

    Args:
        link: the server.
        prefix: begins the channels' names, and not the topics'.
    """

    def __init__(self, link: RedisLink, prefix: bytes) -> None:
        self._link = link
        self._prefix = prefix
        self._connection: Connection | None = None
        self._topics: dict[bytes, anyio.Event] = {}
        """Channels, each with an event that is set when the server has confirmed."""
        self.has_tried = anyio.Event()
        """Set after the first try to connect, whether or not that succeeded."""
        self._send, self._receive = anyio.create_memory_object_stream[tuple[str, str]](BUFFER)

    async def subscribe(self, topic: str) -> None:
        """Have announcements of `topic` from now on.

        While the link is up this returns when the server has confirmed; otherwise at
        once, and the subscription is made when the link comes back.
        """
        channel = self._prefix + to_bytes(topic)
        confirmed = self._topics.setdefault(channel, anyio.Event())
        with anyio.move_on_after(self._link.timeout):
            if await self._tell(pack((b"SUBSCRIBE", channel))):
                await confirmed.wait()

    async def unsubscribe(self, topic: str) -> None:
        """Have no more announcements of `topic`."""
        channel = self._prefix + to_bytes(topic)
        if self._topics.pop(channel, None) is not None:
            with anyio.move_on_after(self._link.timeout):
                await self._tell(pack((b"UNSUBSCRIBE", channel)))

    def __aiter__(self) -> AsyncIterator[tuple[str, str]]:
        return self._receive.__aiter__()

    async def run(self) -> NoReturn:
        """Keep the connection up and read it."""
        failures = 0
        while True:
            connection = self._link.make_connection()
            try:
                with anyio.fail_after(self._link.connect_timeout):
                    await connection.connect()
                    self._connection = connection
                    if self._topics:
                        await self._tell(pack((b"SUBSCRIBE", *self._topics)))
                if failures:
                    _log.info("listening to Redis at %s again", self._link.address)
                failures = 0
                self.has_tried.set()
                await self._read(connection)
            except CONNECTION_LOST as error:
                if not failures:
                    reason = self._link.explain(error, self._link.connect_timeout)
                    _log.warning("no announcements: %s", reason)
            finally:
                self._connection = None
                for confirmed in self._topics.values():
                    confirmed.set()  # nobody shall wait for what is not coming
                with anyio.move_on_after(self._link.connect_timeout, shield=True):
                    await connection.disconnect(nowait=True)
            self.has_tried.set()
            failures += 1
            await anyio.sleep(BACKOFF.delay_after(failures, random.uniform(-1, 1)))  # noqa: S311  jitter

    async def _read(self, connection: Connection) -> NoReturn:
        """Read until the link is lost."""
        was_silent = False
        while True:
            try:
                reply = await connection.read_response(
                    timeout=self._link.timeout, disconnect_on_error=False
                )
            except ResponseError as error:
                _log.warning("no announcements: %s", self._link.explain(error))
                continue
            if reply is not None:
                was_silent = False
                self._take(reply)
            elif was_silent:
                raise TimeoutError(f"silent for {2 * self._link.timeout:g} s")
            else:
                was_silent = True
                with anyio.fail_after(self._link.timeout):
                    await self._tell(_PING)

    def _take(self, reply: Any) -> None:
        match reply:
            case [b"message", bytes(channel), bytes(data)] if channel in self._topics:
                announcement = from_bytes(channel[len(self._prefix) :]), from_bytes(data)
                try:
                    self._send.send_nowait(announcement)
                except anyio.WouldBlock:
                    _log.debug("dropped an announcement; %d wait", BUFFER)
            case [b"subscribe", bytes(channel), _] if channel in self._topics:
                self._topics[channel].set()
            case _:  # a pong, an unsubscription, or what was under way before that
                pass

    async def _tell(self, command: bytes) -> bool:
        """Send a command if the link is up; its reply comes to `_read`.

        An error is `_read`'s to notice.
        """
        connection = self._connection
        if connection is None or not connection.is_connected:
            return False
        try:
            await send(connection, command)
        except CONNECTION_LOST:
            return False
        return True

    def close(self) -> None:
        """End the iteration."""
        self._send.close()
        self._receive.close()
