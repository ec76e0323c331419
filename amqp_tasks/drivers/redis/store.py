"""Task states on Redis (6.2 or later), and on a Redis Cluster of one node.

Of each task there is a hash and a stream, which one script at a time changes
(``lua/*.lua``, the rules of `core.rules` in Redis's words); of each worker a key that
expires; and an index for lists (`redis_index`). Announcements go by pub/sub
(`redis_listener`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
import anyio.lowlevel
from redis.exceptions import NoScriptError, ReadOnlyError, ResponseError

from ...core.operations import ListTasks, Operation
from ...exceptions import StateCorrupt, StateStoreRefused, StateStoreUnavailable
from .commands import LOAD_SCRIPTS, Commands
from .index import TaskIndex
from .keys import Keys, to_bytes
from .link import RedisLink, Session, pack
from .listener import RedisListener
from .replies import Touched, read_reply

__all__ = ["RedisStore"]


_CORRUPT: Final = ("WRONGTYPE", "attempt to ")
"""In what Redis says of a key of another type, and Lua of a field that is missing."""


class RedisStore:
    """A `StateStore` on a Redis server. Used on one asyncio event loop.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``.
        prefix: begins every key and channel; stores with different ones do not meet.
        timeout: seconds that a round trip may take.
        connect_timeout: seconds that it may take to get a connection.

    Raises:
        SettingsError: the URL or the prefix will not do.
    """

    def __init__(self, url: str, *, prefix: str, timeout: float, connect_timeout: float) -> None:
        self._link = RedisLink(url, timeout=timeout, connect_timeout=connect_timeout)
        self._keys = Keys(to_bytes(prefix))
        self._commands = Commands(self._keys)
        self._index = TaskIndex(self._keys)

    @property
    def address(self) -> str:
        """The URL without password and options."""
        return self._link.address

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None, None]:
        """Connect, load the scripts, and check that writing is possible.

        Raises:
            StateStoreUnavailable: nobody answers there, or not in time.
            StateStoreRefused: wrong login, or not allowed to write, a replica for example.
        """
        try:
            await self._check()
            yield
        finally:
            await self._link.disconnect()  # noqa: ASYNC102  only closes the socket

    async def apply(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        """Carry out a batch; return an answer, or an exception, for each, in order.

        Tasks that changed cost a second round trip, for the index. `ListTasks` is
        answered after everything else in the batch. When this is cancelled, as when it
        raises, nobody knows whether the operations were carried out.

        Raises:
            StateStoreUnavailable: the server was not reached, or did not answer in time.
            StateStoreRefused: wrong login.
        """
        if not operations:
            await anyio.lowlevel.checkpoint()
            return []
        lists = [isinstance(operation, ListTasks) for operation in operations]
        direct = [op for op, is_list in zip(operations, lists, strict=True) if not is_list]
        async with self._link.session() as session:
            replies = await self._send(session, direct)
            read = [self._read(op, reply) for op, reply in zip(direct, replies, strict=True)]
            await self._index.follow(session, [state for _, state in read if state is not None])
            listed = [
                self._explained(await self._index.list_ids(session, op))
                for op in operations
                if isinstance(op, ListTasks)
            ]
        if any(isinstance(reply, ReadOnlyError) for reply in replies):
            # The primary became a replica. Its name may lead elsewhere by now.
            await self._link.disconnect(idle_only=True)
        answers, found = iter(read), iter(listed)
        return [next(found) if is_list else next(answers)[0] for is_list in lists]

    @asynccontextmanager
    async def listen(self) -> AsyncGenerator[RedisListener, None]:
        """Open a subscription. It reconnects by itself for as long as it is open.

        Returns after the first try to connect, whether or not that succeeded.
        """
        listener = RedisListener(self._link, self._keys.prefix)
        failure: Exception | None = None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(listener.run)
                await listener.has_tried.wait()
                try:
                    yield listener
                except Exception as error:
                    # Raised outside of the group, that would put it into another one.
                    failure = error
                tasks.cancel_scope.cancel()
        finally:
            listener.close()
        if failure is not None:
            raise failure

    async def _check(self) -> None:
        write = pack((b"SET", self._keys.prefix + b"check", b"", b"PX", b"1000", b"GET"))
        async with self._link.session() as session:
            ping, *rest = await session.round_trip([pack((b"PING",)), write, *LOAD_SCRIPTS])
        for reply in (ping, *rest):
            if isinstance(reply, ResponseError):
                error = self._link.explain(reply)
                if isinstance(error, StateStoreRefused | StateStoreUnavailable):
                    raise error from reply
                raise StateStoreRefused(str(error)) from reply

    async def _send(self, session: Session, operations: Sequence[Operation[Any]]) -> list[Any]:
        """Send operations, those again that met a server which has lost the scripts."""
        commands = [self._commands.write(operation) for operation in operations]
        if not commands:
            return []
        replies = await session.round_trip(commands)
        again = [n for n, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if again:
            repeated = [commands[n] for n in again]
            loaded_and_replies = await session.round_trip([*LOAD_SCRIPTS, *repeated])
            for n, reply in zip(again, loaded_and_replies[len(LOAD_SCRIPTS) :], strict=True):
                replies[n] = reply
        return replies

    def _read(self, operation: Operation[Any], reply: Any) -> tuple[Any, Touched | None]:
        """Return the answer that a reply says, or an exception, and what it says of a task."""
        if isinstance(reply, ResponseError):
            if any(sign in str(reply) for sign in _CORRUPT):
                return self._corrupt(operation, reply), None
            return self._explained(reply), None
        try:
            return read_reply(operation, reply)
        except (ValueError, KeyError, TypeError) as error:
            return self._corrupt(operation, error), None

    def _corrupt(self, operation: Operation[Any], error: Exception) -> StateCorrupt:
        refusal = StateCorrupt(
            f"Redis at {self.address}: what is stored for task "
            f"{getattr(operation, 'task_id', '?')!r} is not a task's; use another state_prefix"
        )
        refusal.__cause__ = error
        return refusal

    def _explained(self, reply: Any) -> Any:
        if not isinstance(reply, ResponseError):
            return reply
        error = self._link.explain(reply)
        error.__cause__ = reply
        return error
