"""A worker: the tree of task groups on both loops.

::

    task loop   executor                  outlives all below: it owes them answers
                └─ I/O loop   state       the store's client
                              ├─ presence, cancel watch, the watchdog's records
                              └─ intake   one task per delivery
                                 └─ link  the broker's connection

Each level can count on the ones above it until it has ended itself: deliveries are
settled while the broker is connected, and the presence is there until the last attempt
has stopped.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskStatus

from ..core.message import FilterExtra
from ..core.operations import AppendEvents
from ..registry import TaskRegistry
from ..settings import Settings
from .batching import StateClient
from .beacon import Beacon
from .cancellation import CancelWatch
from .consumer import Consumer
from .executor import Executor, Middleware
from .failures import single_error
from .intake import Intake
from .io_loop import IoLoop
from .link import Link, Servers
from .presence import Census, Presence, new_incarnation
from .producer import Producer
from .records import Records
from .watchdog import open_watchdog

__all__ = ["Worker", "open_worker"]

log = logging.getLogger(__name__)


class Worker:
    """A running worker, as its surroundings see it.

    Attributes:
        id: its incarnation, which is in the states of the tasks it runs.
    """

    def __init__(self, io: IoLoop, service: _WorkerService) -> None:
        self.id = service.owner
        self.producer = service.producer
        """For tasks that queue tasks."""
        self._io = io
        self._service = service
        self._ended = anyio.Event()

    def stop(self, grace: float) -> None:
        """Take no more tasks; cancel those that still run in `grace` seconds.

        May be called again with a shorter grace. Returns at once; see `wait_ended`.
        """
        self._io.post(self._service.stop, grace)

    async def wait_ended(self) -> None:
        """Return when it has stopped and settled everything."""
        await self._ended.wait()

    async def serve(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Run it, until it is stopped; what `open_worker` starts."""
        try:
            await self._io.serve(self._service.run, task_status=task_status)
        finally:
            self._ended.set()


class _WorkerService:
    """The part of a worker that runs on the I/O loop, and is made there."""

    def __init__(
        self,
        io: IoLoop,
        executor: Executor,
        servers: Servers,
        registry: TaskRegistry,
        settings: Settings,
        clock: Callable[[], float],
        filter_extra: FilterExtra | None,
    ) -> None:
        self.owner = new_incarnation()
        store = servers.make_store()
        self._state = state = StateClient(store)
        self._link = link = Link(servers.make_broker(), state, servers.topology, settings)
        self.producer = Producer(
            link,
            store,
            state,
            owner=self.owner,
            presence=None,  # a worker has one anyway
            state_ttl=settings.state_ttl,
            clock=clock,
            filter_extra=filter_extra,
        )
        if settings.beacon_ttl:
            link.beacon = Beacon(servers.topology, self.owner, settings.beacon_ttl)
        census = Census(state, self.owner, settings.presence_ttl)
        consumer = Consumer(
            io,
            link,
            executor,
            registry,
            settings,
            owner=self.owner,
            census=census,
            clock=clock,
            filter_extra=filter_extra,
        )
        self._guards = consumer.guards
        self._intake = Intake(link, consumer, settings)
        self._watch = CancelWatch(
            store, state, self.owner, census, consumer.running, settings.cancel_poll_interval
        )
        info: dict[str, object] = {
            "host": platform.node(),
            "pid": os.getpid(),
            "queue": settings.queue,
        }
        self._presence = Presence(state, self.owner, settings.presence_ttl, info, census)
        self._stop_called = anyio.Event()
        self.records = Records(state, consumer, self.stop)

    async def append(self, task_id: str, fence: int, entry: str) -> None:
        """Append an entry to the event log of a task that runs here."""
        await self._state.ask(AppendEvents(task_id=task_id, fence=fence, entries=(entry,)))

    def stop(self, grace: float) -> None:
        self._intake.hurry(grace)
        self._stop_called.set()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Work until `stop` is called; cancelling this stops without any grace."""
        try:
            await self._run(task_status)
        finally:
            self.records.left.set()

    async def _run(self, task_status: TaskStatus[None]) -> None:
        async with anyio.create_task_group() as outside:
            outside.start_soon(self._stop_when_cancelled)
            # What is under way is ended in good order, whoever cancels.
            with anyio.CancelScope(shield=True):
                async with (
                    self._state.open(),
                    self.producer.open(),
                    anyio.create_task_group() as lives,
                ):
                    await lives.start(self._presence.run)
                    await lives.start(self._watch.run)
                    await lives.start(self.records.run)
                    await lives.start(self._guards.run)
                    await lives.start(self._intake.run)
                    try:
                        await self._serve(task_status)
                    finally:
                        # Also when the broker is lost for good: nobody else may start
                        # these tasks before they have stopped here.
                        self._intake.hurry(0)
                        with anyio.CancelScope(shield=True):
                            await self._intake.drain()
                    lives.cancel_scope.cancel()
            outside.cancel_scope.cancel()

    async def _serve(self, task_status: TaskStatus[None]) -> None:
        async with anyio.create_task_group() as tasks:
            with anyio.CancelScope() as starting:
                tasks.start_soon(self._cut_short, starting)
                await tasks.start(self._link.run)
            if not starting.cancelled_caught:
                task_status.started()
                await self._stop_called.wait()
                await self._intake.drain()
            tasks.cancel_scope.cancel()

    async def _cut_short(self, starting: anyio.CancelScope) -> None:
        await self._stop_called.wait()
        starting.cancel()

    async def _stop_when_cancelled(self) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            self.stop(0)


@asynccontextmanager
async def open_worker(
    io: IoLoop,
    servers: Servers,
    registry: TaskRegistry,
    settings: Settings,
    *,
    middleware: Sequence[Middleware] = (),
    clock: Callable[[], float],
    filter_extra: FilterExtra | None = None,
) -> AsyncGenerator[Worker, None]:
    """Run a worker for as long as the block; leaving the block stops it with its grace."""
    with single_error() as edge:
        # First of all, and left last: it watches while the worker starts and stops, too.
        async with open_watchdog(io, settings) as watchdog:
            executor = Executor(
                io,
                max_threads=settings.max_running_tasks,
                cancel_grace=settings.cancel_grace,
                middleware=middleware,
                clock=clock,
            )
            service = await io.make(
                _WorkerService, io, executor, servers, registry, settings, clock, filter_extra
            )
            if watchdog is not None:
                watchdog.report_to(service.records)

            async def append(task_id: str, fence: int, entry: str) -> None:
                await io.call(service.append, task_id, fence, entry)

            executor.append = append
            worker = Worker(io, service)
            async with anyio.create_task_group() as outer:
                # Nobody but `stop` ends it: a start that is cancelled would never return.
                with anyio.CancelScope(shield=True):
                    await outer.start(executor.run)
                try:
                    async with anyio.create_task_group() as inner:
                        await inner.start(worker.serve)
                        with edge.block():
                            yield worker
                        worker.stop(settings.shutdown_grace)
                finally:
                    executor.stop()
