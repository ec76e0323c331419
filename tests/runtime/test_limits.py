"""How many tasks one worker runs, and what waits for a slot."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from amqp_tasks import TaskStatus
from amqp_tasks.core.message import Message

from . import shop
from .harness import MakeApp, memory, publish, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]


@pytest.mark.parametrize("limit", [1, 7])
async def test_a_worker_never_runs_more_than_max_running_tasks(
    make_app: MakeApp, journal: shop.Journal, limit: int
) -> None:
    app = make_app(max_running_tasks=limit)
    task = app.task(shop.count_running)
    async with app.worker():
        handles = [await task(1.0) for _ in range(3 * limit + 1)]
        for handle in handles:
            assert await handle.join(timeout=100) is TaskStatus.FINISHED
    assert journal.most_running == limit


@pytest.fixture
def no_collections() -> Iterator[None]:
    """Keep the collector from looking at many thousand living tasks again and again."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.patience(60)
@pytest.mark.usefixtures("no_collections")
@pytest.mark.parametrize(
    ("anyio_backend", "count"),
    [("asyncio-virtual", 10_000), ("trio-virtual", 3_000)],
    indirect=["anyio_backend"],
)
async def test_ten_thousand_tasks_sleep_in_one_worker_and_all_finish(
    make_app: MakeApp, journal: shop.Journal, count: int
) -> None:
    app = make_app(max_running_tasks=count, cancel_poll_interval=60, presence_ttl=600)
    task = app.task(shop.count_running)
    async with app.worker():
        await publish(
            app,
            *(
                Message.compose(task_id=str(number), func=task.name, args=[20.0])
                for number in range(count)
            ),
        )
        await until(lambda: journal.running == count)
    records = memory(app)[1]._records.values()
    assert len(records) == count
    assert {record.status for record in records} == {TaskStatus.FINISHED}


@pytest.mark.parametrize("children", [1, 10])
async def test_a_parent_and_its_children_need_one_slot_together(
    make_app: MakeApp, journal: shop.Journal, children: int
) -> None:
    app = make_app(max_running_tasks=1)
    app.task(shop.nap)
    async with app.worker():
        parent = await app.task(shop.lead_naps)(children, 1.0)
        assert await parent.result(timeout=100) == [f"nap {i}" for i in range(children)]


async def test_many_parents_and_their_children_need_one_slot_together(make_app: MakeApp) -> None:
    app = make_app(max_running_tasks=1)
    app.task(shop.nap)
    lead = app.task(shop.lead_naps)
    async with app.worker():
        parents = [await lead(3, 1.0) for _ in range(5)]
        for parent in parents:
            assert await parent.result(timeout=200) == ["nap 0", "nap 1", "nap 2"]


@pytest.mark.parametrize("seconds", [0.01, 30.0], ids=["shortly", "for_long"])
async def test_a_task_that_waits_for_another_s_result_lets_it_have_its_slot(
    make_app: MakeApp, seconds: float
) -> None:
    app = make_app(max_running_tasks=1)
    app.task(shop.nap)
    async with app.worker():
        waiting = await app.task(shop.nap_elsewhere)(seconds)
        assert await waiting.result(timeout=100) == "nap"


async def test_a_task_that_gave_its_slot_away_runs_no_more_than_once(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(max_running_tasks=1)
    app.task(shop.nap)
    async with app.worker():
        waiting = await app.task(shop.nap_elsewhere)(100.0)
        assert await waiting.result(timeout=200) == "nap"
        state = await waiting.state()
        assert state.attempt == 1
    assert journal.count("nap started") == 1
