"""What all tests share: the event loops that they run on."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import trio.testing

from .clock import VirtualClockLoop

Backend = Callable[[], tuple[str, dict[str, Any]]]

VIRTUAL_CLOCKS: dict[str, Backend] = {
    "asyncio-virtual": lambda: ("asyncio", {"loop_factory": VirtualClockLoop}),
    "trio-virtual": lambda: ("trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}),
}
REAL_CLOCKS: dict[str, Backend] = {
    "asyncio": lambda: ("asyncio", {"use_uvloop": False}),
    "uvloop": lambda: ("asyncio", {"use_uvloop": True}),
    "trio": lambda: ("trio", {}),
}

ALL_LOOPS = bool(os.environ.get("AMQP_TASKS_ALL_LOOPS"))
"""Whether tests that cost much are run on every event loop that they can run on."""

IO_LOOPS = ("asyncio", "uvloop") if ALL_LOOPS else ("uvloop",)
"""What a single driver's own tests run on. The I/O thread has uvloop where there is one; the
conformance suites of all drivers run on both in any case."""


@pytest.fixture(params=VIRTUAL_CLOCKS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Both backends under a virtual clock. Tests with real servers override this."""
    return VIRTUAL_CLOCKS[request.param]()


LONGEST_FIRST = ("e2e", "drivers", "bridge", "chaos")
"""Folders whose files take longest: what begins last should not go on alone for minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return LONGEST_FIRST.index(folder) if folder in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=rank)
