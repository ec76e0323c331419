"""Tasks that wait for other tasks, and do something besides."""

from __future__ import annotations

import anyio

from amqp_tasks import RemoteTaskError, ResultTimeout

from . import shop


async def _work(seconds: float) -> None:
    """Take up the slot that one task has."""
    await shop.count_running(seconds)


async def lose_patience_and_work(seconds: float) -> None:
    """Wait for a task that takes longer than one waits, and go on without it."""
    handle = await shop.journal.task(shop.count_running)(seconds)
    try:
        await handle.result(timeout=1)
    except ResultTimeout:
        await _work(seconds)


async def lose_patience_twice(seconds: float) -> str:
    """Wait for a task for a moment, and then for as long as it takes."""
    handle = await shop.journal.task(shop.nap)(seconds)
    try:
        await handle.result(timeout=0.5)
    except ResultTimeout:
        return str(await handle.result())
    return "too early"


async def work_while_children_run(seconds: float) -> None:
    """Work in the block of a group that has children."""
    async with shop.journal.app.remote_task_group() as group:
        await group.start(shop.journal.task(shop.count_running), seconds)
        await _work(seconds)


async def outlive_a_child(seconds: float) -> None:
    """Go on after a child has failed."""
    queue = shop.journal.task(shop.count_running)
    await queue(seconds)
    try:
        async with shop.journal.app.remote_task_group() as group:
            await group.start(shop.journal.task(shop.fail_after), 1.0)
            await queue(seconds)
    except* RemoteTaskError:
        await _work(seconds)


async def wait_for_two_at_once(seconds: float) -> list[str]:
    """Wait for two tasks in two children of this one."""
    results: list[str] = []

    async def wait(name: str, seconds: float) -> None:
        handle = await shop.journal.task(shop.nap)(seconds, name)
        results.append(await handle.result())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait, "short", seconds)
        tasks.start_soon(wait, "long", 2 * seconds)
    return results


async def wait_again_while_the_slot_is_taken(seconds: float) -> None:
    """Begin to wait for a task while this one waits for its slot, after another task."""
    handle = await shop.journal.task(shop.nap)(1.0, "first")
    await shop.journal.task(shop.nap)(seconds, "filler")

    async def wait_again() -> None:
        await shop.journal.wait_for("filler started")
        await (await shop.journal.task(shop.nap)(1.0, "second")).result()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait_again)
        await handle.result()
