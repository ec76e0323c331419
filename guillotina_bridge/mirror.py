"""Custom state managers: a utility of an application's own, which is told of every state.

What holds is what the workers keep, with leases and fences; the utility has a copy, which
people and programs read, and takes requests to cancel. It is told

- ``scheduled`` by the producer, before the message is published;
- ``running`` by a middleware, before the attempt begins;
- ``finished``, ``errored``, ``retrying``, ``canceled``, or ``scheduled`` again, when the
  workers' state says so: how an attempt ends is certain only then;
- whatever else it has missed (a task that never started, a worker that died) when it is asked
  for a task that has not ended, by `read`.

It is called on guillotina's event loop only. Its failures are logged, and fail no task.

For who runs tasks::

    mirror = Mirror()
    app = TaskApp(middleware=[mirror.middleware, run_attempt], ...)
    async with app.connect(), app.worker() as worker, mirror.open(app):
        ...                         # and, before it is left,
        worker.stop(grace)
        await worker.wait_ended()   # so that all ends are written down

A mere producer needs none of it.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from contextvars import Context
from typing import Any, Final
from weakref import WeakKeyDictionary

import anyio
from anyio.abc import TaskGroup

from amqp_tasks import (
    AmqpTasksError,
    Attempt,
    TaskApp,
    TaskState,
    TaskStatus,
    current_attempt,
)

from .managers import get_state_manager, state_in_app
from .service import BridgeService, get_service
from .views import has_ended, view

__all__ = ["Mirror", "ask", "read", "tell", "tell_not_queued", "tell_scheduled"]

log = logging.getLogger(__name__)

FIRST_LOOK: Final = 0.02
LONGEST_LOOK: Final = 2.0
"""Seconds between looks at a task whose attempt has ended, until its end is written down."""

_failing: WeakKeyDictionary[BridgeService, set[str]] = WeakKeyDictionary()
"""Methods of the utility that failed when they were called last: that is said once."""


# ------------------------------------------------------------------------ telling it


async def tell_scheduled(task_id: str, job: Mapping[str, Any]) -> bool:
    """Tell the utility of a new task; False if it knows the id already."""
    if await ask("get", task_id):
        return False
    await _update(
        task_id,
        {
            "task_id": task_id,
            "status": str(TaskStatus.SCHEDULED),
            "updated": time.time(),
            "job_data": dict(job),
            "job_retries": 0,
            "eventlog": [],
        },
    )
    return True


async def tell_not_queued(task_id: str, error: Exception) -> None:
    """Tell the utility that a new task is not in the queue."""
    status = str(TaskStatus.ERRORED)
    shown = {"status": status, "reason": "not_queued", "error": str(error), "updated": time.time()}
    await _update(task_id, shown)


async def tell(task_id: str) -> None:
    """Tell the utility how a task does now, as far as the workers' states can be read."""
    with _away():
        state = await state_in_app(task_id)
        if state is not None:
            await _tell(state)


async def read(task_id: str) -> dict[str, Any]:
    """Return the utility's state of a task, which is brought up to date if it has not ended.

    If the utility fails, what the workers keep is the answer, and the other way round.

    Raises:
        StateStoreError, NotConnected: neither can be read.
    """
    shown: dict[str, Any] = await ask("get", task_id) or {}
    if has_ended(shown):
        return shown
    try:
        state = await state_in_app(task_id)
    except AmqpTasksError:
        if shown:
            return shown
        raise
    if state is None:
        return shown
    actual = view(state)
    if any(shown.get(key) != actual[key] for key in ("status", "job_retries", "eventlog")):
        await _tell(state)
        shown = {**shown, **actual}
    return shown


async def _tell(state: TaskState) -> None:
    await _update(state.task_id, view(state))
    if state.status.ended and hasattr(get_state_manager(), "clean_canceled"):
        # A request to cancel would be kept for ever.
        await ask("clean_canceled", state.task_id)


async def _update(task_id: str, shown: dict[str, Any]) -> None:
    await ask("update", task_id, shown)


