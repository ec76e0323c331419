"""The whole way: call, queue, worker, result; and what cannot go that way."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import anyio
import pytest

from amqp_tasks import ArgumentsError, DefinitionError, RemoteTaskError, TaskApp, TaskStatus
from amqp_tasks.core.message import Message

from . import shop
from .harness import MakeApp, depth, error_messages, memory, publish

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]

ID = UUID(int=7)
MOMENT = dt.datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=dt.UTC)
POINT = shop.Point(1, Decimal("0.10"))


async def outcome(app: TaskApp, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a task in a worker of its own and return its result."""
    async with app.worker():
        handle = await app.task(func)(*args, **kwargs)
        return await handle.result(timeout=10)


async def test_a_call_is_run_by_a_worker_and_its_result_comes_back(app: TaskApp) -> None:
    assert await outcome(app, shop.add, 1, b=2) == 3


async def test_producer_and_worker_can_be_apart(app: TaskApp) -> None:
    add = app.task(shop.add)
    async with app.connect():
        handle = await add(1, 2)
        assert await handle.status() is TaskStatus.SCHEDULED
    async with app.worker():
        assert await handle.result(timeout=10) == 3
    async with app.connect():
        assert await handle.result(timeout=0) == 3
    assert depth(app) == 0


async def test_nothing_is_queued_before_the_call_is_awaited(app: TaskApp) -> None:
    async with app.connect():
        call = app.task(shop.add)(1, 2)
        assert depth(app) == 0
        await call
        assert depth(app) == 1


