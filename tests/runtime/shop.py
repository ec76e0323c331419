"""Tasks for the tests: functions of a module, as tasks must be.

Each test registers what it needs in an app of its own: ``add = app.task(shop.add)``. What
a task does is noted in `journal`, which each test has new.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import anyio
import anyio.from_thread
from pydantic import AfterValidator, BaseModel

from amqp_tasks import MessageType, Task, TaskApp, current_attempt


class Journal:
    """What happened when, and doors at which tasks wait until the test opens them."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, float]] = []
        self._events: dict[str, anyio.Event] = {}
        self.running = 0
        self.most_running = 0
        self.app: TaskApp
        """For tasks that queue tasks."""

    def task(self, func: Callable[..., Any]) -> Task[..., Any]:
        """The task that the test has made of a function of this module."""
        found = self.app.tasks.find(f"{__name__}.{func.__name__}")
        assert isinstance(found, Task)
        return found

    def note(self, what: str) -> None:
        self.entries.append((what, anyio.current_time()))
        self.event(what).set()

    def event(self, what: str) -> anyio.Event:
        return self._events.setdefault(what, anyio.Event())

    async def wait_for(self, what: str, within: float = 60.0) -> None:
        with anyio.fail_after(within):
            await self.event(what).wait()

    def open(self, door: str) -> None:
        self.event(f"door {door}").set()

    async def wait_for_count(self, what: str, count: int, within: float = 60.0) -> None:
        with anyio.fail_after(within):
            while self.count(what) < count:
                self._events.pop(what, None)
                await self.event(what).wait()

    async def pass_through(self, door: str) -> None:
        await self.event(f"door {door}").wait()

    def times(self, what: str) -> list[float]:
        """When it happened, counted from the first time."""
        moments = [moment for name, moment in self.entries if name == what]
        return [moment - moments[0] for moment in moments]

    def count(self, what: str) -> int:
        return len(self.times(what))


journal = Journal()


# ------------------------------------------------------------------------ usual


async def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b


async def echo(value: Any) -> Any:
    journal.note("echo")
    return value


async def take_timeout(timeout: float) -> None:
    """Has a parameter that is called as an option is."""


async def nap(seconds: float, name: str = "nap") -> str:
    journal.note(f"{name} started")
    await anyio.sleep(seconds)
    journal.note(f"{name} ended")
    return name


async def wait_at(door: str) -> str:
    journal.note(f"{door} started")
    await journal.pass_through(door)
    journal.note(f"{door} ended")
    return door


async def count_running(seconds: float) -> None:
    journal.running += 1
    journal.most_running = max(journal.most_running, journal.running)
    try:
        await anyio.sleep(seconds)
    finally:
        journal.running -= 1


# ------------------------------------------------------------------------ types


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Point:
    x: int
    y: Decimal


class Order(BaseModel):
    id: UUID
    placed: dt.datetime
    points: list[Point]


async def order_back(order: Order) -> Order:
    assert type(order) is Order
    return order


async def point_back(point: Point) -> Point:
    assert type(point) is Point
    return point


async def moment_back(moment: dt.datetime) -> dt.datetime:
    assert type(moment) is dt.datetime
    return moment


async def uuid_back(value: UUID) -> UUID:
    assert type(value) is UUID
    return value


async def decimal_back(value: Decimal) -> Decimal:
    assert type(value) is Decimal
    return value


async def colour_back(colour: Colour) -> Colour:
    assert type(colour) is Colour
    return colour


async def annotated_with_nothing(value: NowhereDefined) -> None:  # type: ignore[name-defined]  # noqa: F821
    """Annotated with what is defined nowhere."""


async def maybe_back(value: Point | None = None) -> Point | None:
    return value


async def every_kind(
    a: int, /, b: int, *rest: int, c: int = 3, d: Decimal, **more: UUID
) -> list[Any]:
    assert type(d) is Decimal
    assert all(type(value) is UUID for value in more.values())
    return [a, b, list(rest), c, str(d), {name: value.int for name, value in more.items()}]


# ----------------------------------------------------------------------- failing


class OutOfStock(Exception):
    """Raised by the tasks here."""


async def fail(message: str = "no") -> None:
    journal.note("fail")
    raise OutOfStock(message)


async def fail_until(number: int) -> int:
    """Fail in the attempts before attempt number `number`."""
    journal.note("fail_until")
    attempt = current_attempt().number
    if attempt < number:
        raise OutOfStock(f"attempt {attempt}")
    return attempt


