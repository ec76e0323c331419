"""Task states in memory."""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_right
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import anyio
import anyio.lowlevel
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from ...core.operations import (
    AppendEvents,
    Beat,
    CancelAnswer,
    Change,
    IsAlive,
    Leave,
    ListTasks,
    LogEntry,
    Operation,
    Poll,
    Polled,
    Read,
    ReadEvents,
    RequestCancel,
)
from ...core.record import TaskRecord
from ...core.rules import change

__all__ = ["MemoryStore"]


class MemoryStore:
    """A dict of records under the rules of `core.rules`.

    Args:
        clock: returns seconds since the epoch; the same clock as its user's.
    """

    address = "memory://"

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._records: dict[str, TaskRecord] = {}
        self._events: defaultdict[str, list[str]] = defaultdict(list)
        self._presence: dict[str, float] = {}
        self._expiries: list[tuple[float, str]] = []
        self._listeners: set[_MemoryListener] = set()

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None, None]:
        """Open; there is nothing that could refuse it."""
        await anyio.lowlevel.checkpoint()
        yield

    async def apply(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        await anyio.lowlevel.checkpoint()
        self._expire()
        return [self._answer(operation) for operation in operations]

    @asynccontextmanager
    async def listen(self) -> AsyncGenerator[_MemoryListener, None]:
        listener = _MemoryListener()
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)
            listener.close()

    def clear(self) -> None:
        """Forget everything, as a restart of an empty server does."""
        self._records.clear()
        self._events.clear()
        self._presence.clear()

    def _answer(self, operation: Operation[Any]) -> Any:
        match operation:
            case AppendEvents(task_id=task_id, fence=fence, entries=entries):
                record = self._records.get(task_id)
                if record is None or record.fence != fence:
                    return False
                self._events[task_id].extend(entries)
                return True
            case Beat(owner=owner, ttl=ttl):
                known = owner in self._presence
                self._presence[owner] = self._clock() + ttl
                return known
            case IsAlive(owner=owner):
                return owner in self._presence
            case Leave(owner=owner):
                self._presence.pop(owner, None)
                return None
            case Poll(task_id=task_id):
                record = self._records.get(task_id)
                return None if record is None else Polled(record.fence, record.cancel)
            case Read(task_id=task_id):
                record = self._records.get(task_id)
                return None if record is None else replace(record)
            case ReadEvents():
                return self._read_events(operation)
            case ListTasks():
                return self._list(operation)
            case _:
                return self._change(operation)  # type: ignore[arg-type]  # no others exist

    def _change(self, operation: Change) -> object:
        task_id = operation.task_id
        before = self._records.get(task_id)
        after, answer = change(before, operation)
        if after is None:
            self._records.pop(task_id, None)
            return answer
        self._records[task_id] = after
        if after.expires_at is not None:
            heapq.heappush(self._expiries, (after.expires_at, task_id))
        if after.status.ended and (before is None or not before.status.ended):
            self._announce(f"ended:{task_id}", after.status)
        if isinstance(operation, RequestCancel) and answer == CancelAnswer("requested"):
            self._announce(f"cancel:{after.owner}", task_id)
        return answer

    def _read_events(self, operation: ReadEvents) -> list[LogEntry]:
        entries = self._events.get(operation.task_id, [])
        first = int(operation.after or 0)
        if operation.newest:
            first = max(first, len(entries) - operation.limit)
        chosen = itertools.islice(enumerate(entries, 1), first, first + operation.limit)
        return [LogEntry(str(position), data) for position, data in chosen]

    def _list(self, operation: ListTasks) -> list[str]:
        ids = sorted(self._records)
        start = bisect_right(ids, operation.after) if operation.after is not None else 0
        matching = (
            task_id
            for task_id in ids[start:]
            if task_id.startswith(operation.prefix)
            and operation.status in (None, self._records[task_id].status)
        )
        return list(itertools.islice(matching, operation.limit))

    def _announce(self, topic: str, text: str) -> None:
        for listener in self._listeners:
            listener.announce(topic, text)

    def _expire(self) -> None:
        now = self._clock()
        for owner in [owner for owner, until in self._presence.items() if until <= now]:
            del self._presence[owner]
        while self._expiries and self._expiries[0][0] <= now:
            _, task_id = heapq.heappop(self._expiries)
            record = self._records.get(task_id)
            if record is not None and record.expires_at is not None and record.expires_at <= now:
                del self._records[task_id]
                self._events.pop(task_id, None)


class _MemoryListener:
    BUFFER = 10_000
    """Announcements that may wait; more are dropped, as announcements may be."""

    def __init__(self) -> None:
        self._topics: set[str] = set()
        self._send: MemoryObjectSendStream[tuple[str, str]]
        self._receive: MemoryObjectReceiveStream[tuple[str, str]]
        self._send, self._receive = anyio.create_memory_object_stream(self.BUFFER)

    async def subscribe(self, topic: str) -> None:
        await anyio.lowlevel.checkpoint()
        self._topics.add(topic)

    async def unsubscribe(self, topic: str) -> None:
        await anyio.lowlevel.checkpoint()
        self._topics.discard(topic)

    def __aiter__(self) -> AsyncIterator[tuple[str, str]]:
        return self._receive.__aiter__()

    def announce(self, topic: str, text: str) -> None:
        if topic in self._topics:
            with suppress(anyio.WouldBlock):
                self._send.send_nowait((topic, text))

    def close(self) -> None:
        self._send.close()
        self._receive.close()
