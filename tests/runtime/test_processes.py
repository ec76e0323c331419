"""Tasks in processes of their own, on real clocks."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import anyio
import pytest

from amqp_tasks import NoRetry, RemoteTaskError, RetryPolicy, TaskApp, TaskStatus

from ..conftest import REAL_CLOCKS
from . import shop

pytestmark = [pytest.mark.anyio, pytest.mark.patience(30)]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return REAL_CLOCKS[request.param]()


@pytest.fixture
def app() -> TaskApp:
    return TaskApp(broker_url="memory://", state_url="memory://", clock=time.time)


async def pid_in(file: Path) -> int:
    """Return the id that a process leaves in a file."""
    with anyio.fail_after(20):
        while not (file.exists() and (text := file.read_text()).endswith("\n")):
            await anyio.sleep(0.02)
    return int(text)


async def gone(pid: int) -> bool:
    with anyio.move_on_after(5):
        while True:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return True
            await anyio.sleep(0.02)
    return False


async def test_its_result_comes_back(app: TaskApp) -> None:
    square = app.task(process=True)(shop.square)
    async with app.worker():
        assert await (await square(12)).result(timeout=20) == 144


async def test_what_it_raises_comes_back_with_its_traceback(app: TaskApp) -> None:
    fail = app.task(process=True, retry=RetryPolicy(max_retries=0))(shop.fail_in_process)
    async with app.worker():
        with pytest.raises(RemoteTaskError) as caught:
            await (await fail()).result(timeout=20)
    assert caught.value.type == "tests.runtime.shop.OutOfStock"
    assert caught.value.message == "in a process"
    assert 'raise OutOfStock("in a process")' in caught.value.traceback


async def test_it_is_killed_at_its_timeout_while_it_burns_a_core(
    app: TaskApp, tmp_path: Path
) -> None:
    policy = RetryPolicy(max_retries=0)
    burn = app.task(process=True, timeout=3.0, retry=policy)(shop.burn)
    square = app.task(process=True)(shop.square)
    async with app.worker():
        # The process is up then, and used again: starting one is not what is timed here.
        assert await (await square(2)).result(timeout=60) == 4
        handle = await burn(str(tmp_path / "pid"))
        with pytest.raises(RemoteTaskError) as caught:
            await handle.result(timeout=20)
        assert caught.value.reason == "timeout"
        assert await gone(await pid_in(tmp_path / "pid"))


async def test_it_is_killed_when_it_is_cancelled_while_it_burns_a_core(
    app: TaskApp, tmp_path: Path
) -> None:
    async with app.worker():
        handle = await app.task(process=True)(shop.burn)(str(tmp_path / "pid"))
        pid = await pid_in(tmp_path / "pid")
        assert await handle.cancel()
        assert await handle.join(timeout=20) is TaskStatus.CANCELED
        assert await gone(pid)


def give_up() -> None:
    raise NoRetry("for good")


async def test_it_can_say_that_trying_again_is_futile(app: TaskApp) -> None:
    retry = RetryPolicy(max_retries=None, delay=0)
    async with app.worker():
        handle = await app.task(process=True, retry=retry)(give_up)()
        with pytest.raises(RemoteTaskError, match="NoRetry: for good"):
            await handle.result(timeout=20)
        assert (await handle.state()).attempt == 1
