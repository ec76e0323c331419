"""What is delivered again, by whom it is run, and what is written of it."""

from __future__ import annotations

import anyio
import pytest

from amqp_tasks import RemoteTaskError, RetryPolicy, TaskApp, TaskStatus
from amqp_tasks.core.message import Message
from amqp_tasks.core.operations import Beat, Claim, Granted

from . import shop
from .harness import (
    MakeApp,
    ask,
    depth,
    error_messages,
    left_in_queues,
    memory,
    now,
    publish,
    record_of,
    ticks,
    until,
    until_status,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]


# ------------------------------------------------------------------ lost connections


async def test_a_task_whose_delivery_is_lost_while_it_runs_runs_once_and_ends_once(
    app: TaskApp, journal: shop.Journal
) -> None:
    async with app.worker():
        handle = await app.task(shop.nap)(30.0)
        await journal.wait_for("nap started")
        memory(app)[0].drop_sessions()
        assert await handle.result(timeout=40) == "nap"
        state = await handle.state()
        await until(lambda: left_in_queues(app) == 0)
        await anyio.sleep(60)
        assert await handle.state() == state
        assert state.attempt == 1
    assert journal.count("nap started") == 1
    assert record_of(app, handle).crashes == 0


@pytest.mark.parametrize("count", range(0, 60, 3))
async def test_a_connection_lost_in_any_phase_loses_no_task_and_runs_none_twice(
    app: TaskApp, journal: shop.Journal, count: int
) -> None:
    async with app.worker():
        handle = await app.task(shop.echo)("here")
        await ticks(count)
        memory(app)[0].drop_sessions()
        assert await handle.result(timeout=40) == "here"
        await until(lambda: left_in_queues(app) == 0)
    assert journal.count("echo") == 1


async def test_an_attempt_that_fails_while_the_connection_is_lost_is_tried_again_once(
    app: TaskApp, journal: shop.Journal
) -> None:
    async with app.worker():
        handle = await app.task(retry=RetryPolicy(max_retries=1, delay=5))(shop.fail_after)(10.0)
        await journal.wait_for("fail_after started")
        await anyio.sleep(9.99)
        memory(app)[0].drop_sessions()
        assert await handle.join(timeout=100) is TaskStatus.ERRORED
        await until(lambda: left_in_queues(app) == depth(app, "-error") == 1)
    assert journal.count("fail_after started") == 2


async def test_a_consumer_that_was_cancelled_comes_back(app: TaskApp) -> None:
    add = app.task(shop.add)
    async with app.worker():
        assert await (await add(1)).result(timeout=10) == 2
        memory(app)[0].delete_queue("shop")
        await anyio.sleep(1)
        assert await (await add(1)).result(timeout=20) == 2


# -------------------------------------------------------------------- many workers


async def test_two_workers_share_the_work(make_app: MakeApp, journal: shop.Journal) -> None:
    app = make_app(max_running_tasks=3)
    task = app.task(shop.count_running)
    async with app.worker() as one, app.worker() as other:
        handles = [await task(10.0) for _ in range(12)]
        for handle in handles:
            await handle.join(timeout=100)
    assert journal.most_running == 6
    owners = [record_of(app, handle).owner for handle in handles]
    assert {owners.count(one.id), owners.count(other.id)} == {6}


