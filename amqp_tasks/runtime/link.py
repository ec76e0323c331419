"""The line to the servers, on the I/O loop: kept up for as long as somebody needs it."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import anyio
from anyio.abc import TaskStatus

from ..abc import Broker, BrokerSession, StateStore
from ..core.operations import Operation
from ..core.settlement import Publication
from ..core.topology import Topology
from ..exceptions import (
    BrokerError,
    BrokerUnavailable,
    PublishFailed,
    StateCorrupt,
    StateStoreError,
)
from ..settings import Settings
from .batching import StateClient
from .beacon import Beacon

__all__ = ["Link", "Servers", "SessionUser", "pauses"]

log = logging.getLogger(__name__)

R = TypeVar("R")

FIRST_PAUSE: Final = 0.2
LONGEST_PAUSE: Final = 10.0
"""Seconds between attempts to reach a server that does not answer; jittered."""

SessionUser = Callable[[BrokerSession], Coroutine[Any, Any, None]]
"""What to do with a session, for as long as it lasts; cancelled when it is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """Where the servers are. The drivers are made on the loop that they are used on."""

    make_broker: Callable[[], Broker]
    make_store: Callable[[], StateStore]
    topology: Topology


def pauses() -> Callable[[], float]:
    """Return a function that gives growing, jittered pauses in seconds."""
    pause = FIRST_PAUSE

    def following() -> float:
        nonlocal pause
        current, pause = pause, min(pause * 2, LONGEST_PAUSE)
        return current * random.uniform(0.5, 1.0)  # noqa: S311  not a secret

    return following


class Link:
    """The broker's connection, and the state store to go with it. `run` is its service.

    Args:
        may_start_without: whether connecting for the first time may fail like any other time.
        may_lose: whether to go on for ever when it is away, not only for `reconnect_timeout`.
    """

    def __init__(
        self,
        broker: Broker,
        state: StateClient,
        topology: Topology,
        settings: Settings,
        *,
        may_start_without: bool = False,
        may_lose: bool = False,
    ) -> None:
        self.broker = broker
        self.state = state
        self.topology = topology
        self.use_session: SessionUser | None = None
        self.beacon: Beacon | None = None
        self._settings = settings
        self._may_start_without = may_start_without
        self._patience = math.inf if may_lose else settings.reconnect_timeout
        self._session: BrokerSession | None = None
        self._connected = anyio.Event()
        self._problem: object = None
        """Why there is no session, if there was one or has been an attempt."""

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Connect, report the start, and stay connected until cancelled.

        Raises:
            BrokerError: the broker cannot be used, or could not be reached again in time.
        """
        if self._may_start_without:
            task_status.started()
            await self._connect_in_time(at_once=True)
        else:
            await self._one_session(task_status)
        while True:
            await self._connect_in_time(at_once=False)

    async def publish(self, publication: Publication) -> None:
        """Publish, and return when the broker has confirmed.

        Raises:
            PublishFailed: it was not confirmed within `publish_timeout`.
        """
        timeout = self._settings.publish_timeout
        began = anyio.current_time()
        with anyio.move_on_after(timeout):
            await self._connected.wait()
        if self._session is None:
            why = self._problem or "the first attempt goes on"
            raise PublishFailed(
                f"no connection to {self.broker.address} within {timeout:g} s "
                f"(publish_timeout): {why}; nothing was queued",
                maybe=False,
            )
        left = timeout - (anyio.current_time() - began)
        await self._session.publish(self.topology.exchange, publication, left)

    async def publish_persistently(self, publication: Publication) -> None:
        """Publish, again and again until the broker has confirmed."""
        pause = pauses()
        while True:
            try:
                return await self.publish(publication)
            except BrokerError as error:
                log.warning("cannot publish to %s: %s", publication.queue.name, error)
                await anyio.sleep(pause())

    async def ask_persistently(self, operation: Operation[R]) -> R:
        """Ask the state store, again and again until it has answered.

        Raises:
            StateCorrupt: it never will, for this task.
        """
        pause = pauses()
        while True:
            try:
                return await self.state.ask(operation)
            except StateCorrupt:
                raise
            except StateStoreError as error:
                log.warning("the state store does not serve: %s", error)
                await anyio.sleep(pause())

    async def _connect_in_time(self, *, at_once: bool) -> None:
        """Have a session, as soon as there can be one; return when it is over."""
        began, pause = anyio.current_time(), pauses()
        while True:
            if not at_once:
                await anyio.sleep(pause())
            at_once = False
            try:
                return await self._one_session(anyio.TASK_STATUS_IGNORED)
            # Whatever it says: a broker that is starting refuses logins and misses queues.
            except BrokerError as error:
                down, limit = anyio.current_time() - began, self._patience
                if down > limit:
                    raise BrokerUnavailable(
                        f"{error} (for {down:.0f} s; reconnect_timeout={limit:g})"
                    ) from error
                self._problem = error
                # A broker that refuses to serve is not merely away.
                level = logging.WARNING if isinstance(error, BrokerUnavailable) else logging.ERROR
                log.log(level, "cannot connect, tried again: %s", error)

    async def _one_session(self, task_status: TaskStatus[None]) -> None:
        async with self.broker.session() as session:
            await self._declare(session)
            if self._problem is not None:
                log.warning("connected to %s", self.broker.address)
                self._problem = None
            self._session = session
            self._connected.set()
            task_status.started()
            try:
                reason = await self._while_open(session)
            finally:
                self._session = None
                self._connected = anyio.Event()
            self._problem = reason
            # Before the session is closed, which takes seconds if nobody answers.
            log.warning("lost the connection to %s: %s", self.broker.address, reason)

    async def _declare(self, session: BrokerSession) -> None:
        limit = self._settings.connect_timeout
        try:
            with anyio.fail_after(limit):
                await session.declare(self.topology.exchange, self.topology.always())
        except TimeoutError:
            raise BrokerUnavailable(
                f"{self.broker.address} declares no queue within {limit:g} s (connect_timeout)"
            ) from None

    async def _while_open(self, session: BrokerSession) -> str:
        reasons: list[str] = []
        async with anyio.create_task_group() as tasks:

            async def end_after(watch: Callable[[], Awaitable[str]]) -> None:
                reasons.append(await watch())
                tasks.cancel_scope.cancel()

            tasks.start_soon(end_after, session.wait_closed)
            if self.beacon is not None:
                tasks.start_soon(end_after, partial(self._watch_beacon, self.beacon, session))
            if self.use_session is not None:
                tasks.start_soon(self.use_session, session)
        return reasons[0]

    async def _watch_beacon(self, beacon: Beacon, session: BrokerSession) -> str:
        reason = await beacon.watch(session)
        if self._settings.on_beacon_lost == "exit":
            raise BrokerUnavailable(f"{self.broker.address}: {reason} (on_beacon_lost=exit)")
        return reason
