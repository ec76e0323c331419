"""The connection, the tasks that talk on it, and the news of its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

import anyio
from aiormq import Channel
from aiormq import exceptions as amqp

from ...exceptions import BrokerError, BrokerUnavailable
from .errors import explain, translate
from .wire import Connection, Streams, quiet_context

__all__ = ["GOODBYE", "Link"]

T = TypeVar("T")

GOODBYE: Final = 3.0
"""Seconds for closing in good order: last acks, channels, the connection. A broker that
does not answer is left without a goodbye."""

_UNREADABLE: Final = (amqp.InvalidFrameError, ValueError, ArithmeticError, RecursionError)
"""What aiormq and pamqp raise when they cannot read a frame."""

_PASSES: Final = 50
"""How often the event loop goes round before a connection counts as closed. aiormq ends its
last tasks by itself, two or three passes later as seen, and has nothing to wait for."""


class Link:
    """A connection to RabbitMQ.

    Attributes:
        connection: aiormq's.
        address: of the broker, for people to read; has no password.
        lost: set when the connection is gone.
        reason: why, in words; empty until then.
        met_unreadable: it was lost over something that aiormq could not read.
    """

    def __init__(self, connection: Connection, streams: Streams, address: str) -> None:
        self.connection = connection
        self.address = address
        self.lost = asyncio.Event()
        self.reason = ""
        self.met_unreadable = False
        self._streams = streams
        self._context = quiet_context()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def open(self, timeout: float) -> None:
        """Connect. `close` has to be called afterwards, whatever came of it.

        Raises:
            TimeoutError: it took longer than `timeout` seconds.
            Exception: whatever aiormq raises.
        """
        connecting = self.spawn(self._connect())
        done, _ = await asyncio.wait([connecting], timeout=timeout)
        if not done:
            raise TimeoutError
        if connecting.cancelled():
            raise amqp.AMQPConnectionError("the connection was lost")
        connecting.result()
        self._streams.handshake_done()

    async def close(self, flush: Callable[[], Awaitable[None]]) -> None:
        """Close in good order, after `flush`, or without order after `GOODBYE` seconds.

        No socket and no task is left, whatever the state of the connection.
        """
        # Shielded, because a session is often left by a cancellation, and the verdicts
        # shall reach the broker all the same. Every wait in here has a limit.
        with anyio.CancelScope(shield=True):
            try:
                await asyncio.wait([self.spawn(self._say_goodbye(flush))], timeout=GOODBYE)
            finally:
                self._end("closed by this side, and the broker did not answer")
                self._streams.abort()
                for task in self._tasks:
                    task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=GOODBYE)
            for _ in range(_PASSES):
                await asyncio.sleep(0)

    def check_open(self, doing: str) -> None:
        """
        Raises:
            BrokerUnavailable: the connection is gone.
        """
        if self.lost.is_set():
            raise BrokerUnavailable(f"{doing}: {self.reason}")

    async def channel(self, *, confirms: bool) -> Channel:
        """Open a channel. To be called in a task of this link's."""
        channel = await self.connection.channel(
            publisher_confirms=confirms,
            # No limit on frames that wait to be read: the prefetch limits what comes. A
            # full buffer would stop the reader of the whole connection, and for good if
            # the channel is closed by then.
            frame_buffer_size=0,
        )
        assert isinstance(channel, Channel)
        return channel

    def spawn(self, call: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a call that has an answer in a task that no caller's cancellation reaches."""
        task = asyncio.get_running_loop().create_task(call, context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    async def outcome(self, task: asyncio.Task[T], doing: str) -> T:
        """Wait for a task of `spawn`. Cancelling this wait does nothing to the task.

        Raises:
            BrokerError: it failed; begins with `doing`.
        """
        await asyncio.wait([task])
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None:
            return task.result()
        raise self.failure(error, doing) from error

    def failure(self, error: BaseException, doing: str) -> BrokerError:
        """Return our error for `error`, with the reason of the loss if there was one."""
        if self.reason and not isinstance(error, BrokerError):
            return BrokerUnavailable(f"{doing}: {self.reason}")
        return translate(error, doing)

    async def is_blocked(self) -> bool:
        """Tell whether the broker takes no messages at present (memory or disk alarm)."""
        ready = self.spawn(self.connection.ready())
        await asyncio.sleep(0)  # it ends in its first step if nothing is in its way
        if ready.done():
            return False
        ready.cancel()
        return True

    async def _connect(self) -> None:
        await self.connection.connect()
        self.connection.closing.add_done_callback(self._on_closed)

    async def _say_goodbye(self, flush: Callable[[], Awaitable[None]]) -> None:
        await flush()
        self._end("closed by this side")
        if self.connection.is_opened:
            # Always with a reason: by default aiormq raises a bare CancelledError in
            # whatever waits for something.
            await self.connection.close(amqp.ConnectionClosed(200, "closed by this side"))

    def _on_closed(self, closing: asyncio.Future[Any]) -> None:
        error = None if closing.cancelled() else closing.exception()
        self.met_unreadable = isinstance(error, _UNREADABLE)
        if self.connection.is_connection_was_stuck:
            seconds = (self.connection.heartbeat_timeout + 1) * 3
            self._end(f"no sign of life from the broker for {seconds} seconds")
        else:
            self._end(explain(error))

    def _end(self, reason: str) -> None:
        self.reason = self.reason or reason
        self.lost.set()

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # or asyncio reports it when nobody waited for the task
