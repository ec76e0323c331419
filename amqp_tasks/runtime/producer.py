"""A producer's part on the I/O loop: queue tasks, look at them, wait for their end."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

import anyio
from anyio.abc import TaskGroup

from ..abc import Listener, StateStore
from ..core.lifecycle import TaskStatus
from ..core.message import FilterExtra, Message, decode
from ..core.operations import (
    CANCELED_NOW,
    REQUESTED,
    UNKNOWN,
    Create,
    Discharge,
    ListTasks,
    LogEntry,
    Read,
    ReadEvents,
    RequestCancel,
    Revoke,
)
from ..core.outcome import CancelReason, Reason
from ..core.record import Owed, TaskRecord
from ..core.settlement import error_text, wait_for
from ..exceptions import PublishFailed, StateStoreError, TaskNotFound
from .batching import StateClient
from .failures import describe
from .link import Link
from .presence import Presence
from .reopening import UNCONFIRMED_TTL, as_new, reopening

__all__ = ["Producer"]

log = logging.getLogger(__name__)

FIRST_LOOK: Final = 0.25
LONGEST_LOOK: Final = 5.0
"""Seconds between looks at a task that somebody waits for. Announcements come at once;
these are for when one is lost."""


class Producer:
    """Queues tasks and follows them. Call its methods within `open`.

    Args:
        owner: the incarnation that waits for tasks which are queued as children.
        presence: says that `owner` is alive, from the first child on; None if somebody
            else says so.
        state_ttl: seconds for which the state of a task that was not queued is kept.
        clock: seconds since the epoch.
        filter_extra: see `decode`.
    """

    def __init__(
        self,
        link: Link,
        store: StateStore,
        state: StateClient,
        *,
        owner: str,
        presence: Presence | None,
        state_ttl: float,
        clock: Callable[[], float],
        filter_extra: FilterExtra | None = None,
    ) -> None:
        self._link = link
        self._state = state
        self._ends = EndWatch(store, state)
        self._owner = owner
        self._presence = presence
        """None as soon as it is there."""
        self._appearing = anyio.Lock()
        self._services: TaskGroup
        self._state_ttl = state_ttl
        self._clock = clock
        self._filter_extra = filter_extra

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None, None]:
        """Listen for the ends of tasks, for as long as the block."""
        async with self._ends.open(), anyio.create_task_group() as self._services:
            try:
                yield
            finally:
                self._services.cancel_scope.cancel()

    async def be_present(self) -> str:
        """See to it that this producer counts as alive; return its incarnation.

        Tasks that somebody waits for are canceled when nobody does any more.
        """
        async with self._appearing:
            if self._presence is not None:
                await self._services.start(self._presence.run)
                self._presence = None
        return self._owner

    async def enqueue(self, message: Message, keep_unqueued: bool = False) -> None:
        """Write the state of a new task and publish its message.

        A task whose id is known already is left as it is, and published again only if it
        is not known to be in the queue.

        Args:
            keep_unqueued: if it certainly is not in the queue, say so in its state instead
                of taking that back.

        Raises:
            StateStoreError: nothing was queued.
            PublishFailed: `maybe` says whether it was queued; calling again is safe.
        """
        nonce, now = secrets.token_hex(8), self._clock()
        created = await self._state.ask(
            Create(
                task_id=message.task_id,
                name=message.func,
                job=message.body.decode(),
                nonce=nonce,
                now=now,
                ttl=UNCONFIRMED_TTL,
                due=message.due,
                deadline=message.deadline,
                timeout=message.timeout,
                parent=message.parent,
            )
        )
        if not created.owed:
            return
        try:
            await self._link.publish(wait_for(message, self._link.topology, now=now))
        except PublishFailed as error:
            if created.new and not error.maybe:
                kept = self._unqueued(error) if keep_unqueued else None
                await self._take_back(message, nonce, kept)
            raise
        await self._confirm(message)

    async def retry(self, task_id: str) -> bool:
        """Start an errored task anew; False if it is not errored.

        Raises:
            TaskNotFound: nothing is known about it.
            PublishFailed, StateStoreError: it may not have been queued; calling again is safe.
        """
        record, now = await self.read(task_id), self._clock()
        call = decode(record.job.encode(), filter_extra=self._filter_extra)
        call = replace(call, deadline=record.deadline, timeout=record.timeout, parent=record.parent)
        message = as_new(call, now=now)
        reopen = reopening(message, now=now)
        if not (await self._state.ask(reopen)).owed:
            return False
        try:
            await self._link.publish(wait_for(message, self._link.topology, now=now))
        except PublishFailed as error:
            if not error.maybe:
                await self._take_back(message, reopen.nonce, record.error)
            raise
        await self._confirm(message)
        return True

    async def read(self, task_id: str) -> TaskRecord:
        """Return the state of a task.

        Raises:
            TaskNotFound: nothing is known about it.
        """
        return _known(task_id, await self._state.ask(Read(task_id=task_id)))

    async def events(self, question: ReadEvents) -> Sequence[LogEntry]:
        """Return entries of a task's event log."""
        return await self._state.ask(question)

    async def cancel(self, task_id: str, reason: CancelReason) -> bool:
        """Cancel a task, or ask its worker to; False if it has ended.

        Raises:
            TaskNotFound: nothing is known about it.
        """
        answer = await self._state.ask(
            RequestCancel(task_id=task_id, reason=reason, now=self._clock())
        )
        if answer == UNKNOWN:
            _known(task_id, None)
        return answer in (CANCELED_NOW, REQUESTED)

    async def wait(self, task_id: str) -> TaskRecord:
        """Return the state of a task when it has ended.

        Raises:
            TaskNotFound: nothing is known about it, or not any more.
        """
        return _known(task_id, await self._ends.wait(task_id))

    async def list(
        self, prefix: str, status: TaskStatus | None, after: str | None, limit: int
    ) -> Sequence[TaskRecord]:
        """Return the states of tasks in the order of their ids."""
        question = ListTasks(prefix=prefix, status=status, after=after, limit=limit)
        ids = await self._state.ask(question)
        records = await self._state.ask_all([Read(task_id=task_id) for task_id in ids])
        for record in records:
            if isinstance(record, StateStoreError):
                raise record
        return [record for record in records if isinstance(record, TaskRecord)]

    def _unqueued(self, error: PublishFailed) -> str:
        return error_text(describe(error, Reason.NOT_QUEUED), attempt=1, worker=self._owner)

    async def _take_back(self, message: Message, nonce: str, error: str | None) -> None:
        """Forget a task that certainly is not in the queue; or, with an error, say so."""
        revoke = Revoke(
            task_id=message.task_id,
            nonce=nonce,
            now=self._clock(),
            error=error,
            ttl=self._state_ttl,
        )
        try:
            await self._state.ask(revoke)
        except StateStoreError as away:
            log.warning(
                "task %s was not queued, but its state says scheduled for up to %g s: %s",
                message.task_id,
                UNCONFIRMED_TTL,
                away,
            )

    async def _confirm(self, message: Message) -> None:
        operation = Discharge(
            task_id=message.task_id,
            owed=Owed.PUBLISH,
            attempt=message.attempt,
            ttl=None,
            now=self._clock(),
        )
        try:
            await self._state.ask(operation)
        except StateStoreError as error:
            # It is in the queue; what is missing is only written down by the claim.
            log.warning("task %s is queued, its state could not say so: %s", message.task_id, error)


