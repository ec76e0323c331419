"""Two event loops and what passes between them.

User code runs on the *task loop*: whatever loop the caller has, asyncio or Trio.
Everything that holds a task (delivery, lease, state, acknowledgement) runs on the *I/O
loop*: asyncio in a thread of its own, or, with drivers in memory, the task loop itself.

Rules of the hand-off:

- `post` and `post_back` never block, and wake the other loop once per batch.
- Neither loop ever waits for the other in a blocking call; that is how they deadlock.
- Cancelling a `call` cancels its coroutine on the I/O loop and waits until it has ended.
  Such coroutines wait for our own queues and events only: client libraries are driven by
  services, so a cancelled caller never interrupts a client library in mid-call.

This module alone names the thread primitives of asyncio and Trio.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from contextvars import Context
from functools import partial
from importlib.util import find_spec
from typing import Any, Generic, Protocol, TypeVar, TypeVarTuple, cast

import anyio
import anyio.lowlevel
from anyio.abc import TaskStatus

__all__ = [
    "Inbox",
    "IoLoop",
    "Postbox",
    "SameLoop",
    "ThreadLoop",
    "open_io_thread",
    "postbox_of_this_loop",
    "runs_trio",
]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

Service = Callable[..., Coroutine[Any, Any, None]]
"""An async function with a `task_status` keyword that it reports its start to."""


class IoLoop(Protocol):
    """The I/O loop as the task loop sees it, and the way back."""

    async def call(self, func: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        """Run an async function on the I/O loop; return, or raise, what it does."""
        ...

    async def make(self, kind: Callable[[*Ts], T], *args: *Ts) -> T:
        """Call a function, or make an object, on the I/O loop; return what comes of it.

        Whatever holds events or locks has to be made on the loop that it is used on.
        """
        ...

    async def serve(self, service: Service, *, task_status: TaskStatus[None]) -> None:
        """Run a service on the I/O loop until it ends or this call is cancelled."""
        ...

    def post(self, func: Callable[[*Ts], object], *args: *Ts) -> None:
        """Call a function in a task of the I/O loop soon. It must not raise."""
        ...

    def post_back(self, func: Callable[[*Ts], object], *args: *Ts) -> None:
        """Call a function on the task loop soon, not in a task. It must not raise."""
        ...


class SameLoop:
    """An I/O loop that is the task loop."""

    async def call(self, func: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        return await func(*args)

    async def make(self, kind: Callable[[*Ts], T], *args: *Ts) -> T:
        await anyio.lowlevel.checkpoint()
        return kind(*args)

    async def serve(
        self, service: Service, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        await service(task_status=task_status)

    def post(self, func: Callable[[*Ts], object], *args: *Ts) -> None:
        func(*args)

    def post_back(self, func: Callable[[*Ts], object], *args: *Ts) -> None:
        func(*args)


class Postbox:
    """Calls functions on one loop, in order; any thread may post, and a signal handler."""

    def __init__(self, wake: Callable[[Callable[[], None]], object]) -> None:
        self._wake = wake
        self._posted: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._woken = False

    def post(self, func: Callable[[*Ts], object], *args: *Ts) -> None:
        self._posted.append((func, args))
        # A thread that sees the flag set has appended before `_empty` cleared it, so its
        # item is still taken; one that sees it cleared wakes the loop once more.
        if not self._woken:
            self._woken = True
            try:
                self._wake(self._empty)
            except RuntimeError:  # Trio's RunFinishedError is one
                # That loop has ended; nobody is left to whom it could matter.
                self._posted.clear()

    def _empty(self) -> None:
        self._woken = False
        while self._posted:
            func, args = self._posted.popleft()
            func(*args)


def postbox_of_this_loop() -> Postbox:
    """Make a postbox for the loop that is running in this thread."""
    if runs_trio():
        import trio

        return Postbox(trio.lowlevel.current_trio_token().run_sync_soon)
    loop = asyncio.get_running_loop()
    # Without a context of its own the callback would keep the poster's alive.
    return Postbox(partial(loop.call_soon_threadsafe, context=Context()))


def runs_trio() -> bool:
    """Tell whether the loop that is running in this thread is Trio's.

    Importing Trio takes a while, so that is left to those who use it.
    """
    # It may just be being imported, in another thread.
    trio = getattr(sys.modules.get("trio"), "lowlevel", None)
    return trio is not None and trio.in_trio_run()


class Inbox(Generic[T]):
    """Items for a task that takes all there are at once; `put` is a mere function."""

    def __init__(self) -> None:
        self._items: list[T] = []
        self._filled = anyio.Event()

    def put(self, item: T) -> None:
        """Add an item. On the inbox's own loop, but not necessarily in a task."""
        self._items.append(item)
        self._filled.set()

    async def take(self) -> list[T]:
        """Wait until there are items, and take them all."""
        await self._filled.wait()
        self._filled = anyio.Event()
        return self.take_nowait()

    def take_nowait(self) -> list[T]:
        """Take all that are there, if any."""
        items, self._items = self._items, []
        return items


