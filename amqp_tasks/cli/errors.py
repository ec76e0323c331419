"""``python -m amqp_tasks errors``"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NoReturn, TypeVar

import anyio
import click
from rich.console import Console
from rich.text import Text

import amqp_tasks

from ..app import TaskApp
from ..client.errors import ErrorLetter, ErrorQueue
from ..exceptions import (
    AppNotFound,
    ArgumentsError,
    BrokerError,
    DecodeError,
    DefinitionError,
    SettingsError,
    StateCorrupt,
    StateStoreError,
    TaskCanceled,
)
from .flags import given_settings
from .letters import as_dict, everything, named, new_table, plain, row
from .loading import load_app
from .worker import worker

__all__ = ["errors"]

F = TypeVar("F", bound=Callable[..., Any])

EXIT_NOTHING: Final = 1
EXIT_USAGE: Final = 2
EXIT_SERVER: Final = 3

AT_ONCE: Final = 100
"""Letters that are replayed at the same time; their round trips are shared."""

TABLE_LIMIT: Final = 100
WIDTH: Final = 200
"""Letters in a table if it is not said how many, and its width where there is no terminal."""

_LIMIT_HELP = f"""
Letters that are neither replayed nor dropped wait at the broker while the command looks for
others, {ErrorQueue.max_held:,} of them at most. Of a queue with more than that, a command that
does not take them out sees the oldest {ErrorQueue.max_held:,}, and says so.
"""

_EPILOG = """
\b
Exit codes:
  0  done
  1  nothing matches (an empty list is no error); or something that does cannot be replayed
     or dropped; or there were more letters than can be looked at
  2  wrong usage: a flag, a setting, or --app
  3  the broker or the state store cannot be used, or was lost
"""

_SETTINGS = ("broker_url", "state_url", "exchange", "queue", "queue_type", "state_prefix")


def _command(command: F) -> F:
    """Add what every command here has: --app, and the worker's flags for where things are."""
    for option in reversed([each for each in worker.params if each.name in _SETTINGS]):
        command.__dict__.setdefault("__click_params__", []).append(option)
    return click.option(
        "--app",
        "app_spec",
        required=True,
        metavar="MODULE:ATTRIBUTE",
        envvar="AMQP_TASKS_APP",
        help="The TaskApp whose error queue it is, as in shop.tasks:app.  [AMQP_TASKS_APP]",
    )(command)


def _selectors(command: F) -> F:
    """Add the ways to say which letters are meant."""
    for add in (
        click.option("--all", "everything", is_flag=True, help="All letters."),
        click.option("--task", "name", metavar="NAME", help="Those of the task called NAME."),
        click.argument("task_ids", nargs=-1, metavar="[TASK_ID]..."),
    ):
        command = add(command)
    return command


# ------------------------------------------------------------------------ commands


@click.group()
def errors() -> None:
    """Look at the error queue; replay or drop what is in it."""


@errors.command("list", epilog=_EPILOG, help=f"List the letters, oldest first.\n{_LIMIT_HELP}")
@click.option("--task", "name", metavar="NAME", help="Only those of the task called NAME.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"At most N of them.  [default: {TABLE_LIMIT} in a table, all with --json]",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for scripts.")
@_command
def list_letters(
    app_spec: str, name: str | None, limit: int | None, as_json: bool, **settings: Any
) -> None:
    if limit is None and not as_json:
        limit = TABLE_LIMIT
    _run(app_spec, settings, partial(_list, name=name, limit=limit, as_json=as_json))


@errors.command(epilog=_EPILOG, help=f"Show everything about one letter.\n{_LIMIT_HELP}")
@click.argument("task_id")
@_command
def show(app_spec: str, task_id: str, **settings: Any) -> None:
    _run(app_spec, settings, partial(_show, task_id=task_id))


@errors.command(
    epilog=_EPILOG,
    help="Put tasks back into the main queue, as if they were new: with their first attempt, "
    "and without a deadline if it is over. It can be interrupted, even killed, and called "
    f"again: no task is lost, and none is doubled.\n{_LIMIT_HELP}",
)
@_selectors
@_command
def replay(
    app_spec: str,
    task_ids: tuple[str, ...],
    name: str | None,
    everything: bool,
    **settings: Any,
) -> None:
    choice = _Choice(frozenset(task_ids), name, everything)
    choice.check("--all")
    _run(app_spec, settings, partial(_take, choice=choice, what=_Replaying()))


