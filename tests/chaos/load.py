"""A producer that goes on, whatever happens, and says what it has got accepted."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

import anyio

from amqp_tasks import TaskApp
from amqp_tasks.exceptions import AmqpTasksError, PublishFailed, StateStoreError

from . import shop
from .fleet import Links, Servers
from .oracle import Oracle

__all__ = ["Load"]

AT_ONCE: Final = 50
"""Calls of `add_task` under way at a time."""


class Load:
    """Queues tasks in a thread, at a steady rate, through links of its own.

    A call that fails is repeated with the same task id until it is accepted.

    Args:
        rate: tasks per second.
        failing: the share of tasks that fail at first.
        longest: seconds that the longest tasks take; most take far less.

    Attributes:
        accepted: when each task was accepted, and when the call of `add_task` that did
            it had begun, by the task's id.
        errors: how often calls have failed, by what they said.
    """

    def __init__(
        self,
        servers: Servers,
        oracle: Oracle,
        *,
        rate: float,
        failing: float,
        longest: float,
        seed: int,
        backend: str = "asyncio",
    ) -> None:
        self.links = Links(servers)
        self.accepted: dict[str, tuple[float, float]] = {}
        self.errors: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self._settings: dict[str, Any] = {
            **servers.settings(self.links),
            "heartbeat": 2,
            "connect_timeout": 3,
            "publish_timeout": 5,
            "state_timeout": 2,
            "reconnect_timeout": 60,
        }
        self._path = str(oracle.path)
        self._rate = rate
        self._failing = failing
        self._longest = longest
        self._backend = backend
        self._random = random.Random(f"load {seed}")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load")

    @contextmanager
    def running(self) -> Generator[Load, None, None]:
        """Queue tasks for as long as the block, or until `finish`."""
        with self.links.running():
            self._thread.start()
            try:
                yield self
            finally:
                self._stop.set()
                self._thread.join(60)
                if self._thread.is_alive():
                    raise AssertionError("the producer does not come to an end")

    def finish(self, timeout: float = 90) -> None:
        """Begin no more tasks, and return when all that were begun are accepted."""
        self._stop.set()
        self._thread.join(timeout)
        if self.failure is not None:
            raise AssertionError("the producer has failed") from self.failure
        if self._thread.is_alive():
            raise AssertionError(f"the producer's calls are not accepted: {self.errors}")

    def first_accepted(self, since: float) -> float | None:
        """Return when a task was first accepted whose call had begun after `since`."""
        later = [at for at, begun in list(self.accepted.values()) if begun >= since]
        return min(later, default=None)

    def _run(self) -> None:
        try:
            anyio.run(self._keep_connected, backend=self._backend)
        except BaseException as error:
            self.failure = error

    async def _keep_connected(self) -> None:
        """Queue tasks; connect again if the client has given up."""
        pending: list[tuple[str, Any, float]] = []
        while not self._stop.is_set() or pending:
            app = TaskApp(**self._settings)
            try:
                async with app.connect():
                    await self._queue_tasks(app, pending)
            except AmqpTasksError as error:
                self._count(error)
                await anyio.sleep(0.2)

    async def _queue_tasks(self, app: TaskApp, pending: list[tuple[str, Any, float]]) -> None:
        slots = anyio.CapacityLimiter(AT_ONCE)
        async with anyio.create_task_group() as tasks:
            again, pending[:] = pending[:], []
            for call in again:
                tasks.start_soon(self._queue, app, call, pending, slots)
            began, count = anyio.current_time(), 0
            while not self._stop.is_set():
                due = int((anyio.current_time() - began) * self._rate)
                if slots.borrowed_tokens == AT_ONCE:
                    count = due  # what could not be queued in time is not made up for
                for _ in range(due - count):
                    tasks.start_soon(self._queue, app, self._next_call(), pending, slots)
                count = max(count, due)
                await anyio.sleep(0.02)

    async def _queue(
        self,
        app: TaskApp,
        call: tuple[str, Any, float],
        pending: list[tuple[str, Any, float]],
        slots: anyio.CapacityLimiter,
    ) -> None:
        task_id, task, seconds = call
        pending.append(call)
        while True:
            try:
                async with slots:
                    begun = time.time()
                    await app.add_task(task, self._path, seconds, task_id=task_id)
                break
            except (PublishFailed, StateStoreError) as error:
                self._count(error)
                await anyio.sleep(0.2)
        pending.remove(call)
        self.accepted[task_id] = (time.time(), begun)

    def _next_call(self) -> tuple[str, Any, float]:
        task_id = f"t{len(self.accepted):06}-{self._random.getrandbits(48):012x}"
        if self._random.random() < self._failing:
            return task_id, shop.fails_at_first, 0.02
        number = self._random.random()
        if number < 0.02:
            return task_id, shop.work, self._random.uniform(0.6, 1) * self._longest
        if number < 0.06:
            return task_id, shop.work_in_thread, self._random.uniform(0, 0.2)
        return task_id, shop.work, self._random.choice((0.0, 0.0, 0.05, 0.3))

    def _count(self, error: AmqpTasksError) -> None:
        maybe = f" (maybe={error.maybe})" if isinstance(error, PublishFailed) else ""
        self.errors[f"{type(error).__name__}{maybe}"] += 1
