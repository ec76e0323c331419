"""The virtual clocks themselves: an hour passes at once, and in order."""

from __future__ import annotations

import time

import anyio
import pytest

pytestmark = pytest.mark.anyio


async def test_an_hour_takes_no_time() -> None:
    began, virtual = time.monotonic(), anyio.current_time()
    order: list[str] = []

    async def nap(name: str, seconds: float) -> None:
        await anyio.sleep(seconds)
        order.append(name)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(nap, "long", 3600)
        tasks.start_soon(nap, "short", 60)
    assert order == ["short", "long"]
    assert anyio.current_time() - virtual == pytest.approx(3600)
    assert time.monotonic() - began < 60
