"""The watchdog: names the task that captures the event loop, and spares the others.

The task loop beats, `Limits.pause` apart, for as long as it is free. A thread looks at it
as often. When the loop is captured (`capture` says when that is):

1. The task is named: its id and the stack of the loop's thread go to the log and, by way
   of the I/O loop, which is alive, to the task's state.
2. The task is interrupted (`interrupt`), again and again until an interrupt has hit it.
   What it leaves behind, the executor settles like any failure: reason `blocked_loop`.
3. If the grace is over and the loop still captured, nothing in this process can be saved.
   The I/O loop settles the task, gives all others back, and leaves; the process ends.

With drivers in memory it ends at 2: what is in memory would be lost with the process.

Each of the guards is watched by a simpler one. The thread watches the loop; an interval
timer does (`interrupt`) while the thread cannot run; and if that thread, whatever the
reason, does not look any more, `faulthandler` ends the process without asking Python.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Final, NoReturn

import anyio

from ..settings import Settings
from .attempt import Attempt
from .capture import Capture, Limits, Sight, Verdict, judge, look
from .interrupt import Interrupter, open_interrupter
from .io_loop import IoLoop, ThreadLoop, postbox_of_this_loop
from .loop_view import COLLECTION, LoopView, view_of_this_loop
from .records import Records

__all__ = ["EXIT_BLOCKED", "Watchdog", "open_watchdog"]

log = logging.getLogger(__name__)

EXIT_BLOCKED: Final = 3
"""Exit code of a process whose task loop was captured for good."""

PATIENCE: Final = 10.0
"""Seconds that the I/O loop may take to settle and give back, before the process ends."""

LOST_HEARTBEATS: Final = 3
"""AMQP heartbeats after which the broker has given a silent worker's messages to others."""

Post = Callable[..., object]
"""Calls a function with arguments on some loop, soon; may be called from any thread."""


@asynccontextmanager
async def open_watchdog(io: IoLoop, settings: Settings) -> AsyncGenerator[Watchdog | None]:
    """Watch the loop that this is called on for as long as the block; None if that is off."""
    if not settings.auto_kill_timeout:
        yield None
        return
    view, to_tasks = view_of_this_loop(), postbox_of_this_loop().post
    post: Post
    if isinstance(io, ThreadLoop):
        grace = settings.cancel_grace if settings.on_blocked_loop == "interrupt" else 0.0
        post = io.post
    else:
        # Drivers in memory are on the loop that they would have to help.
        grace, post = math.inf, to_tasks
    limits = Limits(settings.auto_kill_timeout, grace)
    delay = max(limits.timeout + limits.grace, LOST_HEARTBEATS * settings.heartbeat)
    notes = _Notes(post)
    with (
        _last_resort(delay) as last_resort,
        view.open(),
        open_interrupter(view, to_tasks, limits, notes.write) as interrupter,
    ):
        watchdog = Watchdog(view, limits, interrupter, last_resort, notes)
        async with anyio.create_task_group() as tasks:
            living = anyio.CancelScope(shield=True)
            tasks.start_soon(_beat, view, limits.pause, living)
            watchdog.start()
            try:
                yield watchdog
            finally:
                watchdog.stop()
                living.cancel()


async def _beat(view: LoopView, pause: float, living: anyio.CancelScope) -> None:
    with living:  # and not only as long as nobody cancels the worker: it may take a while
        while True:
            view.beat()
            await anyio.sleep(pause)


