"""``@task`` and ``@object_task``: functions whose calls are scheduled.

::

    @task
    async def send(address: str) -> None: ...

    await send("ann@example.com")                   # queued when this returns
    send.after_commit("ann@example.com")            # queued if what was changed is stored
    await send.func("ann@example.com")              # here and now

However it is to be scheduled: the function, the arguments and the request are looked at in the
call, which raises what is wrong with them, and what it has seen is what the task gets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload
from uuid import uuid4

from guillotina import app_settings, task_vars
from guillotina.db.interfaces import ITransaction
from guillotina.exceptions import TransactionNotFound
from guillotina.request import Request
from guillotina.transactions import get_transaction
from guillotina.utils import get_current_request
from zope.interface import implementer

from .calls import PreparedCall
from .interfaces import ITaskDefinition
from .service import get_service
from .state import TaskState
from .task_vars import amqp_job
from .utils import RETRIES, compose, compose_for_object

__all__ = ["ObjectTaskDefinition", "TaskDefinition", "object_task", "task"]


@implementer(ITaskDefinition)
class TaskDefinition:
    """A function whose calls are scheduled.

    Its methods take the function's arguments, and

        _request: None for the current one.
        _retries: how often queueing is tried again when the broker has not confirmed.
        _task_id: None for a new one. A known id stands for the task that has it.

    They raise what `add_task` does.

    Args:
        func: a function of a module.
        retries: what `_retries` is if it is not given.
    """

    def __init__(self, func: Callable[..., Any], retries: int = RETRIES) -> None:
        self.func = func
        self.retries = retries
        functools.update_wrapper(self, func, updated=())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.func!r}>"

    async def __call__(
        self,
        *args: Any,
        _request: Request | None = None,
        _retries: int | None = None,
        _task_id: str | None = None,
        **kwargs: Any,
    ) -> TaskState:
        """Queue a call now."""
        return await self._composed(args, kwargs, _request, _retries, _task_id).schedule()

    schedule = __call__

    def after_request(
        self,
        *args: Any,
        _request: Request | None = None,
        _name: str | None = None,
        _retries: int | None = None,
        _task_id: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Queue a call when the request has been answered, if that was no error.

        A failure to queue it is logged, counted, and written into the task's state.

        Args:
            _name: of the future; one with the same name replaces this.

        Returns:
            The name.
        """
        call = self._composed(args, kwargs, _request, _retries, _task_id)
        name = _name or uuid4().hex
        request = get_current_request() if _request is None else _request
        request.add_future(name, call.schedule_behind)
        return name

    def after_commit(
        self,
        *args: Any,
        _request: Request | None = None,
        _retries: int | None = None,
        _task_id: str | None = None,
        **kwargs: Any,
    ) -> TaskState:
        """Queue a call when the current transaction has been committed.

        A failure to queue it is logged, counted, and written into the task's state. If
        queueing takes longer than the setting `after_commit_wait`, it goes on behind the
        answer to the request.

        Returns:
            The state of the task, which is not known before it is queued.

        Raises:
            TransactionNotFound: there is none, or it will not be committed.
        """
        txn = _to_be_committed("after_commit")
        call = self._composed(args, kwargs, _request, _retries, _task_id)
        seconds = get_service().settings.after_commit_wait

        async def hook(committed: bool) -> None:
            # While this waits, the transaction keeps its connection to the database.
            if committed:
                await call.schedule_behind(seconds)

        txn.add_after_commit_hook(hook)
        return TaskState(call.task_id)

    def before_commit(
        self,
        *args: Any,
        _request: Request | None = None,
        _retries: int | None = None,
        _task_id: str | None = None,
        **kwargs: Any,
    ) -> TaskState:
        """Queue a call just before the current transaction is committed.

        If that fails, nothing is stored. If the commit fails, the task runs all the same, and
        if it does so because of a conflict, it is queued once for each try of the request.

        Raises:
            TransactionNotFound: there is none, or it will not be committed.
        """
        txn = _to_be_committed("before_commit")
        call = self._composed(args, kwargs, _request, _retries, _task_id)

        async def hook() -> None:
            await call.schedule()

        txn.add_before_commit_hook(hook)
        return TaskState(call.task_id)

    def _composed(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        request: Request | None,
        retries: int | None,
        task_id: str | None,
    ) -> PreparedCall:
        return self._compose(
            self.func,
            args,
            kwargs,
            request=request,
            retries=self.retries if retries is None else retries,
            task_id=task_id,
        )

    _compose = staticmethod(compose)


class ObjectTaskDefinition(TaskDefinition):
    """A function with an object, its first argument, whose calls are scheduled."""

    _compose = staticmethod(compose_for_object)


@overload
def task(func: Callable[..., Any], retries: int = RETRIES) -> TaskDefinition: ...
@overload
def task(*, retries: int = RETRIES) -> Callable[[Callable[..., Any]], TaskDefinition]: ...


def task(func: Callable[..., Any] | None = None, retries: int = RETRIES) -> Any:
    """Make a function one whose calls are scheduled: ``@task`` or ``@task(retries=5)``."""
    return _define(TaskDefinition, func, retries)


@overload
def object_task(func: Callable[..., Any], retries: int = RETRIES) -> ObjectTaskDefinition: ...
@overload
def object_task(
    *, retries: int = RETRIES
) -> Callable[[Callable[..., Any]], ObjectTaskDefinition]: ...


def object_task(func: Callable[..., Any] | None = None, retries: int = RETRIES) -> Any:
    """The same for a function with an object, which the task loads anew."""
    return _define(ObjectTaskDefinition, func, retries)


def _define(kind: type[TaskDefinition], func: Callable[..., Any] | None, retries: int) -> Any:
    if func is None:
        return functools.partial(kind, retries=retries)
    return kind(func, retries)


def _to_be_committed(method: str) -> ITransaction:
    """Return the current transaction.

    Raises:
        TransactionNotFound: there is none that will be committed. guillotina would take the
            hook, and never call it.
    """
    txn = get_transaction()
    if txn is None:
        why = "there is no transaction"
    elif txn.read_only and not _commits():
        why = f"the transaction of a {task_vars.request.get().method} request is not committed"
    else:
        return txn
    raise TransactionNotFound(
        f"{method}: {why}, and the task would never be queued. Use `await task(...)` to queue it "
        "now, or task.after_request(...)"
    )


def _commits() -> bool:
    """Tell whether a read-only transaction is committed all the same.

    So it is if the storage is read-only, and not the request. The one of a task is, whatever
    request has scheduled it.
    """
    request = task_vars.request.get()
    if amqp_job.get() is not None or request is None:
        return True
    return bool(app_settings["check_writable_request"](request))
