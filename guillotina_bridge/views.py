"""The state of a task as a dict, with the keys that guillotina_amqp's users know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from amqp_tasks import TaskState, TaskStatus

__all__ = ["RESERVED", "UPDATE", "has_ended", "view"]

UPDATE: Final = "update"
"""The kind of entries of a task's event log that `IStateManagerUtility.update` makes."""

RESERVED: Final = frozenset(
    {
        *("task_id", "status", "updated", "job_data", "job_retries"),
        *("eventlog", "result", "error", "reason"),
    }
)
"""Keys of a state that no task can update."""

LATEST: Final = 1_000
"""Entries of the event log that are shown."""

_NOT_SHOWN: Final = {UPDATE, "result"}


def view(state: TaskState) -> dict[str, Any]:
    """Return a task's state as a dict, with what the task itself has added by updates."""
    shown: dict[str, Any] = {}
    for update in _entries(state, UPDATE):
        shown |= update
    shown |= {
        "task_id": state.task_id,
        "status": str(state.status),
        "updated": state.updated_at,
        "job_data": dict(state.job),
        "job_retries": state.attempt - 1,
        "eventlog": [
            [_local_time(entry["at"]), entry["message"]]
            for entry in state.eventlog
            if entry["kind"] not in _NOT_SHOWN
        ][-LATEST:],
    }
    if state.status is TaskStatus.FINISHED:
        shown["result"] = state.result  # whatever it is: 0, "" and [] are results
    elif state.error is not None:
        error = state.error
        shown["error"] = error.get("traceback") or f"{error.get('type')}: {error.get('message')}"
    if state.reason is not None:
        shown["reason"] = str(state.reason)
    return shown


def has_ended(shown: Mapping[str, Any]) -> bool:
    """Tell whether a state, as a dict, is one that a task stays in."""
    return shown.get("status") in {status.value for status in TaskStatus if status.ended}


def _entries(state: TaskState, kind: str) -> Iterator[Mapping[str, Any]]:
    for entry in state.eventlog:
        if entry["kind"] == kind and isinstance(entry["message"], Mapping):
            yield entry["message"]


def _local_time(at: float) -> str:
    # Without a time zone, as guillotina_amqp wrote it.
    return datetime.fromtimestamp(at).isoformat(" ", "milliseconds")  # noqa: DTZ006
