"""Object tasks: functions that get an object, which travels as its path in the container."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from guillotina import task_vars
from guillotina.interfaces import IContainer, IResource
from guillotina.utils import get_content_path, navigate_to

from amqp_tasks import AmqpTasksError, ArgumentsError, DefinitionError, NoRetry, Task

from .exceptions import ObjectNotFoundException
from .functions import APP_IN_USE, find_function, task_of

__all__ = ["arguments_task", "open_call", "path_of"]


def path_of(ob: IResource) -> str:
    """Return the path of an object in the current container.

    Raises:
        ArgumentsError: it is not in there, or nobody can tell because its parents are not
            known. Its path would be that of another object.
    """
    container, top = task_vars.container.get(), ob
    while top is not None and not IContainer.providedBy(top):
        top = getattr(top, "__parent__", None)
    if top is None or container is None or top.id != container.id:
        where = "no container" if container is None else f"container {container.id!r}"
        raise ArgumentsError(
            f"{ob!r} is not within the current container ({where}), or was loaded without its "
            "parents; the task could not find it"
        )
    path: str = get_content_path(ob)
    return path


async def open_call(
    name: str, path: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Return the function of an object task and what to call it with, the object first.

    Raises:
        NoRetry: the function is not served, or not there, or takes no such arguments.
        ObjectNotFoundException: there is no such object (any more).
    """
    try:
        function = find_function(name)
        values, keywords = arguments_task(function).signature.decode_arguments(args, kwargs)
    except AmqpTasksError as error:
        raise NoRetry(str(error)) from error
    try:
        ob = await navigate_to(task_vars.container.get(), path)
    except KeyError:
        raise ObjectNotFoundException(f"there is no object {path!r}") from None
    return function, (ob, *values), keywords


@cache
def arguments_task(function: Callable[..., Any]) -> Task[..., Any]:
    """Return a task that has a function's name and parameters, but for the object.

    It is never called. Its signature says how the rest of the arguments travel.

    Raises:
        DefinitionError: see `task_of`; or the function takes no object.
    """
    task = task_of(function)
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    first = parameters[0].kind if parameters else inspect.Parameter.KEYWORD_ONLY
    if first in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        raise DefinitionError(f"{task.name} takes no object: that is the first argument")
    if first is not inspect.Parameter.VAR_POSITIONAL:
        del parameters[0]

    def stand_in() -> None: ...

    names = {parameter.name for parameter in parameters}
    annotations = inspect.get_annotations(function)
    stand_in.__annotations__ = {name: annotations[name] for name in names & annotations.keys()}
    stand_in.__wrapped__ = function  # type: ignore[attr-defined]  # annotations are of its module
    stand_in.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    stand_in.__module__, stand_in.__qualname__ = function.__module__, function.__qualname__
    return Task(stand_in, APP_IN_USE, name=task.name)
