"""The states of a task and the one table of its transitions.

Laws of this file:

1. Whatever changes a task's status is an event in `TRANSITIONS`. A pair of status
   and event that is not in the table cannot happen; asking for it raises and
   changes nothing.
2. finished, errored and canceled absorb: nothing that a worker or a producer does
   leads out of them. There is one exception: somebody who replays a task out of the
   error queue reopens it, and it goes from errored back to scheduled.
3. State stores do not repeat the table. They ask `sources` from which states an
   event may come, and refuse the write otherwise.

Who moves a task on::

    scheduled   a producer wrote it; a worker's claim moves it on
    running     a worker holds the lease; only that worker's settlement moves it on,
                or another worker's claim once the holder is gone
    retrying    an attempt failed and the next waits in a delay queue
    finished    ended with a result
    errored     ended with an error; its message is in the error queue, and only
                replaying that moves the task on
    canceled    ended because somebody asked for it
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from ..exceptions import IllegalTransition

__all__ = ["ENDED", "TRANSITIONS", "Event", "TaskStatus", "advance", "sources", "target"]


class TaskStatus(StrEnum):
    """Where a task is in its life."""

    SCHEDULED = "scheduled"
    RUNNING = "running"
    RETRYING = "retrying"
    FINISHED = "finished"
    ERRORED = "errored"
    CANCELED = "canceled"

    @property
    def ended(self) -> bool:
        """True for the three states that absorb."""
        return self in ENDED


class Event(StrEnum):
    """What can happen to a task."""

    CLAIM = "claim"
    """A worker starts an attempt. Also on a running task, whose worker is gone."""
    SUCCEED = "succeed"
    RETRY = "retry"
    """The attempt failed; another one follows."""
    FAIL = "fail"
    """The attempt failed, or could not start, and none follows."""
    CANCEL = "cancel"
    RELEASE = "release"
    """The worker gives the task back unfinished, without counting the attempt."""
    REOPEN = "reopen"
    """Somebody replays the task out of the error queue."""


_S = TaskStatus
ENDED: Final = frozenset({_S.FINISHED, _S.ERRORED, _S.CANCELED})

TRANSITIONS: Final[Mapping[TaskStatus, Mapping[Event, TaskStatus]]] = {
    _S.SCHEDULED: {
        Event.CLAIM: _S.RUNNING,
        Event.FAIL: _S.ERRORED,
        Event.CANCEL: _S.CANCELED,
    },
    _S.RUNNING: {
        Event.CLAIM: _S.RUNNING,
        Event.SUCCEED: _S.FINISHED,
        Event.RETRY: _S.RETRYING,
        Event.FAIL: _S.ERRORED,
        Event.CANCEL: _S.CANCELED,
        Event.RELEASE: _S.SCHEDULED,
    },
    _S.RETRYING: {
        Event.CLAIM: _S.RUNNING,
        Event.FAIL: _S.ERRORED,
        Event.CANCEL: _S.CANCELED,
    },
    _S.FINISHED: {},
    _S.ERRORED: {
        Event.REOPEN: _S.SCHEDULED,
    },
    _S.CANCELED: {},
}


def advance(status: TaskStatus, event: Event) -> TaskStatus:
    """Return the status that follows `status` when `event` happens.

    Raises:
        IllegalTransition: `event` cannot happen to a task that is `status`.
    """
    try:
        return TRANSITIONS[status][event]
    except KeyError:
        possible = ", ".join(TRANSITIONS[status]) or "nothing, it has ended"
        raise IllegalTransition(
            f"cannot {event} a task that is {status}; possible here: {possible}"
        ) from None


def sources(event: Event) -> frozenset[TaskStatus]:
    """Return the states in which `event` may happen."""
    return frozenset(status for status, row in TRANSITIONS.items() if event in row)


def target(event: Event) -> TaskStatus:
    """Return the one state that `event` leads to, whatever the state before it."""
    (status,) = {row[event] for row in TRANSITIONS.values() if event in row}
    return status
