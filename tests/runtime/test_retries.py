"""Failing tasks: how often they are tried again, when, and what is left of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import anyio
import pytest

from amqp_tasks import RemoteTaskError, RetryPolicy, TaskApp, TaskStatus

from . import shop
from .harness import MakeApp, depth, error_messages, until, until_status

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]

LATE = 0.3
"""Seconds that a wait may end late: the ladder's smallest step, and a bit."""


def assert_about(moments: Sequence[float], expected: Sequence[float]) -> None:
    """The moments are these, or a little later; never earlier."""
    assert len(moments) == len(expected)
    for moment, earliest in zip(moments, expected, strict=True):
        assert earliest - 0.01 <= moment <= earliest + LATE


@pytest.mark.parametrize(
    ("policy", "starts"),
    [
        (RetryPolicy(max_retries=3, delay=0.5, backoff=2, jitter=0), [0, 0.5, 1.5, 3.5]),
        (RetryPolicy(max_retries=2, delay=3, backoff=1, jitter=0), [0, 3, 6]),
        (RetryPolicy(max_retries=2, delay=10, backoff=9, max_delay=20, jitter=0), [0, 10, 30]),
        (RetryPolicy(max_retries=1, delay=7777, max_delay=9999, jitter=0), [0, 7777]),
        (RetryPolicy(max_retries=2, delay=0, jitter=0), [0, 0, 0]),
        (RetryPolicy(max_retries=0), [0]),
    ],
    ids=["backoff", "constant", "max_delay", "hours", "at_once", "never"],
)
async def test_attempts_start_after_the_policy_s_delays(
    make_app: MakeApp, journal: shop.Journal, policy: RetryPolicy, starts: list[float]
) -> None:
    app = make_app(cancel_poll_interval=60, presence_ttl=600)
    task = app.task(retry=policy)(shop.fail)
    async with app.worker():
        handle = await task()
        assert await handle.join(timeout=20_000) is TaskStatus.ERRORED
    # Each later attempt may start late by as much as the ones before it, together.
    moments = journal.times("fail")
    assert_about([b - a for a, b in pairs(moments)], [b - a for a, b in pairs(starts)])
    assert len(moments) == len(starts)


def pairs(items: Sequence[float]) -> list[tuple[float, float]]:
    return list(pairwise(items))


async def test_jitter_moves_a_delay_by_its_share_at_most(
    app: TaskApp, journal: shop.Journal
) -> None:
    task = app.task(retry=RetryPolicy(max_retries=20, delay=10, backoff=1, jitter=0.5))(shop.fail)
    async with app.worker():
        await (await task()).join(timeout=1000)
    delays = [later - earlier for earlier, later in pairs(journal.times("fail"))]
    assert all(5 - 0.01 <= delay <= 15 + LATE for delay in delays)
    assert max(delays) - min(delays) > 1


async def test_a_result_is_waited_for_over_all_attempts(app: TaskApp) -> None:
    task = app.task(retry=RetryPolicy(delay=2, jitter=0))(shop.fail_until)
    async with app.worker():
        handle = await task(3)
        await until_status(handle, TaskStatus.RETRYING)
        state = await handle.state()
        assert state.attempt == 2
        assert state.error is not None
        assert (state.error["message"], state.error["attempt"]) == ("attempt 1", 1)
        assert state.due == pytest.approx(state.updated_at + 2)
        assert state.ended_at is None
        assert await handle.result() == 3
        assert (await handle.state()).attempt == 3


async def test_a_retry_outlives_its_worker(app: TaskApp, journal: shop.Journal) -> None:
    task = app.task(retry=RetryPolicy(delay=60, jitter=0))(shop.fail_until)
    async with app.worker():
        handle = await task(2)
        await until_status(handle, TaskStatus.RETRYING)
    await anyio.sleep(10)
    async with app.worker():
        assert await handle.result(timeout=60) == 2
    assert_about(journal.times("fail_until"), [0, 60])


@pytest.mark.parametrize("retries", [0, 2])
async def test_without_a_policy_a_task_waits_in_the_delay_queue_max_task_retries_times(
    make_app: MakeApp, journal: shop.Journal, retries: int
) -> None:
    app = make_app(max_task_retries=retries, delayed_ttl_ms=90_000)
    async with app.worker():
        handle = await app.task(shop.fail)()
        for number in range(retries):
            await until_status(handle, TaskStatus.RETRYING, within=100)
            await until(lambda: depth(app, "-delay") == 1)
            await journal.wait_for_count("fail", number + 2, within=100)
        assert await handle.join(timeout=100) is TaskStatus.ERRORED
    assert_about(journal.times("fail"), [90.0 * number for number in range(retries + 1)])


async def test_none_retries_for_ever(make_app: MakeApp, journal: shop.Journal) -> None:
    app = make_app(max_task_retries=None, delayed_ttl_ms=1000)
    async with app.worker():
        handle = await app.task(shop.fail)()
        await journal.wait_for_count("fail", 50, within=100)
        assert await handle.status() is not TaskStatus.ERRORED
        await handle.cancel()