class _Call:
    """One call from the task loop, on its way to the I/O loop and back."""

    def __init__(self, func: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> None:
        self._func = func
        self._args = args
        self._scope: anyio.CancelScope | None = None
        self._cancelled = False
        self._result: Any = None
        self._error: BaseException | None = RuntimeError("the I/O loop ended during the call")
        self.done = anyio.Event()
        """Belongs to the task loop."""

    async def run(self, post_back: Callable[[Callable[[], object]], None]) -> None:
        """Run on the I/O loop."""
        try:
            with anyio.CancelScope() as self._scope:
                if self._cancelled:
                    self._scope.cancel()
                self._result = await self._func(*self._args)
                self._error = None
        except Exception as error:
            self._error = error
        finally:
            post_back(self.done.set)

    def cancel(self) -> None:
        """Cancel, on the I/O loop, whether it has begun or not."""
        self._cancelled = True
        if self._scope is not None:
            self._scope.cancel()

    def answer(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._result


class _StartReport:
    """The `task_status` of a service on the I/O loop, watched from the task loop."""

    def __init__(self, post_back: Callable[[Callable[[], object]], None]) -> None:
        self._post_back = post_back
        self.event = anyio.Event()
        """Belongs to the task loop. Set when the service has started, or has ended."""
        self.is_started = False

    def started(self, value: None = None) -> None:
        self.is_started = True
        self._post_back(self.event.set)


class ThreadLoop:
    """An I/O loop in a thread of its own. Made by `open_io_thread`."""

    def __init__(self, name: str) -> None:
        self._to_tasks = postbox_of_this_loop()
        self._to_io: Postbox
        self._posted: Inbox[tuple[Callable[..., object], tuple[Any, ...]]]
        self._calls: anyio.abc.TaskGroup
        self._calls_have_ended = False
        self._stop: anyio.Event
        self._started = anyio.Event()
        self._ended = anyio.Event()
        self._waited_for: set[anyio.Event] = set()
        """Events of the task loop that the I/O loop is to set."""
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    async def call(self, func: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        call = _Call(func, args)
        self._post_call(call)
        await self._wait(call.done, call)
        return cast("T", call.answer())

    async def make(self, kind: Callable[[*Ts], T], *args: *Ts) -> T:
        async def run() -> T:
            await anyio.lowlevel.checkpoint()
            return kind(*args)

        return await self.call(run)

    async def serve(
        self, service: Service, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        report = _StartReport(self.post_back)

        async def run() -> None:
            try:
                await service(task_status=report)
            finally:
                self.post_back(report.event.set)

        call = _Call(run, ())
        self._post_call(call)
        await self._wait(report.event, call)
        if report.is_started:
            task_status.started()
        await self._wait(call.done, call)
        call.answer()

    def post(self, func: Callable[[*Ts], object], *args: *Ts) -> None:
        self._to_io.post(self._posted.put, (func, args))

    def post_back(self, func: Callable[[*Ts], object], *args: *Ts) -> None:
        self._to_tasks.post(func, *args)

    async def _wait(self, event: anyio.Event, call: _Call) -> None:
        try:
            await self._until(event)
        except BaseException:
            self.post(call.cancel)
            # Not for long: what runs there waits for events and can be cancelled.
            with anyio.CancelScope(shield=True):
                await self._until(call.done)
            raise

    async def _until(self, event: anyio.Event) -> None:
        """Wait for an event that the I/O loop sets, or for the end of that loop."""
        if self._ended.is_set():
            return
        self._waited_for.add(event)
        try:
            await event.wait()
        finally:
            self._waited_for.discard(event)

    def _post_call(self, call: _Call) -> None:
        if not self._ended.is_set():
            self.post(self._start_call, call)

    def _start_call(self, call: _Call) -> None:
        if not self._calls_have_ended:
            self._calls.start_soon(call.run, self._to_tasks.post)

    async def start(self) -> None:
        self._thread.start()
        # A thread that was started must be waited for: `stop` does.
        with anyio.CancelScope(shield=True):
            await self._until(self._started)
        if self._error is not None:
            raise self._error

    async def stop(self) -> None:
        self.post(self._stop.set)
        with anyio.CancelScope(shield=True):
            await self._ended.wait()
        self._thread.join()  # it has nothing left to do but to return
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            anyio.run(self._main, backend="asyncio", backend_options={"use_uvloop": _has_uvloop()})
        except BaseException as error:  # noqa: ASYNC103  `stop` raises it on the other side
            self._error = error
        finally:
            self._to_tasks.post(self._on_ended)

    def _on_ended(self) -> None:
        self._ended.set()
        for event in self._waited_for:
            event.set()

    async def _main(self) -> None:
        self._posted, self._stop = Inbox(), anyio.Event()
        self._to_io = postbox_of_this_loop()
        # The calls within the taking: until the last has ended they can be cancelled.
        async with anyio.create_task_group() as taking:
            taking.start_soon(self._take_posted)
            async with anyio.create_task_group() as self._calls:
                self._to_tasks.post(self._started.set)
                await self._stop.wait()
            self._calls_have_ended = True
            taking.cancel_scope.cancel()

    async def _take_posted(self) -> None:
        while True:
            for func, args in await self._posted.take():
                func(*args)


@asynccontextmanager
async def open_io_thread(name: str) -> AsyncGenerator[ThreadLoop, None]:
    """Run an asyncio loop (uvloop, where it exists) in a thread for as long as the block.

    Leaving the block waits for the calls that are under way.
    """
    loop = ThreadLoop(name)
    await loop.start()
    try:
        yield loop
    finally:
        await loop.stop()  # noqa: ASYNC102  shields itself; the calls under way were cancelled


def _has_uvloop() -> bool:
    return find_spec("uvloop") is not None  # not on Windows