@errors.command(
    epilog=_EPILOG,
    help="Remove letters for good. On a terminal it asks first. The states of their tasks "
    f"stay as they are.\n{_LIMIT_HELP}",
)
@_selectors
@click.option("--undecodable", is_flag=True, help="Those that are no messages of ours.")
@click.option(
    "--position",
    "positions",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="N",
    help="The one that `list` has under this number, if it has no task id. Can be repeated.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@_command
def drop(
    app_spec: str,
    task_ids: tuple[str, ...],
    name: str | None,
    everything: bool,
    undecodable: bool,
    positions: tuple[int, ...],
    yes: bool,
    **settings: Any,
) -> None:
    choice = _Choice(frozenset(task_ids), name, everything, undecodable, frozenset(positions))
    choice.check("--all, --undecodable or --position")
    if not yes and sys.stdin.isatty():
        click.confirm(f"Drop {choice} for good?", abort=True)
    _run(app_spec, settings, partial(_take, choice=choice, what=_Dropping()))


def _run(
    app_spec: str, settings: dict[str, Any], use: Callable[[ErrorQueue], Awaitable[int]]
) -> NoReturn:
    """Open the error queue, use it, and exit with what that returns."""

    async def main(app: TaskApp) -> int:
        async with app.error_queue() as queue:
            return await use(queue)

    logging.basicConfig(level="WARNING", format="%(levelname)s %(name)s: %(message)s")
    try:
        app = load_app(app_spec, amqp_tasks.default_app)
        app.configure(**given_settings(settings))
        sys.exit(anyio.run(main, app))
    except (SettingsError, AppNotFound, DefinitionError) as error:
        _say(f"Error: {error}")
        sys.exit(EXIT_USAGE)
    except (BrokerError, StateStoreError) as error:
        _say(f"Error: {error}")
        sys.exit(EXIT_SERVER)


# ------------------------------------------------------------------------- choosing


@dataclass(frozen=True)
class _Choice:
    """Which letters are meant."""

    task_ids: frozenset[str]
    name: str | None
    everything: bool
    undecodable: bool = False
    positions: frozenset[int] = frozenset()

    def check(self, others: str) -> None:
        """
        Raises:
            click.UsageError: it is not said, or said in two ways.
        """
        ways = (self.task_ids, self.name, self.everything, self.undecodable, self.positions)
        if sum(map(bool, ways)) != 1:
            raise click.UsageError(f"say which: TASK_ID..., --task NAME, {others}; one of them")

    def fits(self, letter: ErrorLetter) -> bool:
        return (
            self.everything
            or letter.task_id in self.task_ids
            or (self.name is not None and letter.name == self.name)
            or (self.undecodable and letter.problem is not None)
            or letter.position in self.positions
        )

    def is_complete(self, last: ErrorLetter, missing: set[str]) -> bool:
        """Tell whether nothing behind `last` can be meant."""
        if self.positions:
            return last.position >= max(self.positions)
        return bool(self.task_ids) and not missing

    def __str__(self) -> str:
        if self.task_ids:
            return f"the letters of {_listed(map(repr, sorted(self.task_ids)))}"
        if self.positions:
            return f"letter {_listed(map(str, sorted(self.positions)))}"
        if self.undecodable:
            return "all letters that are no messages of ours"
        return "all letters" if self.name is None else f"all letters of task {self.name!r}"


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words)


# ---------------------------------------------------------------------------- doing


@dataclass
class _Replaying:
    """Replays letters, and counts."""

    done: int = 0
    before: int = 0

    async def handle(self, queue: ErrorQueue, letter: ErrorLetter) -> None:
        replayed = await queue.replay(letter)
        self.done += replayed.queued
        self.before += not replayed.queued
        if replayed.deadline_dropped:
            _say(f"task {letter.task_id!r}: its deadline is over, and was dropped")

    def __str__(self) -> str:
        more = f"; {self.before} had been replayed before" if self.before else ""
        return f"replayed {self.done}{more}"


