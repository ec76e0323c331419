"""The hand-off between the task loop and an I/O loop in its own thread, on real clocks."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio.abc import TaskStatus

from amqp_tasks.runtime.io_loop import ThreadLoop, open_io_thread

from ..conftest import REAL_CLOCKS

pytestmark = pytest.mark.anyio

NAME = "amqp_tasks io under test"


@pytest.fixture(params=REAL_CLOCKS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return REAL_CLOCKS[request.param]()


def thread_names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


class Noted:
    """What happened on the I/O loop, seen from the task loop."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.begun = threading.Event()

    async def wait_begun(self) -> None:
        with anyio.fail_after(5):
            while not self.begun.is_set():
                await anyio.sleep(0.001)

    async def sleep(self) -> None:
        self.begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.02)
            self.lines.append("cleaned up")


async def where() -> tuple[str, str]:
    await anyio.lowlevel.checkpoint()
    return threading.current_thread().name, type(asyncio.get_running_loop()).__module__


async def double(number: int) -> int:
    await anyio.sleep(0.001 * (number % 3))
    return 2 * number


async def refuse(text: str) -> None:
    await anyio.lowlevel.checkpoint()
    raise KeyError(text)


async def test_a_call_runs_in_the_thread_and_returns() -> None:
    async with open_io_thread(NAME) as io:
        name, _ = await io.call(where)
        assert name == NAME
        assert await io.call(double, 4) == 8


async def test_a_call_raises_what_it_raises_there_and_the_loop_goes_on() -> None:
    async with open_io_thread(NAME) as io:
        with pytest.raises(KeyError, match="no"):
            await io.call(refuse, "no")
        assert await io.call(double, 4) == 8


async def test_make_makes_an_object_in_the_thread() -> None:
    async with open_io_thread(NAME) as io:
        assert await io.make(threading.get_ident) != threading.get_ident()


async def test_cancelling_a_call_cancels_it_there_and_waits_until_it_has_ended() -> None:
    noted = Noted()
    async with open_io_thread(NAME) as io, anyio.create_task_group() as tasks:
        tasks.start_soon(io.call, noted.sleep)
        await noted.wait_begun()
        assert noted.lines == []
        tasks.cancel_scope.cancel()
    assert noted.lines == ["cleaned up"]


@pytest.mark.parametrize("count", range(4))
async def test_a_call_that_is_cancelled_at_once_ends_at_once(count: int) -> None:
    noted = Noted()
    with anyio.fail_after(5):
        async with open_io_thread(NAME) as io, anyio.create_task_group() as tasks:
            tasks.start_soon(io.call, noted.sleep)
            for _ in range(count):
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
    assert noted.lines == (["cleaned up"] if noted.begun.is_set() else [])


async def test_a_thousand_calls_at_once_each_have_their_own_answer() -> None:
    answers: dict[int, int] = {}

    async def ask(io: ThreadLoop, number: int) -> None:
        answers[number] = await io.call(double, number)

    async with open_io_thread(NAME) as io, anyio.create_task_group() as tasks:
        for number in range(1000):
            tasks.start_soon(ask, io, number)
    assert answers == {number: 2 * number for number in range(1000)}


async def test_posts_arrive_in_their_order_and_so_do_those_that_come_back() -> None:
    there: list[int] = []
    here: list[int] = []

    async def read() -> list[int]:
        await anyio.lowlevel.checkpoint()
        return list(there)

    async with open_io_thread(NAME) as io:
        for number in range(100):
            io.post(there.append, number)
        assert await io.call(read) == list(range(100))

        async def post_back() -> None:
            await anyio.lowlevel.checkpoint()
            for number in range(100):
                io.post_back(here.append, number)

        await io.call(post_back)
        assert here == list(range(100))


# ---------------------------------------------------------------------- services


async def test_a_service_reports_its_start_and_runs_until_it_is_cancelled() -> None:
    noted = Noted()

    async def service(*, task_status: TaskStatus[None]) -> None:
        await anyio.sleep(0.01)
        noted.lines.append("started")
        task_status.started()
        await noted.sleep()

    async with open_io_thread(NAME) as io, anyio.create_task_group() as tasks:
        with anyio.fail_after(5):
            await tasks.start(io.serve, service)
        assert noted.lines == ["started"]
        tasks.cancel_scope.cancel()
    assert noted.lines == ["started", "cleaned up"]


async def test_a_service_that_ends_by_itself_ends_its_serving() -> None:
    async def service(*, task_status: TaskStatus[None]) -> None:
        task_status.started()
        await anyio.sleep(0.01)

    async with open_io_thread(NAME) as io, anyio.create_task_group() as tasks:
        with anyio.fail_after(5):
            await tasks.start(io.serve, service)


async def test_a_service_that_cannot_start_raises_where_it_is_started() -> None:
    async def service(*, task_status: TaskStatus[None]) -> None:
        await anyio.lowlevel.checkpoint()
        raise KeyError("no start")

    async with open_io_thread(NAME) as io:
        with pytest.raises(ExceptionGroup) as caught:
            async with anyio.create_task_group() as tasks:
                await tasks.start(io.serve, service)
        assert caught.group_contains(KeyError, match="no start")


async def test_a_service_that_fails_later_raises_out_of_its_serving() -> None:
    async def service(*, task_status: TaskStatus[None]) -> None:
        task_status.started()
        await anyio.sleep(0.01)
        raise KeyError("later")

    async with open_io_thread(NAME) as io:
        with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012  the block raises
            async with anyio.create_task_group() as tasks:
                await tasks.start(io.serve, service)
                await anyio.sleep(5)
        assert caught.group_contains(KeyError, match="later")


async def test_a_service_that_is_cancelled_while_it_starts_has_ended_afterwards() -> None:
    noted = Noted()

    async def service(*, task_status: TaskStatus[None]) -> None:
        await noted.sleep()

    async with open_io_thread(NAME) as io:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks, anyio.create_task_group() as starting:
                tasks.start_soon(starting.start, io.serve, service)
                await noted.wait_begun()
                scope.cancel()
        assert noted.lines == ["cleaned up"]


# ----------------------------------------------------------------------- the end


async def test_after_the_block_the_thread_is_gone_and_calls_raise() -> None:
    async with open_io_thread(NAME) as io:
        assert NAME in thread_names()
    assert NAME not in thread_names()
    with anyio.fail_after(5):
        with pytest.raises(RuntimeError, match="the I/O loop ended"):
            await io.call(double, 1)
        with pytest.raises(RuntimeError, match="the I/O loop ended"):
            await io.make(list)
        io.post(print)


async def test_leaving_the_block_waits_for_calls_that_are_under_way() -> None:
    answers = []

    async def ask(io: ThreadLoop) -> None:
        answers.append(await io.call(double, 5))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks, open_io_thread(NAME) as io:
            tasks.start_soon(ask, io)
            await anyio.lowlevel.checkpoint()
    assert answers == [10]


async def test_an_error_in_the_block_comes_out_and_the_thread_is_gone() -> None:
    with pytest.raises(KeyError, match="mine"):
        async with open_io_thread(NAME):
            raise KeyError("mine")
    assert NAME not in thread_names()


async def test_opening_can_be_cancelled_and_leaves_no_thread() -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with open_io_thread(NAME) as io:
            await io.call(double, 1)
    assert NAME not in thread_names()