async def fail_after(seconds: float) -> None:
    journal.note("fail_after started")
    await anyio.sleep(seconds)
    raise OutOfStock("after a while")


async def time_out_inside() -> None:
    with anyio.fail_after(1):
        await anyio.sleep_forever()


class Untellable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


async def raise_exit() -> None:
    raise SystemExit(3)


async def raise_stop_iteration() -> None:
    raise StopIteration


async def raise_group() -> None:
    raise ExceptionGroup("two", [ValueError(1), ValueError(2)])


async def raise_untellable() -> None:
    raise Untellable


async def raise_surrogate() -> None:
    raise ValueError("\ud800")


async def unwritable() -> object:
    journal.note("unwritable")
    return object()


async def surrogate() -> str:
    return "\ud800"


async def circular() -> list[Any]:
    ring: list[Any] = []
    ring.append(ring)
    return ring


async def not_what_it_says() -> int:
    return "many"  # type: ignore[return-value]  # that is what is tested


@dataclass
class Choking:
    """Raises what pydantic does not take for a validation error."""

    x: int

    def __post_init__(self) -> None:
        if self.x < 0:
            raise KeyError(self.x)


async def take_choking(value: Choking) -> int:
    return value.x


def _choke(value: Any) -> Any:
    raise KeyError(value)


async def choke_on_result() -> Annotated[int, AfterValidator(_choke)]:
    return 3


async def raise_bare_cancelled() -> None:
    journal.note("bare")
    raise asyncio.CancelledError


# -------------------------------------------------------------------- cancelling


async def clean_up(seconds: float) -> None:
    journal.note("clean_up started")
    try:
        await anyio.sleep_forever()
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(seconds)
        journal.note("cleaned up")


async def finish_anyway(result: str) -> str:
    """Return a result although it was cancelled."""
    journal.note("finish_anyway started")
    try:
        await anyio.sleep_forever()
    except anyio.get_cancelled_exc_class():
        journal.note("cancelled")
    return result


async def raise_when_cancelled() -> None:
    journal.note("raise_when_cancelled started")
    try:
        await anyio.sleep_forever()
    except anyio.get_cancelled_exc_class():
        raise OutOfStock("while being cancelled") from None


async def cancel_bare_when_cancelled() -> None:
    """End with a cancellation that does not come from the scope, as libraries do."""
    journal.note("cancel_bare_when_cancelled started")
    try:
        await anyio.sleep_forever()
    except anyio.get_cancelled_exc_class():
        pass
    raise asyncio.CancelledError


async def tell_reason() -> None:
    journal.note("tell_reason started")
    try:
        await anyio.sleep_forever()
    finally:
        journal.note(f"reason {current_attempt().cancel_reason}")


# ----------------------------------------------------------------------- families


async def lead_naps(count: int, seconds: float) -> list[str]:
    """Have `count` children nap at the same time."""
    async with journal.app.remote_task_group() as group:
        naps = [await group.start(journal.task(nap), seconds, f"nap {i}") for i in range(count)]
    return [await nap.result(timeout=0) for nap in naps]


async def add_elsewhere(a: int, b: int) -> int:
    """Have another task add, and wait for it."""
    return int(await (await journal.task(add)(a, b)).result())


async def nap_elsewhere(seconds: float) -> str:
    """Have another task nap, and wait for it."""
    return str(await (await journal.task(nap)(seconds)).result())


# -------------------------------------------------------------------- generators


async def narrate(count: int) -> AsyncIterator[Any]:
    yield MessageType.DEBUG, "begun"
    for number in range(count):
        yield MessageType.RESULT, number
    yield "whatever"
    yield MessageType.DEBUG, {"left": 0}


async def narrate_and_fail() -> AsyncIterator[Any]:
    yield MessageType.DEBUG, "before"
    yield MessageType.RESULT, 1
    raise OutOfStock("in a generator")


async def narrate_for_ever() -> AsyncIterator[Any]:
    try:
        yield MessageType.DEBUG, "begun"
        journal.note("narrate_for_ever started")
        await anyio.sleep_forever()
    finally:
        journal.note("generator closed")


# --------------------------------------------------------------------- processes


def square(number: int) -> int:
    assert current_attempt().number == 1
    return number * number


def fail_in_process() -> None:
    raise OutOfStock("in a process")


def burn(file: str) -> None:
    """Burn a core for ever; leave the id of the process in a file."""
    Path(file).write_text(f"{os.getpid()}\n", encoding="ascii")
    while True:
        pass