async def test_the_tasks_of_a_worker_that_leaves_are_run_by_the_other(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(shutdown_grace=0, max_running_tasks=5)
    nap = app.task(shop.nap)
    async with app.worker() as stays:
        async with app.worker() as leaves:
            handles = [await nap(10.0) for _ in range(10)]
            await journal.wait_for_count("nap started", 10)
            owners = [record_of(app, handle).owner for handle in handles]
            assert owners.count(leaves.id) == owners.count(stays.id) == 5
        for handle in handles:
            assert await handle.result(timeout=100) == "nap"
            assert record_of(app, handle).owner == stays.id
        assert {record_of(app, handle).crashes for handle in handles} == {0}


# -------------------------------------------------------------------- dead workers


async def running_elsewhere(app: TaskApp, message: Message, crashes: int = 0) -> None:
    """Have a worker that is not there run a task, as the last of several that died of it."""
    claim = Claim(
        task_id=message.task_id,
        name=message.func,
        job=message.body.decode(),
        attempt=1,
        lease="dead 0/1",
        now=now(),
        ttl=1000,
    )
    assert isinstance(await ask(app, claim), Granted)
    for number in range(crashes):
        again = Claim(
            task_id=message.task_id,
            name=message.func,
            job=message.body.decode(),
            attempt=1,
            lease=f"dead {number + 1}/1",
            now=now(),
            ttl=1000,
            lost_lease=f"dead {number}/1",
        )
        assert await ask(app, again) == Granted(record_of(app, "x").fence, number + 1)


async def test_the_task_of_a_worker_that_has_died_is_taken_over_when_its_presence_is_gone(
    app: TaskApp, journal: shop.Journal
) -> None:
    message = Message.compose(task_id="x", func=app.task(shop.echo).name, args=["here"])
    await running_elsewhere(app, message)
    fence = record_of(app, "x").fence
    await ask(app, Beat(owner="dead 0", ttl=8, info="{}"))
    async with app.worker() as worker:
        await publish(app, message)
        await anyio.sleep(7.9)
        assert journal.count("echo") == 0
        await journal.wait_for("echo", within=1.5)
        assert await app.handle("x").result(timeout=10) == "here"
        state = await app.handle("x").state()
        assert (state.attempt, state.worker) == (1, worker.id)
        await until(lambda: left_in_queues(app) == 0)
    assert record_of(app, "x").crashes == 1
    assert record_of(app, "x").fence > fence


async def test_a_task_that_took_down_too_many_workers_goes_to_the_error_queue(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(max_crashes=3)
    message = Message.compose(task_id="x", func=app.task(shop.echo).name, args=["here"])
    await running_elsewhere(app, message, crashes=2)
    async with app.worker():
        await publish(app, message)
        with pytest.raises(RemoteTaskError, match="3 workers died") as caught:
            await app.handle("x").result(timeout=10)
        assert caught.value.reason == "crashed_worker"
        await until(lambda: depth(app, "-error"))
    ((_, headers),) = error_messages(app)
    assert headers["error-reason"] == "crashed_worker"
    assert journal.count("echo") == 0


async def test_a_task_that_took_down_fewer_workers_is_started_again(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(max_crashes=3)
    message = Message.compose(task_id="x", func=app.task(shop.echo).name, args=["here"])
    await running_elsewhere(app, message, crashes=1)
    async with app.worker():
        await publish(app, message)
        assert await app.handle("x").result(timeout=10) == "here"
    assert record_of(app, "x").crashes == 2


async def test_a_worker_whose_task_was_taken_over_stops_it_and_writes_nothing(
    app: TaskApp, journal: shop.Journal
) -> None:
    async with app.worker():
        handle = await app.task(shop.tell_reason)()
        await journal.wait_for("tell_reason started")
        record = record_of(app, handle)
        claim = Claim(
            task_id=handle.task_id,
            name=record.name,
            job=record.job,
            attempt=1,
            lease="other/1",
            now=now() + 1,
            ttl=1000,
            lost_lease=record.lease,
        )
        assert isinstance(await ask(app, claim), Granted)
        await ask(app, Beat(owner="other", ttl=1000, info="{}"))
        await journal.wait_for("reason lease_lost", within=2)
        await anyio.sleep(5)
        assert record_of(app, handle).owner == "other"
        assert await handle.status() is TaskStatus.RUNNING


# ----------------------------------------------------------------- an emptied store


async def test_tasks_that_wait_when_the_store_is_emptied_still_run(
    app: TaskApp, journal: shop.Journal
) -> None:
    echo = app.task(shop.echo)
    async with app.connect():
        first, later = await echo(1), await echo.options(countdown=20)(2)
        memory(app)[1].clear()
    async with app.worker():
        await journal.wait_for_count("echo", 2)
        assert await first.result(timeout=10) == 1
        assert await later.result(timeout=10) == 2


async def test_the_end_of_a_task_that_runs_when_the_store_is_emptied_is_recorded(
    app: TaskApp, journal: shop.Journal
) -> None:
    async with app.worker():
        finished = await app.task(shop.nap)(20.0)
        errored = await app.task(retry=RetryPolicy(max_retries=0))(shop.fail_after)(20.0)
        await journal.wait_for("fail_after started")
        memory(app)[1].clear()
        await anyio.sleep(30)
        assert await finished.result(timeout=0) == "nap"
        with pytest.raises(RemoteTaskError, match="after a while"):
            await errored.result(timeout=0)
    assert journal.count("nap started") == 1


@pytest.mark.parametrize("first", ["store", "broker"])
async def test_a_store_emptied_and_a_connection_lost_together_do_not_end_the_worker(
    app: TaskApp, journal: shop.Journal, first: str
) -> None:
    async with app.worker():
        handle = await app.task(shop.nap)(20.0)
        await journal.wait_for("nap started")
        broker, store = memory(app)
        for act in (store.clear, broker.drop_sessions)[:: 1 if first == "store" else -1]:
            act()
        await anyio.sleep(30)
        assert await handle.result(timeout=0) == "nap"
        assert await (await app.task(shop.add)(1)).result(timeout=10) == 2
        await until(lambda: left_in_queues(app) == 0)
    assert journal.count("nap started") == 1


async def test_a_retry_that_waits_when_the_store_is_emptied_still_runs(
    app: TaskApp, journal: shop.Journal
) -> None:
    async with app.worker():
        handle = await app.task(retry=RetryPolicy(delay=5))(shop.fail_until)(2)
        await until_status(handle, TaskStatus.RETRYING)
        memory(app)[1].clear()
        await journal.wait_for_count("fail_until", 2)
        assert await handle.result(timeout=10) == 2