async def ask(method: str, *args: Any) -> Any:
    """Call a method of the utility; None if it fails, or takes too long.

    It is an application's own: it may raise anything, and no task shall suffer from it.
    """
    service = get_service()
    failing = _failing.setdefault(service, set())
    try:
        with anyio.fail_after(service.settings.library.state_timeout):
            answer = await _call(getattr(get_state_manager(), method), *args)
    except asyncio.CancelledError as error:  # noqa: ASYNC103  raised again if it is for us
        current = asyncio.current_task()
        if current is None or current.cancelling():
            raise
        problem: BaseException = error  # nobody cancels us: it comes from a library of its
    except Exception as error:
        problem = error
    else:
        failing.discard(method)
        return answer
    if method not in failing:
        failing.add(method)
        name = service.settings.persistent_manager
        log.error("the state manager %r fails at %s", name, method, exc_info=problem)
    return None


async def _call(method: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    if "ttl" in inspect.signature(method).parameters:
        # Not in the interface, but guillotina_amqp says how many seconds a state is kept.
        return await method(*args, ttl=int(get_service().settings.library.state_ttl))
    return await method(*args)


# ------------------------------------------------------------------------ running tasks


class Mirror:
    """Tells the utility of the tasks that run in this process, and asks it what to cancel."""

    def __init__(self) -> None:
        self._running: set[Attempt] = set()
        self._ends: TaskGroup | None = None
        self._early: list[Attempt] = []
        """Those that ended before it was open: the worker is, then."""

    async def middleware(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Run an attempt; the outermost middleware, so that nothing comes after it."""
        attempt = current_attempt()
        self._running.add(attempt)
        try:
            if await self._cancel_if_wanted(attempt):
                # It was canceled while it waited, and does not start.
                await anyio.sleep_forever()
            await tell(attempt.task_id)
            return await call()
        finally:
            self._running.remove(attempt)
            if self._ends is None:
                self._early.append(attempt)
            else:
                Context().run(self._ends.start_soon, _tell_end, attempt)

    @asynccontextmanager
    async def open(self, app: TaskApp) -> AsyncGenerator[None, None]:
        """Serve for as long as the block; leaving it tells of the ends that are not told yet.

        Args:
            app: connected, for longer than the block.
        """
        async with anyio.create_task_group() as polling:
            polling.start_soon(self._poll, app.settings.cancel_poll_interval)
            async with anyio.create_task_group() as ends:
                self._ends = ends
                while self._early:
                    ends.start_soon(_tell_end, self._early.pop())
                try:
                    yield
                finally:
                    self._ends = None
                    ends.cancel_scope.deadline = anyio.current_time() + app.settings.state_timeout
            polling.cancel_scope.cancel()

    async def _poll(self, interval: float) -> None:
        while True:
            await anyio.sleep(interval)
            async with anyio.create_task_group() as looks:
                for attempt in self._running.copy():
                    looks.start_soon(self._look_at, attempt)

    async def _look_at(self, attempt: Attempt) -> None:
        if not await self._cancel_if_wanted(attempt):
            with _away():
                await read(attempt.task_id)  # and so tell it of new entries in the log

    async def _cancel_if_wanted(self, attempt: Attempt) -> bool:
        if attempt.cancel_reason is not None or not await ask("is_canceled", attempt.task_id):
            return False
        with _away():
            await get_service().app.handle(attempt.task_id).cancel()
        return True


async def _tell_end(attempt: Attempt) -> None:
    """Wait until the end of an attempt is written down, and tell of it."""
    pause = FIRST_LOOK
    while True:
        with _away():
            state = await state_in_app(attempt.task_id, log_entries=1)
            if state is None or not _is_under_way(state, attempt):
                whole = await state_in_app(attempt.task_id)
                if whole is not None:  # or else nobody will know more
                    await _tell(whole)
                return
        await anyio.sleep(pause)
        pause = min(pause * 2, LONGEST_LOOK)


def _is_under_way(state: TaskState, attempt: Attempt) -> bool:
    return state.status is TaskStatus.RUNNING and (state.worker, state.attempt) == (
        attempt.worker,
        attempt.number,
    )


@contextmanager
def _away() -> Generator[None, None, None]:
    """Go on if the workers' states cannot be reached: the next look may."""
    try:
        yield
    except AmqpTasksError as error:
        log.warning("the state manager is not told of a task: %s", error)
