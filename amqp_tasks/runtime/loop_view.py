"""What the watchdog can see of the task loop: from another thread, or from a signal handler.

The loop may be captured while anybody looks, so nothing here waits for it.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..core.message import clean
from .attempt import Attempt, attempt_in
from .io_loop import runs_trio

if TYPE_CHECKING:
    import trio

__all__ = ["COLLECTION", "LoopView", "format_stack", "may_interrupt", "view_of_this_loop"]

COLLECTION: Final = "a garbage collection"
"""Stands for the running task while a collection runs: nobody is to blame for it."""

_MACHINERY: Final = ("anyio", "asyncio", "outcome", "trio", "uvloop")
"""Packages that make up an event loop."""

_RUNTIME: Final = __name__.rpartition(".")[0] + "."
_PACKAGE: Final = __name__.partition(".")[0] + "."

_HELPERS: Final = frozenset(
    {
        *("abc", "attr", "collections", "contextlib", "enum", "functools", "heapq", "logging"),
        *("selectors", "socket", "sortedcontainers", "threading", "traceback", "types"),
        *("typing", "weakref"),
    }
)
"""Modules that event loops, and everybody else, are built with."""


class _Tasks(Protocol):
    """The part of a view that depends on the kind of loop."""

    def running(self, in_its_thread: bool) -> object | None:
        """Return the task whose step is running."""
        ...

    def context(self, task: Any) -> Context | None:
        """Return the context that a task runs in."""
        ...


class LoopView:
    """One event loop and its thread, as others see them.

    Made in the loop's thread, by `view_of_this_loop`.

    Attributes:
        thread: the identifier of the loop's thread.
        beats: how often `beat` was called; a loop that is captured calls it no more.
        on_beat: called at each beat.
    """

    def __init__(self, tasks: _Tasks) -> None:
        self.thread = threading.get_ident()
        self.in_main_thread = threading.current_thread() is threading.main_thread()
        self.beats = 0
        self.on_beat: Callable[[], object] = lambda: None
        self._tasks = tasks
        self._collections = _Collections(self.thread)
        self._schedule = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        self._queued = 0.0

    def beat(self) -> None:
        """Show that the loop is free: called on the loop, again and again."""
        self.beats += 1
        self.on_beat()

    def open(self) -> Any:
        """Take notice of garbage collections for as long as the block (a context manager)."""
        return self._collections.open()

    @property
    def is_collecting(self) -> bool:
        """True while a garbage collection runs, in whichever thread."""
        return self._collections.began is not None

    def cpu_time(self) -> float:
        """Return the seconds that the caller's thread, which is the loop's, has computed.

        Collecting garbage does not count. A process that is suspended or starved does not
        compute, so by this clock no time passes for it.
        """
        return time.thread_time() - self._collections.cpu_time

    def queued_time(self) -> float:
        """Return the seconds that the loop's thread has waited for a processor.

        Only Linux tells; elsewhere it is 0, and a busy machine cannot be seen.
        """
        # Not 0 if it cannot be read for once: a clock that is set by it must not jump.
        with suppress(OSError, ValueError, IndexError):
            # Time computed, time waited (both in ns), and how often.
            self._queued = int(self._schedule.read_text().split()[1]) / 1e9
        return self._queued

    def running(self) -> object | None:
        """Return what has the loop at this moment: a task, or `COLLECTION`, if that is known."""
        if self._collections.lasts_since(time.monotonic() - _SHORT):
            return COLLECTION
        return self._tasks.running(threading.get_ident() == self.thread)

    def attempt_of(self, task: object | None) -> Attempt | None:
        """Return the attempt that a task belongs to, be it a child's child, if there is one."""
        if task is None or task is COLLECTION:
            return None
        context = self._tasks.context(task)
        return None if context is None else attempt_in(context)

    def stack(self) -> str:
        """Return the stack of the loop's thread as text, from the task's first frame on."""
        frame = _frame_of(self.thread)
        return "(the thread has ended)" if frame is None else format_stack(frame)


_SHORT: Final = 0.1
"""Seconds that a garbage collection takes without anybody taking notice."""


def view_of_this_loop() -> LoopView:
    """Make a view of the loop that is running in this thread."""
    if runs_trio():
        return LoopView(_TrioTasks())
    return LoopView(_AsyncioTasks(asyncio.get_running_loop()))


