"""Deliberate bugs, and a command that sees whether the tests of the promise find them.

``python -m tests.mutations`` applies one bug after the other to a copy of the package in a
temporary folder, and runs there the machine of `tests/runtime/machine` and then, should that
notice nothing, the model of `tests/core`, and last some tests by example. It ends with 1 if a
bug is not found, or cannot be applied any more. The work tree is not touched.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

__all__ = ["MUTATIONS", "Mutation", "occurrences"]

ROOT: Final = Path(__file__).parent.parent
COPIED: Final = ("amqp_tasks", "tests", "pyproject.toml")
SUITES: Final = {
    "machine": ["tests/runtime/machine", "-k", "asyncio"],
    "model": ["tests/core/test_settlement_model.py", "-k", "not with_a_fault"],
    "examples": ["tests/runtime/test_shutdown.py", "-k", "asyncio"],
}
"""What is to find the bugs, the first that does so is named: arguments for pytest."""
EXAMPLES: Final = 200
LIMIT: Final = 900.0
"""Seconds for one suite on one bug."""
FAILED: Final = 1
"""How pytest ends when tests failed; 2 and more are errors of another kind."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """A bug: `old` becomes `new` in a file of the package."""

    name: str
    file: str
    old: str
    new: str
    why: str
    """What it does to whom."""


MUTATIONS: Final[Sequence[Mutation]] = (
    Mutation(
        "ack before the state is written",
        "core/settlement.py",
        "return (write(Event.SUCCEED, result=result), Verdict.ACK)",
        "return (Verdict.ACK, write(Event.SUCCEED, result=result))",
        "a worker that dies in between takes the task with it",
    ),
    Mutation(
        "ignore the fence",
        "core/rules.py",
        "if record.lease != op.lease or record.fence != op.fence:",
        "if False:",
        "a worker that was presumed dead settles what another one runs",
    ),
    Mutation(
        "count an attempt at shutdown",
        "core/outcome.py",
        "case CancelReason.SHUTDOWN:\n            return GivenBack()",
        "case CancelReason.SHUTDOWN:\n            return Failed(failure)",
        "each deployment uses up a retry of whatever runs",
    ),
    Mutation(
        "requeue nothing at shutdown",
        "core/settlement.py",
        "return (write(Event.RELEASE), Verdict.REQUEUE)",
        "return (write(Event.RELEASE), Verdict.ACK)",
        "what a worker gives back is in no queue",
    ),
    Mutation(
        "forget what the state owes",
        "runtime/consumer.py",
        "await self._carry_out(self._pay(message, answer), delivery)",
        "delivery.ack()",
        "a worker that died between state and publication has lost the retry",
    ),
    Mutation(
        "publish without caring for the confirm",
        "runtime/link.py",
        'log.warning("cannot publish to %s: %s", publication.queue.name, error)',
        "return None",
        "a message that was refused counts as queued, and its original is acked",
    ),
    Mutation(
        "park without waiting for the confirm",
        "runtime/consumer.py",
        "await self._link.publish_persistently(park(message, self._link.topology))\n"
        "        delivery.ack()",
        "delivery.ack()\n"
        "        await self._link.publish_persistently(park(message, self._link.topology))",
        "who dies in between has dropped the copy that keeps the task of another",
    ),
    Mutation(
        "ack what is held by another",
        "runtime/consumer.py",
        "answer.owner)\n                await self._park(message, delivery)",
        "answer.owner)\n                delivery.ack()",
        "the normal crash: the message comes back before the dead worker's presence is gone",
    ),
    Mutation(
        "ack before the guard copy is confirmed",
        "runtime/guards.py",
        "await self._link.publish_persistently(guard(task.message, self._link.topology))\n"
        "        task.ticket.ack()",
        "task.ticket.ack()\n"
        "        await self._link.publish_persistently(guard(task.message, self._link.topology))",
        "a task that waits for others is in no queue when its worker dies then",
    ),
    Mutation(
        "take a lost reply for a success",
        "runtime/link.py",
        'log.warning("the state store does not serve: %s", error)',
        "return None  # type: ignore[return-value]",
        "a settlement that nobody has written is followed by the ack",
    ),
    Mutation(
        "presume everybody else gone",
        "runtime/presence.py",
        "if not is_alive}",
        "if True}",
        "a copy that comes back starts the task a second time, beside the first",
    ),
    Mutation(
        "presume nobody gone",
        "runtime/presence.py",
        "if not is_alive}",
        "if False}",
        "what a dead worker ran is never run again",
    ),
    Mutation(
        "start a copy beside what runs here",
        "runtime/consumer.py",
        "original = self._at_work.get(key)",
        "original = None",
        "a redelivered message starts the task a second time on the same worker",
    ),
    Mutation(
        "look for no cancel requests",
        "runtime/cancellation.py",
        "await self.look(list(self._running))",
        "pass",
        "a cancel request whose announcement is lost never arrives",
    ),
    Mutation(
        "say that it is queued before it is",
        "runtime/producer.py",
        "if not created.owed:\n            return\n",
        "if not created.owed:\n            return\n        await self._confirm(message)\n",
        "a producer that dies in between leaves a task that nobody will ever run",
    ),
    Mutation(
        "do not cancel what waits for a retry",
        "core/rules.py",
        "if record.status is TaskStatus.RUNNING:\n        return replace(record, cancel=",
        "if record.status is not TaskStatus.SCHEDULED:\n        return replace(record, cancel=",
        "a task that shall be cancelled is started once more",
    ),
    Mutation(
        "do not count retries",
        "core/settlement.py",
        "again = message.attempt + 1",
        "again = message.attempt",
        "what always fails is tried for ever",
    ),
    Mutation(
        "error without a letter",
        "core/settlement.py",
        "return (publish, MarkPublished(discharge), verdict)",
        "return (MarkPublished(discharge), verdict)",
        "an errored task is not in the error queue",
    ),
    Mutation(
        "ack what a lost lease leaves behind",
        "core/settlement.py",
        "return (Verdict.REQUEUE,)",
        "return (Verdict.ACK,)",
        "it may be the only copy: the one who took the task over may have had no delivery",
    ),
)


def occurrences(mutation: Mutation) -> int:
    """Return how often the text that it replaces is in the file."""
    return (ROOT / "amqp_tasks" / mutation.file).read_text().count(mutation.old)


# ----------------------------------------------------------------------- the command


@dataclass(frozen=True, slots=True)
class Result:
    mutation: Mutation | None
    found_by: str
    """Name of a suite; or nothing."""
    seconds: float
    trouble: str = ""
    """Why nothing can be said."""


@contextmanager
def _copy(mutation: Mutation | None) -> Iterator[Path]:
    """Make a copy of the package and its tests, with the bug."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", ".*")
                shutil.copytree(source, copy / name, ignore=ignored)
            else:
                shutil.copy(source, copy / name)
        if mutation is not None:
            file = copy / "amqp_tasks" / mutation.file
            file.write_text(file.read_text().replace(mutation.old, mutation.new))
        yield copy


