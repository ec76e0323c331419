"""What the tasks of the machine do. `stage` is where they are seen to do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import anyio

from amqp_tasks import Attempt, TaskHandle, current_attempt

__all__ = ["Stage", "act", "set_stage"]


class Stage(Protocol):
    """What looks on."""

    def entered(self, attempt: Attempt) -> Callable[[BaseException | None], None]:
        """A task's function was called; call the result with how it ended."""
        ...

    def kill(self, worker: str) -> None:
        """Kill the program that this worker runs in."""
        ...

    async def queue(self, worker: str, task_id: str, kind: str, seconds: float) -> TaskHandle[str]:
        """Queue a task from within that program."""
        ...


_stage: Stage


def set_stage(stage: Stage) -> None:
    global _stage
    _stage = stage


class OutOfLuck(Exception):
    """What tasks fail with that may be tried again."""


class Futile(Exception):
    """What tasks fail with that need not be tried again."""


async def act(kind: str, seconds: float) -> str:
    """Do what a kind of task does; see `KINDS` in `ledger`."""
    attempt = current_attempt()
    left = _stage.entered(attempt)
    try:
        await _act(kind, seconds, attempt)
    except BaseException as error:
        left(error)
        raise
    left(None)
    return kind


async def _act(kind: str, seconds: float, attempt: Attempt) -> None:
    match kind:
        case "log":
            await attempt.log("one")
            await anyio.sleep(seconds)
            await attempt.log("two")
        case "hang":
            await anyio.sleep_forever()
        case "kill":
            _stage.kill(attempt.worker)
            await anyio.sleep_forever()
        case "wait":
            await _wait_for_child(seconds, attempt)
        case "stubborn" | "tidy":
            await _resist(kind, seconds)
        case _:
            await anyio.sleep(seconds)
            _fail(kind, attempt.number)


def _fail(kind: str, number: int) -> None:
    match kind:
        case "flaky" if number < 3:
            raise OutOfLuck
        case "doomed":
            raise OutOfLuck
        case "futile":
            raise Futile


async def _resist(kind: str, seconds: float) -> None:
    """Do not stop at once when told to; a tidy one cleans up, a stubborn one goes on."""
    if kind == "stubborn":
        with anyio.CancelScope(shield=True):
            await anyio.sleep(seconds)
        return
    try:
        await anyio.sleep(seconds)
    finally:
        with anyio.move_on_after(5, shield=True):
            await anyio.sleep_forever()


async def _wait_for_child(seconds: float, attempt: Attempt) -> None:
    """Wait for a task that this one queues: meanwhile it has neither slot nor delivery."""
    child = f"{attempt.task_id}-child"
    handle = await _stage.queue(attempt.worker, child, "nap", seconds)
    await handle.result()
