"""Tasks that may be the ones that take workers down run apart from each other.

When a worker dies, every task that ran on it has one crash more, whoever's fault it was. A
task with one crash less than is allowed is a suspect: of these, one at a time runs on a
worker. So the next crash blames no two of them, and a task that merely stood beside is
not given up.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from .ticket import Ticket

__all__ = ["Quarantine"]


class Quarantine:
    """Knows the suspects that run here, and those that wait for them to end.

    Args:
        max_crashes: crashes after which a task is given up.
    """

    def __init__(self, max_crashes: int) -> None:
        self._max_crashes = max_crashes
        self._suspects: dict[str, Ticket] = {}
        """Those that run here; all but one wait for other tasks."""
        self._waiting: set[str] = set()

    def shall_wait(self, task_id: str) -> bool:
        """Tell whether a task is known as a suspect that cannot start now."""
        return task_id in self._waiting and self._is_taken()

    @contextmanager
    def place(self, task_id: str, crashes: int, ticket: Ticket) -> Generator[bool]:
        """Say within the block that a task with so many crashes runs; False if it may not.

        One that is given up runs no more, and may always go through.
        """
        is_suspect = 0 < crashes == self._max_crashes - 1
        if not is_suspect:
            yield True
        elif self._is_taken():
            self._waiting.add(task_id)
            yield False
        else:
            self._suspects[task_id] = ticket
            try:
                yield True
            finally:
                del self._suspects[task_id]
                self._waiting.clear()

    def _is_taken(self) -> bool:
        # One that waits for other tasks takes nothing down; and those may be suspects.
        return not all(ticket.is_waiting for ticket in self._suspects.values())
