"""What the tests of the worker and the client share: an app in memory, and its clock."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import pytest

from amqp_tasks import TaskApp, TaskHandle, TaskStatus
from amqp_tasks.core.message import Message
from amqp_tasks.core.operations import Operation
from amqp_tasks.core.record import TaskRecord
from amqp_tasks.core.settlement import Publication
from amqp_tasks.drivers.memory import MemoryBroker, MemoryStore

from . import shop

__all__ = [
    "EPOCH",
    "MakeApp",
    "app",
    "ask",
    "clean_environment",
    "depth",
    "error_messages",
    "forbid_hanging",
    "journal",
    "left_in_queues",
    "make_app",
    "memory",
    "no_task_is_left_over",
    "now",
    "publish",
    "record_of",
    "rewire",
    "ticks",
    "until",
    "until_status",
]

T = TypeVar("T")

EPOCH = 1_700_000_000.0
PATIENCE = 20.0
"""Real seconds after which a test hangs; those that may take longer say so."""

MakeApp = Callable[..., TaskApp]


def now() -> float:
    """The wall clock of the apps: it goes with the virtual clock of the event loop."""
    return EPOCH + anyio.current_time()


# --------------------------------------------------------------------- fixtures


@pytest.fixture(autouse=True)
def forbid_hanging(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that would wait for ever, shielded from every virtual timeout."""
    marker = request.node.get_closest_marker("patience")
    seconds = marker.args[0] if marker else PATIENCE

    def give_up(signum: int, frame: FrameType | None) -> None:
        raise AssertionError(f"the test has not ended within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    # Again and again: what catches every exception catches the first one.
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have settings of their own."""
    for name in [name for name in os.environ if name.startswith("AMQP_TASKS_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def journal() -> shop.Journal:
    """What the tasks of this test have noted."""
    shop.journal = shop.Journal()
    return shop.journal


@pytest.fixture
def make_app(journal: shop.Journal) -> MakeApp:
    """Make an app in memory; takes settings. The tasks find the one that was made last."""

    def make(**settings: Any) -> TaskApp:
        usual = {"broker_url": "memory://", "state_url": "memory://", "queue": "shop"}
        journal.app = TaskApp(clock=now, **{**usual, **settings})
        return journal.app

    return make


@pytest.fixture
def app(make_app: MakeApp) -> TaskApp:
    """An app in memory with the default settings."""
    return make_app()


@pytest.fixture
async def no_task_is_left_over() -> AsyncIterator[None]:
    """Fail a test after which more runs on the loop than before."""
    yield
    await anyio.wait_all_tasks_blocked()
    names = [task.name for task in anyio.get_running_tasks()]
    assert not [name for name in names if name and "amqp_tasks" in name]


# ------------------------------------------------------------- looking at an app


def memory(app: TaskApp) -> tuple[MemoryBroker, MemoryStore]:
    """The broker and the store of an app in memory."""
    return app._memory


def rewire(
    app: TaskApp, *, broker: MemoryBroker | None = None, store: MemoryStore | None = None
) -> None:
    """Give an app another broker or store, before it is used."""
    usual_broker, usual_store = app._memory
    app.__dict__["_memory"] = (broker or usual_broker, store or usual_store)


def left_in_queues(app: TaskApp) -> int:
    """How many messages are ready in any queue, those that wait included; no beacons."""
    broker = memory(app)[0]
    queues = list(broker._queues.values())
    return sum(broker.depth(queue.spec.name) for queue in queues if not queue.spec.exclusive)


def depth(app: TaskApp, suffix: str = "") -> int:
    """How many messages are ready in the app's queue, or one named after it."""
    return memory(app)[0].depth(app.settings.queue + suffix)


def error_messages(app: TaskApp) -> Sequence[tuple[bytes, Mapping[str, Any]]]:
    """Bodies and headers in the error queue."""
    return memory(app)[0].messages(f"{app.settings.queue}-error")


async def ask(app: TaskApp, operation: Operation[T]) -> T:
    """Ask the app's store."""
    (answer,) = await memory(app)[1].apply([operation])
    assert not isinstance(answer, Exception)
    result: T = answer
    return result


def record_of(app: TaskApp, handle: TaskHandle[Any] | str) -> TaskRecord:
    """The state of a task as the store keeps it."""
    task_id = handle if isinstance(handle, str) else handle.task_id
    return memory(app)[1]._records[task_id]


async def publish(app: TaskApp, *messages: Message) -> None:
    """Put messages into the app's queue that no producer of ours has written a state for."""
    topology = app._servers("test").topology
    async with memory(app)[0].session() as session:
        for message in messages:
            publication = Publication(
                queue=topology.main, body=message.body, headers=message.headers()
            )
            await session.publish(topology.exchange, publication, 1.0)


async def until(condition: Callable[[], object], within: float = 60.0) -> None:
    """Return when `condition` is true; looked at in every moment of virtual time."""
    with anyio.fail_after(within):
        while not condition():
            await anyio.sleep(0.01)


async def until_status(handle: TaskHandle[Any], status: TaskStatus, within: float = 60.0) -> None:
    """Return when a task is in this status."""
    with anyio.fail_after(within):
        while await handle.status() is not status:
            await anyio.sleep(0.01)


async def ticks(count: int) -> None:
    """Let everybody run `count` times, in no time."""
    for _ in range(count):
        await anyio.lowlevel.checkpoint()
