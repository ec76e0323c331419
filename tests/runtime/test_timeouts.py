"""Timeouts of attempts and deadlines of tasks."""

from __future__ import annotations

from typing import Any

import pytest

from amqp_tasks import RemoteTaskError, RetryPolicy, TaskApp, TaskStatus
from amqp_tasks.core.message import Message

from . import shop
from .harness import (
    MakeApp,
    depth,
    error_messages,
    left_in_queues,
    memory,
    now,
    publish,
    record_of,
    until,
    until_status,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]

ONCE = RetryPolicy(max_retries=0)


@pytest.mark.parametrize("where", ["task", "call"])
async def test_an_attempt_that_takes_longer_than_its_timeout_is_stopped(
    app: TaskApp, where: str
) -> None:
    nap = app.task(retry=ONCE, timeout=3 if where == "task" else None)(shop.nap)
    if where == "call":
        nap = nap.options(timeout=3)
    async with app.worker():
        began = now()
        handle = await nap(100.0)
        with pytest.raises(RemoteTaskError) as caught:
            await handle.result(timeout=10)
        assert now() - began == pytest.approx(3, abs=0.02)
        await until(lambda: depth(app, "-error"))
    assert caught.value.reason == "timeout"
    assert caught.value.type == "TimeoutError"
    assert caught.value.message == "the attempt took longer than its timeout"
    assert "await anyio.sleep(seconds)" in caught.value.traceback
    ((_, headers),) = error_messages(app)
    assert headers["error-reason"] == "timeout"


async def test_an_attempt_that_is_quicker_is_not(app: TaskApp) -> None:
    async with app.worker():
        assert await (await app.task(timeout=3)(shop.nap)(2.9)).result(timeout=10) == "nap"


@pytest.mark.parametrize(("task", "call", "seconds"), [(3, 30, 30), (30, 3, 3)])
async def test_the_timeout_of_the_call_is_preferred_to_that_of_the_task(
    app: TaskApp, task: float, call: float, seconds: float
) -> None:
    nap = app.task(retry=ONCE, timeout=task)(shop.nap).options(timeout=call)
    async with app.worker():
        began = now()
        assert await (await nap(100.0)).join(timeout=40) is TaskStatus.ERRORED
        assert now() - began == pytest.approx(seconds, abs=0.02)


async def test_each_attempt_has_the_whole_timeout_and_is_tried_again(
    app: TaskApp, journal: shop.Journal
) -> None:
    policy = RetryPolicy(max_retries=2, delay=5, backoff=1, jitter=0, retry_on=(KeyError,))
    nap = app.task(retry=policy)(shop.nap).options(timeout=2)
    async with app.worker():
        handle = await nap(100.0)
        await until_status(handle, TaskStatus.RETRYING)
        error = (await handle.state()).error
        assert error is not None
        assert error["reason"] == "timeout"
        assert await handle.join(timeout=100) is TaskStatus.ERRORED
    first, second, third = journal.times("nap started")
    assert second - first == pytest.approx(7, abs=0.3)
    assert third - second == pytest.approx(7, abs=0.3)


async def test_what_a_task_raises_at_its_timeout_is_its_error_and_the_reason_stays(
    app: TaskApp,
) -> None:
    async with app.worker():
        handle = await app.task(retry=ONCE, timeout=3)(shop.raise_when_cancelled)()
        with pytest.raises(RemoteTaskError) as caught:
            await handle.result(timeout=10)
    assert caught.value.reason == "timeout"
    assert caught.value.type == "tests.runtime.shop.OutOfStock"


async def test_a_task_that_finishes_although_its_timeout_is_over_is_finished(app: TaskApp) -> None:
    async with app.worker():
        handle = await app.task(timeout=3)(shop.finish_anyway)("done")
        assert await handle.result(timeout=10) == "done"


async def test_a_user_who_cancels_before_the_timeout_is_the_reason(
    app: TaskApp, journal: shop.Journal
) -> None:
    async with app.worker():
        handle = await app.task(timeout=3)(shop.clean_up)(10.0)
        await journal.wait_for("clean_up started")
        await handle.cancel()
        assert await handle.join(timeout=20) is TaskStatus.CANCELED


