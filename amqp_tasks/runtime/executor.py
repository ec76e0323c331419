"""One attempt in its cancel scope, on the task loop.

An attempt is shielded from whatever cancels the worker: only `Attempt.cancel` stops it,
and always with a reason. So there is one way in which a task is stopped, and how an
attempt ended can be told for certain.
"""

from __future__ import annotations

import contextvars
import logging
import math
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup, TaskStatus

from ..core.message import Message
from ..core.outcome import (
    CancelReason,
    Failed,
    Outcome,
    Reason,
    Succeeded,
    cancelled_outcome,
)
from ..core.retry import RetryPolicy
from ..core.settlement import Lease
from ..exceptions import AmqpTasksError
from ..registry import FunctionKind, TaskDefinition
from .attempt import Attempt, MessageType, set_current_attempt
from .failures import describe
from .io_loop import Inbox, IoLoop

__all__ = ["Executor", "Job"]

log = logging.getLogger(__name__)


Append = Callable[[str, int, str], Awaitable[None]]
"""Appends an entry, JSON text, to the event log of a task id under a fence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An attempt to be run, as the I/O loop hands it over."""

    definition: TaskDefinition
    message: Message
    lease: Lease
    retry: RetryPolicy
    report: Callable[[Outcome], None]
    """Called on the I/O loop, once, when the attempt has ended."""


class Executor:
    """Runs attempts on the task loop. `run` is its service; the rest are mere functions.

    Args:
        max_threads: synchronous tasks that run at the same time, each in a thread.
        clock: seconds since the epoch.
    """

    def __init__(self, io: IoLoop, *, max_threads: int, clock: Callable[[], float]) -> None:
        self.append: Append
        """Set by the worker before the first job."""
        self._io = io
        self._clock = clock
        self._inbox: Inbox[Job | tuple[str, CancelReason]] = Inbox()
        self._running: dict[str, Attempt] = {}
        self._serving = anyio.CancelScope(shield=True)
        self._threads = anyio.CapacityLimiter(max_threads)

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
        async with anyio.create_task_group() as tasks:
            task_status.started()
            with self._serving:
                while True:
                    for item in await self._inbox.take():
                        self._take(item, tasks)

    def _take(self, item: Job | tuple[str, CancelReason], tasks: TaskGroup) -> None:
        if isinstance(item, Job):
            # An empty context: a task is nobody's child but the framework's.
            contextvars.Context().run(tasks.start_soon, self._attempt, item)
        else:
            lease, reason = item
            attempt = self._running.get(lease)
            if attempt is not None:
                attempt.cancel(reason)

    async def _attempt(self, job: Job) -> None:
        attempt = self._begin(job)
        try:
            with attempt.cancel_scope:
                outcome = await self._outcome(job, attempt)
        finally:
            del self._running[job.lease.id]
        if attempt.cancel_scope.cancelled_caught:
            outcome = _cancelled(attempt)
        self._io.post(job.report, outcome)

    def _begin(self, job: Job) -> Attempt:
        message, now = job.message, self._clock()
        timeout = message.timeout or job.definition.timeout or math.inf
        left = math.inf if message.deadline is None else max(0.0, message.deadline - now)
        limit = CancelReason.TIMEOUT if timeout <= left else CancelReason.DEADLINE
        attempt = Attempt(
            task_id=message.task_id,
            name=job.definition.name,
            number=message.attempt,
            fence=job.lease.fence,
            deadline=message.deadline,
            worker=job.lease.worker,
            cancel_scope=anyio.CancelScope(
                shield=True, deadline=anyio.current_time() + min(timeout, left)
            ),
            limit_reason=limit,
            append=partial(self.append, message.task_id, job.lease.fence),
            clock=self._clock,
        )
        set_current_attempt(attempt)
        self._running[job.lease.id] = attempt
        return attempt

    async def _outcome(self, job: Job, attempt: Attempt) -> Outcome:
        """Run the function; return how it ended, unless its cancellation is to be said so."""
        try:
            args, kwargs = job.definition.signature.decode_arguments(
                job.message.args, job.message.kwargs
            )
        except AmqpTasksError as error:
            return Failed(describe(error, Reason.BAD_ARGUMENTS), may_retry=False)
        try:
            result = await self._call(job.definition, attempt, args, kwargs)
        except anyio.get_cancelled_exc_class() as error:
            if attempt.cancel_scope.cancel_called:
                attempt.stopped_by = error
                raise
            # Nobody of ours asked for it. Taken for a success or a cancellation, the
            # task would be lost without a trace.
            return Failed(describe(error))
        except BaseException as error:
            if attempt.cancel_reason is not None:
                attempt.stopped_by = error
                return _cancelled(attempt)
            return Failed(describe(error), may_retry=isinstance(error, job.retry.retry_on))
        try:
            return Succeeded(job.definition.signature.encode_result(result))
        except AmqpTasksError as error:
            return Failed(describe(error, Reason.BAD_RESULT), may_retry=False)

    async def _call(
        self, definition: TaskDefinition, attempt: Attempt, args: Any, kwargs: Any
    ) -> Any:
        match definition.kind:
            case FunctionKind.COROUTINE:
                return await definition.func(*args, **kwargs)
            case FunctionKind.SYNC:
                call = partial(definition.func, *args, **kwargs)
                return await anyio.to_thread.run_sync(call, limiter=self._threads)
            case FunctionKind.GENERATOR:
                return await self._collect(definition, attempt, args, kwargs)

    async def _collect(
        self, definition: TaskDefinition, attempt: Attempt, args: Any, kwargs: Any
    ) -> list[Any]:
        results = []
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


_EXCEEDED = {
    CancelReason.TIMEOUT: "the attempt took longer than its timeout",
    CancelReason.DEADLINE: "the task was not done by its deadline",
    CancelReason.BLOCKED_LOOP: "the task captured the event loop",
}


def _cancelled(attempt: Attempt) -> Outcome:
    """Return the outcome of an attempt that was cancelled, and did not finish all the same."""
    reason, error = attempt.cancel_reason, attempt.stopped_by
    assert reason is not None
    assert error is not None
    failure = describe(error, Reason(reason) if reason in _EXCEEDED else None)
    if reason in _EXCEEDED and isinstance(error, anyio.get_cancelled_exc_class()):
        # The traceback says where the task was; its last line would be a riddle.
        failure = replace(failure, type="TimeoutError", message=_EXCEEDED[reason])
    return cancelled_outcome(reason, failure)
