"""What Prometheus is told of attempts."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from prometheus_client import REGISTRY

from amqp_tasks import RetryPolicy, TaskApp, TaskHandle, TaskStatus, current_attempt
from guillotina_bridge.metrics import SCHEDULE_ERRORS, watch_job

pytestmark = pytest.mark.anyio

Call = Callable[[], Awaitable[Any]]


class Stage:
    began: asyncio.Event


@pytest.fixture(autouse=True)
async def stage(anyio_backend: object) -> None:
    Stage.began = asyncio.Event()


@pytest.fixture
def name() -> str:
    """What the attempts of a test are called: the registry is everybody's."""
    return f"metrics.{secrets.token_hex(4)}"


def sample(metric: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(metric, labels) or 0.0


def counts(name: str, container: str = "a") -> dict[str, float]:
    """How many attempts have been observed, by their final status."""
    found = {
        status: sample(
            "amqp_job_duration_count",
            dotted_name=name,
            final_status=status,
            container_id=container,
        )
        for status in ("finished", "errored", "canceled")
    }
    return {status: count for status, count in found.items() if count}


def app_in_memory(name: str, container: str | None = "a", **settings: Any) -> TaskApp:
    async def middleware(call: Call) -> Any:
        with watch_job(name, lambda: container or ""):
            return await call()

    app = TaskApp(
        broker_url="memory://", state_url="memory://", middleware=[middleware], **settings
    )
    policy = RetryPolicy(max_retries=1, delay=0)
    for function in (succeed, fail, hang, finish_although_cancelled):
        app.task(retry=policy)(function)
    return app


async def succeed() -> float:
    Stage.began.set()
    return sample("amqp_running_jobs")


async def fail() -> None:
    raise LookupError("as it should")


async def hang() -> None:
    Stage.began.set()
    await anyio.sleep_forever()


async def finish_although_cancelled() -> str:
    Stage.began.set()
    try:
        await anyio.sleep_forever()
    except asyncio.CancelledError:
        assert current_attempt().cancel_reason is not None
    return "done"


async def begun(app: TaskApp, function: Callable[..., Any], **options: Any) -> TaskHandle[Any]:
    handle = await app.add_task(function, **options)
    await Stage.began.wait()
    return handle


async def test_an_attempt_is_counted_while_it_runs_and_measured_when_it_has_ended(
    name: str,
) -> None:
    app = app_in_memory(name)
    before = sample("amqp_running_jobs")
    async with app.worker():
        handle = await app.add_task(succeed)
        assert await handle.result(timeout=10) == before + 1
        assert sample("amqp_running_jobs") == before
    assert counts(name) == {"finished": 1}
    labels = {"dotted_name": name, "final_status": "finished", "container_id": "a"}
    assert 0 < sample("amqp_job_duration_sum", **labels) < 10


async def test_each_failed_attempt_is_errored(name: str) -> None:
    app = app_in_memory(name)
    async with app.worker():
        handle = await app.add_task(fail)
        assert await handle.join(timeout=10) is TaskStatus.ERRORED
    assert counts(name) == {"errored": 2}


async def test_one_that_a_user_cancels_is_canceled(name: str) -> None:
    app = app_in_memory(name)
    async with app.worker():
        handle = await begun(app, hang)
        assert await handle.cancel()
        assert await handle.join(timeout=10) is TaskStatus.CANCELED
    assert counts(name) == {"canceled": 1}


async def test_one_whose_time_is_up_is_errored(name: str) -> None:
    app = app_in_memory(name)
    async with app.worker():
        handle = await begun(app, hang, timeout=0.05)
        assert await handle.join(timeout=10) is TaskStatus.ERRORED
    assert counts(name) == {"errored": 2}


async def test_one_that_finishes_all_the_same_is_finished(name: str) -> None:
    app = app_in_memory(name)
    async with app.worker():
        handle = await begun(app, finish_although_cancelled)
        await handle.cancel()
        assert await handle.join(timeout=10) is TaskStatus.FINISHED
    assert counts(name) == {"finished": 1}


async def test_one_that_is_given_back_has_not_ended(name: str) -> None:
    app = app_in_memory(name)
    before = sample("amqp_running_jobs")
    async with app.worker() as worker:
        await begun(app, hang)
        worker.stop(0)
        await worker.wait_ended()
    assert counts(name) == {}
    assert sample("amqp_running_jobs") == before


async def test_no_container_is_an_empty_label(name: str) -> None:
    app = app_in_memory(name, container=None)
    async with app.worker():
        handle = await app.add_task(succeed)
        await handle.result(timeout=10)
    assert counts(name, container="") == {"finished": 1}


async def test_what_was_not_queued_is_counted() -> None:
    before = sample("amqp_schedule_errors_total")
    SCHEDULE_ERRORS.inc()
    assert sample("amqp_schedule_errors_total") == before + 1
