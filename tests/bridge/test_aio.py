"""To end what was begun, and to run a coroutine in a context."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar, copy_context
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from guillotina_bridge.aio import always, current_task, finish, run_in

pytestmark = pytest.mark.anyio

variable: ContextVar[str] = ContextVar("variable", default="unset")


def never() -> bool:
    return False


# ------------------------------------------------------------------ finish


async def test_what_ends_is_returned_and_what_fails_is_not_raised() -> None:
    async def answer() -> int:
        await asyncio.sleep(0)
        return 42

    async def fail() -> None:
        raise RuntimeError("in there")

    ended = await finish(answer(), impatient=never, patience=9)
    assert (ended.task.result(), ended.native_cancels) == (42, 0)
    failed = await finish(fail(), impatient=always, patience=9)
    assert str(failed.task.exception()) == "in there"


async def test_a_scope_is_shielded_off() -> None:
    event = asyncio.Event()
    with anyio.CancelScope() as scope:
        scope.cancel()
        asyncio.get_running_loop().call_later(0.02, event.set)
        ended = await finish(event.wait(), impatient=lambda: scope.cancel_called, patience=9)
        assert ended.task.result()
        assert ended.native_cancels == 0
        await anyio.lowlevel.checkpoint()
        pytest.fail("the cancellation was lost")
    assert scope.cancelled_caught


async def test_native_cancellations_are_counted_and_can_be_forgotten() -> None:
    event = asyncio.Event()

    async def wait() -> int:
        ended = await finish(event.wait(), impatient=never, patience=9)
        assert current_task().cancelling() == 2
        ended.overtake()
        await asyncio.sleep(0)
        return ended.native_cancels

    task = asyncio.create_task(wait())
    for _ in range(2):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.sleep(0)
    event.set()
    assert await task == 2
    assert task.cancelling() == 0


@pytest.mark.parametrize("native", [True, False])
async def test_patience_has_an_end_when_somebody_waits(native: bool) -> None:
    event = asyncio.Event()

    async def wait() -> bool:
        ended = await finish(event.wait(), impatient=never if native else always, patience=0.02)
        over = not ended.task.done()
        ended.task.cancel()
        ended.overtake()
        return over

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    if native:
        task.cancel()
    assert await task


# ------------------------------------------------------------------ run_in


async def test_a_coroutine_has_its_context_and_its_callers_task() -> None:
    context = copy_context()
    caller = current_task()

    async def inner(arguments: list[Any]) -> str:
        assert current_task() is caller
        variable.set("set")
        await asyncio.sleep(0)
        assert variable.get() == "set"
        child = asyncio.create_task(asyncio.sleep(0, variable))
        assert (await child).get() == "set"
        with anyio.move_on_after(0.001):
            await anyio.sleep(9)
        try:
            await asyncio.create_task(fail())
        except RuntimeError as error:
            arguments.append(str(error))
        return "done"

    async def fail() -> None:
        raise RuntimeError(variable.get())

    heard: list[Any] = []
    assert await run_in(context, inner(heard)) == "done"
    assert heard == ["set"]
    assert variable.get() == "unset"
    assert context[variable] == "set"


async def test_errors_and_cancellations_go_in_and_out() -> None:
    trace: list[str] = []

    async def inner() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            trace.append("cancelled")
            raise
        finally:
            await asyncio.sleep(0)
            trace.append("cleaned up")

    async def fail() -> None:
        raise RuntimeError("out of there")

    with pytest.raises(RuntimeError, match="out of there"):
        await run_in(copy_context(), fail())
    with anyio.move_on_after(0.001) as scope:
        await run_in(copy_context(), inner())
    assert scope.cancelled_caught
    task = asyncio.ensure_future(run_in(copy_context(), inner()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # The scope cancels the clean-up as well, again and again; the other one comes once.
    assert trace == ["cancelled", "cancelled", "cleaned up"]
