"""The watchdog: what counts as captured, whom it may hit, and what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import CodeType, FrameType
from typing import Annotated, Any

import anyio
import anyio.to_thread
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AfterValidator

from amqp_tasks import Attempt, LoopBlocked, RemoteTaskError, TaskApp, current_attempt
from amqp_tasks.runtime.capture import Capture, Limits, Sight, Verdict, judge, look
from amqp_tasks.runtime.interrupt import MOST_INTERRUPTS, open_interrupter
from amqp_tasks.runtime.io_loop import postbox_of_this_loop
from amqp_tasks.runtime.loop_view import COLLECTION, format_stack, may_interrupt, view_of_this_loop

from ..conftest import REAL_CLOCKS
from . import shop
from .harness import MakeApp

LIMITS = Limits(timeout=1.0, grace=0.5)
TIMEOUT = 0.3

A, B = object(), object()
"""Tasks."""


class Steps:
    """What the task `run_hook` does; each test says so."""

    hook: Callable[[], Awaitable[None]]


steps = Steps()


async def run_hook() -> None:
    await steps.hook()


def block(seconds: float) -> None:
    """Keep the loop."""
    time.sleep(seconds)


# ------------------------------------------------- decisions, under made-up times


def seen(*looks: tuple[float, int, object | None]) -> Sight:
    """Return the last of several sights: (when, beats, task)."""
    sight: Sight | None = None
    for at, beats, task in looks:
        is_late = sight is not None and LIMITS.is_late(at - sight.at)
        sight = look(sight, at=at, beats=beats, task=task, is_late=is_late)
    assert sight is not None
    return sight


def every_look(until: float, beats: int = 0, task: object = A) -> list[tuple[float, int, object]]:
    return [
        (number * LIMITS.pause, beats, task) for number in range(round(until / LIMITS.pause) + 1)
    ]


def test_a_task_that_has_the_loop_for_the_timeout_has_captured_it() -> None:
    assert judge(seen(*every_look(0.9)), LIMITS) is Verdict.FREE
    assert judge(seen(*every_look(1.0)), LIMITS) is Verdict.CAPTURED


def test_when_the_grace_is_over_it_is_hopeless() -> None:
    assert judge(seen(*every_look(1.4)), LIMITS) is Verdict.CAPTURED
    assert judge(seen(*every_look(1.6)), LIMITS) is Verdict.HOPELESS


def test_without_a_grace_it_is_hopeless_at_once() -> None:
    assert judge(seen(*every_look(1.0)), Limits(1.0, 0.0)) is Verdict.HOPELESS


def test_a_beat_clears_everybody() -> None:
    assert seen(*every_look(1.0), (1.1, 1, A)).since == 1.1


def test_another_task_is_a_new_suspect() -> None:
    assert seen(*every_look(0.9), (1.0, 0, B)).since == 1.0
    assert seen(*every_look(0.9), (1.0, 0, None)).since == 1.0


def test_what_is_not_known_clears_nobody_that_is_found_next() -> None:
    first, *rest = every_look(1.0)
    assert judge(seen((first[0], 0, None), *rest), LIMITS) is Verdict.CAPTURED


@pytest.mark.parametrize("asleep_at", [0.1, 0.5, 0.9, 1.2])
def test_a_process_that_slept_begins_anew(asleep_at: float) -> None:
    looks = every_look(asleep_at)
    sight = seen(*looks, (looks[-1][0] + 20.0, 0, A))
    assert sight.since == sight.at
    assert judge(sight, LIMITS) is Verdict.FREE


def test_one_that_is_only_a_little_late_does_not() -> None:
    looks = every_look(0.5)
    assert seen(*looks, (looks[-1][0] + 0.35, 0, A)).since == 0.0


@given(
    st.lists(
        st.tuples(
            st.floats(0.01, 1.0), st.sampled_from([0, 0, 0, 1]), st.sampled_from([A, A, A, B, None])
        ),
        min_size=1,
    )
)
def test_nobody_is_accused_of_more_than_was_seen(steps: list[tuple[float, int, Any]]) -> None:
    at, beats, looks = 0.0, 0, []
    for pause, beat, task in steps:
        at, beats = at + pause, beats + beat
        looks.append((at, beats, task))
    sight = seen(*looks)
    # What was seen since then: no beat, no late look, nobody else.
    while looks[0][0] < sight.since:
        looks.pop(0)
    assert {beats for _, beats, _ in looks} == {sight.beats}
    known = [task for _, _, task in looks if task is not None]
    assert len(set(known)) <= 1
    gaps = [later[0] - earlier[0] for earlier, later in itertools.pairwise(looks)]
    assert not any(map(LIMITS.is_late, gaps))


@pytest.mark.parametrize("timeout", [0.05, 1.0, 5.0, 30.0, 3600.0])
def test_looks_are_often_enough_and_a_late_one_is_short_of_the_timeout(timeout: float) -> None:
    limits = Limits(timeout, 1.0)
    assert 0 < limits.pause <= 0.5
    assert not limits.is_late(2 * limits.pause)
    assert limits.is_late(timeout / 2)


# ------------------------------------------------------------ where it may raise


def frame_in(*modules: str) -> FrameType:
    """Return the innermost frame of functions of these modules, outermost first."""
    frames: list[FrameType] = []
    code = compile(
        "def call(rest, end):\n    rest[0](rest[1:], end) if rest else end()", "f", "exec"
    )
    calls = [_function(code, module) for module in modules]
    calls[0](calls[1:], lambda: frames.append(sys._getframe(1)))
    return frames[0]


def _function(code: CodeType, module: str) -> Callable[..., None]:
    names: dict[str, Any] = {"__name__": module}
    exec(code, names)
    call: Callable[..., None] = names["call"]
    return call


@pytest.mark.parametrize("stack", [["mine"], ["asyncio.tasks", "mine"], ["mine", "threading"]])
def test_a_task_s_own_code_may_be_interrupted(stack: list[str]) -> None:
    assert may_interrupt(frame_in("asyncio.events", *stack))


@pytest.mark.parametrize(
    "stack",
    [
        ["asyncio.base_events"],
        ["mine", "anyio._core._tasks"],
        ["mine", "trio._core._run", "sortedcontainers.sorteddict"],
        ["mine", "amqp_tasks.runtime.attempt"],
        ["mine", "asyncio.locks", "collections"],
    ],
)
def test_an_event_loop_that_it_called_may_not(stack: list[str]) -> None:
    assert not may_interrupt(frame_in("asyncio.events", *stack))
    assert not may_interrupt(None)


def test_a_stack_begins_with_the_task_and_leaves_our_own_handler_out() -> None:
    frame = frame_in(
        *("__main__", "amqp_tasks.cli", "asyncio.runners", "amqp_tasks.runtime.executor"),
        *("mine", "asyncio.tasks", "mine.deeper", "amqp_tasks.runtime.interrupt"),
    )
    text = format_stack(frame)
    assert text.startswith("Stack of the event loop's thread (most recent call last):\n")
    assert text.count("in call") == 3


# ------------------------------------------------------------------ on real loops


@pytest.fixture(params=REAL_CLOCKS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return REAL_CLOCKS[request.param]()


def watched(make_app: MakeApp, **settings: Any) -> TaskApp:
    usual = {"cancel_grace": 30.0, "max_task_retries": 0}
    return make_app(auto_kill_timeout=TIMEOUT, **{**usual, **settings})


@asynccontextmanager
async def watched_by(look: Callable[[], None]) -> AsyncIterator[None]:
    """Have a thread look while the block captures the loop."""
    thread = threading.Timer(0.1, look)
    thread.start()
    try:
        yield
    finally:
        await anyio.to_thread.run_sync(thread.join)


@pytest.mark.anyio
async def test_a_thread_sees_which_task_has_the_loop_be_it_a_child_s_child(app: TaskApp) -> None:
    view, found = view_of_this_loop(), []

    async def child(depth: int) -> None:
        async with anyio.create_task_group() as tasks:
            if depth:
                tasks.start_soon(child, depth - 1)
                return
            async with watched_by(lambda: found.append(view.attempt_of(view.running()))):
                block(0.3)

    steps.hook = lambda: child(2)
    async with app.worker():
        handle = await app.task(run_hook)()
        await handle.result(timeout=10)
    (attempt,) = found
    assert attempt is not None
    assert attempt.task_id == handle.task_id


@pytest.mark.anyio
async def test_a_thread_sees_nothing_in_a_loop_that_waits() -> None:
    view, found = view_of_this_loop(), []
    async with watched_by(lambda: found.append(view.running())):
        await anyio.sleep(0.3)
    assert found == [None]


class Garbage:
    """Can be collected by the garbage collector only, and says what it is like."""

    def __init__(self, say: Callable[[], None]) -> None:
        self._itself = self
        self._say = say

    def __del__(self) -> None:
        end = time.thread_time() + 0.3
        while time.thread_time() < end:
            pass
        self._say()


@pytest.mark.anyio
async def test_a_garbage_collection_is_seen_and_its_time_does_not_count() -> None:
    view, found = view_of_this_loop(), []
    gc.collect()  # of what others have left
    with view.open():
        before = view.cpu_time()
        assert not view.is_collecting
        Garbage(lambda: found.append((view.is_collecting, view.running())))
        gc.collect()
        assert found == [(True, COLLECTION)]
        assert not view.is_collecting
        assert view.cpu_time() - before < 0.1


@pytest.mark.anyio
async def test_the_laws_of_the_handler(app: TaskApp) -> None:
    async def be_interrupted() -> None:
        view, attempt = view_of_this_loop(), current_attempt()

        def capture(task: object | None = None, attempt: Attempt | None = attempt) -> Capture:
            return Capture(view.beats, task or view.running(), attempt, 1.0, "stack")

        def hits(capture: Capture, within: str = "mine") -> bool:
            thread = threading.Thread(target=interrupter.interrupt, args=[capture])
            module: dict[str, Any] = {"__name__": within}
            exec("def run(thread): thread.start(); thread.join()", module)
            try:
                module["run"](thread)
            except LoopBlocked:
                return True
            return False

        post = postbox_of_this_loop().post
        with open_interrupter(view, post, LIMITS, note=lambda capture: None) as found:
            assert found is not None
            interrupter = found
            past = capture()
            view.beat()
            assert not hits(past), "the loop is free again"
            assert not hits(capture(task=A)), "it was another task"
            assert not hits(capture(attempt=None)), "it was another attempt"
            assert not hits(capture(), within="asyncio.events"), "it is within the event loop"
            for number in range(MOST_INTERRUPTS):
                assert hits(capture())
                assert attempt.interrupts == number + 1
                assert not hits(capture()), "the loop has not beaten since"
                view.beat()
            assert not hits(capture()), "it has swallowed enough"
        shop.journal.note("all is well")

    steps.hook = be_interrupted
    async with app.worker():
        await (await app.task(run_hook)()).join(timeout=10)
    assert shop.journal.count("all is well") == 1


@pytest.mark.anyio
async def test_what_captures_the_loop_is_interrupted_and_the_rest_goes_on(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    app = watched(make_app)

    async def capture() -> None:
        try:
            block(30)
        except LoopBlocked:
            shop.journal.note(str(current_attempt().cancel_reason))
            raise

    steps.hook = capture
    async with app.worker():
        other = await app.task(shop.nap)(2 * TIMEOUT)
        handle = await app.task(run_hook)()
        with pytest.raises(RemoteTaskError, match="captured the event loop") as caught:
            await handle.result(timeout=10)
        assert await other.result(timeout=10) == "nap"
        (entry,) = (await handle.state()).eventlog
    assert caught.value.reason == "blocked_loop"
    assert caught.value.type == "amqp_tasks.exceptions.LoopBlocked"
    assert "in block\n" in caught.value.traceback
    assert entry["kind"] == "blocked_loop"
    assert shop.journal.count("blocked_loop") == 1
    assert handle.task_id in caplog.text


@pytest.mark.anyio
@pytest.mark.parametrize(
    "anyio_backend", [REAL_CLOCKS["asyncio"](), REAL_CLOCKS["uvloop"]()], ids=["asyncio", "uvloop"]
)
@pytest.mark.parametrize("is_task", [True, False], ids=["task", "callback"])
async def test_a_child_that_nobody_waits_for_is_the_attempt_s_too(
    make_app: MakeApp, is_task: bool, caplog: pytest.LogCaptureFixture
) -> None:
    app, children = watched(make_app), []

    async def sleep() -> None:
        block(30)

    async def capture() -> None:
        if is_task:
            children.append(asyncio.create_task(sleep()))
        else:
            asyncio.get_running_loop().call_soon(block, 30)
        await anyio.sleep_forever()

    steps.hook = capture
    async with app.worker():
        handle = await app.task(run_hook)()
        with pytest.raises(RemoteTaskError) as caught:
            await handle.result(timeout=10)
    assert caught.value.reason == "blocked_loop"
    for child in children:
        with pytest.raises(LoopBlocked):
            await child
    assert f"<Attempt 1 of {handle.task_id!r}" in caplog.text


def _block(value: int) -> int:
    time.sleep(30)
    return value


async def blocked_by_its_result() -> Annotated[int, AfterValidator(_block)]:
    return 1


@pytest.mark.anyio
async def test_a_validator_that_captures_the_loop_takes_down_its_task_only(
    make_app: MakeApp,
) -> None:
    app = watched(make_app)
    task = app.task(blocked_by_its_result)
    async with app.worker():
        handle = await task()
        with pytest.raises(RemoteTaskError) as caught:
            await handle.result(timeout=10)
        assert caught.value.reason == "blocked_loop"
        assert await (await app.task(shop.add)(1)).result(timeout=10) == 2


@pytest.mark.anyio
async def test_many_short_steps_are_load_and_nobody_s_fault(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    app = watched(make_app)
    before = time.monotonic()

    async def step() -> None:
        block(TIMEOUT / 10)

    async def many() -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(30):
                tasks.start_soon(step)

    steps.hook = many
    async with app.worker():
        await (await app.task(run_hook)()).result(timeout=10)
    assert time.monotonic() - before > 2 * TIMEOUT
    assert "captured" not in caplog.text


@pytest.mark.anyio
async def test_a_worker_that_is_cancelled_is_watched_until_it_has_stopped(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    app = watched(make_app)

    async def clean_up() -> None:
        with anyio.CancelScope(shield=True):
            shop.journal.note("cleaning")
            await anyio.sleep(2 * TIMEOUT)
            block(30)

    steps.hook = clean_up
    with anyio.CancelScope() as scope:
        async with app.worker():
            await app.task(run_hook)()
            await shop.journal.wait_for("cleaning")
            scope.cancel()
    (line,) = [line for line in caplog.text.splitlines() if "captured the event loop for" in line]
    assert "<Attempt" in line
    assert "for 0." in line, "and nobody was accused while it waited"


@pytest.mark.anyio
async def test_everything_is_as_before_afterwards(make_app: MakeApp) -> None:
    def handler(signum: int, frame: FrameType | None) -> None: ...

    threads, callbacks = threading.active_count(), list(gc.callbacks)
    before = signal.signal(signal.SIGVTALRM, handler)
    try:
        async with watched(make_app).worker():
            assert signal.getsignal(signal.SIGVTALRM) is not handler
            assert threading.active_count() > threads
        assert signal.getsignal(signal.SIGVTALRM) is handler
        assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
        assert gc.callbacks == callbacks
        assert not [one for one in threading.enumerate() if "watchdog" in one.name]
    finally:
        signal.signal(signal.SIGVTALRM, before)


@pytest.mark.anyio
async def test_if_it_is_off_nothing_is_touched(app: TaskApp) -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    async with app.worker():
        assert signal.getsignal(signal.SIGVTALRM) is before
        assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


@pytest.mark.anyio
async def test_a_second_worker_of_the_process_says_that_it_cannot_interrupt(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    async with watched(make_app).worker():
        assert "can interrupt nobody" not in caplog.text
        async with watched(make_app).worker():
            assert "another worker in this process" in caplog.text


@pytest.mark.anyio
async def test_in_memory_nobody_is_killed(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    app = watched(make_app, cancel_grace=0.1, on_blocked_loop="kill")

    async def swallow() -> None:
        for _ in range(2):
            with contextlib.suppress(LoopBlocked):
                block(3 * TIMEOUT)
                shop.journal.note("slept")

    steps.hook = swallow
    async with app.worker():
        handle = await app.task(run_hook)()
        await handle.result(timeout=10)
    assert shop.journal.count("slept") == 1, "once it is interrupted, and not again without a beat"
    assert caplog.text.count("captured the event loop") == 1


@pytest.mark.anyio
async def test_what_is_not_in_a_task_is_named_and_not_interrupted(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    async with watched(make_app).worker():
        await anyio.sleep(0.2)
        block(2 * TIMEOUT)
    assert "no task of this worker's" in caplog.text
    assert "in block\n" in caplog.text
