"""Functions by their names: which one a message may run, and by which name it finds it.

A message names a function by module and name. Only functions of the served packages are run,
and nothing else is imported: whoever can write into the queue must not run what he likes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

from guillotina import app_settings

from amqp_tasks import DefinitionError, Task, TaskHandle, UnknownTask

from .interfaces import ITaskDefinition
from .service import get_service
from .settings import served_packages

__all__ = ["APP_IN_USE", "check_served", "find_function", "task_of", "unwrap"]

BRIDGE = __name__.partition(".")[0]


class _AppInUse:
    """Queues calls by the app of the service that runs now."""

    async def schedule(
        self, task: Any, options: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TaskHandle[Any]:
        return await get_service().app.schedule(task, options, args, kwargs)


APP_IN_USE: Final = _AppInUse()


def unwrap(found: Any) -> Any:
    """Return the function itself of what a decorator made of it.

    A task of the bridge has it as ``func``, and other decorators may say so by an attribute
    ``__real_func__``.
    """
    while True:
        if ITaskDefinition.providedBy(found):
            found = found.func
        elif hasattr(found, "__real_func__"):
            found = found.__real_func__
        else:
            return found


def find_function(name: str) -> Callable[..., Any]:
    """Return the function that a message calls by a dotted name.

    Raises:
        UnknownTask: it is in no served package; or is not there, and why.
    """
    module, _, attribute = name.rpartition(".")
    if not _is_served(module):
        # Before anything is imported.
        raise UnknownTask(f"{name[:200]!r} is not in a served package: {_remedy()}")
    try:
        function = unwrap(getattr(importlib.import_module(module), attribute))
    except (ImportError, AttributeError) as error:
        raise UnknownTask(f"there is no function {name!r}: {error}") from error
    home = getattr(function, "__module__", None)
    if not callable(function) or not isinstance(home, str) or not _is_served(home):
        # Imported from elsewhere: what is `json.loads` in a served module is not served.
        raise UnknownTask(f"{name!r} is {function!r:.200}, which is not in a served package")
    return function  # type: ignore[no-any-return]  # it was an attribute


def check_served(function: Callable[..., Any]) -> None:
    """Check that workers run a function.

    Raises:
        DefinitionError: it is in no served package.
    """
    if not _is_served(function.__module__):
        name = f"{function.__module__}.{function.__qualname__}"
        raise DefinitionError(f"{name} is not in a served package: {_remedy()}")


@cache
def task_of(function: Callable[..., Any]) -> Task[..., Any]:
    """Return a function, unwrapped already, as a task of the app of whichever service runs.

    Kept, because what a task knows of its function's annotations takes a while to be made.

    Raises:
        DefinitionError: no worker can find it: it is a closure, a method, a lambda, a partial
            object; or its name is by now that of something else.
    """
    task: Task[..., Any] = Task(function, APP_IN_USE)
    module, _, attribute = task.name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute, None)
    if unwrap(found) is not function:
        raise DefinitionError(
            f"{task.name} cannot be scheduled: by that name a worker finds {found!r:.200}. Does a "
            "decorator hide the function? It can say which one it is: wrapper.__real_func__ = "
            "function"
        )
    return task


def _is_served(module: str) -> bool:
    # The bridge is an application, too, but its functions are no tasks.
    return _is_within(module, _served()) and not _is_within(module, [BRIDGE])


def _is_within(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _served() -> Sequence[str]:
    return served_packages(app_settings)


def _remedy() -> str:
    served = ", ".join(_served())
    return f"those are the applications, and what the setting amqp.serve names ({served})"
