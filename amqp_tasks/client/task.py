"""A task as its callers see it: a function whose calls are queued."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from datetime import datetime
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

from ..core.retry import RetryPolicy
from ..registry import TaskDefinition
from .handle import TaskHandle
from .options import CallOptions

__all__ = ["Scheduler", "Task"]

P = ParamSpec("P")
R = TypeVar("R")


class Scheduler(Protocol):
    """Who queues the calls of a task."""

    async def schedule(
        self,
        task: TaskDefinition,
        options: CallOptions,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> TaskHandle[Any]: ...


class Task(TaskDefinition, Generic[P, R]):
    """A function whose calls are queued: ``handle = await task(...)``.

    `TaskApp.task` makes one and registers it. ``Task(func, app)`` makes one that a worker
    finds by the function's dotted name (`serve`, or the app's `find`).

    ``task.func(...)`` calls the function itself, here and now.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        scheduler: Scheduler,
        *,
        name: str | None = None,
        retry: RetryPolicy | None = None,
        timeout: float | None = None,
        process: bool = False,
        options: CallOptions | None = None,
    ) -> None:
        super().__init__(func, name=name, retry=retry, timeout=timeout, process=process)
        self._scheduler = scheduler
        self._options = options or CallOptions()
        self.__doc__ = func.__doc__
        self.__wrapped__ = func

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, TaskHandle[R]]:
        """Queue a call.

        Raises:
            ArgumentsError: the arguments do not fit the function's annotations.
            NotConnected: outside of `TaskApp.connect` and of a worker.
            PublishFailed: the broker has not confirmed; `maybe` says whether it was queued.
            StateStoreError: the state store has not; nothing was queued.
        """
        return self._scheduler.schedule(self, self._options, args, kwargs)

    @property
    def call_options(self) -> CallOptions:
        """The options that its calls are queued with."""
        return self._options

    def options(
        self,
        *,
        task_id: str | None = None,
        timeout: float | None = None,
        deadline: datetime | None = None,
        inherit_deadline: bool | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
        extra: Mapping[str, Any] | None = None,
        keep_unqueued: bool | None = None,
    ) -> Task[P, R]:
        """Return the same task with options for its calls: ``task.options(...)(...)``.

        See `CallOptions` for what they mean.
        """
        other: Task[P, R] = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._options = self._options.updated(
            task_id=task_id,
            timeout=timeout,
            deadline=deadline,
            inherit_deadline=inherit_deadline,
            countdown=countdown,
            eta=eta,
            extra=extra,
            keep_unqueued=keep_unqueued,
        )
        return other