def _run(suite: Sequence[str], copy: Path, examples: int) -> tuple[int, str]:
    """Run pytest in a copy; return how it ended, and the end of what it said."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *suite]
    environment = {**os.environ, "AMQP_TASKS_EXAMPLES": str(examples)}
    environment.pop("PYTHONPATH", None)  # the copy is found because it is the current folder
    try:
        done = subprocess.run(
            [*command, "--hypothesis-seed=1"],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return FAILED, "it hangs"
    return done.returncode, done.stdout[-2_000:] + done.stderr[-2_000:]


def _judge(mutation: Mutation | None, examples: int) -> Result:
    """Try one bug; or none, and then nothing should be found."""
    began = time.monotonic()
    if mutation is not None and occurrences(mutation) != 1:
        return Result(mutation, "", 0.0, f"its text is there {occurrences(mutation)} times")
    with _copy(mutation) as copy:
        for name, suite in SUITES.items():
            code, said = _run(suite, copy, examples)
            if code == FAILED:
                return Result(mutation, name, time.monotonic() - began)
            if code:
                return Result(mutation, "", time.monotonic() - began, said)
    return Result(mutation, "", time.monotonic() - began)


def _report(result: Result) -> None:
    how = result.found_by or ("?" if result.trouble else "nothing")
    name = result.mutation.name if result.mutation else "(no bug)"
    print(f"{how:8} {result.seconds:6.1f} s  {name}  {result.trouble}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="See whether deliberate bugs are found.")
    parser.add_argument("words", nargs="*", help="only the bugs with one of these in their names")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="games for each bug")
    parser.add_argument("--at-once", type=int, default=2, help="bugs that are tried at a time")
    given = parser.parse_args()
    chosen: list[Mutation | None] = [
        mutation
        for mutation in MUTATIONS
        if not given.words or any(word in mutation.name for word in given.words)
    ]
    results = []
    with ThreadPoolExecutor(given.at_once) as pool:
        for result in pool.map(partial(_judge, examples=given.examples), [None, *chosen]):
            results.append(result)
            _report(result)
    without, *others = results
    found = sum(bool(result.found_by) for result in others)
    print(f"{found} of {len(others)} bugs are found")
    if without.found_by or without.trouble:
        print("but so is something where there is none")
    return int(found < len(others) or bool(without.found_by or without.trouble))


if __name__ == "__main__":
    sys.exit(main())
