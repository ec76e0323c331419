"""Interrupting the task that captures the loop: a signal whose handler raises.

Python runs signal handlers in the main thread, between two steps of whatever runs there:
also within `time.sleep`, or while it waits for a lock. If the task loop runs there, too,
an exception that the handler raises comes out of the task's own code.

The signal comes from two sources. The watchdog's thread sends it, after it has looked. And
an interval timer does, which the loop's beats keep setting back: it is for code that
never lets another thread run, as a regular expression does. That timer counts computing
time and no other, so it does not run while the process is suspended or starved.

Laws of the handler:

1. It raises only if the loop is still captured by the same task, and that task's context
   is the current one, and what runs is neither the event loop nor the worker.
2. It raises once, and not again before the loop has beaten.
3. It never waits for a lock. It may have interrupted the holder.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any, Final, NoReturn

from ..exceptions import LoopBlocked
from .attempt import Attempt, attempt_or_none
from .capture import Capture, Limits, Sight, Verdict, judge, look
from .loop_view import LoopView, format_stack, may_interrupt

__all__ = ["MOST_INTERRUPTS", "Interrupter", "open_interrupter"]

log = logging.getLogger(__name__)

MOST_INTERRUPTS: Final = 3
"""Interrupts that an attempt may swallow. Then only the exit path helps."""

# Hardly anybody uses it: SIGALRM is everybody's, and SIGPROF the profilers'. Not on
# Windows, where none of this can be.
_SIGNAL: Final[Any] = getattr(signal, "SIGVTALRM", None)


class Interrupter:
    """Raises `LoopBlocked` in the task that captures the loop. Made by `open_interrupter`.

    Args:
        view: of the loop, which runs in the main thread.
        cancel_soon: calls a function on the loop when it is free; may be called anywhere.
        limits: how long a task may keep the loop; without a grace, nothing is raised.
        note: writes down what was found; before the task can end, hence not in a thread.
    """

    def __init__(
        self,
        view: LoopView,
        cancel_soon: Callable[[Callable[[], None]], object],
        limits: Limits,
        note: Callable[[Capture], None],
    ) -> None:
        self.held: Capture | None = None
        """Why the main thread is held: nothing else could be done about it."""
        self._view = view
        self._cancel_soon = cancel_soon
        self._limits = limits
        self._note = note
        self._found: deque[Capture] = deque()
        self._order: Capture | None = None
        self._own: Capture | None = None
        self._sight: Sight | None = None
        self._raised_at = -1
        self._shall_hold = False
        self._is_handling = False

    # ------------------------------------------------- for the watchdog's thread

    def interrupt(self, capture: Capture) -> None:
        """Have the task interrupted, if it still captures the loop."""
        self._order = capture
        signal.pthread_kill(self._view.thread, _SIGNAL)

    def hold(self) -> None:
        """Have the main thread run nothing more, as soon as it heeds a signal."""
        self._shall_hold = True
        signal.pthread_kill(self._view.thread, _SIGNAL)

    def found(self) -> Iterator[Capture]:
        """Take the captures that were found here, while the thread could not look."""
        while self._found:
            yield self._found.popleft()

    # -------------------------------------------------------- in the main thread

    def set_timer(self) -> None:
        """Set the timer back: the loop has beaten."""
        pause = self._limits.pause
        signal.setitimer(signal.ITIMER_VIRTUAL, 2 * pause, pause)

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        # An exception that is raised within a collection, in somebody's finalizer, is lost.
        if self._is_handling or self._view.is_collecting or frame is None:
            return
        self._is_handling = True
        try:
            self._handle(frame)
        finally:
            self._is_handling = False

    def _handle(self, frame: FrameType) -> None:
        if self._shall_hold:
            self._hold()
        view, attempt = self._view, attempt_or_none()
        sight = look(self._sight, at=view.cpu_time(), beats=view.beats, task=view.running())
        self._sight = sight
        verdict = judge(sight, self._limits)  # by this thread's computing time
        capture = self._ordered(sight, attempt)
        if capture is None and verdict is not Verdict.FREE:
            capture = self._seen(sight, attempt, frame)
        if capture is None:
            return
        if verdict is Verdict.HOPELESS:
            # Nobody else can do anything as long as this thread keeps the interpreter.
            self.held = capture
            self._hold()
        if attempt is None or not self._limits.grace or self._raised_at == capture.beats:
            return
        if attempt.interrupts < MOST_INTERRUPTS and may_interrupt(frame):
            self._raise(capture, attempt)

    def _ordered(self, sight: Sight, attempt: Attempt | None) -> Capture | None:
        """Return the capture that the thread has seen, if it goes on at this moment."""
        order = self._order
        if order is None or not order.is_seen_in(sight):
            return None
        if order.task is None and order.attempt is None and attempt is not None:
            # In a callback. Whose it is, only its context tells, and only here.
            self._order = order = replace(order, attempt=attempt)
            self._find(order)
        return order if order.attempt is attempt else None

    def _seen(self, sight: Sight, attempt: Attempt | None, frame: FrameType) -> Capture:
        """Return the capture that the thread could not see."""
        if self._own is None or not self._own.is_seen_in(sight):
            whose = attempt or self._view.attempt_of(sight.task)
            seconds = sight.at - sight.since
            self._own = Capture(sight.beats, sight.task, whose, seconds, format_stack(frame))
            self._find(self._own)
        return self._own

    def _find(self, capture: Capture) -> None:
        self._found.append(capture)
        self._note(capture)

    def _raise(self, capture: Capture, attempt: Attempt) -> NoReturn:
        self._raised_at = capture.beats
        failure = capture.failure()
        attempt.interrupted(failure)
        # Where it is raised it may be swallowed, or end a child that nobody waits for. The
        # scope sees to it that the attempt ends all the same.
        self._cancel_soon(attempt.cancel_scope.cancel)
        raise LoopBlocked(failure.message)

    def _hold(self) -> NoReturn:
        while True:  # until the process ends; sleeping lets the other threads run
            time.sleep(60)


@contextmanager
def open_interrupter(
    view: LoopView,
    cancel_soon: Callable[[Callable[[], None]], object],
    limits: Limits,
    note: Callable[[Capture], None],
) -> Generator[Interrupter | None]:
    """Be able to interrupt for as long as the block; None, and a line in the log, if not."""
    problem = _problem(view)
    if problem:
        if limits.grace:
            log.warning(
                "the watchdog can interrupt nobody, because %s: a task that captures the "
                "event loop is named%s",
                problem,
                ""
                if math.isinf(limits.grace)
                else f", and {limits.grace:g} s later this process ends",
            )
        yield None
        return
    interrupter = Interrupter(view, cancel_soon, limits, note)
    handler: Any = signal.signal(_SIGNAL, interrupter.on_signal)
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    view.on_beat = interrupter.set_timer
    try:
        yield interrupter
    finally:
        view.on_beat = lambda: None
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        # None stands for a handler that Python knows nothing of and cannot set again.
        signal.signal(_SIGNAL, signal.SIG_DFL if handler is None else handler)


def _problem(view: LoopView) -> str | None:
    if _SIGNAL is None:
        return "this system has no such signals"
    if not view.in_main_thread:
        return "the event loop does not run in the main thread, where Python handles signals"
    handler = signal.getsignal(_SIGNAL)
    if isinstance(getattr(handler, "__self__", None), Interrupter):
        return "another worker in this process does"
    return None