def _known(task_id: str, record: TaskRecord | None) -> TaskRecord:
    if record is None:
        raise TaskNotFound(
            f"no task {task_id!r} is known: it was never queued, or its state has expired"
        )
    return record


class EndWatch:
    """Waits for the ends of tasks: announcements, and a look now and then."""

    def __init__(self, store: StateStore, state: StateClient) -> None:
        self._store = store
        self._state = state
        self._listener: Listener
        self._topics: dict[str, _Topic] = {}
        self._tasks: TaskGroup

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None, None]:
        async with self._store.listen() as self._listener, anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self._hear)
            try:
                yield
            finally:
                self._tasks.cancel_scope.cancel()

    async def wait(self, task_id: str) -> TaskRecord | None:
        """Return the record of a task when it has ended; None if there is none."""
        topic = self._topics.get(task_id)
        if topic is None:
            topic = self._topics[task_id] = _Topic()
            self._tasks.start_soon(self._subscribe, task_id, topic)
        ended = anyio.Event()
        topic.waiting.add(ended)
        try:
            # Before the first look, so that no end is in between.
            with anyio.move_on_after(FIRST_LOOK):
                await topic.subscribed.wait()
            return await self._look_until_ended(task_id, ended)
        finally:
            topic.waiting.discard(ended)
            if not topic.waiting:
                topic.abandoned.set()

    async def _subscribe(self, task_id: str, topic: _Topic) -> None:
        """Be subscribed for as long as somebody waits, in one task, hence in good order."""
        while topic.waiting:
            topic.abandoned = anyio.Event()
            await self._listener.subscribe(f"ended:{task_id}")
            topic.subscribed.set()
            if topic.waiting:
                await topic.abandoned.wait()
            topic.subscribed = anyio.Event()
            await self._listener.unsubscribe(f"ended:{task_id}")
        del self._topics[task_id]

    async def _look_until_ended(self, task_id: str, ended: anyio.Event) -> TaskRecord | None:
        pause = FIRST_LOOK
        while True:
            record = await self._state.ask(Read(task_id=task_id))
            if record is None or record.status.ended:
                return record
            with anyio.move_on_after(pause):
                await ended.wait()
            pause = min(pause * 2, LONGEST_LOOK)

    async def _hear(self) -> None:
        async for name, _ in self._listener:
            topic = self._topics.get(name.removeprefix("ended:"))
            for event in topic.waiting if topic is not None else ():
                event.set()


class _Topic:
    """The end of one task, and those who wait for it."""

    def __init__(self) -> None:
        self.waiting: set[anyio.Event] = set()
        self.subscribed = anyio.Event()
        self.abandoned = anyio.Event()
