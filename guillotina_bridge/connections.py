"""Tasks leave some of a database's connections to others.

In PostgreSQL, a transaction of guillotina's keeps the connection that it has searched with, or
begun to write with, and its commit asks for a second one, without a time limit. When
transactions have all connections of a pool, none of them ever gets on: with the default pool,
13 that commit at the same time.

What is counted is tasks that have a connection, not tasks that run: one that computes, or
waits for other tasks, is in nobody's way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakSet

import anyio
from guillotina.db.interfaces import IPostgresStorage, ITransaction
from guillotina.interfaces import IDatabase

from .exceptions import AMQPConfigurationNotFoundError
from .service import get_service
from .task_vars import amqp_job

__all__ = ["limit_connections", "take_connection"]

_limited: Final[WeakSet[Any]] = WeakSet()
"""Storages."""

_rooms: Final[WeakKeyDictionary[Any, _Room]] = WeakKeyDictionary()
"""By connection manager: a pool, which storages can have in common."""


def limit_connections(db: IDatabase) -> None:
    """See to it that not too many tasks have a connection to a database at the same time.

    One less than the pool has connections; where requests are served as well, half of that
    many.
    """
    storage = db.storage
    if storage in _limited or not IPostgresStorage.providedBy(storage):
        return
    manager = storage.connection_manager
    if manager not in _rooms:
        size = storage.pool.get_max_size()
        _rooms[manager] = _Room(max(1, size // 2 if _has_requests() else size - 1))
    _stand_before(storage, _rooms[manager])
    _limited.add(storage)


def _has_requests() -> bool:
    try:
        return get_service().role == "embedded"
    except AMQPConfigurationNotFoundError:
        return False


async def take_connection(txn: ITransaction) -> None:
    """Give a transaction its connection, if it is about to need one.

    Its commit would wait for that as well, but a commit must not be cancelled.
    """
    if txn.storage in _limited and (txn.added or txn.modified or txn.deleted):
        await txn.get_connection()


def _stand_before(storage: Any, room: _Room) -> None:
    """Replace a storage's `open` and `close`, by which all transactions get connections.

    In the instance: guillotina has no other place for such a thing. Requests pass.
    """
    open_it, close_it = storage.open, storage.close
    owners: dict[Any, object] = {}

    async def open_connection() -> Any:
        job = amqp_job.get()
        if job is None:
            return await open_it()
        await room.enter(job)
        try:
            connection = await open_it()
        except BaseException:
            room.leave(job)
            raise
        owners[connection] = job
        return connection

    async def close_connection(connection: Any) -> None:
        try:
            await close_it(connection)
        finally:
            job = owners.pop(connection, None)
            if job is not None:
                room.leave(job)

    storage.open, storage.close = open_connection, close_connection


@dataclass(eq=False)
class _Guest:
    connections: int = 0
    is_inside: bool = False
    entering: anyio.Lock = field(default_factory=anyio.Lock)


class _Room:
    """Has so many places, each for a task with however many connections."""

    def __init__(self, places: int) -> None:
        self._places = anyio.CapacityLimiter(places)
        self._guests: dict[object, _Guest] = {}

    async def enter(self, job: object) -> None:
        """Note that a task is about to have one more connection; wait for its first one."""
        guest = self._guests.setdefault(job, _Guest())
        guest.connections += 1
        try:
            async with guest.entering:
                if not guest.is_inside:
                    await self._places.acquire_on_behalf_of(guest)
                    guest.is_inside = True
        except BaseException:
            self.leave(job)
            raise

    def leave(self, job: object) -> None:
        """Note that a task has one connection less."""
        guest = self._guests[job]
        guest.connections -= 1
        if guest.connections == 0:
            del self._guests[job]
            if guest.is_inside:
                self._places.release_on_behalf_of(guest)
