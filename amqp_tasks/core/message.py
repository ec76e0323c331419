"""What travels through the broker: one call of a task, and what is known about it.

The body is a JSON object. ``func``, ``args``, ``kwargs`` and ``task_id`` are the call;
every other member is kept as it came (guillotina's workers find ``db_id``,
``container_id`` and ``req_data`` there), unless the worker's app filters them. Otherwise the
body never changes while a message goes from queue to queue. What changes, or concerns the
framework alone, is in headers:

========================  =======================================================
``task-attempt``          number of the attempt that this message is for, from 1
``task-due``              not to be started before; seconds since the epoch
``task-deadline``         not to be started after; seconds since the epoch
``task-timeout``          seconds that one attempt may take, where the caller said
``task-parent``           id of the task that called this one
``task-parent-owner``     incarnation of who waits for this task: gone, it is canceled
``task-parked``           how often this copy has waited while the task ran elsewhere
========================  =======================================================

Any other header with a text value (trace context, for one) is passed on from attempt
to attempt. Headers that begin with ``x-`` belong to the broker and are not: RabbitMQ
reads ``x-death`` of a republished message as a dead-letter cycle and drops it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

from pydantic_core import PydanticSerializationError, from_json, to_json

from ..exceptions import ArgumentsError, DecodeError
from .outcome import Failure

__all__ = [
    "MAX_TASK_ID_LENGTH",
    "UNREADABLE",
    "FilterExtra",
    "Message",
    "check_members",
    "check_task_id",
    "clean",
    "decode",
    "error_headers",
    "filtered",
    "fitting",
    "passed_on",
    "task_id_problem",
]

MAX_TASK_ID_LENGTH: Final = 400
"""Characters. Ids are part of Redis keys and of channel names; this is plenty."""

MAX_HEADER_TEXT: Final = 8_000
"""Characters kept of each text in an error header. The state keeps the whole."""

ATTEMPT: Final = "task-attempt"
DUE: Final = "task-due"
DEADLINE: Final = "task-deadline"
TIMEOUT: Final = "task-timeout"
PARENT: Final = "task-parent"
PARENT_OWNER: Final = "task-parent-owner"
PARKED: Final = "task-parked"

MAX_HEADERS: Final = 128_000
"""Bytes of all headers of a message; RabbitMQ's frames hold 131,072 by default."""

UNREADABLE: Final = "x-unreadable"
"""Header that a driver gives to a message whose headers nobody can read; says why."""

LATEST: Final = 1e12
"""Seconds, thirty thousand years; what is larger is no time, and sums of it overflow."""

MAX_NAME_LENGTH: Final = 1_000
"""Characters of a task's name."""

FilterExtra: TypeAlias = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Returns what is kept of the members of a body beside the call."""

_OF_THE_CALL: Final = frozenset({"func", "args", "kwargs", "task_id"})
_OUR_PREFIXES: Final = ("task-", "error-", "x-")
_ROUTING: Final = ("CC", "BCC")
"""Headers by which RabbitMQ would send copies elsewhere."""

_CHECKED_FROM: Final = 4_000
_CHECKED_NESTING: Final = 150
"""Bytes, and brackets, from which on it is tried whether a new body can be read again: a
number can have too many digits, and lists can be nested too deep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One call of a task on its way to an attempt."""

    task_id: str
    func: str
    """The name under which the task is registered."""
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Members of the body beside the four above."""
    attempt: int = 1
    due: float | None = None
    deadline: float | None = None
    timeout: float | None = None
    parent: str | None = None
    parent_owner: str | None = None
    parked: int = 0
    foreign: Mapping[str, str] = field(default_factory=dict)
    """Headers of others."""
    body: bytes = b""
    """The encoded body; filled in by `compose` and `decode`."""

    @classmethod
    def compose(
        cls,
        *,
        task_id: str,
        func: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        **headers: Any,
    ) -> Message:
        """Make a new message out of values that JSON has.

        Raises:
            ArgumentsError: something in it cannot be written as JSON, or has the key of
                something else.
        """
        kwargs, extra = kwargs or {}, extra or {}
        taken = sorted(_OF_THE_CALL & extra.keys())
        if taken:
            raise ArgumentsError(
                f"extra={extra!r:.200}: {', '.join(taken)} belongs to the call itself; use another "
                "key"
            )
        content = {**extra, "func": func, "args": args, "kwargs": kwargs, "task_id": task_id}
        try:
            body = to_json(content, inf_nan_mode="constants")
        except (PydanticSerializationError, ValueError) as error:
            raise ArgumentsError(f"task {func!r}: cannot be written as JSON: {error}") from error
        if len(body) > _CHECKED_FROM or body.count(b"[") + body.count(b"{") > _CHECKED_NESTING:
            try:
                from_json(body)
            except ValueError as error:
                raise ArgumentsError(
                    f"task {func!r}: no worker could read its arguments: {error}"
                ) from error
        return cls(
            task_id=task_id,
            func=func,
            args=args,
            kwargs=kwargs,
            extra=extra,
            body=body,
            **headers,
        )

    def headers(self) -> dict[str, Any]:
        """Return the headers to publish this message with."""
        ours = {
            ATTEMPT: self.attempt,
            DUE: _as_text(self.due),
            DEADLINE: _as_text(self.deadline),
            TIMEOUT: _as_text(self.timeout),
            PARENT: self.parent,
            PARENT_OWNER: self.parent_owner,
            PARKED: self.parked or None,
        }
        return {**self.foreign, **{key: value for key, value in ours.items() if value is not None}}

    def for_attempt(self, attempt: int, *, due: float | None) -> Message:
        """Return the same call, for another attempt that is due at `due`."""
        return replace(self, attempt=attempt, due=due, parked=0)

    def parked_again(self, times: int = 1) -> Message:
        """Return the same message, for a copy that waits while the task is being run."""
        return replace(self, parked=self.parked + times)


