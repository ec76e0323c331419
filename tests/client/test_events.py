"""The event log of a task, as its callers follow it."""

from __future__ import annotations

import anyio
import pytest

from amqp_tasks import NotConnected, RetryPolicy, TaskApp, TaskEvent, TaskNotFound, TaskStatus
from amqp_tasks.core.operations import AppendEvents

from ..runtime import shop
from ..runtime.harness import ask, memory, record_of, ticks, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]

WHOLE = [("debug", "begun"), ("result", 0), ("result", 1), ("debug", {"left": 0})]


def told(events: list[TaskEvent]) -> list[tuple[str, object]]:
    return [(event.kind, event.message) for event in events]


def topics(app: TaskApp) -> set[str]:
    """What is listened for, beyond a worker's cancel requests."""
    heard = {topic for one in memory(app)[1]._listeners for topic in one._topics}
    return {topic for topic in heard if not topic.startswith("cancel:")}


async def test_events_come_from_the_beginning_and_end_with_the_task(app: TaskApp) -> None:
    narrate = app.task(shop.narrate)
    async with app.worker():
        handle = await narrate(2)
        events = [event async for event in handle.events()]
        assert told(events) == WHOLE
        assert {event.attempt for event in events} == {1}
        assert await handle.status() is TaskStatus.FINISHED
        assert await handle.result(timeout=0) == [0, 1]
        assert told([event async for event in handle.events()]) == WHOLE


async def test_events_can_be_resumed_behind_a_position(app: TaskApp) -> None:
    narrate = app.task(shop.narrate)
    async with app.worker():
        handle = await narrate(2)
        events = [event async for event in handle.events()]
        for number, event in enumerate(events, 1):
            rest = [later async for later in handle.events(after=event.position)]
            assert told(rest) == WHOLE[number:]


async def test_events_of_an_errored_task_end_as_well(app: TaskApp) -> None:
    narrate = app.task(retry=RetryPolicy(max_retries=0))(shop.narrate_and_fail)
    async with app.worker():
        handle = await narrate()
        events = [event async for event in handle.events()]
        assert told(events) == [("debug", "before"), ("result", 1)]
        assert await handle.status() is TaskStatus.ERRORED


async def test_events_come_as_they_are_written(app: TaskApp, journal: shop.Journal) -> None:
    async with app.worker():
        handle = await app.task(shop.narrate_for_ever)()
        with anyio.fail_after(5):
            events = handle.events()
            assert (await anext(events)).message == "begun"
        await handle.cancel()
        with pytest.raises(StopAsyncIteration):
            await anext(events)


async def test_events_are_followed_over_many_pages(app: TaskApp, journal: shop.Journal) -> None:
    async with app.worker():
        handle = await app.task(shop.nap)(5.0)
        await journal.wait_for("nap started")
        entry = '{"at": 1, "attempt": 1, "kind": "log", "message": %d}'
        fence = record_of(app, handle).fence
        entries = tuple(entry % number for number in range(1234))
        assert await ask(app, AppendEvents(task_id=handle.task_id, fence=fence, entries=entries))
        messages = [event.message async for event in handle.events()]
    assert messages == list(range(1234))


async def test_breaking_out_leaves_nothing_behind(app: TaskApp) -> None:
    async with app.worker():
        handle = await app.task(shop.narrate_for_ever)()
        async for event in handle.events():
            assert event.kind == "debug"
            break
        await until(lambda: topics(app) == set())
        await handle.cancel()


@pytest.mark.parametrize("count", range(8))
async def test_cancelling_the_wait_for_an_event_leaves_nothing_behind(
    app: TaskApp, journal: shop.Journal, count: int
) -> None:
    async with app.worker():
        handle = await app.task(shop.nap)(1000.0)
        await journal.wait_for("nap started")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anext, handle.events())
            await ticks(count)
            tasks.cancel_scope.cancel()
        await until(lambda: topics(app) == set())
        await handle.cancel()


async def test_a_task_that_nobody_knows_has_no_events(app: TaskApp) -> None:
    async with app.connect():
        with pytest.raises(TaskNotFound, match="none-such"):
            await anext(app.handle("none-such").events())


async def test_events_need_a_connection(app: TaskApp) -> None:
    with pytest.raises(NotConnected):
        app.handle("any").events()
