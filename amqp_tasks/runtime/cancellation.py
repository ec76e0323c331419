"""How cancel requests reach the tasks that run here.

Polling decides: one round trip for all running tasks, every `cancel_poll_interval`. An
announcement only makes the next look happen at once; a link that is dead without a word
therefore costs time, and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Protocol

import anyio
from anyio.abc import TaskStatus

from ..abc import Listener, StateStore
from ..core.operations import Poll
from ..core.outcome import CancelReason
from ..exceptions import StateStoreError
from .batching import StateClient
from .presence import Census

__all__ = ["CancelWatch", "Cancellable"]

log = logging.getLogger(__name__)


class Cancellable(Protocol):
    """A task that runs here, as the watch sees it."""

    @property
    def fence(self) -> int: ...

    @property
    def parent_owner(self) -> str | None:
        """Incarnation of who waits for this task, if anybody."""
        ...

    def cancel(self, reason: CancelReason) -> None: ...


class CancelWatch:
    """Looks for cancel requests and lost leases. `run` is its service."""

    def __init__(
        self,
        store: StateStore,
        state: StateClient,
        owner: str,
        census: Census,
        running: Mapping[str, Cancellable],
        interval: float,
    ) -> None:
        self._store = store
        self._state = state
        self._census = census
        self._topic = f"cancel:{owner}"
        self._running = running
        self._interval = interval

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Watch until cancelled."""
        async with self._store.listen() as listener, anyio.create_task_group() as tasks:
            await listener.subscribe(self._topic)
            tasks.start_soon(self._hear, listener)
            task_status.started()
            while True:
                await anyio.sleep(self._interval)
                await self.look(list(self._running))
                await self._look_for_orphans()

    async def look(self, task_ids: Iterable[str]) -> None:
        """Ask about these tasks, and cancel those that shall not, or must not, go on."""
        asked = [task_id for task_id in task_ids if task_id in self._running]
        answers = await self._state.ask_all([Poll(task_id=task_id) for task_id in asked])
        for task_id, answer in zip(asked, answers, strict=True):
            task = self._running.get(task_id)
            if isinstance(answer, StateStoreError):
                log.warning("cannot look for cancel requests: %s", answer)
                return
            if task is None or answer is None:
                continue  # it ended meanwhile, or the store was emptied and knows nothing
            if answer.fence > task.fence:
                task.cancel(CancelReason.LEASE_LOST)
            elif answer.cancel is not None:
                task.cancel(_reason(answer.cancel))

    async def _look_for_orphans(self) -> None:
        """Cancel the tasks for which nobody waits any more: their parent's process is gone."""
        owners = {task.parent_owner for task in self._running.values()}
        try:
            gone = await self._census.gone({owner for owner in owners if owner is not None})
        except StateStoreError as error:
            log.warning("cannot look for parents that are gone: %s", error)
            return
        for task in list(self._running.values()):
            if task.parent_owner in gone:
                task.cancel(CancelReason.PARENT)

    async def _hear(self, listener: Listener) -> None:
        async for _, task_id in listener:
            await self.look([task_id])


def _reason(text: str) -> CancelReason:
    try:
        return CancelReason(text)
    except ValueError:  # written by another version
        return CancelReason.USER
