"""One attempt in its cancel scope, on the task loop.

An attempt is shielded from whatever cancels the worker: only `Attempt.cancel` stops it,
and always with a reason. So there is one way in which a task is stopped, and how an
attempt ended can be told for certain.
"""

from __future__ import annotations

import contextvars
import logging
import math
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup, TaskStatus

from ..core.message import Message
from ..core.outcome import (
    CancelReason,
    Failed,
    Failure,
    Outcome,
    Reason,
    Succeeded,
    cancelled_outcome,
)
from ..core.retry import RetryPolicy
from ..core.settlement import Lease
from ..exceptions import NoRetry
from ..registry import FunctionKind, TaskDefinition
from .attempt import Attempt, MessageType, Slot, set_current_attempt
from .failures import describe
from .io_loop import Inbox, IoLoop
from .process import RaisedInProcess, call_in_process

__all__ = ["Executor", "Job", "Middleware"]

log = logging.getLogger(__name__)


Append = Callable[[str, int, str], Awaitable[None]]
"""Appends an entry, JSON text, to the event log of a task id under a fence."""


class Middleware(Protocol):
    """Runs around each attempt, in its cancel scope: ``async def middleware(call)``.

    ``await call()`` runs the task, whatever kind of function it is, and may be called again.
    A result that cannot be kept makes ``call()`` raise; such an error is not to be caught.
    What the middleware returns is the task's result, and what it raises fails the attempt.
    `current_attempt` tells it which.
    """

    async def __call__(self, call: Callable[[], Awaitable[Any]], /) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An attempt to be run, as the I/O loop hands it over."""

    definition: TaskDefinition
    message: Message
    lease: Lease
    retry: RetryPolicy
    report: Callable[[Outcome], None]
    """Called on the I/O loop, once, when the attempt has ended."""
    slot: Slot
    """On the I/O loop."""


class Executor:
    """Runs attempts on the task loop. `run` is its service; the rest are mere functions.

    Args:
        max_threads: synchronous tasks that run at the same time, each in a thread.
        cancel_grace: seconds after which a cancelled attempt that goes on is named.
        middleware: what runs around each attempt, the outermost first.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        io: IoLoop,
        *,
        max_threads: int,
        cancel_grace: float,
        middleware: Sequence[Middleware] = (),
        clock: Callable[[], float],
    ) -> None:
        self.append: Append
        """Set by the worker before the first job."""
        self._io = io
        self._cancel_grace = cancel_grace
        self._middleware = tuple(middleware)
        self._clock = clock
        self._inbox: Inbox[Job | tuple[str, CancelReason]] = Inbox()
        self._running: dict[str, Attempt] = {}
        self._serving = anyio.CancelScope(shield=True)
        self._threads = anyio.CapacityLimiter(max_threads)
        self._processes = anyio.CapacityLimiter(os.cpu_count() or 1)

    def submit(self, job: Job) -> None:
        """Start an attempt soon."""
        self._inbox.put(job)

    def cancel(self, lease: str, reason: CancelReason) -> None:
        """Cancel an attempt soon; nothing happens if it has ended."""
        self._inbox.put((lease, reason))

    def stop(self) -> None:
        """Have `run` end when the attempts have; whoever stops it has cancelled them."""
        self._serving.cancel()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Run what is submitted until `stop` is called; cancelling this does not.

        The I/O loop must be able to count on an answer to what it submits: so the
        worker ends this service last, and nobody else does.
        """
        async with anyio.create_task_group() as services:
            services.start_soon(self._name_the_stubborn)
            async with anyio.create_task_group() as attempts:
                task_status.started()
                with self._serving:
                    while True:
                        for item in await self._inbox.take():
                            self._take(item, attempts)
            services.cancel_scope.cancel()

    async def _name_the_stubborn(self) -> None:
        """Tell of attempts that were cancelled long ago and go on, each once."""
        seen: dict[Attempt, float] = {}
        while True:
            await anyio.sleep(self._cancel_grace / 2)
            now = anyio.current_time()
            cancelled = [one for one in self._running.values() if one.cancel_reason is not None]
            seen = {attempt: seen.get(attempt, now) for attempt in cancelled}
            for attempt, since in seen.items():
                if since + self._cancel_grace <= now:
                    seen[attempt] = math.inf
                    text = (
                        f"cancelled ({attempt.cancel_reason}) {now - since:.0f} s ago, and goes on"
                    )
                    log.error("%r was %s: it shields itself, or swallows it", attempt, text)
                    await attempt.emit("overdue", text)

    def _take(self, item: Job | tuple[str, CancelReason], tasks: TaskGroup) -> None:
        if isinstance(item, Job):
            # At once, so that a cancellation which comes next finds it.
            attempt = self._begin(item)
            # An empty context: a task is nobody's child but the framework's.
            contextvars.Context().run(tasks.start_soon, self._attempt, item, attempt)
        else:
            lease, reason = item
            running = self._running.get(lease)
            if running is not None:
                running.cancel(reason)

    async def _attempt(self, job: Job, attempt: Attempt) -> None:
        set_current_attempt(attempt)
        # A failure if all else fails: whatever happens here, an answer is owed.
        outcome: Outcome = Failed(Failure(type="RuntimeError", message="it ended without a word"))
        try:
            with attempt.cancel_scope:
                outcome = await self._outcome(job, attempt)
        except BaseException as error:  # noqa: ASYNC103  the scope was the attempt's own
            # Interrupted within user code that is not the function: a validator, or so.
            outcome = Failed(attempt.blocked or describe(error))
        finally:
            del self._running[job.lease.id]
            self._io.post(job.report, outcome)

    def _begin(self, job: Job) -> Attempt:
        message, now = job.message, self._clock()
        timeout = message.timeout or job.definition.timeout or math.inf
        left = math.inf if message.deadline is None else max(0.0, message.deadline - now)
        limit = CancelReason.TIMEOUT if timeout <= left else CancelReason.DEADLINE
        attempt = Attempt(
            message=message,
            name=job.definition.name,
            fence=job.lease.fence,
            worker=job.lease.worker,
            cancel_scope=anyio.CancelScope(
                shield=True, deadline=anyio.current_time() + min(timeout, left)
            ),
            limit_reason=limit,
            append=partial(self.append, message.task_id, job.lease.fence),
            slot=_SlotElsewhere(self._io, job.slot),
            clock=self._clock,
        )
        self._running[job.lease.id] = attempt
        return attempt

    async def _outcome(self, job: Job, attempt: Attempt) -> Outcome:
        """Run the function and return how it ended."""
        try:
            args, kwargs = job.definition.signature.decode_arguments(
                job.message.args, job.message.kwargs
            )
        except Exception as error:  # validators are user code
            return Failed(describe(error, Reason.BAD_ARGUMENTS), may_retry=False)
        call = self._around(job.definition, partial(self._call, attempt, args, kwargs))
        try:
            result = await call()
        except _BadResult as bad:
            return bad.outcome()
        except RaisedInProcess as raised:
            known = raised.error is not None
            return Failed(
                raised.failure,
                may_retry=not known or _may_retry(raised.error, job.retry),
            )
        except BaseException as error:  # noqa: ASYNC103  the caller's scope is cancelled, and ends here
            if attempt.cancel_reason is not None:
                return _cancelled(attempt, attempt.cancel_reason, error)
            # A cancellation that nobody of ours asked for is among these. Taken for a
            # success or for a cancel, the task would be lost without a trace.
            bare = isinstance(error, anyio.get_cancelled_exc_class())
            return Failed(describe(error), may_retry=bare or _may_retry(error, job.retry))
        try:
            return Succeeded(_encode(job.definition, result))
        except _BadResult as bad:
            return bad.outcome()

    def _around(
        self, definition: TaskDefinition, run: Callable[[TaskDefinition], Awaitable[Any]]
    ) -> Callable[[], Awaitable[Any]]:
        """Return the call with the middleware around it."""
        if not self._middleware:
            return partial(run, definition)

        async def innermost() -> Any:
            result = await run(definition)
            # Before the middleware has done what cannot be taken back: a commit, say.
            _encode(definition, result)
            return result

        call: Callable[[], Awaitable[Any]] = innermost
        for middleware in reversed(self._middleware):
            call = partial(middleware, call)
        return call

    async def _call(
        self, attempt: Attempt, args: Any, kwargs: Any, definition: TaskDefinition
    ) -> Any:
        match definition.kind:
            case FunctionKind.COROUTINE:
                return await definition.func(*args, **kwargs)
            case FunctionKind.SYNC:
                call = partial(definition.func, *args, **kwargs)
                return await anyio.to_thread.run_sync(call, limiter=self._threads)
            case FunctionKind.PROCESS:
                return await call_in_process(
                    definition, attempt, args, kwargs, limiter=self._processes
                )
            case FunctionKind.GENERATOR:
                return await self._collect(definition, attempt, args, kwargs)

    async def _collect(
        self, definition: TaskDefinition, attempt: Attempt, args: Any, kwargs: Any
    ) -> list[Any]:
        results: list[Any] = []
        async with aclosing(definition.func(*args, **kwargs)) as generator:
            async for item in generator:
                match item:
                    case (MessageType.DEBUG, message):
                        await attempt.emit(MessageType.DEBUG, message)
                    case (MessageType.RESULT, value):
                        results.append(value)
                        await attempt.emit(MessageType.RESULT, value)
                    case _:
                        log.warning(
                            "%r yielded %.200r, which is ignored: must be a pair of a "
                            "MessageType and a value",
                            attempt,
                            item,
                        )
        return results


class _SlotElsewhere:
    """A slot on the I/O loop, used from the task loop."""

    def __init__(self, io: IoLoop, slot: Slot) -> None:
        self._io = io
        self._slot = slot

    def begin_wait(self) -> None:
        self._io.post(self._slot.begin_wait)

    def end_wait(self) -> None:
        self._io.post(self._slot.end_wait)

    async def take(self) -> None:
        await self._io.call(self._slot.take)


class _BadResult(Exception):
    """Raised when a task's result does not fit its annotation, or is not JSON."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error

    def outcome(self) -> Outcome:
        return Failed(describe(self.error, Reason.BAD_RESULT), may_retry=False)


def _encode(definition: TaskDefinition, result: Any) -> str:
    try:
        return definition.signature.encode_result(result)
    except Exception as error:
        raise _BadResult(error) from error


def _may_retry(error: BaseException | None, policy: RetryPolicy) -> bool:
    return isinstance(error, policy.retry_on) and not isinstance(error, NoRetry)


_EXCEEDED = {
    CancelReason.TIMEOUT: "the attempt took longer than its timeout",
    CancelReason.DEADLINE: "the task was not done by its deadline",
}


def _cancelled(attempt: Attempt, reason: CancelReason, error: BaseException) -> Outcome:
    """Return the outcome of an attempt that was cancelled, and did not finish all the same.

    `error` is the cancellation itself, or what the task raised instead.
    """
    if attempt.blocked is not None:
        # Where it was when it captured the loop matters, not what became of the exception.
        return cancelled_outcome(reason, attempt.blocked)
    failure = describe(error, Reason(reason) if reason in _EXCEEDED else None)
    if reason in _EXCEEDED and isinstance(error, anyio.get_cancelled_exc_class()):
        # The traceback says where the task was; its last line would be a riddle.
        failure = replace(failure, type="TimeoutError", message=_EXCEEDED[reason])
    return cancelled_outcome(reason, failure)
