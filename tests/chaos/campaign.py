"""Injects faults under load, measures how they are overcome, and counts in the end."""

from __future__ import annotations

import asyncio
import random
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiormq
import anyio
from aiormq.exceptions import ChannelNotFoundEntity

from amqp_tasks import TaskApp

from .faults import Fault, Hit, World
from .fleet import Fleet, Servers
from .load import Load
from .oracle import Ended, Oracle, Tally, tally

__all__ = ["WORKER_ENV", "Campaign", "Observation", "explain", "queue_sizes", "story", "table"]

WORKER_ENV: Final = {
    "AMQP_TASKS_HEARTBEAT": "2",
    "AMQP_TASKS_BEACON_TTL": "1",
    "AMQP_TASKS_CONNECT_TIMEOUT": "3",
    "AMQP_TASKS_PUBLISH_TIMEOUT": "5",
    "AMQP_TASKS_STATE_TIMEOUT": "2",
    "AMQP_TASKS_PRESENCE_TTL": "3",
    "AMQP_TASKS_RECONNECT_TIMEOUT": "120",
    "AMQP_TASKS_SHUTDOWN_GRACE": "0.3",
    "AMQP_TASKS_CANCEL_POLL_INTERVAL": "0.5",
    "AMQP_TASKS_MAX_RUNNING_TASKS": "40",
    # Who is innocent is another test's business: here workers are killed for fun.
    "AMQP_TASKS_MAX_CRASHES": "1000",
}

OVERCOME: Final = 60.0
"""Seconds within which a fault has to be overcome after it was lifted."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What was seen of one fault. Seconds; None for what was not seen."""

    fault: str
    began: float
    """After the campaign had."""
    held: float
    """From injecting to lifting it."""
    noticed: float | None
    """From injecting it until the first of its victims said in its log that something is
    wrong. None if nobody had to."""
    recovered: float | None
    """From lifting it until each victim had begun and ended an attempt, or had a new task
    accepted; if a worker is gone, from its end until all its tasks had begun elsewhere."""


@dataclass(frozen=True, slots=True)
class _Injection:
    """A fault that was lifted again, and when, in seconds since the epoch."""

    hit: Hit
    orphans: dict[str, int]
    """Tasks that ran on a worker which is gone, and their fences."""
    began: float
    injected: float
    lifted: float


class Campaign:
    """Some workers, some load, and faults."""

    def __init__(self, servers: Servers, fleet: Fleet, load: Load, oracle: Oracle) -> None:
        self.servers = servers
        self.fleet = fleet
        self.load = load
        self.oracle = oracle
        self.observations: list[Observation] = []
        self.states: dict[str, Ended] = {}
        """At the end."""
        self._began = time.time()
        self._world = World(servers, fleet, load)

    @classmethod
    @contextmanager
    def begun(
        cls,
        servers: Servers,
        folder: Path,
        *,
        workers: int = 3,
        rate: float = 100.0,
        failing: float = 0.04,
        longest: float = 5.0,
        seed: int = 0,
        **env: str,
    ) -> Generator[Campaign, None, None]:
        """Run workers and load for as long as the block.

        Args:
            rate: tasks per second.
            failing: the share of tasks that fail at first.
            longest: seconds that the longest tasks take; most take far less.
        """
        oracle = Oracle(folder / "oracle")
        load = Load(servers, oracle, rate=rate, failing=failing, longest=longest, seed=seed)
        started = Fleet.started(servers, folder, workers, {**WORKER_ENV, **env})
        with started as fleet, load.running():
            campaign = cls(servers, fleet, load, oracle)
            campaign.wait_until_all_work()
            yield campaign

    def wait_until_all_work(self) -> None:
        """Return when each worker has done something."""
        began = time.time()
        self._wait_until_overcome("the start", Hit(self.fleet.posts, producer=True), began)

    # ---------------------------------------------------------------------- faults

    def inject(self, fault: Fault, rng: random.Random, hold: float | None = None) -> None:
        """Inject a fault and lift it after `hold` seconds."""
        self._inject(fault, rng, hold)

    def overcome(self, fault: Fault, rng: random.Random) -> None:
        """Inject a fault, lift it, wait until it is overcome, and note how long that took."""
        injection = self._inject(fault, rng, None)
        hit, began, lifted = injection.hit, injection.began, injection.lifted
        recovered = self._wait_until_overcome(fault.name, hit, lifted) - lifted
        if hit.gone is not None:
            taken_over = self._wait_until_taken_over(fault.name, injection)
            recovered = max(taken_over - injection.injected, 0.0)
        # Who is gone says nothing any more; others do.
        witnesses = hit.posts if hit.gone is None else self.fleet.posts
        notices = [at for post in witnesses if (at := post.noticed(began, fault.part)) is not None]
        self.observations.append(
            Observation(
                fault.name,
                began=began - self._began,
                held=lifted - injection.injected,
                noticed=min(notices) - began if notices else None,
                recovered=recovered,
            )
        )

    def _inject(self, fault: Fault, rng: random.Random, hold: float | None) -> _Injection:
        seconds = rng.uniform(*fault.hold) if hold is None else hold
        began = time.time()
        with fault.apply(self._world, rng) as hit:
            injected = time.time()
            orphans = {} if hit.gone is None else self.oracle.unfinished(hit.gone)
            time.sleep(seconds)
        return _Injection(hit, orphans, began, injected, lifted=time.time())

    def inject_in_lanes(self, *lanes: Callable[[], None]) -> None:
        """Run several sequences of faults at the same time."""
        failures: list[BaseException] = []

        def run(lane: Callable[[], None]) -> None:
            try:
                lane()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=(lane,)) for lane in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def _wait_until_overcome(self, what: str, hit: Hit, since: float) -> float:
        """Return when each victim has done something from beginning to end after `since`."""

        def seen() -> dict[str, float | None]:
            seen = {
                post.name: self.oracle.first_whole_attempt(post.pid, since) for post in hit.posts
            }
            if hit.producer:
                seen["producer"] = self.load.first_accepted(since)
            return seen

        return self._wait_for_all(what, seen, since)

    def _wait_until_taken_over(self, what: str, injection: _Injection) -> float:
        """Return when all tasks of a worker that is gone have been started by others."""

        def seen() -> dict[str, float | None]:
            return self.oracle.taken_over(injection.orphans, injection.began - OVERCOME)

        return self._wait_for_all(what, seen, injection.injected)

    def _wait_for_all(
        self, what: str, look: Callable[[], dict[str, float | None]], since: float
    ) -> float:
        deadline = time.monotonic() + OVERCOME
        while True:
            times = look()
            missing = [name for name, at in times.items() if at is None]
            if not missing:
                return max((at for at in times.values() if at is not None), default=since)
            if time.monotonic() > deadline:
                logs = "\n".join(
                    f"--- {post.name}\n{post.last_words()}" for post in self.fleet.posts
                )
                raise AssertionError(
                    f"{what!r} is not overcome after {OVERCOME:g} s by {missing}\n{logs}"
                )
            self.fleet.look_after()
            time.sleep(0.05)

    # ------------------------------------------------------------------------- end

    def settle(self, timeout: float = 90) -> Tally:
        """Queue no more, wait until all is done, stop the workers, and count.

        Raises:
            AssertionError: something is wrong; says what.
        """
        wrong = self.drain(timeout)
        self.states = anyio.run(_states, self.servers)
        counted = tally(self.oracle.lines(), self.load.accepted, self.states)
        wrong |= counted.wrong()
        assert not wrong, f"{counted}\n{explain(wrong, self.oracle)}"
        return counted

    def drain(self, timeout: float = 90) -> dict[str, Any]:
        """Queue no more, wait until all is done, and stop the workers.

        Returns:
            What is wrong as far as can be seen without the state store.
        """
        self.load.finish(timeout)
        deadline = time.monotonic() + timeout
        while (missing := set(self.load.accepted) - self.oracle.ended()) or self._messages():
            if time.monotonic() > deadline:
                break
            self.fleet.look_after()
            time.sleep(0.2)
        codes = self.fleet.stop()
        # What was unacked is ready by now.
        left = self._messages() | queue_sizes(self.servers, (f"{self.servers.queue}-error",))
        wrong: dict[str, Any] = {"never ended": sorted(missing)} if missing else {}
        wrong |= {"messages left": left} if left else {}
        wrong |= {"exit codes": codes} if any(codes) else {}
        return wrong | ({"ended by themselves": self.fleet.deaths} if self.fleet.deaths else {})

    def _messages(self) -> dict[str, int]:
        queue = self.servers.queue
        names = [queue, f"{queue}-delay", *(f"{queue}-wait-{ms}" for ms in (250, 1_000, 5_000))]
        return queue_sizes(self.servers, names)


