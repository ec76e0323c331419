"""Nobody is taken for dead for want of a sign of life that nobody could have given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio
import pytest

from amqp_tasks import StateStoreUnavailable, TaskApp, TaskStatus
from amqp_tasks.core.message import Message
from amqp_tasks.core.operations import Beat, Operation
from amqp_tasks.drivers.memory import MemoryStore

from . import shop
from .harness import MakeApp, ask, memory, now, publish, record_of, rewire

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]


class AbsentStore(MemoryStore):
    is_away = False

    async def apply(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        if self.is_away:
            await anyio.sleep(0.5)
            raise StateStoreUnavailable("memory://: nobody answers")
        return await super().apply(operations)


def second_worker_of(app: TaskApp, make_app: MakeApp, **settings: Any) -> TaskApp:
    """Make an app that works for the same servers."""
    other = make_app(**settings)
    other.__dict__["_memory"] = memory(app)
    other.task(shop.nap)
    return other


async def test_after_the_store_was_away_nothing_is_taken_from_the_living(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(presence_ttl=8)
    store = AbsentStore(now)
    rewire(app, store=store)
    nap = app.task(shop.nap)
    other = second_worker_of(app, make_app, presence_ttl=8)
    async with app.worker():
        handle = await nap(100.0)
        await journal.wait_for("nap started")
        async with other.worker():
            await anyio.sleep(20)
            store.is_away = True
            # Copies come by as soon as there is a store to ask.
            memory(app)[0].drop_sessions()
            await anyio.sleep(30)
            store.is_away = False
            assert await handle.join(timeout=200) is TaskStatus.FINISHED
    assert journal.count("nap started") == 1
    assert record_of(app, handle).crashes == 0


async def test_a_store_that_was_emptied_of_signs_of_life_proves_nobody_dead(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(presence_ttl=8)
    nap = app.task(shop.nap)
    other = second_worker_of(app, make_app, presence_ttl=8)
    async with app.worker(), other.worker():
        handle = await nap(100.0)
        await journal.wait_for("nap started")
        await anyio.sleep(20)
        for _ in range(5):
            memory(app)[1]._presence.clear()
            memory(app)[0].drop_sessions()
            await anyio.sleep(3)
        assert await handle.join(timeout=200) is TaskStatus.FINISHED
    assert journal.count("nap started") == 1


async def test_who_is_gone_for_as_long_as_a_sign_counts_is_gone(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(presence_ttl=8, cancel_poll_interval=1)
    async with app.worker():
        await anyio.sleep(10)
        await ask(app, Beat(owner="elsewhere", ttl=5, info="{}"))
        tell = app.task(shop.tell_reason)
        child = Message.compose(task_id="child", func=tell.name, parent_owner="elsewhere")
        await publish(app, child)
        await journal.wait_for("tell_reason started")
        await journal.wait_for("reason parent", within=7)
