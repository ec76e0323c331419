"""What an app keeps of the members beside a call, of its own messages and of others'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anyio
import pytest

from amqp_tasks import (
    ArgumentsError,
    RemoteTaskError,
    RetryPolicy,
    TaskApp,
    TaskStatus,
    current_attempt,
)
from amqp_tasks.core.message import Message

from . import shop
from .harness import MakeApp, depth, error_messages, memory, publish, rewire, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]

SECRET = {"tenant": "a", "token": "s3cret"}


def without_token(extra: Mapping[str, Any]) -> Mapping[str, Any]:
    return {key: value for key, value in extra.items() if key != "token"}


@pytest.fixture
def app(make_app: MakeApp) -> TaskApp:
    return make_app(filter_extra=without_token)


async def tell_extra() -> dict[str, Any]:
    return dict(current_attempt().extra)


def rewire_to(app: TaskApp, other: TaskApp) -> None:
    broker, store = memory(other)
    rewire(app, broker=broker, store=store)


def of_others(func: str, **extra: Any) -> Message:
    return Message.compose(task_id="theirs", func=func, extra={**SECRET, **extra})


async def test_what_others_have_queued_is_filtered_when_it_comes(app: TaskApp) -> None:
    tell = app.task(tell_extra)
    async with app.worker():
        await publish(app, of_others(tell.name))
        while not await app.list_tasks(status=TaskStatus.FINISHED):
            await anyio.sleep(0.1)
        state = await app.handle("theirs").state()
    assert state.result == {"tenant": "a"}
    assert "s3cret" not in str(state)


async def test_so_it_is_in_what_is_queued_here(app: TaskApp) -> None:
    tell = app.task(tell_extra)
    async with app.connect():
        handle = await tell.options(extra=SECRET)()
        assert "s3cret" not in str(await handle.state())
    async with app.worker():
        assert await handle.result(timeout=10) == {"tenant": "a"}


async def test_its_letter_is_filtered_and_what_is_replayed(app: TaskApp) -> None:
    fail = app.task(retry=RetryPolicy(max_retries=1, delay=1))(shop.fail)
    async with app.worker():
        await publish(app, of_others(fail.name))
        await until(lambda: depth(app, "-error"))
        with pytest.raises(RemoteTaskError):
            await app.handle("theirs").result(timeout=10)
    ((body, _),) = error_messages(app)
    assert b"s3cret" not in body
    assert b"tenant" in body


async def test_a_letter_of_others_is_filtered_when_it_is_replayed(make_app: MakeApp) -> None:
    unfiltered = make_app()
    async with unfiltered.worker():
        await publish(unfiltered, of_others("nobody.serves"))
        await until(lambda: depth(unfiltered, "-error"))
    app = make_app(filter_extra=without_token)
    rewire_to(app, unfiltered)
    async with app.error_queue() as letters:
        async for letter in letters:
            await letters.replay(letter)
    async with app.connect():
        assert "s3cret" not in str(await app.handle("theirs").state())


async def test_a_body_of_which_everything_is_kept_stays_as_it_is(app: TaskApp) -> None:
    body = b'{ "func":"nobody.serves",  "task_id":"theirs", "tenant":"a" }'
    async with app.worker():
        await publish(app, Message(task_id="theirs", func="nobody.serves", body=body))
        await until(lambda: depth(app, "-error"))
    ((kept, _),) = error_messages(app)
    assert kept == body


@pytest.mark.parametrize(
    "answer", [LookupError, None, ["tenant"], {1: "a"}, {"token": object()}, {"func": "other"}]
)
async def test_a_filter_that_fails_loses_nothing(make_app: MakeApp, answer: Any) -> None:
    def fails(extra: Mapping[str, Any]) -> Any:
        if extra and answer is LookupError:
            raise LookupError("no such tenant")
        return answer if extra else extra

    app = make_app(filter_extra=fails)
    add = app.task(shop.add)
    message = of_others(add.name)
    async with app.worker():
        await publish(app, message)
        await until(lambda: depth(app, "-error"))
        assert await (await add(1)).result(timeout=10) == 2
    ((kept, headers),) = error_messages(app)
    assert kept == message.body
    assert headers["error-reason"] == "undecodable"
    assert "cannot be filtered" in headers["error-message"]


@pytest.mark.parametrize("wrong", [3, ["token"], "text"])
@pytest.mark.parametrize("name", ["filter_extra", "middleware"])
async def test_what_is_no_function_is_refused_at_once(
    make_app: MakeApp, name: str, wrong: Any
) -> None:
    with pytest.raises(ArgumentsError, match=f"{name}.*must be a"):
        make_app(**{name: wrong})


@pytest.mark.parametrize("answer", [None, "text", {"func": "other"}])
async def test_a_filter_that_fails_queues_nothing(make_app: MakeApp, answer: Any) -> None:
    app = make_app(filter_extra=lambda _: answer)
    async with app.connect():
        with pytest.raises(ArgumentsError, match="extra"):
            await app.task(shop.add)(1)
        assert await app.list_tasks() == []


async def test_a_retry_filters_what_is_in_an_old_state(make_app: MakeApp) -> None:
    unfiltered = make_app()
    fail = unfiltered.task(retry=RetryPolicy(max_retries=0))(shop.fail).options(extra=SECRET)
    async with unfiltered.worker():
        handle = await fail()
        await handle.join(timeout=10)
    app = make_app(filter_extra=without_token)
    rewire_to(app, unfiltered)
    async with app.connect():
        assert await app.handle(handle.task_id).retry()
        assert "s3cret" not in str(await app.handle(handle.task_id).state())
