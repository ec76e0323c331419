"""A function with the name and the rules under which it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import Enum, auto
from types import FunctionType
from typing import Any

from ..core.checks import check_seconds
from ..core.retry import RetryPolicy
from ..exceptions import DefinitionError
from .naming import check_function, importable_name
from .signature import CallSignature

__all__ = ["FunctionKind", "TaskDefinition"]


class FunctionKind(Enum):
    """How a function is run."""

    COROUTINE = auto()
    GENERATOR = auto()
    """An async generator; what it yields goes into the event log or the result."""
    SYNC = auto()
    """In a worker thread."""
    PROCESS = auto()
    """A synchronous function, in a process of its own."""


class TaskDefinition:
    """What a worker has to know of a task.

    Args:
        func: a function of a module.
        name: the name it is registered under; by default the one it can be imported by.
        retry: None for the app's default.
        timeout: seconds that one attempt may take; None for no limit.
        process: run it, a synchronous function, in a process of its own.

    Raises:
        DefinitionError: see `check_function`.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        *,
        name: str | None = None,
        retry: RetryPolicy | None = None,
        timeout: float | None = None,
        process: bool = False,
    ) -> None:
        function = check_function(func, named=name is not None)
        if name is not None and (not isinstance(name, str) or not name.isprintable() or not name):
            raise DefinitionError(f"name={name!r}: must be a printable text that is not empty")
        if retry is not None and not isinstance(retry, RetryPolicy):
            raise DefinitionError(f"retry={retry!r}: must be a RetryPolicy, or None")
        self.func: Callable[..., Any] = func
        self._function = function
        self.name = name or importable_name(function)
        self.retry = retry
        self.timeout = check_seconds(timeout, "timeout", error=DefinitionError)
        self.kind = _kind_of(function)
        if process:
            self.kind = _in_process(self.kind, function)
        self.signature = CallSignature(
            func, self.name, collects=self.kind is FunctionKind.GENERATOR
        )

    @property
    def location(self) -> tuple[str, str]:
        """Module and name by which another process finds the function."""
        module, _, name = importable_name(self._function).rpartition(".")
        return module, name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"


def _kind_of(func: FunctionType) -> FunctionKind:
    if inspect.isasyncgenfunction(func):
        return FunctionKind.GENERATOR
    if inspect.iscoroutinefunction(func):
        return FunctionKind.COROUTINE
    if inspect.isgeneratorfunction(func):
        raise DefinitionError(
            f"{func.__qualname__} is a generator and cannot be a task: make it an async "
            "generator, or return a list"
        )
    return FunctionKind.SYNC


def _in_process(kind: FunctionKind, func: FunctionType) -> FunctionKind:
    if kind is not FunctionKind.SYNC:
        raise DefinitionError(
            f"{func.__qualname__} is asynchronous and cannot have process=True: there is no event "
            "loop in that process; write it as a plain function"
        )
    if "<locals>" in func.__qualname__:
        raise DefinitionError(
            f"{func.__qualname__} cannot have process=True: another process cannot import it. "
            "Make it a function of its module"
        )
    return FunctionKind.PROCESS
