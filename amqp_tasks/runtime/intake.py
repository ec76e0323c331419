"""How many deliveries are taken, and how a worker stops taking any."""

from __future__ import annotations

import logging
import math
from typing import Final

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup, TaskStatus

from ..abc import BrokerSession
from ..core.outcome import CancelReason
from ..exceptions import BrokerError
from ..settings import Settings
from .consumer import Consumer
from .link import Link, pauses
from .ticket import Ticket

__all__ = ["Intake"]

log = logging.getLogger(__name__)

SHORT_WAIT: Final = 1.0
"""Seconds for which a delivery may wait for a slot; tasks that end at once are common."""


class Intake:
    """Takes deliveries as long as there are free slots. `run` is its service.

    A delivery holds a slot from the moment it is taken until its verdict. Those that the
    broker has sent ahead and that nobody has taken are not claimed, and are given back
    when the worker stops.
    """

    def __init__(self, link: Link, consumer: Consumer, settings: Settings) -> None:
        self._link = link
        self._consumer = consumer
        self._settings = settings
        self._slots = anyio.Semaphore(settings.max_running_tasks)
        self._tasks: TaskGroup
        self._taking = anyio.CancelScope()
        self._patience: anyio.CancelScope | None = None
        self._patient_until = math.inf
        self._stopping = False
        self._open = 0
        self._all_closed = anyio.Event()
        link.use_session = self._use_session

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """See deliveries to their verdicts, whichever session they came from."""
        async with anyio.create_task_group() as self._tasks:
            task_status.started()
            await anyio.sleep_forever()

    def hurry(self, grace: float) -> None:
        """Have `drain` wait no longer than `grace` seconds from now."""
        self._patient_until = min(self._patient_until, anyio.current_time() + grace)
        if self._patience is not None:
            self._patience.deadline = self._patient_until

    async def drain(self) -> None:
        """Stop taking, let what runs finish while `hurry` allows it, and give back the rest.

        Returns when every delivery has its verdict, or, where a server does not answer,
        when it is clear that the broker will deliver them again.
        """
        self._stopping = True
        self._taking.cancel()
        self._consumer.stop()
        with anyio.CancelScope(deadline=self._patient_until) as self._patience:
            await self._wait_until_closed()
        await self.end_attempts()
        with anyio.move_on_after(self._settings.cancel_grace):
            await self._wait_until_closed()

    async def end_attempts(self) -> None:
        """Cancel what runs, and return when it has ended."""
        for running in self._consumer.running.values():
            running.cancel(CancelReason.SHUTDOWN)
        while self._consumer.running:
            with anyio.move_on_after(self._settings.cancel_grace) as grace:
                for running in list(self._consumer.running.values()):
                    await running.ended.wait()
                await anyio.lowlevel.checkpoint()
            if grace.cancelled_caught:
                log.error(
                    "these tasks were cancelled %g s ago and go on: %s",
                    self._settings.cancel_grace,
                    ", ".join(self._consumer.running),
                )

    async def _use_session(self, session: BrokerSession) -> None:
        pause = pauses()
        while not self._stopping:
            try:
                with anyio.CancelScope() as self._taking:
                    await self._take_from(session)
                if not self._stopping:
                    await anyio.sleep(pause())  # ended by the link, if the session is lost
                    log.warning("the consumer of %s was cancelled", self._settings.queue)
                    await session.declare(
                        self._link.topology.exchange, self._link.topology.always()
                    )
            except BrokerError as error:
                log.warning("cannot consume: %s", error)
                await anyio.sleep(pause())

    async def _take_from(self, session: BrokerSession) -> None:
        """Take deliveries until the consumer ends."""
        while await self._take_while_free(session):
            # What is held by copies holds slots and no deliveries, so the broker sends
            # what cannot start. It may start elsewhere, so it is not held here.
            await self._slots.acquire()
            self._slots.release()

    async def _take_while_free(self, session: BrokerSession) -> bool:
        """Return True when there are no slots, False when the consumer has ended."""
        prefetch = self._settings.max_running_tasks
        async with session.consume(self._link.topology.main.name, prefetch) as deliveries:
            async for delivery in deliveries:
                # In this order: a slot that waited for a delivery would be kept from the
                # tasks that want theirs back.
                try:
                    with anyio.move_on_after(SHORT_WAIT) as patience:
                        await self._slots.acquire()
                except BaseException:
                    delivery.requeue()
                    raise
                if patience.cancelled_caught:
                    delivery.requeue()
                    return True
                self._open += 1
                self._tasks.start_soon(self._see_through, Ticket(delivery, self._slots))
        return False

    async def _see_through(self, ticket: Ticket) -> None:
        try:
            await self._consumer.handle(ticket)
        finally:
            ticket.give_slot()
            self._open -= 1
            if not self._open:
                self._all_closed.set()

    async def _wait_until_closed(self) -> None:
        while self._open:
            self._all_closed = anyio.Event()
            await self._all_closed.wait()
