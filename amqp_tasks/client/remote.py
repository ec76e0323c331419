"""A task group whose children run anywhere."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, ParamSpec, Protocol, TypeVar
from uuid import uuid4

import anyio
from anyio.abc import TaskGroup

from ..core.outcome import CancelReason
from ..exceptions import AmqpTasksError, TaskNotFound
from ..runtime.attempt import attempt_or_none
from .client import Client
from .handle import TaskHandle
from .task import Task

__all__ = ["RemoteTaskGroup", "open_remote_task_group"]

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class Queue(Protocol):
    """Queues a child: with its id, and the incarnation that waits for it."""

    async def __call__(
        self,
        task: Task[Any, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        task_id: str,
        parent_owner: str,
    ) -> TaskHandle[Any]: ...


class RemoteTaskGroup:
    """Children that are waited for, and cancelled together; see `TaskApp.remote_task_group`."""

    def __init__(self, client: Client, queue: Queue, follow: TaskGroup, owner: str) -> None:
        self._client = client
        self._queue = queue
        self._followers = follow
        self._owner = owner
        self._open: set[str] = set()
        self._uncertain: set[str] = set()
        """Those whose queueing was not reported as done; nobody waits for them."""
        self._all_done = anyio.Event()
        self._is_closed = False

    async def start(self, task: Task[P, R], /, *args: P.args, **kwargs: P.kwargs) -> TaskHandle[R]:
        """Queue a call as a child of this group.

        Raises:
            AmqpTasksError: the group has ended.
            ArgumentsError, PublishFailed, StateStoreError: see `Task`.
        """
        if self._is_closed:
            raise AmqpTasksError("this remote_task_group has ended; it can start no more tasks")
        # The id is known before anything is sent: a child whose queueing is cancelled
        # half-way can be cancelled as well.
        task_id = self._task_id(task)
        self._uncertain.add(task_id)
        handle: TaskHandle[R] = await self._queue(
            task, args, kwargs, task_id=task_id, parent_owner=self._owner
        )
        self._uncertain.discard(task_id)
        self._open.add(task_id)
        self._followers.start_soon(self._follow, handle)
        return handle

    async def wait(self) -> None:
        """Return when all children have ended. One that fails cancels this."""
        while self._open:
            self._all_done = anyio.Event()
            await self._all_done.wait()

    async def close(self, grace: float) -> None:
        """Cancel the children that have not ended; wait for them, `grace` seconds at most."""
        self._is_closed = True
        with anyio.move_on_after(grace, shield=True):
            async with anyio.create_task_group() as tasks:
                for task_id in self._open | self._uncertain:
                    tasks.start_soon(self._end, task_id)

    async def _follow(self, handle: TaskHandle[Any]) -> None:
        await handle.result_beside()
        self._open.discard(handle.task_id)
        if not self._open:
            self._all_done.set()

    async def _end(self, task_id: str) -> None:
        try:
            if await self._client.cancel(task_id, CancelReason.PARENT):
                await self._client.wait(task_id)
        except TaskNotFound:
            pass  # it was never queued, or has ended long ago
        except AmqpTasksError as error:
            log.warning("task %s could not be cancelled with its group: %s", task_id, error)

    @staticmethod
    def _task_id(task: Task[Any, Any]) -> str:
        return task.call_options.task_id or uuid4().hex


@asynccontextmanager
async def open_remote_task_group(
    client: Client, queue: Queue, *, grace: float
) -> AsyncGenerator[RemoteTaskGroup, None]:
    """Open a group of children that run on any worker.

    Args:
        grace: seconds to wait, at the end, for children that were cancelled.
    """
    owner = await client.be_present()
    attempt = attempt_or_none()
    async with AsyncExitStack() as at_the_end, anyio.create_task_group() as followers:
        group = RemoteTaskGroup(client, queue, followers, owner)
        at_the_end.push_async_callback(group.close, grace)
        yield group
        if attempt is None:
            await group.wait()
        else:
            async with attempt.without_slot():
                await group.wait()