async def test_a_user_who_cancels_after_the_timeout_is_not_the_reason(
    app: TaskApp, journal: shop.Journal
) -> None:
    async with app.worker():
        handle = await app.task(retry=ONCE, timeout=3)(shop.clean_up)(10.0)
        await journal.wait_for("clean_up started")
        await until(lambda: now() - record_of(app, handle).created_at > 4)
        assert await handle.cancel()
        with pytest.raises(RemoteTaskError) as caught:
            await handle.result(timeout=20)
    assert caught.value.reason == "timeout"


async def test_a_task_s_own_timeouts_are_its_own_business(app: TaskApp) -> None:
    async with app.worker():
        handle = await app.task(retry=ONCE)(shop.time_out_inside)()
        with pytest.raises(RemoteTaskError) as caught:
            await handle.result(timeout=10)
    assert caught.value.type == "TimeoutError"
    assert caught.value.reason is None


# ---------------------------------------------------------------------- deadlines


async def run_until(app: TaskApp, func: Any, *args: Any, seconds: float, **headers: Any) -> str:
    """Queue a task by hand, with a deadline; return its id."""
    message = Message.compose(
        task_id="x", func=func.name, args=args, deadline=now() + seconds, **headers
    )
    await publish(app, message)
    await until(lambda: "x" in memory(app)[1]._records)
    return "x"


@pytest.mark.parametrize("seconds", [-1000.0, -0.001, 0.0])
async def test_a_task_whose_deadline_has_passed_is_errored_and_does_not_start(
    app: TaskApp, journal: shop.Journal, seconds: float
) -> None:
    echo = app.task(shop.echo)
    async with app.worker():
        handle = app.handle(await run_until(app, echo, 1, seconds=seconds))
        with pytest.raises(RemoteTaskError, match="its deadline had passed") as caught:
            await handle.result(timeout=10)
        await until(lambda: depth(app, "-error") == left_in_queues(app) == 1)
    assert caught.value.reason == "deadline"
    assert journal.count("echo") == 0


async def test_a_task_is_stopped_at_its_deadline_and_not_tried_again(
    app: TaskApp, journal: shop.Journal
) -> None:
    nap = app.task(retry=RetryPolicy(max_retries=5, delay=1))(shop.nap)
    async with app.worker():
        began = now()
        handle = app.handle(await run_until(app, nap, 100.0, seconds=5))
        with pytest.raises(RemoteTaskError, match="not done by its deadline") as caught:
            await handle.result(timeout=10)
        assert now() - began == pytest.approx(5, abs=0.02)
    assert caught.value.reason == "deadline"
    assert journal.count("nap started") == 1


async def test_a_retry_after_the_deadline_is_not_started(
    app: TaskApp, journal: shop.Journal
) -> None:
    fail = app.task(retry=RetryPolicy(max_retries=5, delay=10, jitter=0))(shop.fail)
    async with app.worker():
        handle = app.handle(await run_until(app, fail, seconds=15))
        with pytest.raises(RemoteTaskError, match="deadline") as caught:
            await handle.result(timeout=60)
    assert caught.value.reason == "deadline"
    assert journal.count("fail") == 2


@pytest.mark.parametrize(("timeout", "reason"), [(3.0, "timeout"), (8.0, "deadline")])
async def test_of_timeout_and_deadline_the_earlier_one_is_the_reason(
    app: TaskApp, timeout: float, reason: str
) -> None:
    nap = app.task(retry=ONCE)(shop.nap)
    async with app.worker():
        handle = app.handle(await run_until(app, nap, 100.0, seconds=5, timeout=timeout))
        with pytest.raises(RemoteTaskError) as caught:
            await handle.result(timeout=10)
    assert caught.value.reason == reason


async def test_a_task_that_waits_for_a_slot_beyond_its_deadline_is_errored(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(max_running_tasks=1)
    nap, echo = app.task(shop.nap), app.task(shop.echo)
    async with app.worker():
        await nap(20.0)
        message = Message.compose(task_id="x", func=echo.name, args=[1], deadline=now() + 5)
        await publish(app, message)
        await until(lambda: "x" in memory(app)[1]._records)
        with pytest.raises(RemoteTaskError, match=r"15\.0 s before it could start"):
            await app.handle("x").result(timeout=30)
    assert journal.count("echo") == 0
