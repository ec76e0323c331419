"""Operations as Redis commands."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib import resources
from typing import Any, Final, NamedTuple

from ...core.lifecycle import ENDED, Event, TaskStatus, sources, target
from ...core.operations import (
    YIELDING,
    AppendEvents,
    Beat,
    Claim,
    Create,
    Discharge,
    IsAlive,
    Leave,
    Operation,
    Poll,
    Read,
    ReadEvents,
    Reopen,
    RequestCancel,
    Revoke,
    Settle,
)
from ...core.outcome import Reason
from ...core.record import Owed
from .keys import Keys, to_bytes
from .link import pack

__all__ = ["LOAD_SCRIPTS", "Commands"]


def _number(value: float) -> bytes:
    """Return a number as a text that gives the same number when it is read."""
    return repr(value).encode()


# ----------------------------------------------------------------------- scripts


class _Script(NamedTuple):
    text: bytes
    sha: bytes


def _script(name: str) -> _Script:
    folder = resources.files(__name__.rpartition(".")[0]) / "lua"
    text = b"\n".join((folder / file).read_bytes() for file in ("common.lua", f"{name}.lua"))
    return _Script(text, hashlib.sha1(text, usedforsecurity=False).hexdigest().encode())


_CREATE: Final = _script("create")
_DISCHARGE: Final = _script("discharge")
_REVOKE: Final = _script("revoke")
_REOPEN: Final = _script("reopen")
_REQUEST_CANCEL: Final = _script("request_cancel")
_CLAIM: Final = _script("claim")
_SETTLE: Final = _script("settle")
_APPEND_EVENTS: Final = _script("append_events")

LOAD_SCRIPTS: Final = tuple(
    pack((b"SCRIPT", b"LOAD", script.text))
    for script in (
        _CREATE,
        _DISCHARGE,
        _REVOKE,
        _REOPEN,
        _REQUEST_CANCEL,
        _CLAIM,
        _SETTLE,
        _APPEND_EVENTS,
    )
)
"""Commands that make the scripts known to a server."""


def _among(statuses: Iterable[TaskStatus]) -> bytes:
    """Return a set of statuses as ``among()`` in common.lua takes it."""
    return f",{','.join(sorted(statuses))},".encode()


# The scripts do not repeat the table of transitions: they are given what it says.
_SCHEDULED: Final = TaskStatus.SCHEDULED.encode()
_RUNNING: Final = target(Event.CLAIM).encode()
_CANCELED: Final = target(Event.CANCEL).encode()
_ENDED: Final = _among(ENDED)
_SOURCES: Final = {event: _among(sources(event)) for event in Event}
_TARGET: Final = {event: target(event).encode() for event in Event}
_ENDS: Final = frozenset(event for event in Event if target(event).ended)


# ---------------------------------------------------------------------- commands


class Commands:
    """Writes operations as commands.

    Args:
        keys: the names to use.
    """

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def write(self, operation: Operation[Any]) -> bytes:
        """Return `operation` as a packed command."""
        match operation:
            case Claim():
                return self._claim(operation)
            case Settle():
                return self._settle(operation)
            case Create():
                return self._create(operation)
            case Reopen():
                return self._reopen(operation)
            case Discharge() | Revoke() | RequestCancel():
                return self._small_change(operation)
            case AppendEvents(task_id=task_id, fence=fence, entries=entries):
                data = map(to_bytes, entries)
                return self._evalsha(_APPEND_EVENTS, task_id, b"%d" % fence, *data)
            case Beat() | IsAlive() | Leave():
                return self._presence(operation)
            case Poll() | Read() | ReadEvents():
                return self._read(operation)
            case _:
                raise TypeError(f"not an operation of a state store: {operation!r}")

    def _evalsha(self, script: _Script, task_id: str, *arguments: bytes) -> bytes:
        return pack((b"EVALSHA", script.sha, b"2", *self._keys.task(task_id), *arguments))

    def _create(self, op: Create) -> bytes:
        expires_at = _number(op.now + op.ttl)
        now = _number(op.now)
        return self._evalsha(
            _CREATE,
            op.task_id,
            *(to_bytes(op.nonce), expires_at, _SCHEDULED),
            *(b"status", _SCHEDULED, b"attempt", b"1", b"fence", b"0"),
            *(b"name", to_bytes(op.name), b"job", to_bytes(op.job)),
            *(b"created_at", now, b"updated_at", now, b"owed", Owed.PUBLISH.encode()),
            *_fields(
                nonce=op.nonce,
                due=op.due,
                deadline=op.deadline,
                timeout=op.timeout,
                parent=op.parent,
            ),
        )

    def _reopen(self, op: Reopen) -> bytes:
        now, status = _number(op.now), _TARGET[Event.REOPEN]
        return self._evalsha(
            _REOPEN,
            op.task_id,
            *(_SOURCES[Event.REOPEN], status, now, _number(op.now + op.ttl)),
            *(b"status", status, b"attempt", b"1", b"updated_at", now),
            *(b"name", to_bytes(op.name), b"job", to_bytes(op.job)),
            *(b"owed", Owed.PUBLISH.encode()),
            *_fields(nonce=op.nonce, deadline=op.deadline, timeout=op.timeout, parent=op.parent),
        )

    def _claim(self, op: Claim) -> bytes:
        now = _number(op.now)
        return self._evalsha(
            _CLAIM,
            op.task_id,
            *(_RUNNING, _CANCELED, _ENDED),
            *(b"%d" % op.attempt, to_bytes(op.lease), now, b"%d" % int(op.now * 1000)),
            *(to_bytes(op.lost_lease), _number(op.now + op.ttl), self._keys.ended(op.task_id)),
            *(job := to_bytes(op.job), to_bytes(op.parent or ""), _number(op.ttl)),
            *(b"name", to_bytes(op.name), b"job", job, b"created_at", now),
            *_fields(deadline=op.deadline, timeout=op.timeout, parent=op.parent),
        )

    def _settle(self, op: Settle) -> bytes:
        status, attempt, now = _TARGET[op.event], b"%d" % op.attempt, _number(op.now)
        ended = op.event in _ENDS
        expires_at = b"" if op.ttl is None else _number(op.now + op.ttl)
        channel = self._keys.ended(op.task_id)
        return self._evalsha(
            _SETTLE,
            op.task_id,
            *(to_bytes(op.lease), b"%d" % op.fence, _SOURCES[op.event], status, attempt, now),
            *((expires_at, channel) if ended else (b"", b"")),
            to_bytes(op.name),
            *(_CANCELED if op.event in YIELDING else b"", expires_at, channel),
            *(b"status", status, b"attempt", attempt, b"updated_at", now),
            *_fields(
                due=op.due,
                result=op.result,
                error=op.error,
                reason=op.reason,
                owed=op.owed,
                crashes="0" if op.event is Event.RETRY else None,
                ended_at=op.now if ended else None,
            ),
        )

    def _small_change(self, op: Discharge | Revoke | RequestCancel) -> bytes:
        match op:
            case Discharge(owed=owed, attempt=attempt, ttl=ttl):
                until = b"" if ttl is None else _number(op.now + ttl)
                arguments = (owed.encode(), b"%d" % attempt, until, _ENDED)
                return self._evalsha(_DISCHARGE, op.task_id, *arguments)
            case Revoke(nonce=nonce, error=error, now=now, ttl=ttl):
                kept: tuple[bytes, ...] = ()
                if error is not None:
                    kept = (
                        *(_TARGET[Event.FAIL], Reason.NOT_QUEUED.encode(), _number(now + ttl)),
                        self._keys.ended(op.task_id),
                        *_fields(error=error, updated_at=now, ended_at=now),
                    )
                return self._evalsha(_REVOKE, op.task_id, _SCHEDULED, to_bytes(nonce), *kept)
            case RequestCancel(reason=reason, now=now):
                return self._evalsha(
                    _REQUEST_CANCEL,
                    op.task_id,
                    *(_RUNNING, _CANCELED, _ENDED),
                    *(to_bytes(reason), _number(now)),
                    *(self._keys.ended(op.task_id), self._keys.cancel()),
                    to_bytes(op.task_id),
                )

    def _presence(self, op: Beat | IsAlive | Leave) -> bytes:
        key = self._keys.presence(op.owner)
        match op:
            case Beat(ttl=ttl, info=info):
                ttl_ms = b"%d" % max(1, int(ttl * 1000))
                return pack((b"SET", key, to_bytes(info), b"PX", ttl_ms, b"GET"))
            case IsAlive():
                return pack((b"EXISTS", key))
            case Leave():
                return pack((b"DEL", key))

    def _read(self, op: Poll | Read | ReadEvents) -> bytes:
        state, events = self._keys.task(op.task_id)
        match op:
            case Poll():
                return pack((b"HMGET", state, b"fence", b"cancel"))
            case Read():
                return pack((b"HGETALL", state))
            case ReadEvents(after=after, limit=limit, newest=newest):
                start = b"-" if after is None else b"(" + to_bytes(after)
                count = (b"COUNT", b"%d" % limit)
                if newest:
                    return pack((b"XREVRANGE", events, b"+", start, *count))
                return pack((b"XRANGE", events, start, b"+", *count))


def _fields(**values: str | float | None) -> list[bytes]:
    """Return names and values for a hash, which leaves out what is None."""
    pairs: list[bytes] = []
    for name, value in values.items():
        if value is not None:
            text = to_bytes(value) if isinstance(value, str) else _number(value)
            pairs += (name.encode(), text)
    return pairs
