"""Any bytes and any headers, many thousand times, with the drivers in memory.

The same as `tests/e2e/test_fuzz.py`, which has fewer messages and real servers.
"""

from __future__ import annotations

import gc
import json
import math
import os
import string
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from datetime import UTC
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amqp_tasks import RetryPolicy, TaskApp
from amqp_tasks.core.message import Message, decode
from amqp_tasks.core.outcome import Reason
from amqp_tasks.core.settlement import Publication
from amqp_tasks.exceptions import DecodeError

from ..conftest import VIRTUAL_CLOCKS
from . import shop
from .harness import depth, error_messages, memory, now, record_of

EXAMPLES = int(os.environ.get("AMQP_TASKS_TEST_FUZZ", "40"))
ADD = f"{shop.__name__}.add"
FAIL = f"{shop.__name__}.fail"
REASONS = {"exception", *Reason}
FAR = 1e15
"""Seconds, thirty million years: a time beyond is another test's."""

pytestmark = pytest.mark.patience(120)


# ------------------------------------------------------------------------ strategies

texts = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(codec=None, categories=["Cs", "Cc", "Cf", "Lu"]), max_size=20),
    st.sampled_from(["", ADD, FAIL, "os.system", "nan", "inf", "1e999", "9" * 5_000, "x" * 401]),
)
numbers = st.one_of(
    st.integers(),
    st.integers(-(2**80), 2**80),
    st.floats(),
    st.booleans(),
    st.sampled_from([10**4_000, -(10**4_000), 2**31, 2**31 - 1, 2**63]),
)
scalars = st.one_of(st.none(), numbers, texts)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
header_values = st.one_of(
    values,
    st.binary(max_size=20),
    st.binary(max_size=20).map(bytearray),
    st.datetimes(timezones=st.just(UTC)),
    st.decimals(),
    st.text(max_size=3).map(lambda text: text * 40_000),
)
our_headers = st.sampled_from(
    ["attempt", "due", "deadline", "timeout", "parent", "parent-owner", "parked", "unknown", ""]
).map("task-{}".format)
header_names = st.one_of(
    our_headers,
    our_headers,
    st.sampled_from(["CC", "BCC", "x-death", "x-delay", "error-reason", "error-traceback"]),
    st.text(max_size=20),
)


def near(value: Any) -> bool:
    """Whether a header is none that lets a message wait for longer than the world lasts."""
    try:
        return not FAR < float(value) < math.inf
    except (TypeError, ValueError, OverflowError):
        return True


