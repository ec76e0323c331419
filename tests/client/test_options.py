"""What a call can say about when it is run."""

from __future__ import annotations

import datetime as dt
from typing import Any

import anyio
import pytest

from amqp_tasks import ArgumentsError, RetryPolicy, TaskApp, TaskStatus, current_attempt

from ..runtime import shop
from ..runtime.harness import EPOCH, depth, left_in_queues, now, record_of

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]

LATE = 0.3
NAIVE = dt.datetime(2024, 2, 29, 12)  # noqa: DTZ001  that is what is tested


def at(seconds: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(EPOCH + seconds, dt.timezone(dt.timedelta(hours=5)))


@pytest.mark.parametrize("seconds", [0, 0.5, 3, 60, 1000.0])
async def test_a_task_is_not_started_before_its_countdown_is_over(
    app: TaskApp, seconds: float
) -> None:
    async with app.worker():
        began = now()
        handle = await app.task(shop.add).options(countdown=seconds)(1)
        assert await handle.result(timeout=2000) == 2
        started = record_of(app, handle).started_at
        assert started is not None
        assert began + seconds - 0.01 <= started <= began + seconds + LATE
        assert left_in_queues(app) == 0


async def test_a_task_is_not_started_before_its_eta(app: TaskApp) -> None:
    async with app.worker():
        handle = await app.task(shop.add).options(eta=at(100))(1)
        state = await handle.state()
        assert (state.status, state.due) == (TaskStatus.SCHEDULED, EPOCH + 100)
        assert await handle.result(timeout=200) == 2
        started = record_of(app, handle).started_at
    assert started is not None
    assert EPOCH + 100 - 0.01 <= started <= EPOCH + 100 + LATE


async def test_an_eta_in_the_past_is_now(app: TaskApp) -> None:
    async with app.worker():
        began = now()
        await (await app.task(shop.add).options(eta=at(-1000))(1)).result(timeout=10)
        assert now() - began < LATE


async def test_a_task_waits_for_its_time_without_a_worker(app: TaskApp) -> None:
    async with app.connect():
        handle = await app.task(shop.add).options(countdown=50)(1)
    await anyio.sleep(100)
    async with app.worker():
        began = now()
        assert await handle.result(timeout=10) == 2
        assert now() - began < LATE


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"eta": NAIVE}, "has no time zone.*add one: datetime.now"),
        ({"deadline": NAIVE}, "has no time zone.*add one: datetime.now"),
        ({"eta": 5}, "eta=5: must be a datetime with a time zone"),
        ({"countdown": -1}, "countdown=-1: must be a finite number of seconds, 0 or more"),
        ({"countdown": float("nan")}, "countdown=nan: must be a finite number"),
        ({"countdown": "5"}, "countdown='5': must be a number of seconds"),
        ({"countdown": True}, "countdown=True: must be a number of seconds"),
        ({"timeout": 0}, "timeout=0: must be a finite number of seconds, above 0"),
        ({"timeout": -3}, "timeout=-3: must be a finite number of seconds, above 0"),
        ({"countdown": 1, "eta": at(5)}, "countdown=1 and eta=.*only one of them can be given"),
        ({"task_id": ""}, "task_id"),
        ({"extra": [1]}, r"extra=\[1\]: must be a mapping with texts as keys"),
        ({"extra": {1: 2}}, "must be a mapping with texts as keys"),
        ({"extra": {"func": "x"}}, "func belongs to the call itself; use another key"),
        ({"extra": {"a": object()}}, "cannot be written as JSON"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
async def test_an_option_that_cannot_be_is_refused_with_what_would_be_right(
    app: TaskApp, options: dict[str, Any], says: str
) -> None:
    add = app.task(shop.add)
    async with app.connect():
        with pytest.raises(ArgumentsError, match=says):
            await add.options(**options)(1)
        assert depth(app) == 0
        assert await app.list_tasks() == []


async def test_options_leave_the_task_itself_as_it_was(app: TaskApp) -> None:
    add = app.task(shop.add)
    later = add.options(countdown=50).options(task_id="mine")
    assert later.name == add.name
    assert (later.call_options.countdown, later.call_options.task_id) == (50, "mine")
    assert (add.call_options.countdown, add.call_options.task_id) == (None, None)


async def test_an_id_that_is_known_stands_for_the_task_that_has_it(
    app: TaskApp, journal: shop.Journal
) -> None:
    echo = app.task(shop.echo).options(task_id="mine")
    async with app.worker():
        assert await (await echo(1)).result(timeout=10) == 1
        assert await (await echo(2)).result(timeout=10) == 1
    assert journal.count("echo") == 1


async def test_add_task_takes_options_by_the_side_of_the_arguments(app: TaskApp) -> None:
    async with app.connect():
        handle = await app.add_task(app.task(shop.add), 1, b=2, task_id="mine", timeout=5)
        state = await handle.state()
        assert (state.task_id, state.job["args"]) == ("mine", [1, 2])


async def test_add_task_refuses_an_option_that_could_be_meant_for_the_function(
    app: TaskApp,
) -> None:
    async with app.connect():
        with pytest.raises(ArgumentsError, match=r"a parameter called timeout.*task\.options"):
            await app.add_task(app.task(shop.take_timeout), timeout=5)
        assert depth(app) == 0


async def look_around(number: int, word: str = "") -> list[Any]:
    attempt = current_attempt()
    if attempt.number == 1:
        raise LookupError
    return [attempt.args, attempt.kwargs, attempt.extra]


async def test_extra_members_travel_with_the_call_and_every_attempt_finds_them(
    app: TaskApp,
) -> None:
    extra = {"db_id": "db", "deep": {"a": [1]}}
    look = app.task(retry=RetryPolicy(max_retries=1, delay=1))(look_around)
    async with app.worker():
        handle = await look.options(extra=extra)(7, word="x")
        assert await handle.result(timeout=10) == [[7, "x"], {}, extra]
        state = await handle.state()
    assert state.attempt == 2
    assert {key: state.job[key] for key in extra} == extra