def decode(
    body: bytes,
    headers: Mapping[str, Any] | None = None,
    filter_extra: FilterExtra | None = None,
) -> Message:
    """Read a message that came from the broker.

    Args:
        filter_extra: says what of the message's `extra` is kept, in its body as well.

    Raises:
        DecodeError: the body or one of our headers is not what a producer writes. Says
            which part, and what would be right. Nothing else is raised, whatever the
            bytes.
    """
    if headers is not None and UNREADABLE in headers:
        raise DecodeError(f"the headers cannot be read: {_short(headers[UNREADABLE])}")
    content = _body_object(body)
    task_id = content.pop("task_id", None)
    problem = task_id_problem(task_id)
    if problem is not None:
        raise DecodeError(f"task_id={_short(task_id)}: {problem}")
    try:
        message = Message(
            task_id=task_id,
            func=_task_name(content),
            args=_take(content, "args", list, "a list", default=[]),
            kwargs=_take(content, "kwargs", dict, "an object", default={}),
            extra=content,
            body=body,
            **_read_headers(headers or {}),
        )
        return message if filter_extra is None else _filtered(message, filter_extra)
    except DecodeError as error:
        error.task_id = task_id
        raise


def filtered(extra: Mapping[str, Any], filter_extra: FilterExtra | None) -> Mapping[str, Any]:
    """Return what is kept of the members beside a call.

    Raises:
        ArgumentsError: the filter has returned something else.
    """
    if filter_extra is None:
        return extra
    kept: Any = filter_extra(extra)
    return check_members(kept, f"filter_extra has returned {kept!r:.200}")


def check_members(value: Any, what: str) -> Mapping[str, Any]:
    """Return `value` if it can be the members beside a call.

    Args:
        what: it is, to begin the error with.

    Raises:
        ArgumentsError: it cannot.
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ArgumentsError(f"{what}: must be a mapping with texts as keys")
    return value


def _filtered(message: Message, filter_extra: FilterExtra) -> Message:
    try:
        extra = filtered(message.extra, filter_extra)
        if extra == message.extra:
            return message
        fresh = Message.compose(
            task_id=message.task_id,
            func=message.func,
            args=message.args,
            kwargs=message.kwargs,
            extra=extra,
        )
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise DecodeError(f"what is beside the call cannot be filtered: {what}") from error
    return replace(message, extra=extra, body=fresh.body)


def task_id_problem(task_id: object) -> str | None:
    """Say what is wrong with a task id; None if nothing is."""
    if not isinstance(task_id, str) or not task_id:
        return "must be a text that is not empty"
    if len(task_id) > MAX_TASK_ID_LENGTH:
        return f"has {len(task_id)} characters; at most {MAX_TASK_ID_LENGTH} are possible"
    if not task_id.isprintable():
        return "must not contain line breaks or other control characters"
    return None


def check_task_id(task_id: object) -> str:
    """Return `task_id` if it can be one.

    Raises:
        ArgumentsError: it cannot, and why.
    """
    problem = task_id_problem(task_id)
    if problem is not None:
        raise ArgumentsError(f"task_id={_short(task_id)}: {problem}")
    assert isinstance(task_id, str)
    return task_id


def error_headers(failure: Failure, *, attempt: int, worker: str, at: float) -> dict[str, Any]:
    """Return the headers that tell, in the error queue, why a message is there."""
    return {
        "error-reason": failure.reason or "exception",
        "error-type": clean(failure.type[:MAX_HEADER_TEXT]),
        "error-message": clean(failure.message[:MAX_HEADER_TEXT]),
        # The end of a traceback names the place; the beginning is the framework's.
        "error-traceback": clean(failure.traceback[-MAX_HEADER_TEXT:]),
        "error-attempt": attempt,
        "error-worker": worker,
        "error-at": _as_text(at),
    }


def clean(text: str) -> str:
    """Return `text` without what UTF-8 cannot hold (lone surrogates)."""
    return text.encode("utf-8", "backslashreplace").decode()


def passed_on(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return those headers of a message that is none of ours which a copy of it can have."""
    return {
        key: value
        for key, value in headers.items()
        if isinstance(value, str | int) and not key.startswith("x-") and key not in _ROUTING
    }