header_tables = st.dictionaries(header_names, header_values, max_size=5).filter(
    lambda headers: near(headers.get("task-due"))
)
calls = st.fixed_dictionaries(
    {},
    optional={
        "task_id": st.one_of(texts, st.text(string.printable, min_size=1), values),
        "func": st.one_of(st.sampled_from([ADD, ADD, FAIL]), texts, values),
        "args": st.one_of(st.just([1, 2]), st.lists(values, max_size=3), values),
        "kwargs": st.one_of(st.just({}), st.dictionaries(texts, values, max_size=3), values),
        "container_id": values,
    },
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good body in which some bytes were replaced, taken out or put in."""
    body = bytearray(
        json.dumps({"func": ADD, "args": [1, "ü"], "kwargs": {}, "task_id": "x"}), "ascii"
    )
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(body)))
        body[start : start + draw(st.integers(0, 5))] = draw(st.binary(max_size=5))
    return bytes(body)


def as_body(call: object) -> bytes:
    return json.dumps(call, ensure_ascii=True).encode()


bodies = st.one_of(st.binary(max_size=60), damaged(), calls.map(as_body), calls.map(as_body))


# ------------------------------------------------------------------------- the tests


def run_in_worker(clock: str, main: Callable[[TaskApp], Coroutine[Any, Any, None]]) -> None:
    """Run an async function within a worker, on an event loop of its own."""
    shop.journal = shop.Journal()
    app = TaskApp(broker_url="memory://", state_url="memory://", queue="shop", clock=now)
    app.task(shop.add)
    app.task(retry=RetryPolicy(max_retries=1, delay=0.5))(shop.fail)

    async def run() -> None:
        async with app.worker():
            await main(app)

    backend, options = VIRTUAL_CLOCKS[clock]()
    anyio.run(run, backend=backend, backend_options=options)


async def publish_raw(app: TaskApp, messages: Iterable[tuple[bytes, Mapping[str, Any]]]) -> None:
    topology = app._servers("test").topology
    async with memory(app)[0].session() as session:
        for body, headers in messages:
            publication = Publication(queue=topology.main, body=body, headers=dict(headers))
            await session.publish(topology.exchange, publication, 1.0)


def in_flight(app: TaskApp) -> int:
    """How many messages are in the main queue or without a verdict."""
    broker = memory(app)[0]
    consumers = [consumer for session in broker._sessions for consumer in session._consumers]
    return depth(app) + sum(len(consumer._unacked) for consumer in consumers)


async def check_all(app: TaskApp, messages: Sequence[tuple[bytes, Mapping[str, Any]]]) -> None:
    """Publish, wait until each has come to its end, and see that it is the right one."""
    await publish_raw(app, messages)
    assert await (await app.add_task(shop.add, 1, 1)).result(timeout=60) == 2
    await anyio.sleep(60)  # a retry, and copies that met a task that was running
    await anyio.wait_all_tasks_blocked()
    assert in_flight(app) == 0
    dead = error_messages(app)
    for _, headers in dead:
        assert headers["error-reason"] in REASONS
        assert headers["error-type"]
        assert headers["error-message"]
    refused = [body for body, headers in dead if headers["error-reason"] == Reason.UNDECODABLE]
    for body, headers in messages:
        try:
            message = decode(body, headers)
        except DecodeError:
            refused.remove(body)
            continue
        if message.due is None or message.due <= now():
            assert record_of(app, message.task_id).status.ended
    assert refused == []


@pytest.mark.parametrize("clock", VIRTUAL_CLOCKS)
@given(messages=st.lists(st.tuples(bodies, header_tables), min_size=1, max_size=12))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_message_comes_to_its_end_and_the_worker_goes_on(
    clock: str, messages: list[tuple[bytes, dict[str, Any]]]
) -> None:
    async def main(app: TaskApp) -> None:
        await check_all(app, messages)

    run_in_worker(clock, main)


@pytest.mark.parametrize("clock", VIRTUAL_CLOCKS)
@given(headers=header_tables)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_headers_of_a_good_call(clock: str, headers: dict[str, Any]) -> None:
    async def main(app: TaskApp) -> None:
        good = as_body({"func": ADD, "args": [1, 2], "kwargs": {}, "task_id": "good"})
        fails = as_body({"func": FAIL, "args": [], "kwargs": {}, "task_id": "fails"})
        await check_all(app, [(good, headers), (fails, headers)])

    run_in_worker(clock, main)


@pytest.mark.parametrize("clock", VIRTUAL_CLOCKS)
@given(members=calls, tries=st.integers(1, 3))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_call_again_and_again(clock: str, members: dict[str, Any], tries: int) -> None:
    """The same message several times, in several guises: one state, one end."""

    async def main(app: TaskApp) -> None:
        body = as_body({"func": ADD, "args": [1], "kwargs": {}, **members, "task_id": "same"})
        await check_all(app, [(body, {"task-attempt": n}) for n in range(1, tries + 1)])

    run_in_worker(clock, main)


@pytest.mark.parametrize("clock", VIRTUAL_CLOCKS)
@pytest.mark.parametrize("due", ["1e308", 1.7976931348623157e308])
def test_a_time_in_the_farthest_future(clock: str, due: object) -> None:
    async def main(app: TaskApp) -> None:
        body = as_body({"func": ADD, "args": [1], "kwargs": {}, "task_id": "later"})
        await check_all(app, [(body, {"task-due": due})])

    run_in_worker(clock, main)


@pytest.mark.parametrize("clock", VIRTUAL_CLOCKS)
@pytest.mark.parametrize(
    "members",
    [
        {"func": ADD, "args": [1]},
        {"func": ADD, "args": "no list"},
        {"func": ADD, "args": ["no number"]},
        {"func": FAIL},
        {"func": "unknown"},
    ],
    ids=str,
)
def test_a_message_is_forgotten_without_the_garbage_collector(
    clock: str, members: dict[str, Any]
) -> None:
    """A cycle would keep its body, of up to 128 MB, for as long as nothing else is collected."""

    async def main(app: TaskApp) -> None:
        gc.collect()
        gc.disable()
        try:
            for number in range(10):
                body = as_body({**members, "task_id": f"task-{number}"})
                await publish_raw(app, [(body, {})])
                await anyio.sleep(60)
            alive = [thing for thing in gc.get_objects() if type(thing) is Message]
        finally:
            gc.enable()
        # The loops keep what they had last.
        assert len(alive) <= 2

    run_in_worker(clock, main)
