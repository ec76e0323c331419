"""Redis's replies as answers to operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from ...core.lifecycle import TaskStatus
from ...core.operations import (
    AppendEvents,
    Beat,
    CancelAnswer,
    Change,
    Claim,
    ClaimAnswer,
    Create,
    Created,
    Discharge,
    Duplicate,
    Ended,
    Granted,
    Held,
    IsAlive,
    LogEntry,
    Operation,
    Owing,
    Poll,
    Polled,
    Read,
    ReadEvents,
    Reopen,
    Reopened,
    RequestCancel,
    Revoke,
    Settle,
    Settled,
)
from ...core.record import Owed, TaskRecord
from .keys import from_bytes

__all__ = ["STATUSES", "Touched", "read_reply"]

STATUSES: Final = {status.encode(): status for status in TaskStatus}


class Touched(NamedTuple):
    """What the index has to know of a task after an operation; None is "not there"."""

    task_id: str
    before: TaskStatus | None
    after: TaskStatus | None
    expires_at: float | None


def read_reply(operation: Operation[Any], reply: Any) -> tuple[Any, Touched | None]:
    """Return the answer to `operation` that `reply` says, and where the task is now.

    The latter also when nothing was changed this time: whoever did it before may have
    been cut off on the way to the index. None for a task that is not there and was not,
    and for operations that change none.

    Raises:
        ValueError, KeyError, TypeError: what is stored there is not a task's.
    """
    match operation:
        case Claim() | Settle() | Create() | Discharge() | Revoke() | Reopen() | RequestCancel():
            before, after, expires_at, *rest = reply
            answer = _change_answer(operation, rest)
            if before is None and after is None:
                return answer, None
            return answer, Touched(
                operation.task_id,
                None if before is None else STATUSES[before],
                None if after is None else STATUSES[after],
                None if expires_at is None else float(expires_at),
            )
        case _:
            return _other_answer(operation, reply), None


def _change_answer(operation: Change, rest: Sequence[Any]) -> Any:
    match operation:
        case Claim():
            return _claim_answer(rest[0], rest[1:])
        case Settle():
            return Settled(from_bytes(rest[0]))
        case Create():
            return Created(new=bool(rest[0]), owed=bool(rest[1]))
        case Discharge():
            return None
        case Revoke():
            return bool(rest[0])
        case Reopen():
            return Reopened(STATUSES[rest[0]], bool(rest[1]))
        case RequestCancel():
            return CancelAnswer(from_bytes(rest[0]))


def _other_answer(operation: Operation[Any], reply: Any) -> Any:
    match operation:
        case AppendEvents() | IsAlive():
            return bool(reply)
        case Beat():
            return reply is not None
        case Poll():
            fence, cancel = reply
            return None if fence is None else Polled(int(fence), _optional_text(cancel))
        case Read(task_id=task_id):
            return _record(task_id, reply) if reply else None
        case ReadEvents(newest=newest):
            entries = [LogEntry(from_bytes(at), from_bytes(data)) for at, (_, data) in reply]
            return entries[::-1] if newest else entries
        case _:  # Leave
            return None


def _claim_answer(kind: bytes, rest: Sequence[Any]) -> ClaimAnswer:
    match kind:
        case b"granted":
            return Granted(int(rest[0]), int(rest[1]))
        case b"held":
            return Held(from_bytes(rest[0]))
        case b"ended":
            return Ended(STATUSES[rest[0]])
        case b"duplicate":
            return Duplicate(int(rest[0]))
        case b"owing":
            owed, attempt, due, error, lease = rest
            return Owing(
                _owed(owed),
                int(attempt),
                None if due is None else float(due),
                _optional_text(error),
                from_bytes(lease or b""),
            )
        case _:
            raise ValueError(f"claim.lua answered {kind!r}")


def _optional_text(data: bytes | None) -> str | None:
    return None if data is None else from_bytes(data)


def _owed(data: bytes) -> Owed:
    return Owed(from_bytes(data))


_FIELDS: Final[dict[bytes, tuple[str, Callable[[bytes], Any]]]] = {
    name.encode(): (name, parse)
    for parse, names in (
        (from_bytes, "name job lease parent result error reason cancel nonce"),
        (int, "attempt fence crashes"),
        (float, "created_at updated_at started_at ended_at due deadline timeout expires_at"),
        (STATUSES.__getitem__, "status"),
        (_owed, "owed"),
    )
    for name in names.split()
}
"""The fields of a state's hash, and how each is read."""


def _record(task_id: str, flat: Sequence[bytes]) -> TaskRecord:
    fields: dict[str, Any] = {}
    for name, data in zip(flat[::2], flat[1::2], strict=True):
        if name in _FIELDS:  # a later version may keep more
            field, parse = _FIELDS[name]
            fields[field] = parse(data)
    return TaskRecord(task_id=task_id, **fields)
