"""A connection that looks alive and carries nothing is noticed, and replaced."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from amqp_tasks import BrokerUnavailable, TaskStatus
from amqp_tasks.core.settlement import Publication
from amqp_tasks.drivers.memory import MemoryBroker

from . import shop
from .harness import MakeApp, left_in_queues, now, rewire, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]


class SilentSession:
    """A session that swallows what is published, when its broker is told so."""

    def __init__(self, session: Any, broker: SilentBroker) -> None:
        self._session = session
        self._broker = broker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    async def is_blocked(self) -> bool:
        return self._broker.is_blocked

    async def publish(self, exchange: str, publication: Publication, timeout: float) -> None:
        if not self._broker.is_silent:
            await self._session.publish(exchange, publication, timeout)


class SilentBroker(MemoryBroker):
    """A broker whose connection can fall silent; a new one is not."""

    is_silent = False
    is_blocked = False
    sessions = 0

    @asynccontextmanager
    async def session(self) -> AsyncGenerator[Any, None]:
        async with super().session() as session:
            self.sessions += 1
            self.is_silent = False
            yield SilentSession(session, self)


async def test_a_connection_without_beacons_is_replaced_and_what_runs_goes_on(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app, broker = make_app(beacon_ttl=2), SilentBroker(now)
    rewire(app, broker=broker)
    async with app.worker():
        handle = await app.task(shop.nap)(60.0)
        await journal.wait_for("nap started")
        await anyio.sleep(20)
        assert broker.sessions == 1
        broker.is_silent, began = True, now()
        await until(lambda: broker.sessions == 2, within=20)
        assert now() - began <= 3 * 2 + 1, "within three TTLs and a short pause"
        assert await handle.join(timeout=120) is TaskStatus.FINISHED
        await until(lambda: left_in_queues(app) == 0)
        assert broker.sessions == 2
    assert journal.count("nap started") == 1


async def test_a_worker_can_be_told_to_exit_instead(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app, broker = make_app(beacon_ttl=2, on_beacon_lost="exit"), SilentBroker(now)
    rewire(app, broker=broker)

    async def work() -> None:
        async with app.worker():
            await app.task(shop.nap)(600.0)
            await journal.wait_for("nap started")
            broker.is_silent = True
            await anyio.sleep_forever()

    with pytest.raises(
        BrokerUnavailable, match=r"no beacon came back for 4 s.*on_beacon_lost=exit"
    ):
        await work()


async def test_a_broker_that_takes_no_messages_at_present_is_alive(make_app: MakeApp) -> None:
    app, broker = make_app(beacon_ttl=2), SilentBroker(now)
    rewire(app, broker=broker)
    async with app.worker():
        broker.is_silent = broker.is_blocked = True
        await anyio.sleep(60)
        assert broker.sessions == 1
        broker.is_silent = broker.is_blocked = False
        await anyio.sleep(60)
        assert broker.sessions == 1


async def test_without_a_ttl_there_are_no_beacons(make_app: MakeApp) -> None:
    app, broker = make_app(beacon_ttl=0), SilentBroker(now)
    rewire(app, broker=broker)
    async with app.worker():
        broker.is_silent = True
        await anyio.sleep(600)
        assert broker.sessions == 1
        assert not [queue for queue in broker._queues.values() if queue.spec.exclusive]