@dataclass
class _Dropping:
    """Drops letters, and counts."""

    done: int = 0

    async def handle(self, queue: ErrorQueue, letter: ErrorLetter) -> None:
        await queue.drop(letter)
        self.done += 1

    def __str__(self) -> str:
        return f"dropped {self.done}"


@dataclass
class _Tally:
    """What a command has met."""

    matched: int = 0
    refused: int = 0
    missing: set[str] = field(default_factory=set)
    failure: BrokerError | StateStoreError | None = None


async def _take(queue: ErrorQueue, choice: _Choice, what: _Replaying | _Dropping) -> int:
    """Replay or drop what is chosen; return the exit code."""
    tally, places = _Tally(missing=set(choice.task_ids)), anyio.Semaphore(AT_ONCE)

    async def one(letter: ErrorLetter) -> None:
        try:
            await what.handle(queue, letter)
        except (DecodeError, TaskCanceled, ArgumentsError, StateCorrupt) as error:
            tally.refused += 1
            _say(f"letter {letter.position}{named(letter)} stays: {error}")
        except (BrokerError, StateStoreError) as error:
            tally.failure = tally.failure or error
        finally:
            places.release()

    async with anyio.create_task_group() as tasks:
        async for letter in queue:
            if choice.fits(letter) and _may_take(letter, choice, tally):
                await places.acquire()
                tasks.start_soon(one, letter)
            if tally.failure is not None or choice.is_complete(letter, tally.missing):
                break
    _say(f"{what} of {queue.total} letters in {queue.name!r}")
    if tally.failure is not None:
        raise tally.failure
    return _judge(queue, choice, tally)


def _may_take(letter: ErrorLetter, choice: _Choice, tally: _Tally) -> bool:
    tally.matched += 1
    tally.missing.discard(letter.task_id or "")
    if not choice.positions or letter.task_id is None:
        return True
    tally.refused += 1
    _say(
        f"letter {letter.position} stays: it is of task {letter.task_id!r}, and numbers change; "
        "drop it by its id"
    )
    return False


def _judge(queue: ErrorQueue, choice: _Choice, tally: _Tally) -> int:
    """Say what was not found; return the exit code."""
    if tally.missing:
        _say(f"no letter in {queue.name!r} for {_listed(map(repr, sorted(tally.missing)))}")
    elif not tally.matched:
        _say(f"nothing in {queue.name!r} matches: {choice}")
    bad = tally.missing or tally.refused or not tally.matched or _cut_short(queue)
    return EXIT_NOTHING if bad else 0


def _cut_short(queue: ErrorQueue) -> bool:
    """Say that there are more letters than can be looked at, if so."""
    if queue.unseen:
        _say(
            f"looked at the oldest letters in {queue.name!r} only, no more than "
            f"{queue.max_held:,} can be held; {queue.unseen:,} more are behind them: "
            "replay or drop some first"
        )
    return bool(queue.unseen)


# -------------------------------------------------------------------------- showing


async def _list(queue: ErrorQueue, name: str | None, limit: int | None, as_json: bool) -> int:
    table, shown = new_table(), 0
    async for letter in queue:
        if name is not None and letter.name != name:
            continue
        if limit is not None and shown == limit:
            _say(f"there are more; --limit {limit * 10} shows more of them")
            break
        shown += 1
        if as_json:
            click.echo(json.dumps(as_dict(letter)))
        else:
            table.add_row(*map(Text, row(letter)))
    if not as_json and shown:
        console = Console(markup=False, highlight=False)
        console.width = console.width if console.is_terminal else WIDTH
        console.print(table)
    if not shown:
        of = "" if name is None else f" of task {name!r}"
        _say(f"no letters{of} in {queue.name!r}")
    return EXIT_NOTHING if _cut_short(queue) else 0


async def _show(queue: ErrorQueue, task_id: str) -> int:
    async for letter in queue:
        if letter.task_id == task_id:
            click.echo(everything(letter, await queue.traceback(letter)))
            return 0
    _cut_short(queue)
    _say(f"no letter in {queue.name!r} for {task_id!r}")
    return EXIT_NOTHING


def _say(text: str) -> None:
    click.echo(plain(text), err=True)
