"""Two workers and a producer in one process, without RabbitMQ or Redis: ``make demo``.

The job: count the primes below 240,000, in 24 parts. Beside it run four tasks that go less
smoothly: one fails and succeeds when it is tried again, one fails for good, one takes longer
than it may, and one is cancelled. A table shows them all as they go.

In earnest, `main` would have no workers in it: they are processes of their own, on any
machine, each started with ``python -m amqp_tasks worker --app demo:app``. And it would not
say ``memory://``, so that RabbitMQ and Redis are used. The rest stays as it is.
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Sequence

import anyio
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from amqp_tasks import RetryPolicy, TaskApp, TaskHandle, TaskState, TaskStatus, current_attempt

PARTS = 24
PART = 10_000
PRIMES = 21_221
"""So many primes are there below PARTS * PART."""

app = TaskApp(queue="demo", max_running_tasks=4)


# ---------------------------------------------------------- the tasks: functions of a module


@app.task
async def count_primes(first: int, last: int) -> int:
    """Count the primes in a range, and let others run now and then."""
    found = 0
    for number in range(first, last):
        found += number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))
        if number % 1_000 == 0:
            await anyio.sleep(0.1)
    return found


@app.task(retry=RetryPolicy(max_retries=3, delay=1.5, jitter=0))
async def ask_server() -> str:
    """Fail the first time, as if the server was not up yet."""
    await anyio.sleep(0.5)
    if current_attempt().number == 1:
        raise ConnectionError("not up yet")
    return "hello!"


@app.task(retry=RetryPolicy(retry_on=(OSError,)))
def parse_price(text: str) -> float:
    """Parse a number. A function that is not async runs in a thread.

    An OSError would be worth another attempt; a ValueError would be the same again.
    """
    return float(text)


@app.task(timeout=2, retry=RetryPolicy(max_retries=0))
async def await_reply() -> None:
    """Wait for what never comes, until the timeout (in seconds) ends it."""
    await anyio.sleep_forever()


@app.task
async def watch_folder() -> None:
    """Go on until cancelled, and tidy up then, as any AnyIO code would."""
    try:
        await anyio.sleep_forever()
    finally:
        with anyio.move_on_after(1, shield=True):
            await current_attempt().log("closed the folder")


# ---------------------------------------------------------- the producer


async def produce() -> TaskHandle[None]:
    """Queue everything. Calling a task gives a handle at once, not its result."""
    # Ids are random unless they are given, as here: the table is in their order.
    await ask_server.options(task_id="moody")()
    await parse_price.options(task_id="failing")("12,50")
    await await_reply.options(task_id="overdue")()
    watching = await watch_folder.options(task_id="canceled")()
    for part in range(PARTS):
        first = part * PART
        await count_primes.options(task_id=part_id(part))(first, first + PART)
    return watching


def part_id(part: int) -> str:
    return f"part-{part + 1:02}"


async def cancel_later(handle: TaskHandle[None]) -> None:
    await anyio.sleep(3)
    await handle.cancel()


# ---------------------------------------------------------- the table

COLOURS = {
    TaskStatus.SCHEDULED: "dim",
    TaskStatus.RUNNING: "cyan",
    TaskStatus.RETRYING: "yellow",
    TaskStatus.FINISHED: "green",
    TaskStatus.ERRORED: "red",
    TaskStatus.CANCELED: "magenta",
}


def as_table(states: Sequence[TaskState]) -> Table:
    table = Table("id", "task", "status", "attempt", "worker", "result or error", box=SIMPLE_HEAD)
    for state in states:
        table.add_row(
            state.task_id,
            state.name.rpartition(".")[2],
            f"[{COLOURS[state.status]}]{state.status}",
            str(state.attempt),
            (state.worker or "")[-8:],
            escape(result_or_error(state)),
        )
    return table


def result_or_error(state: TaskState) -> str:
    match state.status:
        case TaskStatus.FINISHED:
            return str(state.result)
        case TaskStatus.CANCELED:
            return f"by the {state.reason}"
        case _ if state.error:
            return f"{state.error['type']}: {state.error['message']}"
        case _:
            return ""


async def show_until_ended(console: Console) -> Sequence[TaskState]:
    """Show the states of all tasks, of all workers, until each has ended."""
    # Without a terminal there is nothing to move about in: the table comes once, at the end.
    with Live(console=console, auto_refresh=False, transient=not console.is_terminal) as live:
        while True:
            states = await app.list_tasks()
            live.update(as_table(states), refresh=True)
            if all(state.status.ended for state in states):
                break
            await anyio.sleep(0.1)
    if not console.is_terminal:
        console.print(as_table(states))
    return states


# ---------------------------------------------------------- all together


def check(states: Sequence[TaskState]) -> str:
    """Return a summary.

    Raises:
        AssertionError: something has not come out as it should.
    """
    expected = {part_id(part): (TaskStatus.FINISHED, 1) for part in range(PARTS)} | {
        "moody": (TaskStatus.FINISHED, 2),
        "failing": (TaskStatus.ERRORED, 1),
        "overdue": (TaskStatus.ERRORED, 1),
        "canceled": (TaskStatus.CANCELED, 1),
    }
    seen = {state.task_id: (state.status, state.attempt) for state in states}
    assert seen == expected, seen
    result = {state.task_id: state.result for state in states}
    assert result["moody"] == "hello!", result
    primes: int = sum(result[part_id(part)] for part in range(PARTS))
    assert primes == PRIMES, primes
    [overdue] = [state for state in states if state.task_id == "overdue"]
    assert overdue.reason == "timeout", overdue

    count = Counter(str(state.status) for state in states)
    return (
        f"{len(states)} tasks: {count['finished']} finished, {count['errored']} errored, "
        f"{count['canceled']} canceled; {primes:,} primes"
    )


async def main() -> None:
    app.configure(broker_url="memory://", state_url="memory://")
    console = Console()
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(app.run_worker)
            tasks.start_soon(app.run_worker)
            async with app.connect():
                watching = await produce()
                tasks.start_soon(cancel_later, watching)
                states = await show_until_ended(console)
            tasks.cancel_scope.cancel()
    console.print(check(states))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run 28 tasks in this process and show them.")
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    backend = parser.parse_args().backend
    logging.disable(logging.WARNING)  # what fails is in the table
    anyio.run(main, backend=backend)
