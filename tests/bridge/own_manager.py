"""An application with a state manager of its own, which notes what it is told, and can fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from guillotina import configure
from zope.interface import implementer

from guillotina_bridge.interfaces import IStateManagerUtility

app_settings: dict[str, Any] = {"applications": ["tests.bridge.scheduling"]}


@configure.utility(provides=IStateManagerUtility, name="own")
@implementer(IStateManagerUtility)
class OwnManager:
    """States in a dict."""

    def __init__(self) -> None:
        self.states: dict[str, dict[str, Any]] = {}
        self.told: list[tuple[str, str]] = []
        """Id and status, each time that one is told which is new."""
        self.times_to_live: set[float | None] = set()
        self.canceled: set[str] = set()
        self.was_canceled: list[str] = []
        self.loops: set[asyncio.AbstractEventLoop] = set()
        self.failing: str | None = None
        """How: ``raises``, ``hangs``, ``cancels``."""

    def history(self, task_id: str) -> list[str]:
        """Return the statuses that it was told of a task."""
        return [status for each, status in self.told if each == task_id]

    async def _work(self) -> None:
        self.loops.add(asyncio.get_running_loop())
        match self.failing:
            case "raises":
                raise ZeroDivisionError("it is broken")
            case "hangs":
                await asyncio.sleep(3600)
            case "cancels":
                raise asyncio.CancelledError

    async def update(self, task_id: str, data: dict[str, Any], ttl: float | None = None) -> None:
        await self._work()
        known = self.states.setdefault(task_id, {})
        if data.get("status") != known.get("status"):
            self.told.append((task_id, data["status"]))
        known.update(data)
        self.times_to_live.add(ttl)

    async def get(self, task_id: str) -> dict[str, Any]:
        await self._work()
        return dict(self.states.get(task_id, {}))

    async def exists(self, task_id: str) -> bool:
        await self._work()
        return task_id in self.states

    async def list(self) -> AsyncIterator[str]:
        await self._work()
        for task_id in list(self.states):
            yield task_id

    async def cancel(self, task_id: str) -> bool:
        await self._work()
        self.canceled.add(task_id)
        self.was_canceled.append(task_id)
        return True

    async def clean_canceled(self, task_id: str) -> None:
        await self._work()
        self.canceled.discard(task_id)

    async def is_canceled(self, task_id: str) -> bool:
        await self._work()
        return task_id in self.canceled
