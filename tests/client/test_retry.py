"""Errored tasks that start anew."""

from __future__ import annotations

import anyio
import pytest

from amqp_tasks import RemoteTaskError, RetryPolicy, Task, TaskApp, TaskNotFound, TaskStatus

from ..runtime import shop
from ..runtime.harness import depth, left_in_queues, until, until_status

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]

ONCE = RetryPolicy(max_retries=0)


async def fail_before(number: int) -> int:
    """Fail until it is started for that time."""
    shop.journal.note("start")
    if shop.journal.count("start") < number:
        raise LookupError
    return number


def fails_before(app: TaskApp) -> Task[[int], int]:
    return app.task(retry=ONCE)(fail_before)


async def test_an_errored_task_starts_anew(app: TaskApp) -> None:
    async with app.worker():
        handle = await fails_before(app)(3)
        for _ in range(2):
            assert await handle.join(timeout=10) is TaskStatus.ERRORED
            assert await handle.retry() is True
        assert await handle.result(timeout=10) == 3
        state = await handle.state()
        assert (state.attempt, state.error, state.reason) == (1, None, None)
    assert left_in_queues(app) == 2, "its letters"


async def test_replaying_the_letter_of_a_task_that_was_retried_removes_it_and_no_more(
    app: TaskApp, journal: shop.Journal
) -> None:
    async with app.worker():
        handle = await fails_before(app)(2)
        await handle.join(timeout=10)
        assert await handle.retry()
        assert await handle.result(timeout=10) == 2
        async with app.error_queue() as letters:
            async for letter in letters:
                assert (await letters.replay(letter)).queued is False
        await anyio.sleep(60)
    assert journal.count("start") == 2
    assert left_in_queues(app) == 0


async def test_what_is_not_errored_is_not_retried(app: TaskApp, journal: shop.Journal) -> None:
    app.task(shop.wait_at)
    async with app.worker():
        running = await journal.task(shop.wait_at)("a")
        await until_status(running, TaskStatus.RUNNING)
        assert await running.retry() is False
        journal.open("a")
        assert await running.result(timeout=10)
        assert await running.retry() is False
        canceled = await journal.task(shop.wait_at).options(countdown=50)("b")
        assert await canceled.retry() is False
        await canceled.cancel()
        assert await canceled.retry() is False
        assert await canceled.status() is TaskStatus.CANCELED
        with pytest.raises(TaskNotFound, match="nobody"):
            await app.handle("nobody").retry()
        await until(lambda: depth(app) == 0)
    assert journal.count("wait_at a") <= 1


async def test_two_retries_at_the_same_time_start_it_once(
    app: TaskApp, journal: shop.Journal
) -> None:
    async with app.worker():
        handle = await fails_before(app)(2)
        await handle.join(timeout=10)
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(handle.retry)
        assert await handle.result(timeout=10) == 2
        await anyio.sleep(60)
    assert journal.count("start") == 2


async def test_it_has_the_timeout_that_its_caller_gave(app: TaskApp) -> None:
    nap = app.task(retry=ONCE)(shop.nap).options(timeout=3)
    async with app.worker():
        handle = await nap(100.0)
        assert await handle.join(timeout=4) is TaskStatus.ERRORED
        assert await handle.retry()
        with pytest.raises(RemoteTaskError) as caught:
            await handle.result(timeout=4)
    assert caught.value.reason == "timeout"


async def test_a_deadline_that_is_over_is_dropped_and_another_one_kept(app: TaskApp) -> None:
    task = fails_before(app)
    async with app.worker():
        with anyio.move_on_after(5):
            handle = await task(3)
            await handle.join(timeout=4)
        deadline = (await handle.state()).deadline
        assert await handle.retry()
        await handle.join(timeout=4)
        assert (await handle.state()).deadline == deadline
        await anyio.sleep(10)
        assert await handle.retry()
        assert await handle.result(timeout=10) == 3
        assert (await handle.state()).deadline is None