class _AsyncioTasks:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def running(self, in_its_thread: bool) -> object | None:
        # Its documentation does not say so, but it may be asked from any thread.
        return asyncio.current_task(self._loop)

    def context(self, task: Any) -> Context | None:
        if sys.version_info >= (3, 12):
            context: Context = task.get_context()
            return context
        # Before 3.12 there is no way to ask for it; but the task refers to it, and what
        # an object refers to can be asked for.
        return next((one for one in gc.get_referents(task) if isinstance(one, Context)), None)


class _TrioTasks:
    def __init__(self) -> None:
        import trio

        self._current_task = trio.lowlevel.current_task
        root = trio.lowlevel.current_root_task()
        assert root is not None
        self._root = root
        self._thread = threading.get_ident()

    def running(self, in_its_thread: bool) -> object | None:
        if in_its_thread:
            try:
                return self._current_task()
            except RuntimeError:
                return None  # between two steps
        # An instrument would know, and costs at each step of each task. A search costs
        # nothing until the loop is late.
        frames = set(_frames(_frame_of(self._thread)))
        try:
            for task in _descendants(self._root):
                if getattr(task.coro, "cr_frame", None) in frames:
                    return task
        except RuntimeError:
            pass  # the tree has changed under our hands: so the loop is not captured
        return None

    def context(self, task: Any) -> Context | None:
        context: Context = task.context
        return context


def _descendants(task: trio.lowlevel.Task) -> Iterator[trio.lowlevel.Task]:
    waiting = [task]
    while waiting:
        task = waiting.pop()
        yield task
        for nursery in task.child_nurseries:
            waiting.extend(nursery.child_tasks)


class _Collections:
    """Keeps account of garbage collections: they hold up everybody, and are nobody's fault."""

    def __init__(self, thread: int) -> None:
        self.began: float | None = None
        """When the one that is under way began, by the monotonic clock."""
        self.cpu_time = 0.0
        """Seconds that the thread has spent on them."""
        self._thread = thread
        self._cpu_began = 0.0

    @contextmanager
    def open(self) -> Generator[None]:
        gc.callbacks.append(self._notice)
        try:
            yield
        finally:
            gc.callbacks.remove(self._notice)

    def lasts_since(self, moment: float) -> bool:
        began = self.began
        return began is not None and began < moment

    def _notice(self, phase: str, info: dict[str, int]) -> None:
        is_ours = threading.get_ident() == self._thread
        if phase == "start":
            self._cpu_began = time.thread_time()
            self.began = time.monotonic()
        elif self.began is not None:
            if is_ours:
                self.cpu_time += time.thread_time() - self._cpu_began
            self.began = None


# ------------------------------------------------------------------------- stacks


def format_stack(frame: FrameType) -> str:
    """Return a stack as text: the task's part of it, without the loop that runs the task."""
    stack = [*_frames(frame)][::-1]
    loop = next((n for n, one in enumerate(stack) if _runs_tasks(one)), len(stack))
    first = next((n for n in range(loop, len(stack)) if not _runs_tasks(stack[n])), 0)
    last = next((n for n in range(len(stack), first, -1) if not _is_ours(stack[n - 1])), len(stack))
    frames = ((one, one.f_lineno) for one in stack[first:last])
    lines = traceback.StackSummary.extract(frames).format()
    return clean("Stack of the event loop's thread (most recent call last):\n" + "".join(lines))


def may_interrupt(frame: FrameType | None) -> bool:
    """True if an exception may be raised in this frame, which runs in a task's context.

    An event loop, or the worker, that is called by a task has work of its own in hand;
    an exception in the midst of it could break what all tasks rely on.
    """
    for one in _frames(frame):
        package = _module(one).partition(".")[0]
        if package not in _HELPERS:
            return package not in _MACHINERY and not _is_ours(one)
    return False


def _runs_tasks(frame: FrameType) -> bool:
    return _module(frame).partition(".")[0] in _MACHINERY or _module(frame).startswith(_RUNTIME)


def _is_ours(frame: FrameType) -> bool:
    return _module(frame).startswith(_PACKAGE)


def _module(frame: FrameType) -> str:
    name: str = frame.f_globals.get("__name__", "")
    return name + "."


def _frames(frame: FrameType | None) -> Generator[FrameType, None, None]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _frame_of(thread: int) -> FrameType | None:
    # Documented "for internal and specialized purposes only": this is one.
    return sys._current_frames().get(thread)  # pyright: ignore[reportPrivateUsage]
