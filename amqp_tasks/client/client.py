"""An open connection of a producer, as the task loop sees it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskStatus as StartReport

from ..core.lifecycle import TaskStatus
from ..core.message import FilterExtra, Message
from ..core.operations import LogEntry, ReadEvents
from ..core.outcome import CancelReason
from ..core.record import TaskRecord
from ..runtime.batching import StateClient
from ..runtime.failures import single_error
from ..runtime.io_loop import IoLoop
from ..runtime.link import Link, Servers
from ..runtime.presence import Presence, new_incarnation
from ..runtime.producer import Producer
from ..settings import Settings

__all__ = ["Client", "open_client"]


class Client:
    """Carries a producer's calls to the I/O loop.

    Cancelling a call ends its waiting. A task whose call was cancelled while it was being
    queued may be in the queue; calling again with its id is safe.
    """

    def __init__(self, io: IoLoop, producer: Producer) -> None:
        self._io = io
        self._producer = producer

    async def enqueue(self, message: Message, keep_unqueued: bool = False) -> None:
        await self._io.call(self._producer.enqueue, message, keep_unqueued)

    async def read(self, task_id: str) -> TaskRecord:
        return await self._io.call(self._producer.read, task_id)

    async def events(self, question: ReadEvents) -> Sequence[LogEntry]:
        return await self._io.call(self._producer.events, question)

    async def cancel(self, task_id: str, reason: CancelReason = CancelReason.USER) -> bool:
        return await self._io.call(self._producer.cancel, task_id, reason)

    async def retry(self, task_id: str) -> bool:
        return await self._io.call(self._producer.retry, task_id)

    async def be_present(self) -> str:
        return await self._io.call(self._producer.be_present)

    async def wait(self, task_id: str) -> TaskRecord:
        return await self._io.call(self._producer.wait, task_id)

    async def list(
        self, prefix: str, status: TaskStatus | None, after: str | None, limit: int
    ) -> Sequence[TaskRecord]:
        return await self._io.call(self._producer.list, prefix, status, after, limit)


class _ClientService:
    """The part of a client that runs on the I/O loop, and is made there."""

    def __init__(
        self,
        servers: Servers,
        settings: Settings,
        clock: Callable[[], float],
        may_start_without: bool,
        may_lose: bool,
        filter_extra: FilterExtra | None,
    ) -> None:
        store = servers.make_store()
        self._state = StateClient(store)
        self._link = Link(
            servers.make_broker(),
            self._state,
            servers.topology,
            settings,
            may_start_without=may_start_without,
            may_lose=may_lose,
        )
        owner = new_incarnation()
        self.producer = Producer(
            self._link,
            store,
            self._state,
            owner=owner,
            presence=Presence(self._state, owner, settings.presence_ttl, {"role": "producer"}),
            state_ttl=settings.state_ttl,
            clock=clock,
            filter_extra=filter_extra,
        )

    async def run(self, *, task_status: StartReport[None] = anyio.TASK_STATUS_IGNORED) -> None:
        async with self._state.open(), self.producer.open(), anyio.create_task_group() as tasks:
            await tasks.start(self._link.run)
            task_status.started()


@asynccontextmanager
async def open_client(
    io: IoLoop,
    servers: Servers,
    settings: Settings,
    *,
    clock: Callable[[], float],
    may_start_without_broker: bool,
    may_lose_broker: bool,
    filter_extra: FilterExtra | None,
) -> AsyncGenerator[Client, None]:
    """Connect a producer for as long as the block."""
    with single_error() as edge:
        service = await io.make(
            _ClientService,
            servers,
            settings,
            clock,
            may_start_without_broker,
            may_lose_broker,
            filter_extra,
        )
        async with anyio.create_task_group() as tasks:
            await tasks.start(io.serve, service.run)
            try:
                with edge.block():
                    yield Client(io, service.producer)
            finally:
                tasks.cancel_scope.cancel()
