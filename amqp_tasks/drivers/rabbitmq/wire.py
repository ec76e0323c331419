"""What aiormq lets one replace, replaced: its streams, its frame buffers, its encoding of
headers and its voice in the log.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Iterable, Mapping
from contextvars import Context, ContextVar
from typing import Any, Final, SupportsIndex

import aiormq
import pamqp.constants
import pamqp.encode
import pamqp.exceptions
import pamqp.frame
import pamqp.header
from aiormq import spec
from yarl import URL

from ...core.message import UNREADABLE

__all__ = ["Connection", "Properties", "Streams", "quiet_context"]


class Connection(aiormq.Connection):
    """aiormq's connection, with a write queue that is never full.

    aiormq's queue holds ten frames. That protects nothing, because its writer passes
    frames on without waiting for the socket; but it hurts three times. A publish that
    waits for room stays there for good when the connection is lost. One that waits behind
    it writes to a channel which the broker has closed meanwhile, and RabbitMQ answers that
    by closing the connection. And the answer to the broker's own channel.close is dropped
    when there is no room for it. What is in the queue is bounded all the same: each
    publisher waits for its confirm, and acks are no more than the prefetch.
    """

    FRAME_BUFFER_SIZE = 0


class Streams(aiormq.TransportFactory):
    """Opens the socket and keeps hold of it.

    aiormq closes a connection by waiting for the peer, for a minute if it has to.
    With the transport in hand, `abort` ends that at once, and nothing is left open.
    """

    def __init__(self, *, careful: bool = False) -> None:
        self._careful = careful
        self._reader: _Reader | None = None
        self._transport: asyncio.Transport | None = None

    @property
    def connected(self) -> bool:
        """True if there was a connection, TLS included, before or after it was lost."""
        return self._transport is not None

    async def create(
        self, url: URL, **kwargs: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context = None
        if url.scheme == "amqps":
            context = await kwargs["ssl_context_provider"].get_context()
        loop = asyncio.get_running_loop()
        reader = (_CarefulReader if self._careful else _Reader)(loop=loop)
        transport, protocol = await loop.create_connection(
            lambda: asyncio.StreamReaderProtocol(reader, loop=loop),
            str(url.host),
            int(url.port or 0),
            ssl=context,
        )
        self._reader, self._transport = reader, transport
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    def refusal(self) -> spec.Connection.Close | None:
        """Return the frame with which the broker ended the handshake, if it did.

        aiormq says of a wrong virtual host no more than that it did not expect this
        frame, so the reason is read here from what came over the line.
        """
        heard = bytes(self._reader.heard or b"") if self._reader else b""
        while heard:
            try:
                length, _, frame = pamqp.frame.unmarshal(heard)
            except (pamqp.exceptions.PAMQPException, ValueError, struct.error):
                return None
            if isinstance(frame, spec.Connection.Close):
                return frame
            heard = heard[length:]
        return None

    def handshake_done(self) -> None:
        """Stop keeping what the broker says."""
        if self._reader is not None:
            self._reader.heard = None

    def abort(self) -> None:
        """Close the socket without a goodbye, now."""
        if self._transport is not None:
            self._transport.abort()


class _Reader(asyncio.StreamReader):
    """A stream reader that remembers the handshake."""

    heard: bytearray | None

    def __init__(self, *, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.heard = bytearray()

    def feed_data(self, data: Iterable[SupportsIndex]) -> None:
        if self.heard is not None and len(self.heard) < 65_536:
            self.heard.extend(data)
        super().feed_data(data)


class _CarefulReader(_Reader):
    """A reader that replaces message headers which pamqp cannot read.

    RabbitMQ takes names that are no UTF-8, times beyond Python's, and any nesting, from
    anybody. pamqp's error ends the connection, the broker sends the message again, and so
    on for ever. Reading every header twice costs time, so it is done only once that has
    happened.
    """

    def __init__(self, *, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._parts = 0
        self._kind = 0

    async def readexactly(self, n: int) -> bytes:
        # aiormq reads a frame in three parts: its kind, channel and size, and the rest.
        data = await super().readexactly(n)
        part, self._parts = self._parts % 3, self._parts + 1
        if part == 0:
            self._kind = data[0]
        elif part == 2 and self._kind == pamqp.constants.FRAME_HEADER:
            return _readable(data)
        return data


_BEFORE_FLAGS: Final = 12
_AFTER_FLAGS: Final = 14
"""Bytes of a content header before its properties: class, weight, size of the body, flags."""


def _readable(data: bytes) -> bytes:
    """Return the rest of a content header's frame, or one of the same size that can be read."""
    try:
        pamqp.header.ContentHeader().unmarshal(data[:-1])
    except Exception as error:
        # The table of headers with one text in it, which fills the room there is.
        name = pamqp.encode.short_string(UNREADABLE) + b"S"
        room = len(data) - 1 - _AFTER_FLAGS - 4 - len(name) - 4
        if room < 0:  # there can be no header of ours in it
            return data[:_BEFORE_FLAGS] + bytes(len(data) - 1 - _BEFORE_FLAGS) + data[-1:]
        reason = repr(error).encode("ascii", "replace")[:room].ljust(room)
        table = name + struct.pack(">I", room) + reason
        flags = struct.pack(">H", _HAS_HEADERS)
        return data[:_BEFORE_FLAGS] + flags + struct.pack(">I", len(table)) + table + data[-1:]
    return data


_HAS_HEADERS: Final = 1 << 13


class Properties(spec.Basic.Properties):
    """The properties of a persistent JSON message, encoded once.

    A `float` in the headers is written as an AMQP double. pamqp writes the 32-bit kind, in
    which a time of day is off by up to a minute.

    Raises:
        TypeError: a header has a value, or a size, that AMQP does not have.
    """

    # No __slots__: pamqp reads them to find the properties.

    def __init__(self, headers: Mapping[str, Any], message_id: str) -> None:
        super().__init__(
            content_type="application/json",
            headers=dict(headers),
            delivery_mode=2,
            message_id=message_id,
        )
        self._encoded = super().marshal()

    def marshal(self) -> bytes:
        return self._encoded

    def encode_property(self, name: str, value: Any) -> bytes:
        if name != "headers":
            return super().encode_property(name, value)
        fields = b"".join(map(_field, value, value.values()))
        return struct.pack(">I", len(fields)) + fields


def _field(name: str, value: Any) -> bytes:
    encoded = pamqp.encode.short_string(name)
    if isinstance(value, float):
        return encoded + struct.pack(">cd", b"d", value)
    return encoded + pamqp.encode.encode_table_value(value)


_quiet: Final = ContextVar("amqp_tasks_quiet", default=False)


def quiet_context() -> Context:
    """Return a clean context in which aiormq logs at the debug level only.

    What it has to say reaches the caller as an error or a reason, once and in one line;
    its own records bring the same a second time, with tracebacks. The context tells our
    connections from those that the rest of the program may have: tasks inherit it.
    """
    context = Context()
    context.run(_quiet.set, True)
    return context


class _Demote(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        # A blocked connection raises nothing and may stay so for hours: this one is news.
        if not _quiet.get() or "blocked" in str(record.msg):
            return True
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


for _name in ("aiormq.connection", "aiormq.channel", "aiormq.connection.marshall"):
    logging.getLogger(_name).addFilter(_Demote())
