"""What the runtime asks of a message broker and of a state store.

Drivers implement these and know no runtime; the runtime uses these and knows no driver.
Everything here is called on the I/O loop (`runtime.io_loop`) and on no other.

Drivers raise the errors of `exceptions` and no other: what a client library raises is
translated at the border, a bare `CancelledError` of its own making included.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from .core.operations import Operation
from .core.settlement import Publication
from .core.topology import QueueSpec

__all__ = ["Broker", "BrokerSession", "Delivery", "Listener", "StateStore"]


class Delivery(Protocol):
    """A message that the broker has given to this worker and waits for a verdict on.

    Exactly one of `ack`, `requeue` and `reject` is called, once. None of them blocks or
    raises: when the connection is gone the broker delivers the message again anyway.
    """

    @property
    def body(self) -> bytes: ...

    @property
    def headers(self) -> Mapping[str, Any]: ...

    @property
    def redelivered(self) -> bool:
        """True if it was delivered before, to this worker or another."""
        ...

    def ack(self) -> None:
        """The message is done with; forget it."""
        ...

    def requeue(self) -> None:
        """Deliver it again, to anybody."""
        ...

    def reject(self) -> None:
        """Dead-letter it where the queue says, or drop it."""
        ...


class BrokerSession(Protocol):
    """One connection to a broker, from its opening until it is lost or closed."""

    async def declare(self, exchange: str, queues: Sequence[QueueSpec]) -> None:
        """Make sure that the exchange and the queues are there, each bound by its name.

        Raises:
            QueueMismatch: one exists with other arguments; names both.
            BrokerRefused: this user may not.
        """
        ...

    async def publish(self, exchange: str, publication: Publication, timeout: float) -> None:
        """Publish one message, persistent, and return when the broker has confirmed it.

        Declares the publication's queue if this session has not done so.

        Args:
            timeout: seconds.

        Raises:
            PublishFailed: it was not confirmed. `maybe` says whether it may be queued.
        """
        ...

    def consume(
        self, queue: str, prefetch: int
    ) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        """Consume from a queue, with at most `prefetch` deliveries without a verdict.

        The iterator ends when the consumer does: the session is lost, or the broker
        cancelled it. Leaving the block cancels the consumer and gives back what it had
        delivered and nobody took; deliveries that were taken stay with their takers.
        """
        ...

    async def count(self, queue: str) -> int:
        """Return how many messages of a queue are ready: those that are out on delivery,
        to whomever, do not count.

        Raises:
            BrokerRefused: there is no such queue, or this user may not.
            BrokerUnavailable: the connection was lost.
        """
        ...

    async def is_blocked(self) -> bool:
        """Tell whether the broker takes no messages at present (memory or disk alarm)."""
        ...

    async def wait_closed(self) -> str:
        """Return when the connection is lost, with the reason in words."""
        ...


class Broker(Protocol):
    """A message broker."""

    @property
    def address(self) -> str:
        """Where it is, for people to read, without the password."""
        ...

    def session(self) -> AbstractAsyncContextManager[BrokerSession]:
        """Connect; leaving the block closes the connection in good order.

        Raises:
            BrokerUnavailable: nobody answers there.
            BrokerRefused: wrong login, no such virtual host, or no permission.
        """
        ...


class Listener(Protocol):
    """A subscription to what a state store announces.

    Announcements only make things faster: they may be lost without a word, so whoever
    listens polls as well.
    """

    async def subscribe(self, topic: str) -> None: ...

    async def unsubscribe(self, topic: str) -> None: ...

    def __aiter__(self) -> AsyncIterator[tuple[str, str]]:
        """Iterate over announcements, each a topic and a text, without an end."""
        ...


class StateStore(Protocol):
    """Where the state of every task is kept, and which workers are alive.

    It announces, to `Listener` objects anywhere, ``ended:<task_id>`` when a task ends
    (the text is its status) and ``cancel:<owner>`` when a running task shall be
    cancelled (the text is its id).
    """

    @property
    def address(self) -> str:
        """Where it is, for people to read, without the password."""
        ...

    def open(self) -> AbstractAsyncContextManager[None]:
        """Connect, and check that the store answers.

        Raises:
            StateStoreUnavailable: nobody answers there.
            StateStoreRefused: wrong login, or not allowed to write.
        """
        ...

    async def apply(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        """Carry out a batch in one round trip; return an answer for each, in order.

        An operation that failed has its exception in place of an answer. After a
        `StateStoreUnavailable` nobody knows whether an operation was carried out;
        operations can be repeated.
        """
        ...

    def listen(self) -> AbstractAsyncContextManager[Listener]:
        """Open a subscription. It reconnects by itself for as long as it is open."""
        ...
