"""Signs of life: one key for all leases of a worker, or all children of a producer."""

from __future__ import annotations

import logging
import math
import os
import platform
import secrets
from collections.abc import Collection
from typing import Final

import anyio
from anyio.abc import TaskStatus
from pydantic_core import to_json

from ..core.operations import Beat, IsAlive, Leave
from ..exceptions import StateStoreError
from .batching import StateClient

__all__ = ["Census", "Presence", "new_incarnation"]

log = logging.getLogger(__name__)


def new_incarnation() -> str:
    """Return an id for this start of a program: readable, and never the same again."""
    return f"{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"


RENEWALS: Final = 3
"""Signs of life in the time for which one counts."""
HASTE: Final = 10
"""One that could not be given is given again in the tenth part of that time."""


class Presence:
    """Says, often enough, that `owner` is alive. `run` is its service.

    Args:
        ttl: seconds for which one sign counts.
        census: is told when signs of life are missing that should be there.
    """

    def __init__(
        self,
        state: StateClient,
        owner: str,
        ttl: float,
        info: dict[str, object],
        census: Census | None = None,
    ) -> None:
        self._state = state
        self._census = census
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
            pause = self._ttl / RENEWALS
            while True:
                await anyio.sleep(pause)
                pause = self._ttl / (RENEWALS if await self._renew() else HASTE)
        finally:
            # A worker that leaves without a word is waited for; one that says so is not.
            with anyio.move_on_after(2, shield=True):
                await self._leave()

    async def _renew(self) -> bool:
        """Give a sign of life; return whether the store has heard it."""
        try:
            was_present = await self._state.ask(self._beat)
        except StateStoreError as error:
            log.warning("cannot renew the presence of %s: %s", self._beat.owner, error)
            return False
        if not was_present:
            if self._census is not None:
                self._census.distrust()
            log.warning(
                "%s was not seen for %g s (presence_ttl): others may have taken its tasks",
                self._beat.owner,
                self._ttl,
            )
        return True

    async def _leave(self) -> None:
        try:
            await self._state.ask(Leave(owner=self._beat.owner))
        except StateStoreError as error:
            log.warning("cannot take back the presence of %s: %s", self._beat.owner, error)


class Census:
    """Tells who is gone, as far as this worker can know.

    A presence that is missing means nothing as such: all are, after the store was away
    for a while, or was emptied, until everybody has had time to say that he lives. So
    nobody is presumed gone unless the store has answered for as long as a sign of life
    counts, and has this worker's own.

    Args:
        owner: this worker's incarnation, which is present itself.
        ttl: seconds for which a sign of life counts.
    """

    def __init__(self, state: StateClient, owner: str, ttl: float) -> None:
        self._state = state
        self._owner = owner
        self._ttl = ttl
        self._distrusted_until = -math.inf

    def distrust(self) -> None:
        """Take note that signs of life were missing that should have been there."""
        self._distrusted_until = anyio.current_time() + self._ttl

    async def is_gone(self, owner: str) -> bool:
        """
        Raises:
            StateStoreError: nobody can tell at present.
        """
        return owner in await self.gone([owner])

    async def gone(self, owners: Collection[str]) -> set[str]:
        """Return those of `owners` who are gone.

        Raises:
            StateStoreError: nobody can tell at present.
        """
        asked = [owner for owner in owners if owner != self._owner]
        if not asked:
            return set()
        answers = await self._state.ask_all([IsAlive(owner=one) for one in (self._owner, *asked)])
        for answer in answers:
            if isinstance(answer, StateStoreError):
                raise answer
        if not answers[0]:
            self.distrust()
        if anyio.current_time() < self._distrusted_until or self._state.answers_for < self._ttl:
            return set()
        return {owner for owner, is_alive in zip(asked, answers[1:], strict=True) if not is_alive}
