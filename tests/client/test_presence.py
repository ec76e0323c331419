"""Who waits for children has to be seen alive, or they are canceled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio
import pytest

from amqp_tasks import StateStoreUnavailable, TaskApp, TaskStatus
from amqp_tasks.core.operations import Beat, Operation
from amqp_tasks.drivers.memory import MemoryStore

from ..runtime import shop
from ..runtime.harness import MakeApp, memory, now, rewire, ticks

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]


class FaintStore(MemoryStore):
    """A store that takes a second for a sign of life, and refuses as many as it is told to."""

    refuses = 0

    async def apply(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        if any(isinstance(one, Beat) for one in operations):
            await anyio.sleep(1)
            if self.refuses:
                self.refuses -= 1
                raise StateStoreUnavailable("memory://: nobody answers")
        return await super().apply(operations)


async def have_a_child(app: TaskApp) -> None:
    async with app.remote_task_group() as group:
        child = await group.start(shop.journal.task(shop.add), 1)
    assert await child.result(timeout=0) == 2


@pytest.mark.parametrize("count", range(10))
async def test_a_first_group_that_is_cancelled_in_any_phase_does_no_harm_to_the_next(
    app: TaskApp, count: int
) -> None:
    app.task(shop.add)
    async with app.worker(), app.connect():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(have_a_child, app)
            await ticks(count)
            tasks.cancel_scope.cancel()
        with anyio.fail_after(10):
            await have_a_child(app)


async def test_a_first_group_that_cannot_be_opened_does_no_harm_to_the_next(app: TaskApp) -> None:
    store = FaintStore(now)
    rewire(app, store=store)
    app.task(shop.add)
    async with app.worker(), app.connect():
        store.refuses = 1
        with pytest.raises(StateStoreUnavailable):
            await have_a_child(app)
        await have_a_child(app)


async def test_groups_that_are_opened_at_the_same_time_wait_for_the_first_sign_of_life(
    app: TaskApp,
) -> None:
    rewire(app, store=FaintStore(now))
    app.task(shop.add)
    async with app.worker(), app.connect(), anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(have_a_child, app)
            await anyio.sleep(0.1)


async def test_a_store_that_is_emptied_does_not_cancel_the_children_of_the_living(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(presence_ttl=8, cancel_poll_interval=1)
    nap = app.task(shop.nap)
    async with app.worker(), app.connect():
        async with app.remote_task_group() as group:
            child = await group.start(nap, 30.0)
            await journal.wait_for("nap started")
            # Of all that was there, the sign of life alone is missing.
            memory(app)[1]._presence.clear()
        assert await child.status() is TaskStatus.FINISHED
