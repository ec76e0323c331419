"""How a task runs in guillotina: `run_attempt` is the middleware around each attempt."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from typing import Any, Final

import anyio.lowlevel
from guillotina import app_settings, task_vars
from guillotina.db.transaction import Status
from guillotina.exceptions import ConflictError
from guillotina.interfaces import IDatabase

from amqp_tasks import Attempt, current_attempt

from . import transaction
from .aio import run_in
from .context import clear_task_vars, enter_container, enter_request, find_database
from .exceptions import ObjectNotFoundException
from .functions import find_function
from .metrics import watch_job
from .task_vars import amqp_job

__all__ = ["Job", "run_attempt"]

log = logging.getLogger(__name__)

Call = Callable[[], Awaitable[Any]]

OBJECT_TASKS: Final = {"_run_object_task", "_yield_object_task"}


class Job:
    """A task while it runs; ``task_vars.amqp_job.get()`` gives it.

    Attributes:
        attempt: the running attempt.
        data: the body of the task's message: func, args, kwargs, task_id, db_id,
            container_id, req_data.
        task_id: id of the task.
        db_id: id of its database, or None.
        container_id: id of its container, or None.
        req_data: what is known of the request that scheduled it.
    """

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self.data: dict[str, Any] = {
            **attempt.extra,
            "func": attempt.name,
            "args": list(attempt.args),
            "kwargs": dict(attempt.kwargs),
            "task_id": attempt.task_id,
        }
        self.task_id: str = attempt.task_id
        self.db_id: str | None = self.data.get("db_id")
        self.container_id: str | None = self.data.get("container_id") if self.db_id else None
        self.req_data: dict[str, Any] = self.data.get("req_data") or {}
        self.container_entered = ""
        """Id of its container, once that is known to be there."""

    def __repr__(self) -> str:
        return f"<Job {self.task_id!r} ({self.function_name})>"

    @property
    def function_name(self) -> str:
        """Dotted name of the function; of an object task, with the object's function."""
        name: str = self.data["func"]
        kind = name.rpartition(".")[2]
        if kind in OBJECT_TASKS and self.data["args"]:
            return f"{kind.removeprefix('_')}/{self.data['args'][0]}"
        return name


async def run_attempt(call: Call) -> Any:
    """Run an attempt as the user who scheduled it, in a transaction of its own.

    A conflict is tried again at once, `conflict_retry_attempts` times.

    Raises:
        ContainerNotFound: the container has been deleted, and the task fails for good.
    """
    job = Job(current_attempt())
    with watch_job(_known_name(job), lambda: job.container_entered):
        if job.db_id is None:
            return await run_in(copy_context(), _in_context(call, job, None, 0))
        db = await find_database(job.db_id)
        return await _until_no_conflict(call, job, db)


def _known_name(job: Job) -> str:
    """Return the name of the function if there is one; anybody could have made others up."""
    kind, separated, name = job.function_name.partition("/")
    try:
        if separated:
            find_function(name)
    except Exception:  # importing it runs its module, and the attempt itself fails of that
        return f"{kind}/unknown"
    return job.function_name


async def _until_no_conflict(call: Call, job: Job, db: IDatabase) -> Any:
    tries, limit = 0, int(app_settings.get("conflict_retry_attempts", 3))
    while True:
        try:
            # A copy for each: what a try leaves in its context, the next one does not see.
            return await run_in(copy_context(), _in_context(call, job, db, tries))
        except Exception as error:
            if _is_all(error, ObjectNotFoundException):
                log.warning("%r: its object is not there any more", job)
                return None
            if not _is_all(error, ConflictError) or tries >= limit:
                raise
            tries += 1
            log.info("%r: conflict; tried again, %d of %d", job, tries, limit)
        # A task that was cancelled meanwhile is not begun again.
        await anyio.lowlevel.checkpoint()


async def _in_context(call: Call, job: Job, db: IDatabase | None, tries: int) -> Any:
    clear_task_vars()
    amqp_job.set(job)
    request = enter_request(job.req_data)
    request._retry_attempt = tries  # guillotina's errors tell of it
    try:
        result = await (call() if db is None else _in_transaction(call, job, db))
        await transaction.run_futures()
        return result
    finally:
        transaction.drop_futures()


async def _in_transaction(call: Call, job: Job, db: IDatabase) -> Any:
    first = await transaction.begin(db)
    try:
        if job.container_id is not None:
            await enter_container(job.container_id, task_vars.request.get())
            job.container_entered = job.container_id
        result = await call()
        # Not always the first one: a task may commit that, and begin another.
        last = task_vars.txn.get()
        if last is not None and last.status == Status.ACTIVE:
            await transaction.commit(last)
        return result
    finally:
        for txn in {first, task_vars.txn.get()} - {None}:
            await transaction.abort(txn)  # noqa: ASYNC102  shields itself, within limits


def _is_all(error: Exception, kind: type[Exception]) -> bool:
    """Whether an error, or each one of a group, is of that kind."""
    if isinstance(error, ExceptionGroup):
        return error.split(kind)[1] is None
    return isinstance(error, kind)
