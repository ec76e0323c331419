"""What runs around each attempt."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest

from amqp_tasks import (
    MessageType,
    Middleware,
    NoRetry,
    RemoteTaskError,
    RetryPolicy,
    TaskApp,
    TaskCanceled,
    TaskStatus,
    current_attempt,
)

from . import shop
from .harness import MakeApp, error_messages, until_status

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]

Call = Callable[[], Awaitable[Any]]


def noting(journal: shop.Journal, name: str) -> Middleware:
    async def middleware(call: Call) -> Any:
        journal.note(f"{name} before {current_attempt().task_id}")
        result = await call()
        journal.note(f"{name} after")
        return f"{name}({result})"

    return middleware


async def test_the_first_one_is_outermost_and_what_they_return_is_the_result(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    app = make_app(middleware=[noting(journal, "a"), noting(journal, "b")])
    async with app.worker():
        handle = await app.task(shop.echo).options(task_id="one")("x")
        assert await handle.result(timeout=10) == "a(b(x))"
    assert [what for what, _ in journal.entries] == [
        "a before one",
        "b before one",
        "echo",
        "b after",
        "a after",
    ]


async def numbers() -> AsyncIterator[tuple[MessageType, int]]:
    yield MessageType.RESULT, 1
    yield MessageType.RESULT, 2


def thread_name() -> Any:
    assert current_attempt().task_id
    return threading.current_thread().name


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])  # threads know no virtual time
async def test_every_kind_of_function_is_called_alike() -> None:
    async def listed(call: Call) -> Any:
        return [await call()]

    app = TaskApp(broker_url="memory://", state_url="memory://", middleware=[listed])
    coroutine, generator, sync = app.task(shop.echo), app.task(numbers), app.task(thread_name)
    async with app.worker():
        assert await (await coroutine(1)).result(timeout=10) == [1]
        assert await (await generator()).result(timeout=10) == [[1, 2]]
        [name] = await (await sync()).result(timeout=10)
    assert name != threading.current_thread().name


async def fail_at_first() -> int:
    shop.journal.note("start")
    if shop.journal.count("start") == 1:
        raise LookupError
    return shop.journal.count("start")


async def test_it_may_call_again(make_app: MakeApp) -> None:
    async def twice(call: Call) -> Any:
        try:
            return await call()
        except LookupError:
            return await call()

    app = make_app(middleware=[twice])
    async with app.worker():
        handle = await app.task(fail_at_first)()
        assert await handle.result(timeout=10) == 2
        assert (await handle.state()).attempt == 1


async def test_what_it_raises_fails_the_attempt(make_app: MakeApp) -> None:
    async def refuse(call: Call) -> Any:
        raise LookupError(f"not {current_attempt().number}")

    app = make_app(middleware=[refuse])
    retry = RetryPolicy(max_retries=1, delay=1)
    async with app.worker():
        handle = await app.task(retry=retry)(shop.echo)(1)
        with pytest.raises(RemoteTaskError, match="LookupError: not 2"):
            await handle.result(timeout=10)


async def test_a_cancellation_reaches_it_with_its_reason(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    async def clean_up(call: Call) -> Any:
        try:
            return await call()
        finally:
            with anyio.move_on_after(5, shield=True):
                await anyio.sleep(1)
                journal.note(f"cleaned up, {current_attempt().cancel_reason}")

    app = make_app(middleware=[clean_up])
    async with app.worker():
        handle = await app.task(shop.nap)(100)
        await until_status(handle, TaskStatus.RUNNING)
        await handle.cancel()
        with pytest.raises(TaskCanceled):
            await handle.result(timeout=10)
    assert journal.count("cleaned up, user") == 1


async def test_what_it_finished_although_it_was_cancelled_is_finished(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    async def commit(call: Call) -> Any:
        result = await call()
        journal.note("commit")
        with anyio.move_on_after(5, shield=True):
            await anyio.sleep(1)
        return result

    app = make_app(middleware=[commit])
    async with app.worker():
        handle = await app.task(shop.echo)(1)
        await journal.wait_for("commit")
        await handle.cancel()
        assert await handle.result(timeout=10) == 1


async def test_a_result_that_cannot_be_kept_is_known_before_a_middleware_commits(
    make_app: MakeApp, journal: shop.Journal
) -> None:
    async def commit(call: Call) -> Any:
        result = await call()
        journal.note("committed")
        return result

    app = make_app(middleware=[commit])
    async with app.worker():
        for func in (shop.unwritable, shop.not_what_it_says):
            handle = await app.task(func)()
            with pytest.raises(RemoteTaskError) as caught:
                await handle.result(timeout=10)
            assert caught.value.reason == "bad_result"
            assert (await handle.state()).attempt == 1
    assert journal.count("committed") == 0


class Gone(NoRetry):
    """What a task needs is not there any more."""


async def give_up() -> None:
    raise Gone("for good")


async def test_a_task_can_say_that_trying_again_is_futile(app: TaskApp) -> None:
    retry = RetryPolicy(max_retries=None, delay=1)
    async with app.worker():
        handle = await app.task(retry=retry)(give_up)()
        with pytest.raises(RemoteTaskError, match="Gone: for good") as caught:
            await handle.result(timeout=10)
        assert caught.value.type.endswith(".Gone")
        assert (await handle.state()).attempt == 1
    [(_, headers)] = error_messages(app)
    assert headers["error-message"] == "for good"