class Watchdog:
    """Looks at a task loop from a thread of its own. Made by `open_watchdog`."""

    def __init__(
        self,
        view: LoopView,
        limits: Limits,
        interrupter: Interrupter | None,
        last_resort: _LastResort,
        notes: _Notes,
    ) -> None:
        self._view = view
        self._limits = limits
        self._interrupter = interrupter
        self._last_resort = last_resort
        self._notes = notes
        self._looked_at = time.monotonic()
        self._sight: Sight | None = None
        self._capture: Capture | None = None
        """The one that goes on, as far as is known."""
        self._named: tuple[int, Attempt | None] | None = None
        """The `Capture.key` of the last one that was named."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="amqp_tasks watchdog", daemon=True)

    def report_to(self, records: Records) -> None:
        """Use the worker's part on the I/O loop, from the moment that there is one."""
        self._notes.records = records

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop looking. Called on the task loop, which is therefore free."""
        self._ended.set()
        self._thread.join()  # returns at once, or never: then the process ends

    def _run(self) -> None:
        while not self._ended.wait(self._limits.pause):
            self._last_resort.put_off()
            try:
                self._look(time.monotonic())
            except Exception:  # better one look that failed than no watchdog
                log.exception("the watchdog could not look")
        if self._interrupter is not None:
            self._hear(self._interrupter)

    def _look(self, now: float) -> None:
        view, before = self._view, self._sight
        beats = view.beats
        is_silent = before is not None and before.beats == beats
        task = view.running() if is_silent else None  # what has a loop that beats, is no matter
        is_late = self._limits.is_late(now - self._looked_at)
        self._looked_at, at = now, now - view.queued_time()
        self._sight = sight = look(before, at=at, beats=beats, task=task, is_late=is_late)
        if self._interrupter is not None:
            self._hear(self._interrupter)
        if self._capture is not None and self._capture.beats != beats:
            log.info("the event loop is free again")
            self._capture = None
        verdict = judge(sight, self._limits)
        if verdict is Verdict.FREE:
            return
        if self._capture is None or self._capture.task is not task:
            attempt = view.attempt_of(task)
            self._name(Capture(beats, task, attempt, sight.at - sight.since, view.stack()))
        assert self._capture is not None
        if verdict is Verdict.HOPELESS:
            self._exit(self._capture)
        if self._interrupter is not None and task is not COLLECTION:
            self._interrupter.interrupt(self._capture)

    def _hear(self, interrupter: Interrupter) -> None:
        """Learn what the main thread has found out by itself."""
        for capture in interrupter.found():
            self._name(capture)
        if interrupter.held is not None:
            self._exit(interrupter.held)

    # ------------------------------------------------------------- 1. name it

    def _name(self, capture: Capture) -> None:
        self._capture = capture
        if self._named == capture.key:
            return  # this thread and the main thread have seen the same
        self._named = capture.key
        self._notes.write(capture)
        who, seconds = _who(capture), capture.seconds
        log.error("%s captured the event loop for %.1f s\n%s", who, seconds, capture.stack)

    # --------------------------------------------------------- 3. end with it

    def _exit(self, capture: Capture) -> NoReturn:
        log.critical(
            "%s has captured the event loop, and does not let go: this process ends with exit "
            "code %d",
            _who(capture),
            EXIT_BLOCKED,
        )
        self._last_resort.put_off(PATIENCE + 1)
        if self._interrupter is not None:
            # Were the loop to become free now, tasks would go on that are given back.
            self._interrupter.hold()
        # If nobody knows who it is, nobody is cleared either: the tasks stay claimed, and
        # whoever takes them counts a crash, so that this cannot go on for ever.
        is_known = capture.attempt is not None or capture.task is not None
        if is_known and not self._notes.abandon(capture, PATIENCE):
            log.critical("not everything could be settled within %g s", PATIENCE)
        os._exit(EXIT_BLOCKED)


class _Notes:
    """Hands over to the I/O loop what is to be written and done there."""

    def __init__(self, post: Post) -> None:
        self.records: Records | None = None
        self._post = post
        self._written: tuple[int, Attempt | None] | None = None

    def write(self, capture: Capture) -> None:
        """Write a capture to the state of its task, once. Also from a signal handler."""
        if self.records is None or capture.attempt is None or self._written == capture.key:
            return
        self._written = capture.key
        message = {"seconds": capture.seconds, "stack": capture.stack}
        self._post(self.records.note, capture.attempt, "blocked_loop", message)

    def abandon(self, capture: Capture, patience: float) -> bool:
        """Have the worker leave; return whether it did within `patience` seconds."""
        if self.records is None:
            return True
        self._post(self.records.abandon, capture.attempt, capture.failure())
        return self.records.left.wait(patience)


def _who(capture: Capture) -> str:
    if capture.attempt is not None:
        return repr(capture.attempt)
    if capture.task is COLLECTION:
        return "a garbage collection, or a finalizer in it,"
    if capture.task is not None:
        return f"what is no task of this worker's, {capture.task!r},"
    return "something that cannot be told"


# ------------------------------------------------------------- 4. the last resort


class _LastResort:
    """Ends the process, with exit code 1 and all stacks, unless it is put off in time.

    A timer in C, which needs no interpreter. It cannot tell a process that was suspended
    from one that hangs; so its time is one after which a silent worker has lost its
    messages and leases to others anyway.
    """

    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._put_off_at = -delay

    def put_off(self, delay: float | None = None) -> None:
        if math.isinf(self._delay):
            return
        now = time.monotonic()
        # Each time costs a thread, so not at each look.
        if delay is not None or now - self._put_off_at >= min(1.0, self._delay / 10):
            self._put_off_at = now
            # Not sys.stderr: that may be replaced by what has no file descriptor.
            faulthandler.dump_traceback_later(delay or self._delay, exit=True, file=2)


@contextmanager
def _last_resort(delay: float) -> Generator[_LastResort]:
    last_resort = _LastResort(delay)
    last_resort.put_off()
    try:
        yield last_resort
    finally:
        faulthandler.cancel_dump_traceback_later()
