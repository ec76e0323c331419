"""Tasks that look around: at their attempt, their context, their thread."""

from __future__ import annotations

import threading
import time
from contextvars import ContextVar
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel

from amqp_tasks import current_attempt

from . import shop

REQUEST: ContextVar[str] = ContextVar("request", default="none")

blocked, unblock = threading.Event(), threading.Event()


async def about_itself() -> dict[str, Any]:
    """Tell about the second attempt."""
    attempt = current_attempt()
    if attempt.number == 1:
        raise shop.OutOfStock
    return {
        "task_id": attempt.task_id,
        "name": attempt.name,
        "number": attempt.number,
        "fence": attempt.fence,
        "deadline": attempt.deadline,
        "worker": attempt.worker,
        "reason": attempt.cancel_reason,
    }


def _id() -> str:
    return current_attempt().task_id


async def ids_in_children() -> list[str]:
    seen = [_id()]

    async def child() -> None:
        await anyio.lowlevel.checkpoint()
        seen.append(_id())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(child)
        tasks.start_soon(child)
    return seen


async def id_after(seconds: float) -> str:
    await anyio.sleep(seconds)
    return current_attempt().task_id


async def swap_request(name: str) -> str:
    """Return the request that is in the context, and leave another."""
    found = REQUEST.get()
    REQUEST.set(name)
    await anyio.sleep(1)
    assert REQUEST.get() == name
    return found


async def fail_elsewhere() -> None:
    await (await shop.journal.task(shop.fail)()).result()


async def fail_in_group(kind: str) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(shop.nap, 100.0)
        if kind == "child":
            tasks.start_soon(shop.fail)
        else:
            await shop.fail()


async def log_everything() -> str:
    attempt = current_attempt()
    for message in (None, {"x": [1]}, "text", object()):
        await attempt.log(message)
    return "done"


async def log_when_told() -> None:
    shop.journal.note("log_when_told started")
    await shop.journal.pass_through("log")
    await current_attempt().log("too late")
    await anyio.sleep_forever()


# ------------------------------------------------------------------------- threads


def where_it_runs() -> tuple[str, bool]:
    return _id(), threading.current_thread() is threading.main_thread()


def block() -> str:
    blocked.set()
    assert unblock.wait(20)
    return "unblocked"


def log_from_thread() -> None:
    anyio.from_thread.run(current_attempt().log, "from a thread")


def look_for_cancellation() -> None:
    blocked.set()
    while True:
        anyio.from_thread.check_cancelled()
        time.sleep(0.001)


def raise_in_thread(name: str) -> None:
    raise {
        "OutOfStock": shop.OutOfStock("in a thread"),
        "SystemExit": SystemExit(3),
        "StopIteration": StopIteration(),
    }[name]
