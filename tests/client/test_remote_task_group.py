"""Remote task groups: children anywhere, waited for and cancelled together."""

from __future__ import annotations

import datetime as dt
import logging

import anyio
import pytest

from amqp_tasks import (
    AmqpTasksError,
    NotConnected,
    RemoteTaskError,
    RetryPolicy,
    TaskApp,
    TaskCanceled,
    TaskStatus,
)
from amqp_tasks.core.message import Message
from amqp_tasks.core.operations import Beat, IsAlive

from ..runtime import shop
from ..runtime.harness import (
    EPOCH,
    MakeApp,
    ask,
    depth,
    left_in_queues,
    memory,
    now,
    publish,
    record_of,
    until,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_task_is_left_over")]

ONCE = RetryPolicy(max_retries=0)


async def test_leaving_the_block_waits_for_the_children_and_their_results_are_there(
    app: TaskApp,
) -> None:
    add, nap = app.task(shop.add), app.task(shop.nap)
    async with app.worker():
        async with app.remote_task_group() as group:
            total, slept = await group.start(add, 1, b=2), await group.start(nap, 10.0)
        assert await total.result(timeout=0) == 3
        assert await slept.result(timeout=0) == "nap"


async def test_a_group_without_children_ends_at_once(app: TaskApp) -> None:
    async with app.connect():
        began = now()
        async with app.remote_task_group():
            pass
        assert now() == began


async def test_the_children_of_a_client_run_on_a_worker_elsewhere(app: TaskApp) -> None:
    add = app.task(shop.add)
    async with app.worker(), app.connect(), app.remote_task_group() as group:
        children = [await group.start(add, number) for number in range(20)]
    assert [record_of(app, child).result for child in children] == [
        str(number + 1) for number in range(20)
    ]


async def test_a_producer_is_present_from_its_first_group_until_it_leaves(app: TaskApp) -> None:
    async with app.connect():
        assert not memory(app)[1]._presence
        async with app.remote_task_group():
            (owner,) = memory(app)[1]._presence
        await anyio.sleep(100)
        assert await ask(app, IsAlive(owner=owner))
        left_at = now()
    assert not memory(app)[1]._presence
    assert now() == left_at


async def test_a_failing_child_cancels_the_others_and_its_error_comes_out(
    app: TaskApp, journal: shop.Journal
) -> None:
    fail, tell = app.task(retry=ONCE)(shop.fail_after), app.task(shop.tell_reason)
    async with app.worker():
        with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012  the block raises
            async with app.remote_task_group() as group:
                other = await group.start(tell)
                failing = await group.start(fail, 1.0)
        assert await other.status() is TaskStatus.CANCELED
        assert (await other.state()).reason == "parent"
    assert journal.count("reason parent") == 1
    (error,) = caught.value.exceptions
    assert isinstance(error, RemoteTaskError)
    assert error.task_id == failing.task_id
    assert error.type == "tests.runtime.shop.OutOfStock"
    assert error.message == "after a while"
    assert 'raise OutOfStock("after a while")' in error.traceback


async def test_a_failing_child_ends_the_body_of_the_block(app: TaskApp) -> None:
    fail = app.task(retry=ONCE)(shop.fail_after)
    async with app.worker():
        with pytest.raises(ExceptionGroup) as caught, anyio.fail_after(10):  # noqa: PT012  the block raises
            async with app.remote_task_group() as group:
                await group.start(fail, 1.0)
                await anyio.sleep_forever()
    assert [type(error) for error in caught.value.exceptions] == [RemoteTaskError]


async def test_a_child_that_is_tried_again_has_not_failed(app: TaskApp) -> None:
    task = app.task(retry=RetryPolicy(delay=2))(shop.fail_until)
    async with app.worker():
        async with app.remote_task_group() as group:
            child = await group.start(task, 3)
        assert await child.result(timeout=0) == 3


async def test_a_child_that_somebody_else_cancels_counts_as_failed(
    app: TaskApp, journal: shop.Journal
) -> None:
    tell = app.task(shop.tell_reason)
    async with app.worker():
        with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012  the block raises
            async with app.remote_task_group() as group:
                child = await group.start(tell)
                await journal.wait_for("tell_reason started")
                await app.handle(child.task_id).cancel()
    (error,) = caught.value.exceptions
    assert isinstance(error, TaskCanceled)


async def test_an_error_in_the_body_cancels_the_children(
    app: TaskApp, journal: shop.Journal
) -> None:
    tell, later = app.task(shop.tell_reason), app.task(shop.echo).options(countdown=50)
    async with app.worker():
        with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012  the block raises
            async with app.remote_task_group() as group:
                running, waiting = await group.start(tell), await group.start(later, 1)
                await journal.wait_for("tell_reason started")
                raise KeyError("mine")
        for child in (running, waiting):
            assert (await child.state()).reason == "parent"
            assert await child.status() is TaskStatus.CANCELED
    assert [type(error) for error in caught.value.exceptions] == [KeyError]
    assert journal.count("reason parent") == 1
    assert journal.count("echo") == 0


@pytest.mark.parametrize("where", ["body", "waiting"])
async def test_cancelling_the_block_cancels_the_children_and_waits_for_them(
    app: TaskApp, journal: shop.Journal, where: str
) -> None:
    clean_up = app.task(shop.clean_up)
    async with app.worker():
        began = now()
        with anyio.move_on_after(5) as scope:
            async with app.remote_task_group() as group:
                child = await group.start(clean_up.options(inherit_deadline=False), 2.0)
                if where == "body":
                    await anyio.sleep_forever()
        assert scope.cancelled_caught
        assert now() - began == pytest.approx(7, abs=0.1)
        assert (await child.state()).reason == "parent"
    assert journal.count("cleaned up") == 1


async def test_children_that_do_not_stop_are_waited_for_no_longer_than_the_grace(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(cancel_grace=3)
    clean_up = app.task(shop.clean_up)
    caplog.set_level(logging.CRITICAL)
    async with app.worker():
        began = now()
        with anyio.move_on_after(5):
            async with app.remote_task_group() as group:
                child = await group.start(clean_up.options(inherit_deadline=False), 60.0)
        assert now() - began == pytest.approx(8, abs=0.1)
        assert await child.join(timeout=100) is TaskStatus.CANCELED


@pytest.mark.parametrize("count", range(0, 24, 2))
async def test_cancelling_in_any_phase_of_starting_leaves_no_child_behind(
    app: TaskApp, journal: shop.Journal, count: int
) -> None:
    tell = app.task(shop.tell_reason)
    async with app.worker():
        with anyio.CancelScope() as scope:
            async with app.remote_task_group() as group, anyio.create_task_group() as tasks:

                async def cancel() -> None:
                    for _ in range(count):
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()

                tasks.start_soon(cancel)
                await group.start(tell)
                await anyio.sleep_forever()
        await anyio.sleep(20)
        assert all(record.status.ended for record in memory(app)[1]._records.values())
        assert left_in_queues(app) == 0
    assert journal.count("tell_reason started") == journal.count("reason parent")


async def test_a_group_that_has_ended_starts_nothing(app: TaskApp) -> None:
    add = app.task(shop.add)
    async with app.connect():
        async with app.remote_task_group() as group:
            pass
        with pytest.raises(AmqpTasksError, match="remote_task_group has ended"):
            await group.start(add, 1)
        assert depth(app) == 0


async def test_outside_of_connect_there_is_no_group(app: TaskApp) -> None:
    with pytest.raises(NotConnected, match=r"app\.connect\(\)"):
        async with app.remote_task_group():
            pass


async def test_a_child_with_bad_arguments_is_refused_where_it_is_started(app: TaskApp) -> None:
    add = app.task(shop.add)
    async with app.connect():
        with pytest.raises(ExceptionGroup) as caught:
            async with app.remote_task_group() as group:
                await group.start(add, "x")  # type: ignore[arg-type]
        assert caught.group_contains(AmqpTasksError, match="a='x'")
        assert depth(app) == 0


# ------------------------------------------------------------------ from task to task


async def test_a_task_that_is_cancelled_takes_its_children_with_it(
    app: TaskApp, journal: shop.Journal
) -> None:
    nap = app.task(shop.nap)
    async with app.worker():
        parent = await app.task(shop.lead_naps)(3, 1000.0)
        for number in range(3):
            await journal.wait_for(f"nap {number} started")
        assert await parent.cancel()
        assert await parent.join(timeout=10) is TaskStatus.CANCELED
        states = await app.list_tasks()
        children = [state for state in states if state.name == nap.name]
    assert [state.parent for state in children] == [parent.task_id] * 3
    assert {(state.status, state.reason) for state in children} == {(TaskStatus.CANCELED, "parent")}


# -------------------------------------------------------------------- deadlines


async def test_the_deadline_of_the_caller_s_scope_travels(app: TaskApp) -> None:
    add = app.task(shop.add)
    async with app.connect():
        with anyio.fail_after(50):
            inherited = await (await add(1)).state()
            without = await (await add.options(inherit_deadline=False)(1)).state()
            own = dt.datetime.fromtimestamp(EPOCH + 99, dt.UTC)
            explicit = await (await add.options(deadline=own)(1)).state()
        unlimited = await (await add(1)).state()
    assert inherited.deadline == pytest.approx(inherited.created_at + 50, abs=1)
    assert without.deadline is None
    assert explicit.deadline == EPOCH + 99
    assert unlimited.deadline is None


async def test_a_task_past_its_deadline_is_not_started(app: TaskApp, journal: shop.Journal) -> None:
    echo = app.task(shop.echo)
    async with app.connect():
        with anyio.move_on_after(5):
            handle = await echo(1)
    await anyio.sleep(6)
    async with app.worker():
        with pytest.raises(RemoteTaskError, match="deadline") as caught:
            await handle.result(timeout=10)
    assert caught.value.reason == "deadline"
    assert journal.count("echo") == 0


async def test_a_task_that_runs_is_stopped_at_its_deadline(app: TaskApp) -> None:
    nap = app.task(shop.nap)
    async with app.worker():
        began = now()
        with anyio.move_on_after(5):
            handle = await nap(1000.0)
        with pytest.raises(RemoteTaskError) as caught:
            await handle.result(timeout=10)
        assert now() - began == pytest.approx(5, abs=0.1)
        assert caught.value.reason == "deadline"
        assert caught.value.type == "TimeoutError"
        assert "anyio.sleep(seconds)" in caught.value.traceback


# ------------------------------------------------------------------ dead parents


async def test_the_child_of_a_parent_that_is_gone_is_canceled_and_never_starts(
    app: TaskApp, journal: shop.Journal
) -> None:
    echo = app.task(shop.echo)
    orphan = Message.compose(task_id="orphan", func=echo.name, args=[1], parent_owner="elsewhere")
    async with app.worker():
        # Who has just come presumes nobody gone.
        await anyio.sleep(10)
        await publish(app, orphan)
        await until(lambda: "orphan" in memory(app)[1]._records)
        assert await app.handle("orphan").join(timeout=10) is TaskStatus.CANCELED
        assert (await app.handle("orphan").state()).reason == "parent"
    assert journal.count("echo") == 0


async def test_the_running_child_of_a_parent_that_goes_is_canceled(
    app: TaskApp, journal: shop.Journal
) -> None:
    tell = app.task(shop.tell_reason)
    child = Message.compose(task_id="child", func=tell.name, parent_owner="elsewhere")
    async with app.worker():
        await ask(app, Beat(owner="elsewhere", ttl=10, info="{}"))
        await publish(app, child)
        await journal.wait_for("tell_reason started")
        await anyio.sleep(9)
        assert await app.handle("child").status() is TaskStatus.RUNNING
        await journal.wait_for("reason parent", within=3)
        assert await app.handle("child").join(timeout=10) is TaskStatus.CANCELED
        assert (await app.handle("child").state()).reason == "parent"
