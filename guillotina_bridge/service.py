"""The service: amqp_tasks' app, open for as long as guillotina's.

One asyncio task of its own opens and closes everything. It is started in an empty context:
guillotina's variables, a finished transaction among them, are nobody's business here. Task
groups and cancel scopes have to be left in the task that entered them, and guillotina starts
and stops its application in different ones.

This module knows no task and no utility of guillotina's; `application` puts them together.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, nullcontext
from contextvars import Context
from typing import Any, Final, Literal

import anyio
from anyio.abc import TaskGroup

from amqp_tasks import (
    BrokerError,
    NotConnected,
    StateStoreError,
    TaskApp,
    Worker,
)

from .exceptions import AMQPConfigurationNotFoundError
from .settings import BridgeSettings

__all__ = ["BridgeService", "Role", "get_service"]

log = logging.getLogger(__name__)

Role = Literal["producer", "embedded", "command"]
"""What the process does: it queues tasks; it runs some as well; it does nothing else."""

FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0
"""Seconds between attempts to open it anew; jittered."""

Beside = Callable[[TaskApp], AbstractAsyncContextManager[Any]]

_open: list[BridgeService] = []


def get_service() -> BridgeService:
    """Return the service of the application that was started last.

    Raises:
        AMQPConfigurationNotFoundError: there is none.
    """
    if not _open:
        raise AMQPConfigurationNotFoundError(
            "guillotina_bridge does not run: it must be among guillotina's applications, and "
            "guillotina must have been started, and not be stopped; and with tasks in the memory "
            "of a process (amqp.persistent_manager='memory') only `g serve` can have any"
        )
    return _open[-1]


class BridgeService:
    """Holds `TaskApp.connect` open, and within it, if it has one, `TaskApp.worker`.

    Args:
        app: not connected yet.
        keep_trying: whether it starts although the servers cannot be used, and goes on
            trying in the background. If it has started once, it does so anyway, unless its
            role is ``command``.
        beside: what else to hold open, connected, while the worker of a process runs.

    Attributes:
        worker_id: the worker's incarnation while there is one, or None.
    """

    def __init__(
        self,
        app: TaskApp,
        settings: BridgeSettings,
        role: Role,
        *,
        keep_trying: bool = False,
        beside: Beside | None = None,
    ) -> None:
        self.settings = settings
        self.role: Role = role
        self.worker_id: str | None = None
        self._app = app
        self._keep_trying = keep_trying
        self._beside: Beside = beside or (lambda _: nullcontext())
        self._owner: asyncio.Task[None] | None = None
        self._worker: Worker | None = None
        self._problem: Exception | None = None
        """Why it is not connected, if it should be: its states cannot be used."""
        self._error: Exception | None = None
        """What it has ended by."""
        self._first: asyncio.Future[None]
        """Done when it is known what became of the first attempt to open it."""
        self._scope = anyio.CancelScope()
        self._is_connected = self._is_up = False
        """Up: the worker is, too, if there is to be one."""
        self._work_scope = anyio.CancelScope()
        self._stop_called = anyio.Event()
        self._grace = app.settings.shutdown_grace
        self._spawned: TaskGroup | None = None
        self._waiting: set[Coroutine[Any, Any, Any]] = set()
        """What was spawned, and has not ended."""
        self._last_has_ended = anyio.Event()

    def __repr__(self) -> str:
        return f"<BridgeService {self.role}, {'open' if self._is_up else 'not open'}>"

    @property
    def app(self) -> TaskApp:
        """The app, to queue tasks with and to look at them.

        Raises:
            NotConnected: the states cannot be used yet, and why; it tries again by itself.
        """
        if self._problem is not None:
            raise NotConnected(
                f"tasks cannot be queued or looked at now: {self._problem}; tried again in the "
                "background"
            ) from self._problem
        return self._app

    # ------------------------------------------------------------------ for guillotina

    async def start(self) -> None:
        """Open it. If this is cancelled, or fails, nothing is left.

        Raises:
            BrokerError, StateStoreError: a server cannot be used, and why.
        """
        loop = asyncio.get_running_loop()
        self._first = loop.create_future()
        self._owner = loop.create_task(self._run(), name="guillotina_bridge", context=Context())
        try:
            await asyncio.shield(self._first)
        except asyncio.CancelledError:
            self.stop_soon(0)
            await self.wait_ended()  # noqa: ASYNC102  shields itself, and has no grace
            raise
        if self._error is not None:
            await self.wait_ended()
            raise self._error

    async def stop(self, grace: float | None = None) -> None:
        """Drain it and close it, and return when that is done. Once more does nothing.

        Being cancelled takes the rest of the grace away, and is raised at the end.

        Args:
            grace: seconds that tasks may go on; None for `shutdown_grace`.
        """
        self.stop_soon(grace)
        await self.wait_ended()

    def stop_soon(self, grace: float | None = None) -> None:
        """Begin to stop; again with a shorter grace, or 0, to hurry. See `wait_ended`."""
        if grace is not None:
            self._grace = min(grace, self._grace)
        self._stop_called.set()
        if not self._is_connected:
            self._scope.cancel()
        elif self._worker is not None:
            self._worker.stop(self._grace)
        elif not self._is_up:
            self._work_scope.cancel()
        if self._grace <= 0:
            self._last_has_ended.set()

    async def wait_ended(self) -> None:
        """Return when it has ended, of itself or by `stop_soon`; raises nothing of its own.

        Being cancelled stops it without any grace, and is raised at the end.
        """
        cancelled: asyncio.CancelledError | None = None
        # Task.cancel() pierces the shield, and is made up for; AnyIO's scopes would not stop.
        with anyio.CancelScope(shield=True):
            while self._owner is not None and not self._owner.done():
                try:
                    await asyncio.wait({self._owner})
                except asyncio.CancelledError as error:  # noqa: ASYNC103  raised in the end
                    cancelled = error
                    self.stop_soon(0)
        if cancelled is not None:
            raise cancelled

    @property
    def error(self) -> Exception | None:
        """What it has ended by, if it was not told to stop."""
        return self._error

    def spawn(self, call: Coroutine[Any, Any, Any]) -> None:
        """Run a coroutine that outlives its caller, and which the end of the service awaits.

        It runs in a copy of the caller's context, and its errors are logged.

        Raises:
            AMQPConfigurationNotFoundError: the service has ended.
        """
        if self._spawned is None:
            call.close()
            raise AMQPConfigurationNotFoundError("guillotina_bridge has stopped")
        self._waiting.add(call)
        self._spawned.start_soon(self._run_spawned, call)

    # ------------------------------------------------------------------ the task of its own

    async def _run(self) -> None:
        _open.append(self)
        try:
            with self._scope:
                async with anyio.create_task_group() as self._spawned:
                    try:
                        await self._again_and_again(self._stay_connected)
                    except Exception as error:
                        self._error = error
                    self._spawned.cancel_scope.cancel()
        finally:
            self._spawned = None
            _open.remove(self)
            if not self._first.done():
                self._first.set_result(None)

    async def _again_and_again(self, stay: Callable[[], Awaitable[None]]) -> None:
        """Stay open until it is told to stop; open again what servers have ended."""
        pause = FIRST_PAUSE
        while not self._stop_called.is_set():
            was_up = False
            try:
                await stay()
            except Exception as raised:
                error = _one_of(raised)
                was_up, self._is_up = self._is_up, False
                if not self._may_try_again(error):
                    raise error from None
                if not self._is_connected:
                    self._problem = error
                log.error("%s; tried again in the background", error, exc_info=_unless_known(error))
                self._is_known()
            pause = FIRST_PAUSE if was_up else pause
            with anyio.move_on_after(pause * random.uniform(0.5, 1.0)):  # noqa: S311  no secret
                await self._stop_called.wait()
            pause = min(pause * 2, LONGEST_PAUSE)

    def _may_try_again(self, error: Exception) -> bool:
        if self._stop_called.is_set() or self.role == "command":
            return False
        return self._first.done() or (self._keep_trying and _unless_known(error) is None)

    async def _stay_connected(self) -> None:
        # Around the worker: what its last tasks have spawned can still be queued.
        async with self._app.connect(
            may_start_without_broker=self._keep_trying, may_lose_broker=self.role != "command"
        ):
            self._is_connected, self._problem = True, None
            try:
                if self.role == "producer":
                    self._up()
                    await self._stop_called.wait()
                else:
                    await self._again_and_again(self._work)
                await self._end_of_spawned()
            finally:
                self._is_connected = False

    async def _work(self) -> None:
        try:
            with anyio.CancelScope() as self._work_scope:
                async with self._app.worker() as worker, self._beside(self._app):
                    self._worker, self.worker_id = worker, worker.id
                    self._up()
                    await self._stop_called.wait()
                    worker.stop(self._grace)
                    await worker.wait_ended()
        finally:
            self._worker, self.worker_id = None, None

    def _up(self) -> None:
        if self._first.done():
            log.warning("the servers can be used now")
        self._is_up = True
        self._is_known()

    def _is_known(self) -> None:
        if not self._first.done():
            self._first.set_result(None)

    # ------------------------------------------------------------------ what was spawned

    async def _run_spawned(self, call: Coroutine[Any, Any, Any]) -> None:
        try:
            await call
        except Exception:
            log.exception("what was to be done in the background has failed: %r", call)
        finally:
            self._waiting.discard(call)
            if not self._waiting:
                self._last_has_ended.set()

    async def _end_of_spawned(self) -> None:
        """Wait for what was spawned, unless there is no time left."""
        settings = self._app.settings
        self._last_has_ended = anyio.Event()
        if not self._waiting or self._grace <= 0:
            return
        # What they do ends by itself within that.
        with anyio.move_on_after(settings.publish_timeout + 2 * settings.state_timeout):
            await self._last_has_ended.wait()


def _one_of(error: Exception) -> Exception:
    """Return one error for many that servers are to blame for.

    The worker and the producer have a connection each, and lose them together.
    """
    while (
        isinstance(error, ExceptionGroup) and error.split((BrokerError, StateStoreError))[1] is None
    ):
        error = error.exceptions[0]
    return error


def _unless_known(error: Exception) -> Exception | None:
    """Return an error whose traceback is of interest: one that no server is to blame for."""
    return None if isinstance(error, BrokerError | StateStoreError) else error
