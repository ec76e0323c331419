"""Scheduling tasks: what guillotina_amqp's users know from its module of the same name."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Final
from uuid import uuid4

import anyio.to_thread
from guillotina import task_vars
from guillotina.interfaces import IResource
from guillotina.request import Request

from amqp_tasks import ArgumentsError

from .calls import PreparedCall, prepare
from .context import make_request, serialize_request
from .functions import check_served, find_function, task_of, unwrap
from .objects import arguments_task, open_call, path_of
from .state import TaskState

__all__ = [
    "add_object_task",
    "add_task",
    "cancel_task",
    "compose",
    "compose_for_object",
    "find",
    "generate_task_id",
    "get_task_id_prefix",
    "make_request",
    "serialize_request",
]

RETRIES: Final = 3

_PREDECESSOR: Final = "guillotina_amqp.utils"
"""Where messages that guillotina_amqp has queued find the functions of object tasks."""


# ------------------------------------------------------------------------ ids


def get_task_id_prefix() -> str:
    """Return what the ids of the current container's tasks begin with.

    Those of container ``a-b`` begin with that of ``a`` as well.
    """
    return f"task:{task_vars.db.get().id}-{task_vars.container.get().id}-"


def generate_task_id() -> str:
    """Return a new id for a task of the current container, or of none."""
    prefix = "" if task_vars.container.get() is None else get_task_id_prefix()
    return f"{prefix}{uuid4()}"


async def cancel_task(task_id: str) -> bool:
    """Cancel a task; see `TaskState.cancel`."""
    return await TaskState(task_id).cancel()


# ------------------------------------------------------------------------ scheduling


async def add_task(
    func: Callable[..., Any],
    *args: Any,
    _request: Request | None = None,
    _retries: int = RETRIES,
    _task_id: str | None = None,
    **kwargs: Any,
) -> TaskState:
    """Queue a call of a function of a module, or of what a decorator made of it.

    The task runs as the user of the request, in its container, and sees its headers.

    Args:
        _request: None for the current one.
        _retries: how often queueing is tried again when the broker has not confirmed. That
            does not make a second task.
        _task_id: None for a new one. If the id is known, that task stays as it is.

    Raises:
        AMQPConfigurationNotFoundError: the bridge does not run.
        DefinitionError: no worker could find the function, or is allowed to run it.
        ArgumentsError: the arguments do not fit its annotations.
        PublishFailed: the broker has not confirmed; `maybe` says whether it was queued.
        StateStoreError: the state store has not; nothing was queued.
    """
    call = compose(func, args, kwargs, request=_request, retries=_retries, task_id=_task_id)
    return await call.schedule()


async def add_object_task(
    callable: Callable[..., Any],  # guillotina_amqp's name for it
    ob: IResource,
    *args: Any,
    _request: Request | None = None,
    _retries: int = RETRIES,
    _task_id: str | None = None,
    **kwargs: Any,
) -> TaskState:
    """Queue a call of a function with an object of the current container; see `add_task`.

    The task loads the object anew. If it is not there any more, the task finishes with None.

    Raises:
        ArgumentsError: also if the object is not in the current container.
    """
    call = compose_for_object(
        callable, [ob, *args], kwargs, request=_request, retries=_retries, task_id=_task_id
    )
    return await call.schedule()


def compose(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    request: Request | None = None,
    retries: int = RETRIES,
    task_id: str | None = None,
) -> PreparedCall:
    """Return a call that can be queued later. Whatever is wrong with it raises now.

    Raises:
        As `add_task`, but for what concerns the queueing.
    """
    task = _task(func)
    return prepare(
        task,
        args,
        kwargs,
        name=task.name,
        request=request,
        retries=retries,
        task_id=generate_task_id() if task_id is None else task_id,
    )


def compose_for_object(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    request: Request | None = None,
    retries: int = RETRIES,
    task_id: str | None = None,
) -> PreparedCall:
    """Return a call with an object, the first of `args`, that can be queued later."""
    function = _task(func).func
    rest = arguments_task(function)
    if not args:
        raise ArgumentsError(f"task {rest.name!r}: the object is missing, the first argument")
    path = path_of(args[0])
    plain_args, plain_kwargs = rest.signature.encode_arguments(args[1:], kwargs)
    runs = _yield_object_task if inspect.isasyncgenfunction(function) else _run_object_task
    return prepare(
        task_of(runs),
        [rest.name, path, *plain_args],
        plain_kwargs,
        name=rest.name,
        request=request,
        retries=retries,
        task_id=generate_task_id() if task_id is None else task_id,
    )


def _task(func: Callable[..., Any]) -> Any:
    task = task_of(unwrap(func))
    check_served(task.func)
    return task


# ------------------------------------------------------------------------ running


def find(name: str) -> Callable[..., Any]:
    """Return the function that a message calls by a name; what the app is given as `find`.

    Raises:
        UnknownTask: it is not in a served package, or is not there.
    """
    module, _, attribute = name.rpartition(".")
    if module in (__name__, _PREDECESSOR) and attribute in _RUNNERS:
        return _RUNNERS[attribute]
    return find_function(name)


async def _run_object_task(dotted_func: str, path: str, /, *args: Any, **kwargs: Any) -> Any:
    function, values, keywords = await open_call(dotted_func, path, args, kwargs)
    if inspect.iscoroutinefunction(function):
        return await function(*values, **keywords)
    return await anyio.to_thread.run_sync(partial(function, *values, **keywords))


async def _yield_object_task(
    dotted_func: str, path: str, /, *args: Any, **kwargs: Any
) -> AsyncIterator[Any]:
    function, values, keywords = await open_call(dotted_func, path, args, kwargs)
    async with aclosing(function(*values, **keywords)) as generator:
        async for item in generator:
            yield item


_RUNNERS: Final[Mapping[str, Callable[..., Any]]] = {
    "_run_object_task": _run_object_task,
    "_yield_object_task": _yield_object_task,
}
