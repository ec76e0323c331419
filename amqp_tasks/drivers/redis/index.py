"""The index that tasks are listed by: sorted sets of ids, in the order of their bytes.

One holds all ids, one per status those with this status, one says when each expires.
They are in other slots than the tasks' states, so no script can write both: the index
follows, by commands after the script, and can be behind for a moment, or for good where
a process died in between. Therefore

- whatever touches a task writes its place in the index anew;
- whoever lists looks at the states themselves, and repairs the index where it differs;
- ids of tasks that have expired are taken out once their time is over, some at a time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import Final

from redis.exceptions import ResponseError

from ...core.lifecycle import TaskStatus
from ...core.operations import ListTasks
from .keys import Keys, from_bytes, to_bytes
from .link import Session, pack
from .replies import STATUSES, Touched

__all__ = ["TaskIndex"]

TRIM_LIMIT: Final = 1000
"""Expired ids that are looked at in one go."""
TRIM_INTERVAL: Final = 1.0
"""Seconds between two looks."""
TRIM_INTERVAL_BEHIND: Final = 0.1
"""Seconds to the next look when one did not find the end of what has expired."""
MIN_PAGE: Final = 100
"""Ids that are fetched at least when a page has gaps, so that many gaps are few trips."""


class TaskIndex:
    """Keeps the index of one store.

    Args:
        keys: the names to use.
    """

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._all = keys.prefix + b"index"
        self._expiry = self._all + b":expiry"
        self._by_status = {
            status: self._all + b":" + status.value.encode() for status in TaskStatus
        }
        self._next_trim = 0.0

    async def follow(self, session: Session, touched: Sequence[Touched]) -> None:
        """Write what operations have changed; now and then take out what has expired.

        An error that Redis answers (no memory, say) is ignored: the operations were
        carried out, and only a list suffers.
        """
        commands = self._update(touched)
        trim = time.monotonic() >= self._next_trim
        if trim:
            due = (b"-inf", repr(time.time()).encode())
            limit = (b"LIMIT", b"0", b"%d" % TRIM_LIMIT)
            commands.append(pack((b"ZRANGEBYSCORE", self._expiry, *due, *limit)))
        if not commands:
            return
        replies = await session.round_trip(commands)
        if trim:
            ids: list[bytes] = [] if isinstance(replies[-1], ResponseError) else replies[-1]
            is_behind = len(ids) == TRIM_LIMIT
            pause = TRIM_INTERVAL_BEHIND if is_behind else TRIM_INTERVAL
            self._next_trim = time.monotonic() + pause
            states = await self._look(session, ids)
            await self._repair(session, states.values())

    async def list_ids(self, session: Session, op: ListTasks) -> list[str] | ResponseError:
        """Answer a `ListTasks`, or return the error that Redis answers."""
        key = self._all if op.status is None else self._by_status[op.status]
        low, high = _bounds(op.prefix, op.after)
        listed: list[bytes] = []
        page = op.limit
        while len(listed) < op.limit:
            limit = (b"LIMIT", b"0", b"%d" % page)
            (ids,) = await session.round_trip([pack((b"ZRANGEBYLEX", key, low, high, *limit))])
            if isinstance(ids, ResponseError):
                return ids
            states = await self._look(session, ids)
            right = {task_id for task_id, state in states.items() if _fits(state, op.status)}
            listed += [task_id for task_id in ids if task_id in right]
            wrong = [state for task_id, state in states.items() if task_id not in right]
            await self._repair(session, wrong, listed_as=op.status)
            if len(ids) < page:
                break
            low = b"(" + ids[-1]
            page = max(op.limit - len(listed), MIN_PAGE)
        return [from_bytes(task_id) for task_id in listed[: op.limit]]

    async def _look(self, session: Session, ids: Sequence[bytes]) -> dict[bytes, Touched]:
        """Return how the states of `ids` are, without those that are not ours to judge."""
        if not ids:
            return {}
        keys = (self._keys.task(from_bytes(task_id))[0] for task_id in ids)
        commands = [pack((b"HMGET", key, b"status", b"expires_at")) for key in keys]
        states: dict[bytes, Touched] = {}
        for task_id, reply in zip(ids, await session.round_trip(commands), strict=True):
            if isinstance(reply, ResponseError):
                continue
            status, expires_at = reply
            with suppress(ValueError, KeyError):
                states[task_id] = Touched(
                    from_bytes(task_id),
                    None,
                    None if status is None else STATUSES[status],
                    None if expires_at is None else float(expires_at),
                )
        return states

    async def _repair(
        self,
        session: Session,
        states: Collection[Touched],
        *,
        listed_as: TaskStatus | None = None,
    ) -> None:
        """Put the entries of tasks where their states say."""
        commands = self._update([state._replace(before=listed_as) for state in states])
        # Nobody knows which status a task had that is gone.
        gone = [to_bytes(state.task_id) for state in states if state.after is None]
        if gone:
            commands += [pack((b"ZREM", key, *gone)) for key in self._by_status.values()]
        if commands:
            await session.round_trip(commands)

    def _update(self, touched: Iterable[Touched]) -> list[bytes]:
        """Return the commands that bring the index to what `touched` says, in order."""
        last: dict[str, Touched] = {}
        left: defaultdict[str, set[TaskStatus]] = defaultdict(set)
        for each in touched:
            last[each.task_id] = each
            if each.before is not None:
                left[each.task_id].add(each.before)
        add: defaultdict[bytes, list[bytes]] = defaultdict(list)
        remove: defaultdict[bytes, list[bytes]] = defaultdict(list)
        for task_id, state in last.items():
            member = to_bytes(task_id)
            for status in left[task_id] - {state.after}:
                remove[self._by_status[status]].append(member)
            if state.after is None:
                remove[self._all].append(member)
            else:
                add[self._all] += (b"0", member)
                add[self._by_status[state.after]] += (b"0", member)
            if state.expires_at is None:
                remove[self._expiry].append(member)
            else:
                add[self._expiry] += (repr(state.expires_at).encode(), member)
        commands = [pack((b"ZADD", key, *pairs)) for key, pairs in add.items()]
        commands += [pack((b"ZREM", key, *members)) for key, members in remove.items()]
        return commands


def _fits(state: Touched, status: TaskStatus | None) -> bool:
    return state.after is not None and status in (None, state.after)


def _bounds(prefix: str, after: str | None) -> tuple[bytes, bytes]:
    """Return the range of ids that begin with `prefix` and come after `after`."""
    first, last = to_bytes(prefix), b""
    # No UTF-8 has the byte 0xff, so it comes after whatever begins with `prefix`.
    low, high = b"[" + first, b"(" + first + b"\xff"
    if after is not None:
        last = to_bytes(after)
        if last >= first:
            low = b"(" + last
    return low, high
