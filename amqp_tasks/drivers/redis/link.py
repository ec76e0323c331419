"""The seam to redis-py: connections, round trips, and its errors in our words.

redis-py's own pipelines cost three times as much client CPU a command as writing packed
commands to a connection and reading the replies, and time each reply instead of all of
them, so that is what happens here. The pool remains redis-py's.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol, cast

import anyio
import hiredis
from redis import exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from ...exceptions import (
    SettingsError,
    StateStoreError,
    StateStoreRefused,
    StateStoreUnavailable,
)
from ...settings import hide_password

__all__ = ["CONNECTION_LOST", "Connection", "RedisLink", "Session", "pack", "send"]

MAX_CONNECTIONS: Final = 16
"""Whoever needs one more waits. Batches are the rule, so few are used at a time."""

_UNAVAILABLE = "check that Redis runs there and that state_url names it"

_ERRORS: Final[Sequence[tuple[tuple[type[Exception], ...], type[StateStoreError], str]]] = (
    (
        (
            redis_errors.AuthenticationError,
            redis_errors.AuthenticationWrongNumberOfArgsError,
            redis_errors.AuthorizationError,
        ),
        StateStoreRefused,
        "check user and password in state_url",
    ),
    (
        (redis_errors.NoPermissionError,),
        StateStoreRefused,
        "give this user scripting, pub/sub and all commands on keys under state_prefix",
    ),
    (
        (redis_errors.ReadOnlyError,),
        StateStoreRefused,
        "state_url must name the primary, not a replica",
    ),
    (
        (redis_errors.ClusterDownError, redis_errors.TryAgainError),
        StateStoreUnavailable,
        "wait until the cluster is whole again",
    ),
    (
        (redis_errors.BusyLoadingError,),
        StateStoreUnavailable,
        "wait until it has loaded its data",
    ),
    (
        (redis_errors.AskError,),  # and MOVED, its subclass
        StateStoreError,
        "state_url must name a server that holds all keys, not one node of several",
    ),
    (
        (redis_errors.OutOfMemoryError,),
        StateStoreError,
        "raise its maxmemory, or lower state_ttl",
    ),
    (
        (
            redis_errors.ConnectionError,
            redis_errors.TimeoutError,
            redis_errors.InvalidResponse,
            OSError,  # TimeoutError is one
        ),
        StateStoreUnavailable,
        _UNAVAILABLE,
    ),
    (
        (redis_errors.RedisError,),
        StateStoreError,
        "see Redis's own log, and that it is 6.2 or later",
    ),
)
"""What redis-py raises, first match wins; what we raise instead; what to do about it."""

CONNECTION_LOST: Final = (redis_errors.RedisError, OSError)
"""What redis-py raises when a connection cannot be made or used any longer."""

pack: Final = cast("Callable[[tuple[bytes, ...]], bytes]", cast("Any", hiredis).pack_command)
"""Return a command, its name and arguments, as it goes over the wire.

The cast is because hiredis's stub allows a tuple of one only.
"""


class Connection(Protocol):
    """What we use of redis-py's connection, whose methods have no annotations."""

    @property
    def is_connected(self) -> bool: ...

    async def connect(self) -> None: ...

    async def disconnect(self, nowait: bool = False) -> None: ...

    async def send_packed_command(self, command: list[bytes]) -> None: ...

    async def read_response(
        self, *, timeout: float | None = None, disconnect_on_error: bool = True
    ) -> Any: ...


class _Pool(Protocol):
    """What we use of redis-py's connection pool, likewise."""

    def make_connection(self) -> Connection: ...

    async def get_connection(self) -> Connection: ...

    async def release(self, connection: Connection) -> None: ...

    async def disconnect(self, inuse_connections: bool = True) -> None: ...


