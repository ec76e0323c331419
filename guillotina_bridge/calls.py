"""One call that is to be queued: checked and captured where it is written, queued whenever.

What a task gets to know of the request, and of who asks, is what holds at the call. So it
does not matter what has become of both by the time that it is queued.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import anyio
from guillotina import task_vars
from guillotina.request import Request
from guillotina.utils import get_current_request

from amqp_tasks import (
    AmqpTasksError,
    ArgumentsError,
    NotConnected,
    PublishFailed,
    Task,
    default_app,
)

from . import mirror
from .context import request_data
from .exceptions import AMQPConfigurationNotFoundError
from .managers import is_custom
from .metrics import SCHEDULE_ERRORS
from .service import get_service
from .state import TaskState

__all__ = ["PreparedCall", "prepare"]

log = logging.getLogger(__name__)

FIRST_PAUSE: Final = 0.2
LONGEST_PAUSE: Final = 10.0
"""Seconds between attempts to queue a call; jittered."""


def prepare(
    task: Task[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    name: str,
    task_id: str,
    request: Request | None,
    retries: int,
) -> PreparedCall:
    """Return a call that can be queued at any time, now or when the request has ended.

    Args:
        name: of what is called, for people to read.
        request: None for the current one.

    Raises:
        AMQPConfigurationNotFoundError: the bridge does not run. A warning would not do: who
            schedules a task counts on it, and a task that is dropped is lost.
        ArgumentsError: arguments do not fit the function; or they, or what the request
            says, cannot be written as JSON; or an option is not what it must be.
        RequestNotFound: there is no request.
    """
    get_service()
    if not isinstance(retries, int) or retries < 0:
        raise ArgumentsError(f"_retries={retries!r}: must be an integer that is not negative")
    # Raises if that can be no id. By an app that needs no connection: if there is none now,
    # there may be by the time that the call is queued.
    default_app.handle(task_id)
    plain_args, plain_kwargs = task.signature.encode_arguments(args, kwargs)
    if request is None:  # and not merely empty: it is a mapping as well
        request = get_current_request()
    db, container = task_vars.db.get(), task_vars.container.get()
    extra = {
        "db_id": getattr(db, "id", None),
        "container_id": getattr(container, "id", None),
        "req_data": request_data(request),
    }
    # Of the texts that travel, so that nobody can change them any more.
    kept_args, kept_kwargs = task.signature.decode_arguments(plain_args, plain_kwargs)
    return PreparedCall(
        name=name,
        # Who asks has a deadline, say because the client is impatient. The task has none: it
        # is not waited for.
        task=task.options(task_id=task_id, extra=extra, inherit_deadline=False),
        args=kept_args,
        kwargs=kept_kwargs,
        job={
            **extra,
            "func": task.name,
            "args": plain_args,
            "kwargs": plain_kwargs,
            "task_id": task_id,
        },
        task_id=task_id,
        retries=retries,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedCall:
    """A call that can be queued; more than once does no harm, for its id is the same.

    Attributes:
        name: of what is called, for people to read.
        job: the body of its message, as it will be.
        retries: how often queueing is tried again when the broker has not confirmed.
    """

    name: str
    task: Task[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    job: Mapping[str, Any]
    task_id: str
    retries: int

    def __str__(self) -> str:
        return f"{self.task_id} ({self.name})"

    async def schedule(self) -> TaskState:
        """Queue it.

        Raises:
            PublishFailed: the broker has not confirmed; `maybe` says whether it was queued.
            StateStoreError: the state store has not; nothing was queued.
            NotConnected: the servers cannot be used at the moment.
        """
        await self._queue(keep=False)
        return TaskState(self.task_id)

    async def schedule_behind(self, seconds: float | None = None) -> None:
        """Queue it in a task of the service's, and wait for that, `seconds` at most.

        Raises nothing, because nobody is there any more to be told. A failure is logged,
        counted, and written into the task's state.
        """
        done = anyio.Event()
        try:
            get_service().spawn(self._queue_whatever_happens(done))
        except AMQPConfigurationNotFoundError as error:
            self._has_failed(f"was not queued: {error}")
            return
        with anyio.move_on_after(float("inf") if seconds is None else seconds):
            await done.wait()

    async def _queue_whatever_happens(self, done: anyio.Event) -> None:
        try:
            await self._queue_for_certain()
        except Exception as error:
            self._has_failed(f"was not queued: {error}")
        except BaseException:
            self._has_failed("was not queued, or may not have been: the service ends")
            raise
        finally:
            done.set()

    def _has_failed(self, how: str) -> None:
        SCHEDULE_ERRORS.inc()
        log.error("task %s %s", self, how)

    async def _queue_for_certain(self) -> None:
        """Queue it; if it may be in the queue, go on until it is known to be."""
        pause, maybe = FIRST_PAUSE, False
        while True:
            try:
                return await self._queue(keep=not maybe)
            except AmqpTasksError as error:
                maybe = maybe or _may_be_queued(error)
                if not maybe:
                    raise
                log.warning("task %s may be queued, or not; tried again: %s", self, error)
            await _pause(pause)
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _queue(self, *, keep: bool) -> None:
        """Queue it, with retries.

        Args:
            keep: leave a state behind, as errored, if it certainly is not in the queue.
        """
        is_new = is_custom() and await mirror.tell_scheduled(self.task_id, self.job)
        try:
            await self._try_to_queue(keep)
        except AmqpTasksError as error:
            if is_new and not _may_be_queued(error):
                await mirror.tell_not_queued(self.task_id, error)
            raise

    async def _try_to_queue(self, keep: bool) -> None:
        maybe, pause = False, FIRST_PAUSE
        for left in range(self.retries, -1, -1):
            # The state of one that was not queued would stand in the way of the next try.
            task = self.task.options(keep_unqueued=keep and left == 0)
            try:
                await task(*self.args, **self.kwargs)
                return
            except AmqpTasksError as error:
                maybe = maybe or _may_be_queued(error)
                if left == 0 or not _may_try_again(error):
                    if maybe:  # so one of the tries before may have come through
                        raise PublishFailed(str(error), maybe=True) from error
                    raise
            await _pause(pause)
            pause = min(pause * 2, LONGEST_PAUSE)


def _may_be_queued(error: AmqpTasksError) -> bool:
    return isinstance(error, PublishFailed) and error.maybe


def _may_try_again(error: AmqpTasksError) -> bool:
    # The service opens itself anew when it has lost its servers, if there is one.
    no_connection = isinstance(error, NotConnected)
    no_service = isinstance(error, AMQPConfigurationNotFoundError)
    return isinstance(error, PublishFailed) or (no_connection and not no_service)


async def _pause(seconds: float) -> None:
    await anyio.sleep(seconds * random.uniform(0.5, 1.0))  # noqa: S311  not a secret