async def test_an_error_that_is_not_worth_it_is_not_tried_again(app: TaskApp) -> None:
    policy = RetryPolicy(retry_on=(OSError, ValueError))
    async with app.worker():
        handle = await app.task(retry=policy)(shop.fail)()
        assert await handle.join(timeout=1) is TaskStatus.ERRORED
        assert (await handle.state()).attempt == 1


async def test_an_error_that_is_worth_it_is_tried_again(app: TaskApp) -> None:
    policy = RetryPolicy(delay=0, retry_on=(OSError, shop.OutOfStock))
    async with app.worker():
        assert await (await app.task(retry=policy)(shop.fail_until)(3)).result(timeout=10) == 3


# ---------------------------------------------------------------- after the last


async def test_after_the_last_attempt_the_state_has_the_error(app: TaskApp) -> None:
    task = app.task(retry=RetryPolicy(max_retries=1, delay=0))(shop.fail)
    async with app.worker() as worker:
        handle = await task("sold out")
        with pytest.raises(RemoteTaskError) as caught:
            await handle.result(timeout=10)
        state = await handle.state()
    error = caught.value
    assert error.task_id == handle.task_id
    assert error.type == "tests.runtime.shop.OutOfStock"
    assert error.message == "sold out"
    assert error.reason is None
    assert "raise OutOfStock(message)" in error.traceback
    assert "amqp_tasks" not in error.traceback.split("raise OutOfStock")[0].replace(__name__, "")
    assert str(error) == f"task {handle.task_id!r} failed: {error.type}: sold out"
    assert (state.status, state.attempt, state.worker) == (TaskStatus.ERRORED, 2, worker.id)
    assert state.error == {
        "type": error.type,
        "message": "sold out",
        "traceback": error.traceback,
        "reason": None,
        "attempt": 2,
        "worker": worker.id,
    }
    assert state.ended_at is not None
    assert state.result is None


async def test_after_the_last_attempt_the_message_is_in_the_error_queue_and_says_why(
    app: TaskApp,
) -> None:
    task = app.task(retry=RetryPolicy(max_retries=1, delay=0))(shop.fail)
    async with app.worker() as worker:
        handle = await task("sold out")
        await handle.join(timeout=10)
        await until(lambda: depth(app, "-error"))
    ((body, headers),) = error_messages(app)
    assert handle.task_id.encode() in body
    assert headers["error-reason"] == "exception"
    assert headers["error-type"] == "tests.runtime.shop.OutOfStock"
    assert headers["error-message"] == "sold out"
    assert "raise OutOfStock(message)" in headers["error-traceback"]
    assert headers["error-attempt"] == 2
    assert headers["error-worker"] == worker.id
    assert headers["task-attempt"] == 2
    assert depth(app) == 0


async def test_the_error_queue_forgets_after_its_time(make_app: MakeApp) -> None:
    app = make_app(errored_ttl_ms=5000)
    async with app.worker():
        await (await app.task(retry=RetryPolicy(max_retries=0))(shop.fail)()).join(timeout=10)
        await until(lambda: depth(app, "-error"))
        await anyio.sleep(5)
        assert depth(app, "-error") == 0


async def test_the_state_of_an_ended_task_expires_and_that_of_others_does_not(
    make_app: MakeApp,
) -> None:
    app = make_app(state_ttl=100, cancel_poll_interval=60, presence_ttl=600)
    async with app.worker():
        ended = await app.task(shop.add)(1)
        waiting = await app.task(shop.nap)(100_000)
        assert await ended.result(timeout=10) == 2
        await anyio.sleep(90)
        assert await ended.status() is TaskStatus.FINISHED
        await anyio.sleep(11)
        assert [state.task_id for state in await app.list_tasks()] == [waiting.task_id]
        await anyio.sleep(9000)
        assert await waiting.status() is TaskStatus.RUNNING
        await waiting.cancel()


@pytest.mark.parametrize(
    ("func", "kind", "text"),
    [
        (shop.raise_exit, "SystemExit", "3"),
        (shop.raise_stop_iteration, "RuntimeError", "StopIteration"),
        (shop.raise_group, "ExceptionGroup", "two"),
        (shop.raise_untellable, "tests.runtime.shop.Untellable", "cannot be had"),
        (shop.raise_surrogate, "ValueError", "\\ud800"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_whatever_a_task_raises_is_its_error_alone(
    app: TaskApp, func: Any, kind: str, text: str
) -> None:
    policy = RetryPolicy(max_retries=0)
    async with app.worker():
        with pytest.raises(RemoteTaskError) as caught:
            await (await app.task(retry=policy)(func)()).result(timeout=10)
        assert caught.value.type == kind
        assert text in caught.value.message
        assert await (await app.task(shop.add)(1)).result(timeout=10) == 2
