"""A virtual clock for asyncio: time passes only when everybody waits for it.

Trio has one of its own (`trio.testing.MockClock(autojump_threshold=0)`); this is the same
for asyncio, so that a test of an hour's waiting takes milliseconds on both.
"""

from __future__ import annotations

import asyncio
import selectors

__all__ = ["VirtualClockLoop"]


class _JumpingSelector(selectors.DefaultSelector):
    """Never waits while a timer is due: moves the loop's clock on instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            # No timer: only a thread or a signal can wake the loop, so really wait.
            return super().select(None)
        ready = super().select(0)
        if not ready:
            self.now += timeout
        return ready


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop whose `time()` jumps to the next timer when nothing else is left."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now
