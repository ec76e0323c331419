"""The error queue on the I/O loop: its letters are read without removing, replayed, dropped.

A letter is a message in the error queue. Reading takes it as any consumer would and gives
it no verdict, so when the broker loses the reader, for whatever reason, it is where it was.

Letters are read in pages. A page is a connection of its own with one consumer, whose
prefetch is the page's size. Closing the connection gives back, in their order, all letters
that have no verdict, without anybody having kept them: the broker holds what was read, not
this process, and a queue of any length is read in little memory. Pages are closed in the
order in which they were opened, so that looking at a queue leaves it as it was. (Taking
letters out of several pages may not: RabbitMQ 3.10 was seen to put the beginning of a page of
a quorum queue behind the next one.)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from typing import Final

import anyio
from anyio.abc import TaskGroup, TaskStatus
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from ..abc import Broker, BrokerSession, Delivery
from ..core import lifecycle
from ..core.message import FilterExtra, Message, decode
from ..core.operations import Discharge, Read
from ..core.record import Owed, TaskRecord
from ..core.settlement import Publication
from ..exceptions import ArgumentsError, BrokerUnavailable, TaskCanceled
from ..settings import Settings
from .batching import StateClient
from .link import Servers
from .reopening import as_new, reopening

__all__ = ["MAX_HELD", "ErrorDesk", "Found", "Replayed"]

PAGE: Final = 5_000
"""Letters in a page. One that reads faster than its letters are looked at holds as many."""

MAX_HELD: Final = 13 * PAGE
"""Letters that can be held unacknowledged, and so be looked at, at the same time. What is
replayed or dropped makes room for others."""

BATCH: Final = 100
"""Letters that cross from loop to loop in one go."""

SILENCE: Final = 0.5
"""Seconds without a letter after which is asked whether there are any left: some of those
that were counted may have expired since, or have been taken by somebody else."""
MAX_SILENCES: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What replaying a letter came to."""

    queued: bool
    """False if it had been replayed before; it only was still there."""
    deadline_dropped: bool = False
    """True if its deadline was over, and the task has none now."""


class _Page:
    """A connection that letters are read on. `run` is the task behind it."""

    def __init__(self, broker: Broker, queue: str, at_most: int) -> None:
        self.opened = anyio.Event()
        self.ready = 0
        """Letters in the queue before this page took any."""
        self._broker = broker
        self._queue = queue
        self._at_most = at_most
        self._held = 0
        self._prefetch = 0
        self._session: BrokerSession
        self._deliveries: AsyncIterator[Delivery]
        self._turning = anyio.Event()
        self._turned = anyio.Event()
        self._leaving = anyio.Event()
        self._left = anyio.Event()

    @property
    def is_full(self) -> bool:
        """True if the broker sends no more before something has its verdict."""
        return self._held >= self._prefetch

    async def run(self) -> None:
        """Connect and consume; keep the connection until `close`, whoever is cancelled."""
        try:
            # The connection is left first and the consumer with it. The other way round what
            # was sent ahead would be given back before, and so in front of, what was read.
            async with AsyncExitStack() as consuming, self._broker.session() as self._session:
                self.ready = await self._session.count(self._queue)
                self._prefetch = min(self.ready, self._at_most, PAGE)
                if self._prefetch:
                    consumer = self._session.consume(self._queue, self._prefetch)
                    self._deliveries = await consuming.enter_async_context(consumer)
                with anyio.CancelScope(shield=True):
                    self.opened.set()
                    await self._turning.wait()
                    if not self._leaving.is_set():
                        await consuming.aclose()
                        self._turned.set()
                        await self._leaving.wait()
        finally:
            self._turned.set()
            self._left.set()

    async def take(self) -> Delivery | None:
        """Return the next delivery; None if there is none although one was counted.

        Raises:
            BrokerUnavailable: the broker has ended the reading, or sends nothing.
        """
        empty = 0
        for _ in range(MAX_SILENCES):
            with anyio.move_on_after(SILENCE):
                async for delivery in self._deliveries:
                    self._held += 1
                    return delivery
                raise BrokerUnavailable(
                    f"queue {self._queue!r} cannot be read any more: the connection to "
                    f"{self._broker.address} was lost, or the queue deleted"
                )
            # Twice, because a letter may be on its way to us that the queue counts no more.
            empty = 0 if await self._session.count(self._queue) else empty + 1
            if empty == 2:
                return None
        raise BrokerUnavailable(
            f"{self._broker.address} sends nothing of queue {self._queue!r}, though there is "
            "something in it; does another consumer have it for itself?"
        )

    def ack(self, delivery: Delivery) -> None:
        self._held -= 1
        delivery.ack()

    async def turn(self) -> None:
        """Take no more, for this page is full; what was taken stays with it.

        When it returns, what the broker has sent since, where there was room again, is back
        in the queue, and the next page begins with it.
        """
        self._turning.set()
        await self._turned.wait()

    async def close(self) -> None:
        """Give back what has no verdict; return when the connection is closed."""
        self._leaving.set()
        self._turning.set()
        await self._left.wait()


