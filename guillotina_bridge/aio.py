"""Two things that asyncio lacks: to end what was begun, and to run a coroutine in a context."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Generic, TypeVar

import anyio

__all__ = ["Ended", "always", "current_task", "finish", "run_in"]

T = TypeVar("T")

GLANCE: Final = 0.5
"""Seconds between looks at whether somebody has become impatient."""


@dataclass(frozen=True)
class Ended(Generic[T]):
    """What became of a coroutine that was to be finished."""

    task: asyncio.Task[T]
    """Is done, unless its time was up."""
    native_cancels: int
    """How often ``Task.cancel()`` was called meanwhile on the task that waits."""

    def then(self, later: Ended[T]) -> Ended[T]:
        """Return what became of it after a second wait."""
        return Ended(later.task, self.native_cancels + later.native_cancels)

    def overtake(self) -> None:
        """Forget these cancellations: they came too late."""
        for _ in range(self.native_cancels):
            current_task().uncancel()


def always() -> bool:
    """Somebody is impatient from the start."""
    return True


def current_task() -> asyncio.Task[Any]:
    """Return the task of the calling coroutine."""
    task = asyncio.current_task()
    assert task is not None
    return task


async def finish(
    call: Coroutine[Any, Any, T] | asyncio.Task[T],
    *,
    impatient: Callable[[], bool],
    patience: float,
) -> Ended[T]:
    """Await a coroutine, or a task, to its end, whoever cancels the caller; raises nothing.

    AnyIO's scopes are shielded off. A ``Task.cancel()`` pierces such a shield: so the
    coroutine runs in a task of its own, and the wait for it is begun again.

    Args:
        impatient: tells whether somebody waits for the caller to be gone. A
            ``Task.cancel()`` says so as well.
        patience: seconds that it may still take from then on.
    """
    task = call if isinstance(call, asyncio.Task) else asyncio.create_task(call)
    native_cancels = 0
    deadline: float | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait({task}, timeout=min(GLANCE, patience))
            except asyncio.CancelledError:  # noqa: ASYNC103  counted, for the caller to see to
                native_cancels += 1
            now = anyio.current_time()
            if deadline is None and (native_cancels or impatient()):
                deadline = now + patience
            if deadline is not None and now >= deadline:
                break
    return Ended(task, native_cancels)


@types.coroutine
def run_in(context: Context, call: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """Await a coroutine with another context, in the task of the caller.

    A task of its own would have a context as well, but then whatever cancels the caller's
    would have to be handed on.
    """
    step: Callable[[], Any] = partial(call.send, None)
    while True:
        try:
            waits_for = context.run(step)
        except StopIteration as end:
            result: T = end.value
            return result
        try:
            step = partial(call.send, (yield waits_for))
        except BaseException as error:  # noqa: ASYNC103  the coroutine's, GeneratorExit as well
            step = partial(call.throw, error)