async def _states(servers: Servers) -> dict[str, Ended]:
    found: dict[str, Ended] = {}
    app = TaskApp(**servers.settings())
    async with app.connect():
        last: str | None = None
        while page := await app.list_tasks(after=last, limit=500):
            for state in page:
                fence = state.result if isinstance(state.result, int) else None
                found[state.task_id] = Ended(str(state.status), fence, state.attempt)
            last = page[-1].task_id
    return found


def queue_sizes(servers: Servers, names: Iterable[str]) -> dict[str, int]:
    """Return those of the queues that have messages which are ready, and how many."""

    async def ask() -> dict[str, int]:
        found: dict[str, int] = {}
        connection = await aiormq.connect(servers.rabbit.url)
        try:
            for name in names:
                channel = await connection.channel()
                try:
                    answer = await channel.queue_declare(name, passive=True)
                except ChannelNotFoundEntity:
                    continue  # and the channel is gone with it
                if answer.message_count:
                    found[name] = answer.message_count
                await channel.close()
        finally:
            await connection.close()
        return found

    return asyncio.run(ask())


def explain(wrong: Mapping[str, Any], oracle: Oracle) -> str:
    """Return what is wrong, with the whole story of some of the tasks."""
    text: list[str] = []
    for name, what in wrong.items():
        if not isinstance(what, list):
            text.append(f"{name}: {what}")
            continue
        text.append(f"{name}: {len(what)}")
        for item in what[:5]:
            text.append(f"  {item}")
            text.extend(f"    {line}" for line in oracle.lines() if line.task_id == item)
    return "\n".join(text)


def story(observations: Sequence[Observation]) -> str:
    """Return a line for each fault, in the order in which they were overcome."""
    return "\n".join(
        f"{one.began:6.1f} s: {one.fault}, for {one.held:.1f} s, noticed after "
        f"{_range([one.noticed])}, recovered after {_range([one.recovered])}"
        for one in observations
    )


def table(observations: Sequence[Observation]) -> str:
    """Return a table of fault classes, for people to read."""
    by_name: dict[str, list[Observation]] = defaultdict(list)
    for observation in observations:
        by_name[observation.fault].append(observation)
    rows = [f"{'fault':44} {'number':>6}  {'noticed after':>15}  {'recovered after':>15}"]
    for name, seen in sorted(by_name.items()):
        noticed = _range([one.noticed for one in seen])
        recovered = _range([one.recovered for one in seen])
        rows.append(f"{name:44} {len(seen):>6}  {noticed:>15}  {recovered:>15}")
    rows.append("(seconds; median, and the longest in brackets)")
    return "\n".join(rows)


def _range(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{statistics.median(known):.1f} ({max(known):.1f})"