class RedisLink:
    """A way to one Redis server.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``.
        timeout: seconds that a round trip may take.
        connect_timeout: seconds that it may take to get a connection.

    Raises:
        SettingsError: `url` is none that redis-py takes.
    """

    def __init__(self, url: str, *, timeout: float, connect_timeout: float) -> None:
        # A query may hold a password too, and nobody needs it to find the server.
        self.address = hide_password(url).partition("?")[0]
        self.timeout = timeout
        self.connect_timeout = connect_timeout
        try:
            self._pool = _make_pool(url, connect_timeout)
            self._pool.make_connection()  # looks at the rest of the URL; does not connect
        except (ValueError, TypeError, redis_errors.RedisError) as error:
            raise SettingsError(f"state_url={self.address!r}: {error}") from None

    def make_connection(self) -> Connection:
        """Return a connection outside of the pool, not connected yet."""
        return self._pool.make_connection()

    @asynccontextmanager
    async def session(self) -> AsyncGenerator[Session, None]:
        """Take a connection, for as many round trips as belong together.

        An exception, a cancellation included, closes the connection, so that nobody
        reads the replies to somebody else's commands.

        Raises:
            StateStoreUnavailable: nobody answers there, or the connection was lost.
            StateStoreRefused: wrong login.
        """
        try:
            with anyio.fail_after(self.connect_timeout):
                connection = await self._pool.get_connection()
        except CONNECTION_LOST as error:
            raise self.explain(error, self.connect_timeout) from error
        try:
            yield Session(connection, self.timeout)
        except BaseException as error:
            with anyio.move_on_after(self.connect_timeout, shield=True):
                await connection.disconnect(nowait=True)
            if isinstance(error, CONNECTION_LOST):
                raise self.explain(error, self.timeout) from error
            raise
        finally:
            with anyio.move_on_after(self.connect_timeout, shield=True):
                await self._pool.release(connection)

    async def disconnect(self, *, idle_only: bool = False) -> None:
        """Close the pool's connections; the next session opens a new one."""
        with anyio.move_on_after(self.connect_timeout, shield=True):
            await self._pool.disconnect(inuse_connections=not idle_only)

    def explain(self, error: Exception, waited: float = 0.0) -> StateStoreError:
        """Return the error to be raised from `error`: ours, in one line, with advice.

        Args:
            waited: seconds, for a `TimeoutError` of a cancel scope, which says nothing.
        """
        reason = " ".join(str(error).split())
        if isinstance(error, TimeoutError) and not reason:
            reason = f"no answer within {waited:g} s"
        reason = reason.rstrip(".") or type(error).__name__
        for theirs, ours, advice in _ERRORS:
            if isinstance(error, theirs):
                return ours(f"Redis at {self.address}: {reason}; {advice}")
        raise error


def _make_pool(url: str, connect_timeout: float) -> _Pool:
    options: dict[str, Any] = dict(parse_url(url))
    options |= {
        # Scripts may be repeated, but when is for their sender to decide.
        "retry": Retry(NoBackoff(), 0),
        "retry_on_error": [],
        "retry_on_timeout": False,
        # Cancel scopes around whole round trips bound them; a timer for each
        # reply would only cost time.
        "socket_timeout": None,
        "socket_connect_timeout": connect_timeout,
        "health_check_interval": 0,
        "decode_responses": False,
        "protocol": 2,
        "max_connections": MAX_CONNECTIONS,
        "timeout": None,
    }
    return cast("_Pool", BlockingConnectionPool(**options))


async def send(connection: Connection, data: bytes) -> None:
    """Send packed commands.

    Raises:
        RedisError, OSError: the connection was lost.
    """
    try:
        await connection.send_packed_command([data])
    except RuntimeError as error:
        # uvloop says so of a transport that was closed a moment ago.
        raise redis_errors.ConnectionError(str(error)) from error


class Session:
    """A connection that is ours for a while."""

    def __init__(self, connection: Connection, timeout: float) -> None:
        self._connection = connection
        self._timeout = timeout

    async def round_trip(self, commands: Sequence[bytes]) -> list[Any]:
        """Send packed commands together; return a reply or a `ResponseError` for each.

        Raises:
            TimeoutError: the replies were not all there in time.
            RedisError, OSError: the connection was lost.
        """
        replies: list[Any] = []
        with anyio.fail_after(self._timeout):
            await send(self._connection, b"".join(commands))
            for _ in commands:
                try:
                    replies.append(await self._connection.read_response())
                except redis_errors.ResponseError as error:
                    replies.append(error)
        return replies
