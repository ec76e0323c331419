"""A program of its own, on a line of its own: a worker, or a producer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import anyio

from amqp_tasks import AmqpTasksError, BrokerError, RetryPolicy, StateStoreError, TaskApp
from amqp_tasks.settings import Settings, load_settings

from ..harness import now
from .acts import OutOfLuck, act
from .ledger import MAX_CRASHES, MAX_RETRIES, Ledger
from .lines import Line, LineBroker, LineStore, Network

__all__ = ["QUEUE", "Program"]

QUEUE: Final = "m"
PRESENCE_TTL: Final = 6.0
TROUBLE_LASTS: Final = 2 * PRESENCE_TTL
"""Seconds after a fault for which it may be the reason that a presence is gone."""
SETTINGS: Final[dict[str, Any]] = {
    "broker_url": "memory://",
    "state_url": "memory://",
    "queue": QUEUE,
    "max_running_tasks": 3,
    "max_crashes": MAX_CRASHES,
    "presence_ttl": PRESENCE_TTL,
    "publish_timeout": 3,
    "cancel_grace": 1,
    "shutdown_grace": 3,
    "reconnect_timeout": 100,
    "guard_after": 3,
}
RETRY: Final = RetryPolicy(
    max_retries=MAX_RETRIES,
    delay=1.0,
    backoff=3.0,
    jitter=0.5,
    retry_on=(OutOfLuck, AmqpTasksError),
)


@cache
def _settings() -> Settings:
    return load_settings(SETTINGS)


class Program:
    """A program with an app of its own: a worker, or a producer. `run` is its life."""

    def __init__(self, name: str, network: Network, ledger: Ledger) -> None:
        self.name = name
        self.line = Line(network, self.crash, self.trouble)
        self.app = TaskApp(clock=now)
        self.app.__dict__["_settings"] = _settings()  # reading them takes longer than all else
        self.app.__dict__["_memory"] = (LineBroker(self.line), LineStore(self.line))
        self.task = self.app.task(retry=RETRY)(act)
        self.incarnation = ""
        self.has_left = False
        self.started, self.ended = anyio.Event(), anyio.Event()
        self._ledger = ledger
        self._scope = anyio.CancelScope()
        self._stop: Callable[[float], None] | None = None
        self._is_stopping = False
        self._trouble_at = -TROUBLE_LASTS

    @property
    def is_dead(self) -> bool:
        return self.line.is_dead

    @property
    def is_well(self) -> bool:
        """Whether it is there, and was not told to leave."""
        return not (self.is_dead or self.has_left or self._is_stopping)

    def was_in_trouble(self, since: float) -> bool:
        return self._trouble_at >= min(since, anyio.current_time()) - TROUBLE_LASTS

    def trouble(self) -> None:
        """A fault befalls its presence."""
        self._trouble_at = anyio.current_time()

    def crash(self) -> None:
        """Die: nothing that it does from now on is seen by anybody."""
        if self.is_dead or self.has_left:
            return
        self._ledger.note(f"{self.name} crashes")
        self.line.is_dead = True
        self.line.drop_sessions()
        self._scope.cancel()  # only so that it is out of the way one day

    def stop(self, grace: float) -> None:
        self._is_stopping = True
        self._ledger.note(f"{self.name} is told to stop within {grace} s")
        if self._stop is None:
            self._scope.cancel()
        else:
            self._stop(grace)

    async def run(self, *, is_worker: bool) -> None:
        try:
            with self._scope:
                await (self._work() if is_worker else self._produce())
        except (BrokerError, StateStoreError) as error:
            self._ledger.note(f"{self.name} gives up: {error}")
            is_excused = self.is_dead or self._is_stopping or not self.line.reaches_broker
            is_excused |= self.was_in_trouble(anyio.current_time()) or not self.started.is_set()
            self._ledger.expect(is_excused, f"{self.name} gives up although it is well: {error}")
        else:
            self._ledger.expect(
                self.is_dead or self._is_stopping, f"{self.name} leaves without being told"
            )
        finally:
            if not self.is_dead:
                self._ledger.note(f"{self.name} has left")
            self.has_left = True
            self.started.set()
            self.ended.set()

    async def _work(self) -> None:
        async with self.app.worker() as worker:
            self.incarnation, self._stop = worker.id, worker.stop
            self._ledger.note(f"{self.name} is {worker.id}")
            self.started.set()
            await worker.wait_ended()

    async def _produce(self) -> None:
        async with self.app.connect():
            self.started.set()
            await anyio.sleep_forever()
