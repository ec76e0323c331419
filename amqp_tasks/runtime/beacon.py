"""Proof that a connection works both ways.

A beacon is a message that a worker sends to itself: published to a delay queue of its own,
expired from there into a beacon queue of its own, and consumed. It takes the way that tasks
take, so when none comes back, the connection is dead, whatever TCP says.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import AsyncIterator
from typing import Final

import anyio

from ..abc import BrokerSession, Delivery
from ..core.settlement import Publication
from ..core.topology import QueueSpec, Topology
from ..exceptions import BrokerError, BrokerUnavailable

__all__ = ["Beacon"]

log = logging.getLogger(__name__)

LOST_AFTER: Final = 2
"""Times the beacons' TTL without one, after which the connection counts as dead. The last
one may still have been on its way when it died: that makes three times the TTL."""


class Beacon:
    """Sends beacons and waits for them. `watch` is for one session after the other.

    Args:
        owner: this worker's incarnation, in the names of its queues.
        ttl: seconds that a beacon waits in its delay queue, and between two beacons.
    """

    def __init__(self, topology: Topology, owner: str, ttl: float) -> None:
        self._topology = topology
        self._owner = owner
        self._ttl = ttl
        self._numbers = itertools.count(1)

    async def watch(self, session: BrokerSession) -> str:
        """Return why the connection counts as dead, as soon as it does."""
        name = f"{self._owner}-{next(self._numbers)}"
        queue, delay = self._topology.beacon(name, ttl_ms=max(1, round(self._ttl * 1000)))
        try:
            with anyio.fail_after(LOST_AFTER * self._ttl):
                await session.declare(self._topology.exchange, [queue, delay])
        except TimeoutError:
            return f"no queue for beacons within {LOST_AFTER * self._ttl:g} s"
        except BrokerError as error:
            return str(error)
        reason = ""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._send, session, delay)
            reason = await self._receive(session, queue)
            tasks.cancel_scope.cancel()
        return reason

    async def _send(self, session: BrokerSession, delay: QueueSpec) -> None:
        publication = Publication(queue=delay, body=b"", headers={})
        while True:
            try:
                await session.publish(self._topology.exchange, publication, self._ttl)
            except BrokerError as error:
                log.debug("a beacon could not be sent: %s", error)
            await anyio.sleep(self._ttl)

    async def _receive(self, session: BrokerSession, queue: QueueSpec) -> str:
        """Return when none has come back for too long, and there is no excuse for it."""
        limit, excused_until = LOST_AFTER * self._ttl, -math.inf
        try:
            async with session.consume(queue.name, prefetch=LOST_AFTER + 1) as beacons:
                while True:
                    late, is_blocked = await self._take(beacons, limit), await session.is_blocked()
                    now = anyio.current_time()
                    if is_blocked:
                        # A broker that takes no messages (memory or disk alarm) lives.
                        log.warning("no beacon for %g s: the broker takes no messages", limit)
                    if is_blocked or late > self._ttl:  # or this process slept
                        # What was to be sent meanwhile is missing for a while afterwards.
                        excused_until = now + 2 * limit
                    elif now > excused_until:
                        return f"no beacon came back for {limit:g} s"
        except BrokerError as error:
            return str(error)

    async def _take(self, beacons: AsyncIterator[Delivery], limit: float) -> float:
        """Take beacons until none comes for `limit` seconds; return how late that was seen."""
        began, is_proved = anyio.current_time(), False
        with anyio.move_on_after(limit) as patience:
            async for beacon in beacons:
                beacon.ack()
                patience.deadline = anyio.current_time() + limit
                if not is_proved:
                    is_proved = True
                    took = anyio.current_time() - began
                    log.info("beacons come back, the first one in %.1f s", took)
            raise BrokerUnavailable("the broker has cancelled the consumer of the beacons")
        return anyio.current_time() - patience.deadline
