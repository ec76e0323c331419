"""What the tests of state stores share: how to ask one, and a few usual operations."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import pytest

from amqp_tasks.abc import StateStore
from amqp_tasks.core.lifecycle import Event, TaskStatus
from amqp_tasks.core.operations import (
    Claim,
    Create,
    Discharge,
    Granted,
    ListTasks,
    Operation,
    Read,
    ReadEvents,
    Reopen,
    RequestCancel,
    Revoke,
    Settle,
)
from amqp_tasks.core.record import Owed, TaskRecord
from amqp_tasks.drivers.memory import MemoryStore
from amqp_tasks.drivers.redis import RedisStore

from ..conftest import REAL_CLOCKS, VIRTUAL_CLOCKS

__all__ = ["HOUR", "ODD_IDS", "Asker", "choose_backend", "choose_case", "open_store", "until"]

T = TypeVar("T")

HOUR = 3600.0


async def until(condition: Callable[[], Awaitable[object]], *, within: float = 20.0) -> None:
    """Return when `condition` is true; it is looked at again and again."""
    with anyio.fail_after(within):
        while not await condition():
            await anyio.sleep(0.01)


@dataclass
class Asker:
    """Asks a store one thing at a time. What is not said has a usual value."""

    store: StateStore
    clock: Callable[[], float]

    async def ask(self, operation: Operation[T]) -> T:
        """Return the answer, or raise the exception in its place."""
        (answer,) = await self.store.apply([operation])
        if isinstance(answer, Exception):
            raise answer
        result: T = answer
        return result

    def create(self, task_id: str = "t", **fields: Any) -> Create:
        usual = {"name": "mail.send", "job": '{"func": "mail.send"}', "nonce": "n1"}
        return Create(task_id=task_id, **{**usual, "now": self.clock(), **fields})

    def discharge(self, task_id: str = "t", **fields: Any) -> Discharge:
        usual = {"owed": Owed.PUBLISH, "attempt": 1, "ttl": None, "now": self.clock()}
        return Discharge(task_id=task_id, **{**usual, **fields})

    def revoke(self, task_id: str = "t", nonce: str = "n1") -> Revoke:
        return Revoke(task_id=task_id, nonce=nonce, now=self.clock())

    def reopen(self, task_id: str = "t", **fields: Any) -> Reopen:
        usual = {"name": "mail.send", "job": "{}", "nonce": "r1", "now": self.clock()}
        return Reopen(task_id=task_id, **{**usual, **fields})

    def request_cancel(self, task_id: str = "t", **fields: Any) -> RequestCancel:
        usual = {"reason": "user", "now": self.clock()}
        return RequestCancel(task_id=task_id, **{**usual, **fields})

    def claim(self, task_id: str = "t", **fields: Any) -> Claim:
        usual = {"name": "mail.send", "job": "{}", "attempt": 1, "lease": "w1/1", "ttl": HOUR}
        return Claim(task_id=task_id, **{**usual, "now": self.clock(), **fields})

    def settle(self, fence: int, event: Event = Event.SUCCEED, **fields: Any) -> Settle:
        usual = {"task_id": "t", "name": "mail.send", "lease": "w1/1", "attempt": 1, "ttl": HOUR}
        return Settle(fence=fence, event=event, **{**usual, "now": self.clock(), **fields})

    async def read(self, task_id: str = "t") -> TaskRecord:
        """Return a record that is there."""
        record = await self.ask(Read(task_id=task_id))
        assert record is not None
        return record

    async def is_gone(self, task_id: str = "t") -> bool:
        return await self.ask(Read(task_id=task_id)) is None

    async def list_ids(self, **fields: Any) -> list[str]:
        return list(await self.ask(ListTasks(**fields)))

    async def log(self, task_id: str = "t", **fields: Any) -> list[str]:
        """Return the data of a task's log."""
        return [entry.data for entry in await self.ask(ReadEvents(task_id=task_id, **fields))]

    async def make_running(self, task_id: str = "t", **fields: Any) -> int:
        """Claim a task, new or not; return the fence."""
        granted = await self.ask(self.claim(task_id, **fields))
        assert isinstance(granted, Granted)
        return granted.fence

    async def make(self, status: TaskStatus, task_id: str = "t") -> int:
        """Bring a new task to `status`; return its fence, 0 if it has none."""
        if status is TaskStatus.SCHEDULED:
            await self.ask(self.create(task_id))
            return 0
        fence = await self.make_running(task_id)
        event, fields = _LAST_STEPS[status]
        if event is not None:
            await self.ask(self.settle(fence, event, task_id=task_id, **fields))
        return fence


_LAST_STEPS: dict[TaskStatus, tuple[Event | None, dict[str, Any]]] = {
    TaskStatus.RUNNING: (None, {}),
    TaskStatus.RETRYING: (Event.RETRY, {"attempt": 2, "owed": Owed.RETRY, "error": '"boom"'}),
    TaskStatus.FINISHED: (Event.SUCCEED, {"result": "1"}),
    TaskStatus.ERRORED: (Event.FAIL, {"owed": Owed.ERROR, "error": '"boom"'}),
    TaskStatus.CANCELED: (Event.CANCEL, {"reason": "user"}),
}


# ---------------------------------------------------------------------- fixtures

CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "memory-asyncio": ("memory", VIRTUAL_CLOCKS["asyncio-virtual"]),
    "memory-trio": ("memory", VIRTUAL_CLOCKS["trio-virtual"]),
    "redis-asyncio": ("redis_server", REAL_CLOCKS["asyncio"]),
    "redis-uvloop": ("redis_server", REAL_CLOCKS["uvloop"]),
    "redis-cluster-asyncio": ("redis_cluster", REAL_CLOCKS["asyncio"]),
    "redis-cluster-uvloop": ("redis_cluster", REAL_CLOCKS["uvloop"]),
}
"""Stores in memory run under virtual clocks, those with a server in real time."""

ODD_IDS = [
    *("plain", "with space", "tab\there", "new\nline", "{braced}", "}{", "{}", "{", "}", "%"),
    *("%7D", "a*b", "a?b", "a[b]c", "a\\b", "it's", 'say "x"', "a:b", "a/b", "$(x)", "(", "["),
    *("-", "+", "0", "ünï", "日本", "\U0001f600", "\x7f", "\ud800", "e\u0301", "\uffff"),
    *("nul\0nul", "a" * 300),
]


@pytest.fixture(name="case", params=CASES)
def choose_case(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(name="anyio_backend")
def choose_backend(case: str) -> Any:
    return CASES[case][1]()


@pytest.fixture(name="asker")
async def open_store(case: str, request: pytest.FixtureRequest) -> AsyncIterator[Asker]:
    """An open store that is empty."""
    store: StateStore
    where = CASES[case][0]
    if where == "memory":
        asker = Asker(store := MemoryStore(_virtual_time), _virtual_time)
    else:
        server = request.getfixturevalue(where)
        prefix = f"test-{time.time_ns()}:"
        store = RedisStore(server.url, prefix=prefix, timeout=20, connect_timeout=20)
        asker = Asker(store, time.time)
    async with store.open():
        yield asker


def _virtual_time() -> float:
    return 1_700_000_000.0 + anyio.current_time()
