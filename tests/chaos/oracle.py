"""What the tasks themselves wrote down, and what is wrong with it.

Each attempt appends lines to one file, each with a single write, so that lines of several
processes neither mix nor get lost when a writer is killed::

    <word> <task id> <fence> <attempt> <worker's pid> <seconds since the epoch>

with the words ``start``, ``end``, ``fail`` (it raises) and ``stop`` (it was cancelled).
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

__all__ = ["Ended", "Line", "Oracle", "Tally", "note", "tally"]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the file."""

    word: str
    task_id: str
    fence: int
    attempt: int
    pid: int
    at: float


def note(path: str, word: str, task_id: str, fence: int, attempt: int) -> None:
    """Append a line."""
    line = f"{word} {task_id} {fence} {attempt} {os.getpid()} {time.time():.6f}\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


class Oracle:
    """Reads the file as it grows. May be used by several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._lines: list[Line] = []
        self._ended: set[str] = set()
        self._position = 0

    def lines(self) -> list[Line]:
        """Return all lines so far."""
        with self._lock:
            self._read()
            return list(self._lines)

    def since(self, at: float) -> list[Line]:
        """Return the lines of after `at`; cheaper than all of them."""
        with self._lock:
            self._read()
            # Nearly in order: who writes has looked at the clock just before.
            recent = takewhile(lambda line: line.at > at - 10, reversed(self._lines))
            return [line for line in recent if line.at >= at][::-1]

    def ended(self) -> set[str]:
        """Return the tasks that have ended at least once."""
        with self._lock:
            self._read()
            return set(self._ended)

    def unfinished(self, pid: int) -> dict[str, int]:
        """Return the tasks that a worker has started and nobody has ended, with the fences."""
        ended = self.ended()
        return {
            line.task_id: line.fence
            for line in self.lines()
            if line.word == "start" and line.pid == pid and line.task_id not in ended
        }

    def first_whole_attempt(self, pid: int, since: float) -> float | None:
        """Return when a worker first ended an attempt that it had started after `since`."""
        started: set[int] = set()
        for line in self.since(since):
            if line.pid == pid:
                if line.word == "start":
                    started.add(line.fence)
                elif line.word in ("end", "fail") and line.fence in started:
                    return line.at
        return None

    def taken_over(self, orphans: Mapping[str, int], since: float) -> dict[str, float | None]:
        """Return when each of some tasks was started under a higher fence, or ended."""
        seen: dict[str, float | None] = dict.fromkeys(orphans)
        for line in self.since(since):
            if line.task_id in orphans and seen[line.task_id] is None:
                is_successor = line.fence > orphans[line.task_id]
                if line.word == "end" or (line.word == "start" and is_successor):
                    seen[line.task_id] = line.at
        return seen

    def _read(self) -> None:
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._position)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._position += len(whole) + len(newline)
            new = [_parsed(text) for text in whole.decode().splitlines()]
            self._lines.extend(new)
            self._ended.update(line.task_id for line in new if line.word == "end")


@dataclass(frozen=True, slots=True)
class Ended:
    """How the state of a task says that it ended; each task returns its fence."""

    status: str
    fence: int | None
    attempt: int


@dataclass(slots=True)
class Tally:
    """What there is to count. All but the first five are to be empty."""

    accepted: int = 0
    starts: int = 0
    ends: int = 0
    recorded: int = 0
    """States that say finished."""
    reruns: int = 0
    """Ends of a task beyond its first, each under a fence of its own: what a worker had
    done, but could not record before it was lost, was done again."""
    lost: list[str] = field(default_factory=list)
    """Accepted, and no state says that it ended."""
    doubled: list[str] = field(default_factory=list)
    """Ended twice under one fence: an effect that checks the fence would happen twice."""
    not_finished: list[str] = field(default_factory=list)
    """Ended, but not well."""
    unproved: list[str] = field(default_factory=list)
    """Said to be finished by an attempt which has not ended."""
    restarted: list[str] = field(default_factory=list)
    """Started with a higher fence than that of the attempt which is recorded."""
    shared: list[str] = field(default_factory=list)
    """Started twice under one fence. (Fences that go down are none of our business: a worker
    that was suspended between its claim and the start is a zombie, and may start late.)"""

    def wrong(self) -> dict[str, list[str]]:
        """Return what should be empty and is not."""
        names = ("lost", "doubled", "not_finished", "unproved", "restarted", "shared")
        return {name: found for name in names if (found := getattr(self, name))}

    def __str__(self) -> str:
        return (
            f"{self.accepted} tasks, {self.starts} starts, {self.ends} ends, "
            f"{self.recorded} recorded as finished, {self.reruns} done again under a new fence, "
            f"{len(self.lost)} lost, {len(self.doubled)} doubled"
        )


def tally(lines: Iterable[Line], accepted: Iterable[str], states: Mapping[str, Ended]) -> Tally:
    """Count.

    Args:
        accepted: ids of the tasks that `add_task` has taken.
        states: what the state store says about them at the end.
    """
    starts: dict[str, list[int]] = defaultdict(list)
    ends: dict[str, list[int]] = defaultdict(list)
    for line in lines:
        if line.word == "start":
            starts[line.task_id].append(line.fence)
        elif line.word == "end":
            ends[line.task_id].append(line.fence)
    result = Tally(
        starts=sum(map(len, starts.values())),
        ends=sum(map(len, ends.values())),
        reruns=sum(len(set(fences)) - 1 for fences in ends.values()),
        doubled=[task for task, fences in ends.items() if len(set(fences)) < len(fences)],
        shared=[task for task, fences in starts.items() if len(set(fences)) < len(fences)],
    )
    for task in accepted:
        result.accepted += 1
        state = states.get(task)
        if state is None:
            result.lost.append(task)
        elif state.status != "finished":
            (result.lost if _is_open(state) else result.not_finished).append(task)
        else:
            result.recorded += 1
            if state.fence not in ends[task]:
                result.unproved.append(task)
            elif state.fence != max(starts[task]):
                result.restarted.append(task)
    return result


def _is_open(state: Ended) -> bool:
    return state.status not in ("errored", "canceled")


def _parsed(text: str) -> Line:
    word, task_id, fence, attempt, pid, at = text.split()
    return Line(word, task_id, int(fence), int(attempt), int(pid), float(at))
