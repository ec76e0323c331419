"""A sign of life: one key for all leases of a worker, or all children of a producer."""

from __future__ import annotations

import logging
import os
import platform
import secrets

import anyio
from anyio.abc import TaskStatus
from pydantic_core import to_json

from ..core.operations import Beat, Leave
from ..exceptions import StateStoreError
from .batching import StateClient

__all__ = ["Presence", "new_incarnation"]

log = logging.getLogger(__name__)


def new_incarnation() -> str:
    """Return an id for this start of a program: readable, and never the same again."""
    return f"{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"


class Presence:
    """Says every third of `ttl` seconds that `owner` is alive. `run` is its service."""

    def __init__(self, state: StateClient, owner: str, ttl: float, info: dict[str, object]) -> None:
        self._state = state
        self._beat = Beat(owner=owner, ttl=ttl, info=to_json(info).decode())
        self._ttl = ttl

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Appear, report the start, stay present until cancelled, and leave.

        The start fails if the first sign cannot be given: without it, others would take
        a worker's tasks, or cancel a producer's children, at once.
        """
        await self._state.ask(self._beat)
        task_status.started()
        try:
            while True:
                await anyio.sleep(self._ttl / 3)
                await self._renew()
        finally:
            # A worker that leaves without a word is waited for; one that says so is not.
            with anyio.move_on_after(2, shield=True):
                await self._leave()

    async def _renew(self) -> None:
        try:
            was_present = await self._state.ask(self._beat)
        except StateStoreError as error:
            log.warning("cannot renew the presence of %s: %s", self._beat.owner, error)
            return
        if not was_present:
            log.warning(
                "%s was not seen for %g s (presence_ttl): others may have taken its tasks",
                self._beat.owner,
                self._ttl,
            )

    async def _leave(self) -> None:
        try:
            await self._state.ask(Leave(owner=self._beat.owner))
        except StateStoreError as error:
            log.warning("cannot take back the presence of %s: %s", self._beat.owner, error)
