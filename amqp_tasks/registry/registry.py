"""The tasks of one app, by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from ..exceptions import DuplicateTask, UnknownTask
from .definition import TaskDefinition

__all__ = ["TaskRegistry"]


class TaskRegistry:
    """Finds the task that a message names.

    A message may name a registered task, what `find` knows of, or a function of a module
    that the app was told to serve. Nothing else is ever imported or called.

    Args:
        find: returns the function, or task, of a name that is not registered; None if it
            has none. What it returned is registered under that name.

    Attributes:
        served: modules and packages whose functions may be run by their dotted name.
    """

    def __init__(self, find: Callable[[str], Callable[..., Any] | None] | None = None) -> None:
        self._tasks: dict[str, TaskDefinition] = {}
        self._find = find
        self.served: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[TaskDefinition]:
        return iter(self._tasks.values())

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: TaskDefinition) -> None:
        """Register a task.

        Raises:
            DuplicateTask: another one has that name.
        """
        other = self._tasks.setdefault(task.name, task)
        if other is not task:
            raise DuplicateTask(
                f"{_where(task)} cannot be registered as {task.name!r}: that is the name of "
                f"{_where(other)} already. Give one of them another: @app.task(name='...')"
            )

    def find(self, name: str) -> TaskDefinition:
        """Return the task called `name`.

        Raises:
            UnknownTask: there is none.
        """
        task = self._tasks.get(name) or self._found(name)
        if task is not None:
            return task
        module, _, attribute = name.rpartition(".")
        if any(module == root or module.startswith(root + ".") for root in self.served):
            return self._import(module, attribute)
        raise UnknownTask(
            f"{name[:200]!r} is not a task of this app. Import the module that defines it where "
            "the app is made, or name its module in the setting `serve`"
        )

    def _found(self, name: str) -> TaskDefinition | None:
        if self._find is None:
            return None
        try:
            found = self._find(name)
            if found is None:
                return None
            task = found if isinstance(found, TaskDefinition) else TaskDefinition(found, name=name)
        except UnknownTask:
            raise
        except (Exception, SystemExit) as error:  # finding may import the user's code
            raise _unusable(name, error) from error
        self._tasks[name] = task
        return task

    def _import(self, module: str, attribute: str) -> TaskDefinition:
        name = f"{module}.{attribute}"
        try:
            found: Any = getattr(importlib.import_module(module), attribute)
            if isinstance(found, TaskDefinition):
                return found
            task = TaskDefinition(found)
        except (Exception, SystemExit) as error:  # importing runs the user's code
            raise _unusable(name, error) from error
        if task.name != name:
            # Imported from elsewhere: `json` in a served module is not served.
            raise UnknownTask(f"{name!r} is another name of {task.name!r}, which is not served")
        self._tasks[name] = task
        return task


def _unusable(name: str, error: BaseException) -> UnknownTask:
    why = f"{type(error).__name__}: {error}"
    return UnknownTask(f"{name!r} is not a function that can be run: {why}")


def _where(task: TaskDefinition) -> str:
    code = task.func.__code__
    return f"{task.func.__qualname__} ({code.co_filename}:{code.co_firstlineno})"
