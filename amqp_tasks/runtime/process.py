"""Tasks that run in a process of their own: they may burn a core, and can be killed.

AnyIO keeps a pool of worker processes and kills the one whose call is cancelled. What
travels between the processes is pickled, but only between this worker and its own
children; nothing from a message is ever unpickled.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Final

import anyio
import anyio.to_process

from ..core.outcome import CancelReason, Failure
from ..exceptions import AmqpTasksError
from ..registry import TaskDefinition
from .attempt import Attempt, set_current_attempt
from .failures import describe

__all__ = ["RaisedInProcess", "call_in_process"]

PARENT_INTERVAL: Final = 1.0
"""Seconds between looks whether the worker still lives."""


class RaisedInProcess(Exception):  # not an error of ours: the executor unwraps it
    """Carries what a task raised in its process."""

    def __init__(self, failure: Failure, error: BaseException | None) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.error = error
        """The exception itself, if it could be brought here."""


async def call_in_process(
    definition: TaskDefinition,
    attempt: Attempt,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    limiter: anyio.CapacityLimiter,
) -> Any:
    """Call a task's function in a worker process; cancelling this kills the process.

    Raises:
        RaisedInProcess: the function raised.
    """
    facts = _Facts(
        task_id=attempt.task_id,
        name=attempt.name,
        number=attempt.number,
        fence=attempt.fence,
        deadline=attempt.deadline,
        worker=attempt.worker,
        parent=os.getpid(),
    )
    raised, value = await anyio.to_process.run_sync(
        _run, definition.location, facts, args, kwargs, cancellable=True, limiter=limiter
    )
    if raised:
        failure, pickled = value
        raise RaisedInProcess(failure, None if pickled is None else _unpickled(pickled))
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What the attempt in the other process knows of itself."""

    task_id: str
    name: str
    number: int
    fence: int
    deadline: float | None
    worker: str
    parent: int
    """Process id of the worker."""


class _AttemptElsewhere(Attempt):
    """The attempt as it is seen within the process: there is no event loop there."""

    def __init__(self, facts: _Facts) -> None:
        self.task_id = facts.task_id
        self.name = facts.name
        self.number = facts.number
        self.fence = facts.fence
        self.deadline = facts.deadline
        self.worker = facts.worker

    @property
    def cancel_reason(self) -> CancelReason | None:
        return None

    def __getattr__(self, name: str) -> Any:
        raise AmqpTasksError(
            f"current_attempt().{name} is not there for a task in a process: it has no event "
            "loop, and is killed rather than cancelled"
        )

    async def emit(self, kind: str, message: Any) -> None:
        self.__getattr__("log")


def _run(
    location: tuple[str, str], facts: _Facts, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[bool, Any]:
    """Run in the worker process; return whether it raised, and what."""
    # The parent decides when this ends. A terminal sends its signals to both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    set_current_attempt(_AttemptElsewhere(facts))
    _die_with(facts.parent)
    try:
        module, name = location
        found: Any = getattr(import_module(module), name)
        func = found.func if isinstance(found, TaskDefinition) else found
        return False, func(*args, **kwargs)
    except BaseException as error:  # noqa: ASYNC103  there is no event loop here
        return True, (describe(error), _pickled(error))


@cache
def _die_with(parent: int) -> None:
    """End this process soon after the worker's: nobody waits for what it does, and the task
    starts again elsewhere."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_INTERVAL)
        os._exit(1)

    threading.Thread(target=watch, name="amqp_tasks parent watch", daemon=True).start()


def _pickled(error: BaseException) -> bytes | None:
    """Return an exception in a form that can be read back, if there is one."""
    try:
        pickled = pickle.dumps(error)
        _unpickled(pickled)
    except Exception:
        return None
    return pickled


def _unpickled(pickled: bytes) -> BaseException:
    error: BaseException = pickle.loads(pickled)  # noqa: S301  from our own child
    return error
