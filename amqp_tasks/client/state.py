"""The state of a task, for people and programs to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from ..core.lifecycle import TaskStatus
from ..core.operations import LogEntry
from ..core.record import TaskRecord

__all__ = ["TaskState"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskState:
    """What is known about a task. Times are seconds since the epoch."""

    task_id: str
    name: str
    status: TaskStatus
    attempt: int
    """Number of the attempt that runs, will run next, or ran last; from 1."""
    worker: str | None
    """Incarnation of the worker that runs it, or ran it last."""
    created_at: float
    updated_at: float
    started_at: float | None
    ended_at: float | None
    due: float | None
    """When a waiting task is to be started, at the earliest."""
    deadline: float | None
    parent: str | None
    result: Any
    """None until it is finished."""
    error: Mapping[str, Any] | None
    """The latest failure: type, message, traceback, reason, attempt, worker."""
    reason: str | None
    """Why it was canceled, or why it failed if there is more to say than that it did."""
    cancel_requested: str | None
    """The reason for which it is to be cancelled and has not stopped yet, or None."""
    job: Mapping[str, Any]
    """The message's body: func, args, kwargs, task_id and whatever else is in it."""
    eventlog: Sequence[Mapping[str, Any]]
    """What the task has logged, its latest entries: at, attempt, kind, message."""


def state_from(
    record: TaskRecord, log: Sequence[LogEntry], decode_result: Callable[[str], Any]
) -> TaskState:
    """Return the readable form of a record and its event log."""
    return TaskState(
        task_id=record.task_id,
        name=record.name,
        status=record.status,
        attempt=record.attempt,
        worker=record.owner or None,
        created_at=record.created_at,
        updated_at=record.updated_at,
        started_at=record.started_at,
        ended_at=record.ended_at,
        due=record.due,
        deadline=record.deadline,
        parent=record.parent,
        result=None if record.result is None else decode_result(record.result),
        error=None if record.error is None else from_json(record.error),
        reason=record.reason,
        cancel_requested=record.cancel,
        job=from_json(record.job) if record.job else {},
        eventlog=[from_json(entry.data) for entry in log],
    )
