"""What all tests share: the event loops that they run on."""

from __future__ import annotations

from typing import Any

import pytest
import trio.testing

from .clock import VirtualClockLoop

VIRTUAL_CLOCKS = {
    "asyncio-virtual": lambda: ("asyncio", {"loop_factory": VirtualClockLoop}),
    "trio-virtual": lambda: ("trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}),
}
REAL_CLOCKS = {
    "asyncio": lambda: ("asyncio", {"use_uvloop": False}),
    "uvloop": lambda: ("asyncio", {"use_uvloop": True}),
    "trio": lambda: ("trio", {}),
}


@pytest.fixture(params=VIRTUAL_CLOCKS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Both backends under a virtual clock. Tests with real servers override this."""
    return VIRTUAL_CLOCKS[request.param]()
