"""What is done to the programs, and how it all comes to rest."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Protocol

import anyio
import anyio.lowlevel
import trio

from amqp_tasks import (
    AmqpTasksError,
    Attempt,
    NotConnected,
    PublishFailed,
    StateStoreError,
    TaskHandle,
    TaskNotFound,
)
from amqp_tasks.core.message import decode
from amqp_tasks.drivers.memory import MemoryBroker

from ..harness import now
from .acts import set_stage
from .ledger import Ledger
from .lines import InOrder, Network, SharedStore, Trap
from .programs import QUEUE, Program

__all__ = ["Limits", "Move", "World", "play"]

PATIENCE: Final = 1_800
"""Virtual seconds after the last fault in which everything comes to its end."""
QUIET: Final = 20
"""Seconds without anything to do, after which nothing comes late any more."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a task waits, and how long it may take; seconds."""

    countdown: float | None = None
    timeout: float | None = None
    deadline: float | None = None

    def options(self, task_id: str) -> dict[str, Any]:
        at = None
        if self.deadline is not None:
            at = dt.datetime.fromtimestamp(now() + self.deadline, dt.UTC)
        return {
            "task_id": task_id,
            "countdown": self.countdown,
            "timeout": self.timeout,
            "deadline": at,
        }


class World:
    """Everything there is. Its public methods but `settle_down` are the moves."""

    def __init__(self, tasks: anyio.abc.TaskGroup) -> None:
        self.ledger = Ledger(anyio.current_time, self._host)
        self._network = Network(MemoryBroker(now), SharedStore(now, self.ledger.changed), tasks)
        # Sets of objects have another order in every run.
        self._network.broker.__dict__["_sessions"] = InOrder()
        self._network.store.__dict__["_listeners"] = InOrder()
        self._tasks = tasks
        self._programs: list[Program] = []
        self._producer: Program | None = None
        self._calls = 0
        """Of producers, that go on."""
        self._staff = 1

    # --------------------------------------------------------------------- moves

    async def advance(self, ticks: int, seconds: float) -> None:
        """Let time pass, or only let everybody run."""
        for _ in range(ticks):
            await anyio.lowlevel.checkpoint()
        if seconds:
            await anyio.sleep(seconds)

    def submit(self, kind: str, seconds: float, limits: Limits) -> None:
        """Somebody queues a task, and does not give up before it is told that it is queued."""
        task_id = f"t{len(self.ledger.tasks) + 1}"
        self.ledger.submitted(task_id, kind, has_limit=bool(limits.timeout or limits.deadline))
        self._calls += 1
        self._tasks.start_soon(self._submit, limits.options(task_id), kind, seconds)

    def fill_up(self, count: int = 0) -> None:
        """Start as many workers as are missing, of those that there shall be from now on."""
        self._staff = count or self._staff
        for _ in range(self._staff - sum(one.is_well for one in self._workers)):
            self.start_worker()

    def start_worker(self) -> None:
        self._start(is_worker=True)

    def crash(self, pick: int) -> None:
        """A worker is killed."""
        if program := self._pick(pick):
            program.crash()

    def trap(self, pick: int, trap: Trap) -> None:
        """One of the next calls of a program, to whichever server, goes wrong."""
        if program := self._pick(pick, producer_too=True):
            self.ledger.note(f"trap for {program.name}: {trap}")
            program.line.traps.append(replace(trap))  # it counts

    def stop(self, pick: int, grace: float) -> None:
        """A worker is told to stop."""
        if program := self._pick(pick):
            program.stop(grace)

    def redeliver(self, pick: int) -> None:
        """A worker's connection to the broker is cut; it can connect again."""
        if program := self._pick(pick, producer_too=True):
            self.ledger.note(f"{program.name} loses its connection")
            program.line.drop_sessions()

    def expire_presence(self, pick: int) -> None:
        """A worker counts as dead, although it lives."""
        if program := self._pick(pick):
            self.ledger.note(f"the presence of {program.name} expires")
            program.trouble()
            self._network.store.forget(program.incarnation)

    async def isolate(self, pick: int, seconds: float) -> None:
        """A worker reaches no server for longer than it counts as alive, and then again."""
        if program := self._pick(pick):
            self.ledger.note(f"{program.name} is isolated for {seconds} s")
            program.line.broker_is_up = program.line.store_is_up = False
            program.line.drop_sessions()
            await anyio.sleep(seconds)
            program.line.heal()

    def part(self, pick: int, *, broker: bool, store: bool) -> None:
        """A program does not reach a server any more."""
        if program := self._pick(pick, producer_too=True):
            self.ledger.note(f"{program.name} is cut off: {broker=} {store=}")
            program.line.broker_is_up &= not broker
            program.line.store_is_up &= not store
            if broker:
                program.line.drop_sessions()

    def part_all(self, *, broker: bool, store: bool) -> None:
        """A server is away for everybody."""
        self.ledger.note(f"servers are away: {broker=} {store=}")
        self._network.broker_is_up &= not broker
        self._network.store_is_up &= not store
        if broker:
            self._network.broker.drop_sessions()

    def deafen(self, pick: int) -> None:
        """Announcements do not reach a worker any more, without a word, for ever."""
        if program := self._pick(pick):
            program.line.hears = False

    def heal(self) -> None:
        """All lines and servers are well again."""
        self.ledger.note("all is healed")
        self._network.broker_is_up = self._network.store_is_up = True
        for program in self._programs:
            program.line.heal()

    def cancel(self, pick: int) -> None:
        """A user cancels a task."""
        ids = list(self.ledger.tasks)
        if ids:
            self._start_cancelling(ids[pick % len(ids)])

    # ------------------------------------------------------- what tasks see (`Stage`)

    def entered(self, attempt: Attempt) -> Callable[[BaseException | None], None]:
        return self.ledger.entered(attempt)

    def kill(self, worker: str) -> None:
        self._host(worker).crash()

    async def queue(self, worker: str, task_id: str, kind: str, seconds: float) -> TaskHandle[str]:
        self.ledger.submitted(task_id, kind)
        program = self._host(worker)
        handle = await program.task.options(task_id=task_id, inherit_deadline=False)(kind, seconds)
        if not program.is_dead:
            self.ledger.accepted(task_id)
        return handle

    # ----------------------------------------------------------------------- rest

    async def settle_down(self) -> None:
        """Let the faults cease and everything come to its end, and judge."""
        self.heal()
        self.ledger.note("faults cease")
        quiet = 0
        for second in range(PATIENCE):
            quiet = quiet + 1 if self._is_at_rest() else 0
            if quiet > QUIET:
                break
            if second % 10 == 0:
                self._cancel_what_hangs()
            self.fill_up()
            await anyio.sleep(1)
        self._judge()
        for program in self._programs:
            if not program.has_left:
                program.stop(0)
        with anyio.move_on_after(60):
            for program in self._programs:
                await program.ended.wait()
        still_there = [program.name for program in self._programs if not program.ended.is_set()]
        self.ledger.expect(not still_there, f"told to stop a minute ago, and there: {still_there}")

    def _cancel_what_hangs(self) -> None:
        for task in self.ledger.tasks.values():
            record = self._network.store.record(task.task_id)
            if task.kind == "hang" and record is not None and not record.status.ended:
                self._start_cancelling(task.task_id)

    def _is_at_rest(self) -> bool:
        return not (self._calls or self._left_in_queues()) and all(
            record is None or record.status.ended or record.expires_at is not None
            for record in map(self._network.store.record, self.ledger.tasks)
        )

    def _left_in_queues(self) -> dict[str, int]:
        """How many messages there are in which queue, without letters and beacons."""
        broker = self._network.broker
        depths = {
            name: broker.depth(name)
            for name in list(broker._queues)
            if name != f"{QUEUE}-error" and "beacon" not in name
        }
        unacked = sum(
            len(consumer._unacked)
            for session in broker._sessions
            for consumer in session._consumers
            if consumer.queue == QUEUE
        )
        return {name: count for name, count in {**depths, "unacked": unacked}.items() if count}

    def _judge(self) -> None:
        broker = self._network.broker
        letters = []
        if f"{QUEUE}-error" in broker._queues:
            letters = [decode(*letter).task_id for letter in broker.messages(f"{QUEUE}-error")]
        self.ledger.judge(self._network.store._records, letters, self._left_in_queues())

    # --------------------------------------------------------------------- insides

    @property
    def _workers(self) -> list[Program]:
        return [program for program in self._programs if program.name.startswith("w")]

    def _host(self, worker: str) -> Program:
        return next(program for program in self._programs if program.incarnation == worker)

    def _pick(self, pick: int, *, producer_too: bool = False) -> Program | None:
        """Choose among those that are there and have started."""
        choices = [one for one in self._workers if one.is_well and one.incarnation]
        if producer_too and self._producer is not None and self._producer.is_well:
            choices.append(self._producer)
        return choices[pick % len(choices)] if choices else None

    def _start(self, *, is_worker: bool) -> Program:
        name = f"{'w' if is_worker else 'p'}{len(self._programs) + 1}"
        program = Program(name, self._network, self.ledger)
        self._programs.append(program)
        self._tasks.start_soon(partial(program.run, is_worker=is_worker))
        return program

    async def _connected(self) -> Program:
        """Return a producer that is connected, sooner or later."""
        while True:
            producer = self._producer
            if producer is None or not producer.is_well:
                producer = self._producer = self._start(is_worker=False)
            await producer.started.wait()
            if producer.is_well:
                return producer
            await anyio.sleep(0.5)

    async def _submit(self, options: dict[str, Any], kind: str, seconds: float) -> None:
        task_id = options["task_id"]
        is_accepted = False
        while not is_accepted:
            producer = await self._connected()
            try:
                await producer.task.options(**options)(kind, seconds)
                is_accepted = True
            except (PublishFailed, StateStoreError, NotConnected) as error:
                self.ledger.note(f"{task_id} is not accepted: {error}")
                await anyio.sleep(0.5)
            if producer.is_dead:
                break  # and who called died with it
        else:
            self.ledger.accepted(task_id)
        self._calls -= 1

    def _start_cancelling(self, task_id: str) -> None:
        self._calls += 1
        self._tasks.start_soon(self._cancel, task_id)

    async def _cancel(self, task_id: str) -> None:
        while True:
            producer = await self._connected()
            try:
                answer = await producer.app.handle(task_id).cancel()
            except TaskNotFound:
                break
            except AmqpTasksError:
                await anyio.sleep(0.5)
            else:
                self.ledger.note(f"{task_id} shall be cancelled: {answer}")
                break
        self._calls -= 1


class Move(Protocol):
    """Something that is done to a world."""

    def __call__(self, world: World, /) -> Awaitable[None] | None: ...


def play(moves: Sequence[Move], seed: int, backend: tuple[str, dict[str, Any]]) -> Ledger:
    """Run a world of its own through these moves and to its rest; return what happened."""
    random.seed(seed)
    _make_trio_repeatable(seed)
    name, options = backend
    return anyio.run(_play, moves, backend=name, backend_options=options)


async def _play(moves: Sequence[Move]) -> Ledger:
    async with anyio.create_task_group() as tasks:
        world = World(tasks)
        set_stage(world)
        for move in moves:
            result = move(world)
            if result is not None:
                await result
        await world.settle_down()
        tasks.cancel_scope.cancel()
    return world.ledger


def _make_trio_repeatable(seed: int) -> None:
    """Have Trio's scheduler draw its order from a seed, as it does for its own tests."""
    run = trio._core._run
    vars(run)["_ALLOW_DETERMINISTIC_SCHEDULING"] = True
    run._r.seed(seed)
