"""What lies between a program and its servers: a line that can fail in any call.

All programs of a `world.World` share one `MemoryBroker` and one `SharedStore`. Each
reaches them over a `Line` of its own, on which traps lie in wait and which can be cut. A
program whose line is dead is as good as killed: whatever it still does, nobody sees.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import anyio
import anyio.lowlevel

from amqp_tasks.core.operations import Change, Operation
from amqp_tasks.core.record import TaskRecord
from amqp_tasks.core.settlement import Publication
from amqp_tasks.core.topology import QueueSpec
from amqp_tasks.drivers.memory import MemoryBroker, MemoryStore
from amqp_tasks.exceptions import BrokerUnavailable, PublishFailed, StateStoreUnavailable

__all__ = ["Fault", "InOrder", "Line", "LineBroker", "LineStore", "Network", "SharedStore", "Trap"]

LATE: Final = 7.0
"""Seconds after which a question arrives that nobody waits for any more."""

Watch = Callable[[Change, TaskRecord | None, TaskRecord | None, object], None]


class SharedStore(MemoryStore):
    """A store that tells of every change; `watch` gets the record before and after."""

    def __init__(self, clock: Callable[[], float], watch: Watch) -> None:
        super().__init__(clock)
        self._watch = watch

    def answer_now(self, operations: Sequence[Operation[Any]]) -> list[Any]:
        self._expire()
        return [self._answer(operation) for operation in operations]

    def forget(self, owner: str) -> None:
        """Have a presence expire at once."""
        self._presence.pop(owner, None)

    def record(self, task_id: str) -> TaskRecord | None:
        return self._records.get(task_id)

    def _change(self, operation: Change) -> object:
        before = self._records.get(operation.task_id)
        answer = super()._change(operation)
        self._watch(operation, before, self._records.get(operation.task_id), answer)
        return answer


class Fault(StrEnum):
    """What can happen to one call."""

    CRASH_BEFORE = "crash before"
    CRASH_AFTER = "crash after"
    CUT_BEFORE = "cut before"
    """The broker's connection is lost, and the call does nothing."""
    CUT_AFTER = "cut after"
    LOSE_QUESTION = "lose question"
    LOSE_ANSWER = "lose answer"
    """A confirm is dropped, or a reply after the write."""
    REFUSE = "refuse"
    """A message is certainly not queued."""
    DELAY = "delay"
    """The call is carried out after the caller was told that nobody knows."""


@dataclass(slots=True)
class Trap:
    """A fault that waits for one call out of those that it may befall.

    Attributes:
        where: the call's name, or a name for many: see `Line.before`.
        calls: how many calls are left alone before.
        pause: seconds until the caller is told.
    """

    fault: Fault
    where: str
    calls: int
    pause: float = 0.0


class InOrder(dict[Any, None]):
    """A set that iterates in the order of its additions, also while it changes."""

    def add(self, item: Any) -> None:
        self[item] = None

    def discard(self, item: Any) -> None:
        self.pop(item, None)

    def __iter__(self) -> Any:
        return iter(list(self.keys()))


@dataclass(slots=True)
class Network:
    """The servers, and whether anybody reaches them."""

    broker: MemoryBroker
    store: SharedStore
    tasks: anyio.abc.TaskGroup
    broker_is_up: bool = True
    store_is_up: bool = True


class Line:
    """The line of one program.

    Args:
        crash: ends the program, and this line.
        trouble: notes that a call to the store did not go as it should.
    """

    def __init__(
        self, network: Network, crash: Callable[[], None], trouble: Callable[[], None]
    ) -> None:
        self.network = network
        self.traps: list[Trap] = []
        self.broker_is_up = True
        self.store_is_up = True
        self.hears = True
        """Whether announcements of the store come through; a link that is silent stays so."""
        self.is_dead = False
        self.crash = crash
        self.trouble = trouble
        self.sessions: list[Any] = []

    @property
    def reaches_broker(self) -> bool:
        return self.broker_is_up and self.network.broker_is_up and not self.is_dead

    @property
    def reaches_store(self) -> bool:
        return self.store_is_up and self.network.store_is_up and not self.is_dead

    def drop_sessions(self) -> None:
        """Cut the connections to the broker; what was unacked goes back."""
        for session in list(self.sessions):
            session.close("the connection was cut")

    def heal(self) -> None:
        self.traps.clear()
        self.broker_is_up = self.store_is_up = True

    def before(self, *names: str) -> Trap | None:
        """A call begins: return the trap that it is caught in, if it is.

        Names are `connect`, `declare`, `consume`, `deliver`, `verdict`, `publish` and the
        name of the queue for the broker; for the store `store` and the names of the
        operations, as `Settle`; and `any` for whichever call it is.
        """
        caught = None
        for trap in list(self.traps):
            if caught is None and (trap.where == "any" or trap.where in names):
                trap.calls -= 1
                if trap.calls < 0:
                    self.traps.remove(trap)
                    caught = trap
        if caught is not None and caught.fault is Fault.CRASH_BEFORE:
            self.crash()
        if caught is not None and caught.fault is Fault.CUT_BEFORE:
            self.drop_sessions()
        return caught

    def after(self, trap: Trap | None) -> None:
        """A call was carried out."""
        if trap is not None and trap.fault is Fault.CRASH_AFTER:
            self.crash()
        if trap is not None and trap.fault is Fault.CUT_AFTER:
            self.drop_sessions()


# -------------------------------------------------------------------- the state store