def fitting(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return as many headers as a message can have; ours first, then the shorter ones."""
    room, kept = MAX_HEADERS, {}
    for key in sorted(
        headers, key=lambda key: (not key.startswith(_OUR_PREFIXES), _size(headers, key))
    ):
        room -= _size(headers, key)
        if room < 0:
            break
        kept[key] = headers[key]
    return kept


def _size(headers: Mapping[str, Any], key: str) -> int:
    """Return the bytes that a header takes, at most."""
    value = headers[key]
    text = value.encode("utf-8", "replace") if isinstance(value, str) else b" " * 8
    return len(key.encode("utf-8", "replace")) + len(text) + 6


def _as_text(seconds: float | None) -> str | None:
    """Return a number of seconds as a text that gives the same number when it is read.

    A float in a header is written in single precision by pamqp (4.0): two minutes more or
    less in a time since the epoch.
    """
    return None if seconds is None else repr(float(seconds))


def _body_object(body: bytes) -> dict[str, Any]:
    try:
        content = from_json(body)
    except ValueError as error:
        raise DecodeError(f"the body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DecodeError(f"the body is a JSON {type(content).__name__}; must be an object")
    return content


def _task_name(content: dict[str, Any]) -> str:
    name = _take(content, "func", str, "the name of a task, a text that is not empty")
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise DecodeError(
            f"func={_short(name)}: must be the name of a task, of at most {MAX_NAME_LENGTH} "
            "characters and without line breaks"
        )
    assert isinstance(name, str)
    return name


def _take(
    content: dict[str, Any], key: str, kind: type[Any], what: str, *, default: Any = None
) -> Any:
    value = content.pop(key, default)
    if not isinstance(value, kind) or value == "":
        raise DecodeError(f"{key}={_short(value)}: must be {what}")
    return value


def _read_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attempt": _whole(headers, ATTEMPT, default=1, least=1),
        "parked": _whole(headers, PARKED, default=0, least=0),
        "due": _seconds(headers, DUE),
        "deadline": _seconds(headers, DEADLINE),
        "timeout": _seconds(headers, TIMEOUT),
        "parent": _name(headers, PARENT),
        "parent_owner": _name(headers, PARENT_OWNER),
        "foreign": {
            key: value
            for key, value in headers.items()
            if isinstance(value, str) and not key.startswith(_OUR_PREFIXES) and key not in _ROUTING
        },
    }


def _whole(headers: Mapping[str, Any], key: str, *, default: int, least: int) -> int:
    value = headers.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise DecodeError(f"header {key}={_short(value)}: must be a whole number from {least}")
    return value


def _seconds(headers: Mapping[str, Any], key: str) -> float | None:
    value = headers.get(key)
    if value is None:
        return None
    if not isinstance(value, bool) and isinstance(value, str | int | float):
        try:
            seconds = float(value)
        except (ValueError, OverflowError):
            seconds = math.nan
        if abs(seconds) < LATEST:
            return seconds
    raise DecodeError(f"header {key}={_short(value)}: must be a number of seconds below {LATEST:g}")


def _name(headers: Mapping[str, Any], key: str) -> str | None:
    value = headers.get(key)
    problem = None if value is None else task_id_problem(value)
    if problem is not None:
        raise DecodeError(f"header {key}={_short(value)}: {problem}")
    assert value is None or isinstance(value, str)
    return value


def _short(value: object) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a deep nesting
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 120 else f"{text[:117]}..."