@dataclass(slots=True, eq=False)
class Found:
    """A letter that was read and waits for a verdict, or to be given back."""

    position: int
    """From 1, the oldest."""
    delivery: Delivery
    page: _Page
    is_settled: bool = False

    def ack(self) -> None:
        self.check_open()
        self.is_settled = True
        self.page.ack(self.delivery)

    def check_open(self) -> None:
        if self.is_settled:
            raise ArgumentsError(f"letter {self.position} was replayed or dropped already")


class _Reader:
    """Reads all letters that are there when it starts. `run` is its service."""

    def __init__(self, broker: Broker, queue: str) -> None:
        self.total = 0
        self.unseen = 0
        self._broker = broker
        self._queue = queue
        self._pages: list[_Page] = []
        self._receive: MemoryObjectReceiveStream[Found]

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Read, ahead of whoever takes, until cancelled; then give back what has no verdict."""
        send, self._receive = anyio.create_memory_object_stream[Found](BATCH)
        with self._receive:
            async with anyio.create_task_group() as tasks:
                try:
                    with send:
                        await self._read(send, tasks, task_status)
                    await anyio.sleep_forever()
                finally:
                    with anyio.CancelScope(shield=True):  # the drivers limit what they take
                        for page in self._pages:
                            await page.close()

    async def take(self) -> list[Found]:
        """Return the letters that are next, as many as there are; none after the last."""
        batch: list[Found] = []
        with suppress(anyio.EndOfStream, anyio.WouldBlock):
            batch.append(await self._receive.receive())
            while len(batch) < BATCH:
                batch.append(self._receive.receive_nowait())
        return batch

    async def _read(
        self,
        send: MemoryObjectSendStream[Found],
        tasks: TaskGroup,
        task_status: TaskStatus[None],
    ) -> None:
        page = await self._open_page(tasks, PAGE)
        self.total = self.unseen = page.ready
        task_status.started()
        for position in range(1, self.total + 1):
            if page.is_full:
                if len(self._pages) * PAGE >= MAX_HELD:
                    return
                await page.turn()
                page = await self._open_page(tasks, self.unseen)
                if not page.ready:
                    break
            delivery = await page.take()
            if delivery is None:
                break
            self.unseen -= 1
            await send.send(Found(position, delivery, page))
        self.unseen = 0

    async def _open_page(self, tasks: TaskGroup, at_most: int) -> _Page:
        page = _Page(self._broker, self._queue, at_most)
        self._pages.append(page)
        tasks.start_soon(page.run)
        await page.opened.wait()
        return page


class ErrorDesk:
    """Reads, replays and drops letters. Made on the I/O loop; `run` is its service.

    Args:
        clock: seconds since the epoch.
        filter_extra: see `decode`.
    """

    def __init__(
        self,
        servers: Servers,
        settings: Settings,
        clock: Callable[[], float],
        filter_extra: FilterExtra | None,
    ) -> None:
        self._broker = servers.make_broker()
        self._state = StateClient(servers.make_store())
        self._topology = servers.topology
        self._reader = _Reader(self._broker, servers.topology.error.name)
        self._session: BrokerSession
        self._publish_timeout = settings.publish_timeout
        self._clock = clock
        self._filter_extra = filter_extra
        self._replaying: dict[str, anyio.Event] = {}
        self._replayed: set[str] = set()

    @property
    def total(self) -> int:
        """How many letters there were at the start."""
        return self._reader.total

    @property
    def unseen(self) -> int:
        """How many of them have not been read: yet, or because too many are held."""
        return self._reader.unseen

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Connect, and read until cancelled.

        Raises:
            BrokerError, StateStoreError: a server cannot be used, or was lost; there is no
                error queue.
        """
        async with (
            self._state.open(),
            self._broker.session() as self._session,
            anyio.create_task_group() as tasks,
        ):
            await tasks.start(self._reader.run)
            task_status.started()

    async def take(self) -> list[Found]:
        """Return the letters that are next; none after the last."""
        return await self._reader.take()

    async def read(self, task_id: str) -> TaskRecord | None:
        """Return the state of a task, if it is known."""
        return await self._state.ask(Read(task_id=task_id))

    async def drop(self, found: Found) -> None:
        """Remove a letter for good."""
        found.ack()

    async def replay(self, found: Found) -> Replayed:
        """Put a letter's task back into the main queue, as if it were new.

        Of several letters of one task the first is replayed, the others are removed.

        Raises:
            DecodeError: it is no message of ours.
            TaskCanceled: somebody has canceled the task, after an earlier replay.
            PublishFailed, StateStoreError: it is still there; replaying again is safe.
        """
        found.check_open()
        message = decode(found.delivery.body, found.delivery.headers, self._filter_extra)
        task_id = message.task_id
        while (other := self._replaying.get(task_id)) is not None:
            await other.wait()
        if task_id in self._replayed:
            found.ack()
            return Replayed(queued=False)
        self._replaying[task_id] = ended = anyio.Event()
        try:
            replayed = await self._replay(message, by_broker=_was_moved_by_broker(found.delivery))
            self._replayed.add(task_id)
        finally:
            del self._replaying[task_id]
            ended.set()
        found.ack()
        return replayed

    async def _replay(self, message: Message, *, by_broker: bool) -> Replayed:
        # State, message, state, and only then the letter: killed in between, the next replay
        # finds the state still owing, or else that the message is on its way.
        new = as_new(message, now=self._clock())
        reopened = await self._state.ask(reopening(new, now=self._clock()))
        if reopened.status is lifecycle.TaskStatus.CANCELED:
            raise TaskCanceled(f"task {new.task_id!r} was canceled; it is not replayed")
        if not reopened.owed:
            if by_broker and not reopened.status.ended:
                # The broker gave up on it, not we: its state goes on waiting for this very
                # message. Where another copy is on its way, the claim sees to it.
                await self._publish(replace(message, parked=0))
                return Replayed(queued=True)
            return Replayed(queued=False)
        await self._publish(new)
        await self._state.ask(
            Discharge(
                task_id=new.task_id,
                owed=Owed.PUBLISH,
                attempt=new.attempt,
                ttl=None,
                now=self._clock(),
            )
        )
        return Replayed(queued=True, deadline_dropped=new.deadline != message.deadline)

    async def _publish(self, message: Message) -> None:
        publication = Publication(
            queue=self._topology.main, body=message.body, headers=message.headers()
        )
        await self._session.publish(self._topology.exchange, publication, self._publish_timeout)


def _was_moved_by_broker(delivery: Delivery) -> bool:
    """Tell whether a letter was dead-lettered by the broker and not by a worker."""
    return "error-reason" not in delivery.headers