class LineStore:
    """The state store at the end of a line; see `abc.StateStore`."""

    address = "memory://"

    def __init__(self, line: Line) -> None:
        self._line = line

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None, None]:
        await self.apply([])
        yield

    async def apply(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        line, store = self._line, self._line.network.store
        trap = line.before("store", *(type(operation).__name__ for operation in operations))
        fault = None if trap is None else trap.fault
        await anyio.lowlevel.checkpoint()
        if trap is not None and fault in (Fault.LOSE_QUESTION, Fault.DELAY):
            line.trouble()
            if fault is Fault.DELAY and line.reaches_store:
                line.network.tasks.start_soon(_later, store.answer_now, operations)
            await anyio.sleep(trap.pause)
            raise StateStoreUnavailable("memory://: the question was lost")
        if not line.reaches_store:
            line.trouble()
            await anyio.sleep(0.01)  # no loop runs so fast that time stands still
            raise StateStoreUnavailable("memory://: nobody answers")
        answers = store.answer_now(operations)
        line.after(trap)
        if trap is not None and (fault is Fault.LOSE_ANSWER or line.is_dead):
            line.trouble()
            await anyio.sleep(trap.pause)
            raise StateStoreUnavailable("memory://: the answer was lost")
        return answers

    @asynccontextmanager
    async def listen(self) -> AsyncGenerator[_LineListener, None]:
        async with self._line.network.store.listen() as listener:
            yield _LineListener(self._line, listener)


class _LineListener:
    def __init__(self, line: Line, listener: Any) -> None:
        self._line = line
        self._listener = listener
        self._announcements = aiter(listener)

    async def subscribe(self, topic: str) -> None:
        await self._listener.subscribe(topic)

    async def unsubscribe(self, topic: str) -> None:
        await self._listener.unsubscribe(topic)

    def __aiter__(self) -> _LineListener:
        return self

    async def __anext__(self) -> tuple[str, str]:
        while True:
            announcement: tuple[str, str] = await anext(self._announcements)
            if self._line.hears and self._line.reaches_store:
                return announcement


async def _later(call: Callable[..., object], *args: Any) -> None:
    await anyio.sleep(LATE)
    call(*args)


# -------------------------------------------------------------------------- the broker


class LineBroker:
    """The broker at the end of a line; see `abc.Broker`."""

    address = "memory://"

    def __init__(self, line: Line) -> None:
        self._line = line

    @asynccontextmanager
    async def session(self) -> AsyncGenerator[_LineSession, None]:
        line = self._line
        line.after(line.before("connect"))
        async with line.network.broker.session() as session:
            if not line.reaches_broker:
                raise BrokerUnavailable("memory://: nobody answers")
            session.__dict__["_consumers"] = InOrder()
            line.sessions.append(session)
            try:
                yield _LineSession(line, session)
            finally:
                line.sessions.remove(session)


class _LineSession:
    def __init__(self, line: Line, session: Any) -> None:
        self._line = line
        self._session = session

    async def declare(self, exchange: str, queues: Sequence[QueueSpec]) -> None:
        trap = self._line.before("declare")
        await self._session.declare(exchange, queues)
        self._line.after(trap)

    async def publish(self, exchange: str, publication: Publication, timeout: float) -> None:
        trap = self._line.before("publish", publication.queue.name)
        fault = None if trap is None else trap.fault
        if trap is not None and fault in (Fault.REFUSE, Fault.LOSE_QUESTION, Fault.DELAY):
            if fault is Fault.DELAY and self._line.reaches_broker:
                self._line.network.tasks.start_soon(_later, self._route, publication)
            await anyio.sleep(min(trap.pause, timeout))
            raise PublishFailed("memory://: not confirmed", maybe=fault is not Fault.REFUSE)
        await self._session.publish(exchange, publication, timeout)
        self._line.after(trap)
        if trap is not None:
            await anyio.sleep(min(trap.pause, timeout))
            raise PublishFailed("memory://: not confirmed", maybe=True)

    def _route(self, publication: Publication) -> None:
        broker = self._line.network.broker
        broker._declare(publication.queue)
        broker._route(publication.queue.name, publication.body, publication.headers)

    @asynccontextmanager
    async def consume(self, queue: str, prefetch: int) -> AsyncGenerator[AsyncIterator[Any], None]:
        trap = self._line.before("consume")
        async with self._session.consume(queue, prefetch) as deliveries:
            self._line.after(trap)
            yield _LineDeliveries(self._line, deliveries)

    async def count(self, queue: str) -> int:
        count: int = await self._session.count(queue)
        return count

    async def is_blocked(self) -> bool:
        return bool(await self._session.is_blocked())

    async def wait_closed(self) -> str:
        reason: str = await self._session.wait_closed()
        return reason


class _LineDeliveries:
    def __init__(self, line: Line, deliveries: AsyncIterator[Any]) -> None:
        self._line = line
        self._deliveries = deliveries

    def __aiter__(self) -> _LineDeliveries:
        return self

    async def __anext__(self) -> _LineDelivery:
        delivery = _LineDelivery(self._line, await anext(self._deliveries))
        self._line.after(self._line.before("deliver"))
        return delivery


class _LineDelivery:
    def __init__(self, line: Line, delivery: Any) -> None:
        self._line = line
        self._delivery = delivery

    @property
    def body(self) -> bytes:
        body: bytes = self._delivery.body
        return body

    @property
    def headers(self) -> Mapping[str, Any]:
        headers: Mapping[str, Any] = self._delivery.headers
        return headers

    @property
    def redelivered(self) -> bool:
        return bool(self._delivery.redelivered)

    def ack(self) -> None:
        self._verdict(self._delivery.ack)

    def requeue(self) -> None:
        self._verdict(self._delivery.requeue)

    def reject(self) -> None:
        self._verdict(self._delivery.reject)

    def _verdict(self, give: Callable[[], None]) -> None:
        trap = self._line.before("verdict")
        give()  # without any effect if the connection is gone
        self._line.after(trap)