@pytest.mark.parametrize(
    ("func", "value"),
    [
        (shop.moment_back, MOMENT),
        (shop.uuid_back, ID),
        (shop.decimal_back, Decimal("1.10")),
        (shop.point_back, POINT),
        (shop.order_back, shop.Order(id=ID, placed=MOMENT, points=[POINT])),
        (shop.colour_back, shop.Colour.RED),
        (shop.maybe_back, POINT),
        (shop.maybe_back, None),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
async def test_values_are_converted_by_the_annotations_both_ways(
    app: TaskApp, func: Callable[..., Any], value: Any
) -> None:
    result = await outcome(app, func, value)
    assert result == value
    assert type(result) is type(value)


async def test_a_call_may_give_what_pydantic_can_make_the_type_of(app: TaskApp) -> None:
    assert await outcome(app, shop.point_back, {"x": "1", "y": "0.10"}) == POINT


async def test_every_kind_of_parameter_travels(app: TaskApp) -> None:
    result = await outcome(app, shop.every_kind, 1, 2, 4, 5, c=6, d=Decimal("0.5"), e=ID)
    assert result == [1, 2, [4, 5], 6, "0.5", {"e": 7}]


async def test_defaults_are_the_worker_s(app: TaskApp) -> None:
    async with app.worker():
        handle = await app.task(shop.add)(1)
        state = await handle.state()
        assert state.job["args"] == [1]
        assert state.job["kwargs"] == {}
        assert await handle.result(timeout=10) == 2
        assert await outcome(app, shop.maybe_back) is None


@pytest.mark.parametrize("value", [0, "", [], False, None, {}, 0.0])
async def test_a_falsy_result_comes_back_as_it_is(app: TaskApp, value: object) -> None:
    result = await outcome(app, shop.echo, value)
    assert result == value
    assert type(result) is type(value)
    (state,) = memory(app)[1]._records.values()
    assert state.result is not None


async def test_a_handle_by_id_has_the_result_as_json_has_it(app: TaskApp) -> None:
    async with app.worker():
        handle = await app.task(shop.point_back)(POINT)
        await handle.join(timeout=10)
        assert await app.handle(handle.task_id).result(timeout=0) == {"x": 1, "y": "0.10"}


async def test_the_state_tells_what_happened(app: TaskApp) -> None:
    async with app.worker() as worker:
        handle = await app.task(shop.nap)(5.0)
        await handle.join(timeout=10)
        state = await handle.state()
    assert state.task_id == handle.task_id
    assert state.name == "tests.runtime.shop.nap"
    assert (state.status, state.attempt, state.result) == (TaskStatus.FINISHED, 1, "nap")
    assert state.worker == worker.id
    assert (state.error, state.reason, state.due) == (None, None, None)
    assert state.started_at is not None
    assert state.ended_at is not None
    assert state.ended_at - state.started_at == pytest.approx(5, abs=0.01)
    assert state.created_at <= state.started_at
    assert state.updated_at == state.ended_at


# ------------------------------------------------------------------ bad arguments


@pytest.mark.parametrize(
    ("args", "kwargs", "names"),
    [
        (("x",), {}, "a='x'"),
        ((), {}, "missing a required argument: 'a'"),
        ((1, 2, 3), {}, "too many positional arguments"),
        ((1,), {"c": 3}, "unexpected keyword argument 'c'"),
        ((1, object()), {}, "b=<object"),
    ],
)
async def test_wrong_arguments_are_refused_at_the_call_and_nothing_is_queued(
    app: TaskApp, args: Any, kwargs: Any, names: str
) -> None:
    add = app.task(shop.add)
    async with app.connect():
        with pytest.raises(ArgumentsError, match=r"tests\.runtime\.shop\.add") as caught:
            await add(*args, **kwargs)
        assert names in str(caught.value)
        assert depth(app) == 0
        assert await app.list_tasks() == []


async def test_an_argument_that_json_does_not_have_is_refused_at_the_call(app: TaskApp) -> None:
    echo = app.task(shop.echo)
    ring: list[Any] = []
    ring.append(ring)
    async with app.connect():
        for value in (object(), ring, "\ud800", {1, object()}):
            with pytest.raises(ArgumentsError):
                await echo(value)
        assert depth(app) == 0


async def test_a_message_with_bad_arguments_is_errored_and_not_tried_again(app: TaskApp) -> None:
    add = app.task(shop.add)
    async with app.worker():
        await publish(app, Message.compose(task_id="bad", func=add.name, args=["x", 1]))
        await publish(app, Message.compose(task_id="good", func=add.name, args=[1, 1]))
        assert await _ended(app, "good") is TaskStatus.FINISHED
        assert await _ended(app, "bad") is TaskStatus.ERRORED
        state = await app.handle("bad").state()
    assert state.reason == "bad_arguments"
    assert state.error is not None
    assert state.error["reason"] == "bad_arguments"
    ((body, headers),) = error_messages(app)
    assert b'"bad"' in body
    assert headers["error-reason"] == "bad_arguments"
    assert headers["error-type"] == "amqp_tasks.exceptions.ArgumentsError"


async def test_arguments_that_their_type_chokes_on_are_errored_and_the_worker_goes_on(
    app: TaskApp,
) -> None:
    taking = app.task(shop.take_choking)
    async with app.worker():
        await publish(app, Message.compose(task_id="bad", func=taking.name, args=[{"x": -1}]))
        assert await _ended(app, "bad") is TaskStatus.ERRORED
        assert (await app.handle("bad").state()).reason == "bad_arguments"
        assert await (await taking(shop.Choking(1))).result(timeout=10) == 1


async def _ended(app: TaskApp, task_id: str) -> TaskStatus:
    with anyio.fail_after(10):
        while task_id not in memory(app)[1]._records:
            await anyio.sleep(0.01)
    return await app.handle(task_id).join(timeout=10)


# ------------------------------------------------------------------- bad results


@pytest.mark.parametrize(
    "func",
    [shop.unwritable, shop.surrogate, shop.circular, shop.not_what_it_says, shop.choke_on_result],
    ids=lambda func: func.__name__,
)
async def test_a_result_that_cannot_be_written_is_an_error_and_not_tried_again(
    app: TaskApp, func: Callable[[], Any]
) -> None:
    async with app.worker():
        handle = await app.task(func)()
        with pytest.raises(RemoteTaskError, match="result") as caught:
            await handle.result(timeout=10)
        assert caught.value.reason == "bad_result"
        assert (await handle.state()).attempt == 1
        assert await (await app.task(shop.add)(1)).result(timeout=10) == 2
    ((_, headers),) = error_messages(app)
    assert headers["error-reason"] == "bad_result"


# ----------------------------------------------------- annotations that cannot do


async def test_an_annotation_that_nothing_is_known_of_is_refused_at_the_call(app: TaskApp) -> None:
    task = app.task(shop.annotated_with_nothing)
    async with app.connect():
        with pytest.raises(DefinitionError, match=r"annotated_with_nothing.*NowhereDefined"):
            await task(1)
        assert depth(app) == 0


async def test_a_message_for_it_is_errored_and_the_worker_goes_on(app: TaskApp) -> None:
    add, task = app.task(shop.add), app.task(shop.annotated_with_nothing)
    async with app.worker():
        await publish(app, Message.compose(task_id="bad", func=task.name, args=[1]))
        assert await _ended(app, "bad") is TaskStatus.ERRORED
        assert await (await add(1)).result(timeout=10) == 2
    ((_, headers),) = error_messages(app)
    assert "NowhereDefined" in headers["error-message"]


async def test_a_served_module_that_raises_when_it_is_imported_does_not_end_the_worker(
    make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runtime_raising_goods.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    app = make_app(serve="runtime_raising_goods")
    add = app.task(shop.add)
    async with app.worker():
        await publish(app, Message.compose(task_id="bad", func="runtime_raising_goods.sell"))
        assert await _ended(app, "bad") is TaskStatus.ERRORED
        assert (await app.handle("bad").state()).reason == "unknown_task"
        assert await (await add(1)).result(timeout=10) == 2


@pytest.mark.parametrize("name", ["none.such", "undecorated"])
async def test_an_unknown_name_is_errored_and_the_worker_goes_on(app: TaskApp, name: str) -> None:
    add = app.task(shop.add)
    async with app.worker():
        await publish(app, Message.compose(task_id="lost", func=name))
        assert await _ended(app, "lost") is TaskStatus.ERRORED
        state = await app.handle("lost").state()
        assert state.reason == "unknown_task"
        assert await (await add(1)).result(timeout=10) == 2
    ((_, headers),) = error_messages(app)
    assert headers["error-reason"] == "unknown_task"
    assert name in headers["error-message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"task_id": "x"}',
        b'{"task_id": "x", "func": 1}',
        b'{"task_id": 5, "func": "f"}',
        b'{"task_id": "x", "func": "f", "args": {}}',
        b'{"task_id": "x", "func": "f", "kwargs": []}',
    ],
)
async def test_a_body_that_is_no_message_goes_to_the_error_queue_and_the_worker_goes_on(
    app: TaskApp, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    add = app.task(shop.add)
    junk = Message(task_id="junk", func="junk", body=body, foreign={"traceparent": "kept"})
    async with app.worker():
        with caplog.at_level(logging.ERROR):
            await publish(app, junk)
            assert await (await add(1)).result(timeout=10) == 2
    ((kept, headers),) = error_messages(app)
    assert kept == body
    assert headers["error-reason"] == "undecodable"
    assert headers["traceparent"] == "kept"
    assert "cannot be read" in caplog.text


async def test_headers_that_cannot_be_read_are_no_message_of_ours(app: TaskApp) -> None:
    async with app.worker():
        broken = Message.compose(task_id="x", func="f", attempt=0)
        await publish(app, broken)
        await _drained(app)
    ((_, headers),) = error_messages(app)
    assert headers["error-reason"] == "undecodable"
    assert "task-attempt" in headers["error-message"]


async def test_a_message_of_guillotina_amqp_is_run(app: TaskApp) -> None:
    echo = app.task(shop.echo)
    old = Message.compose(
        task_id="task:guillotina:1",
        func=echo.name,
        args=["hello"],
        extra={"db_id": "db", "container_id": "c", "req_data": {"url": "http://x"}},
    )
    async with app.worker():
        await publish(app, old)
        assert await _ended(app, "task:guillotina:1") is TaskStatus.FINISHED
        state = await app.handle("task:guillotina:1").state()
    assert state.result == "hello"
    assert state.job["req_data"] == {"url": "http://x"}


async def _drained(app: TaskApp) -> None:
    with anyio.fail_after(10):
        while depth(app) or not error_messages(app):
            await anyio.sleep(0.01)
