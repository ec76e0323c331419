"""The Redis store when its server is away, slow, strange or against it."""

from __future__ import annotations

import asyncio
import time
import types
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import pytest

from amqp_tasks.core.lifecycle import TaskStatus
from amqp_tasks.core.operations import Beat, Created, Granted, IsAlive, Read
from amqp_tasks.drivers.redis import RedisStore
from amqp_tasks.exceptions import (
    SettingsError,
    StateCorrupt,
    StateStoreError,
    StateStoreRefused,
    StateStoreUnavailable,
)

from ..servers.process import free_port
from ..servers.redis import RedisServer
from .redis_stores import LONG, SHORT, choose_loop, make_store, open_own_store, start_server  # noqa: F401  fixtures
from .state_stores import HOUR, Asker

pytestmark = pytest.mark.anyio

T = TypeVar("T")


def check_text(error: Exception, *words: str) -> None:
    """Check that an error is one line that says `words` and no password."""
    text = str(error)
    assert "\n" not in text
    assert "secret" not in text
    for word in words:
        assert word in text
    assert error.__cause__ is not None


# --------------------------------------------------------------------- opening


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1/", "redis://127.0.0.1:99999/", "redis://127.0.0.1/?colour=red"),
        "redis://127.0.0.1/?socket_timeout=soon",
    ],
)
def test_a_url_that_will_not_do(url: str) -> None:
    with pytest.raises(SettingsError, match="state_url"):
        make_store(url)


def test_a_prefix_that_would_tear_a_tasks_keys_apart() -> None:
    with pytest.raises(SettingsError, match=r"state_prefix='a{}b{}': .* 'ab{}' would do"):
        RedisStore("redis://127.0.0.1/", prefix="a{}b{}", timeout=1, connect_timeout=1)


def test_the_address_holds_no_password() -> None:
    assert make_store("redis://u:secret@h:1/2").address == "redis://u:***@h:1/2"
    assert make_store("unix:///tmp/s?password=secret").address == "unix:///tmp/s"


async def test_open_when_nobody_is_there() -> None:
    port = free_port()
    with pytest.raises(StateStoreUnavailable) as raised:
        async with make_store(f"redis://:secret@127.0.0.1:{port}/0").open():
            pass
    check_text(raised.value, f"127.0.0.1:{port}", "state_url")


async def test_open_when_nobody_answers(server: RedisServer) -> None:
    server.pause()
    began = time.monotonic()
    with pytest.raises(StateStoreUnavailable) as raised:
        async with make_store(server.url, timeout=SHORT).open():
            pass
    assert time.monotonic() - began < SHORT + 5
    check_text(raised.value, f"127.0.0.1:{server.port}", f"{SHORT:g} s")


async def test_open_where_something_else_answers() -> None:
    async def answer(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(listener.serve, answer)
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        with pytest.raises(StateStoreUnavailable) as raised:
            async with make_store(f"redis://127.0.0.1:{port}/0").open():
                pass
        check_text(raised.value, f"127.0.0.1:{port}")
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("login", ["", ":secret2@", "default:secret2@", "nobody:secret2@"])
async def test_open_with_a_wrong_login(tmp_path: Path, login: str) -> None:
    server = RedisServer(tmp_path / "redis", password="secret1")
    server.start()
    try:
        store = make_store(f"redis://{login}127.0.0.1:{server.port}/0")
        with pytest.raises(StateStoreRefused) as raised:
            async with store.open():
                pass
        check_text(raised.value, f"127.0.0.1:{server.port}", "password")
        async with make_store(server.url).open():
            pass
    finally:
        server.stop()


async def test_a_login_without_a_permission(server: RedisServer) -> None:
    with server.client() as client:
        client.acl_setuser(
            "reader", enabled=True, passwords=["+secret"], keys=["*"], commands=["+@read", "+ping"]
        )
    store = make_store(f"redis://reader:secret@127.0.0.1:{server.port}/0")
    with pytest.raises(StateStoreRefused) as raised:
        async with store.open():
            pass
    check_text(raised.value, f"127.0.0.1:{server.port}", "give this user")


async def test_announcing_without_permission_fails_nothing(server: RedisServer) -> None:
    with server.client() as client:
        client.acl_setuser(
            *("quiet",), enabled=True, passwords=["+secret"], keys=["*"], commands=["+@all"]
        )
        client.acl_setuser("quiet", enabled=True, reset_channels=True, commands=["+@all"])
    store = make_store(f"redis://quiet:secret@127.0.0.1:{server.port}/0")
    asker = Asker(store, time.time)
    async with store.open():
        await asker.make(TaskStatus.FINISHED)
        assert (await asker.read()).status is TaskStatus.FINISHED


async def test_a_read_only_replica(tmp_path: Path, server: RedisServer) -> None:
    replica = RedisServer(tmp_path / "replica", replica_of=server)
    replica.start()
    try:
        with pytest.raises(StateStoreRefused) as raised:
            async with make_store(replica.url).open():
                pass
        check_text(raised.value, f"127.0.0.1:{replica.port}", "primary")
    finally:
        replica.stop()


# ------------------------------------------------------------ errors of operations


async def test_a_primary_that_becomes_a_replica(asker: Asker, server: RedisServer) -> None:
    await asker.make(TaskStatus.RUNNING)
    with server.client() as client:
        client.replicaof("127.0.0.1", free_port())
        refused, seen, alive = await asker.store.apply(
            [asker.create("u"), Read(task_id="t"), IsAlive(owner="w")]
        )
        assert isinstance(refused, StateStoreRefused)
        check_text(refused, f"127.0.0.1:{server.port}", "primary")
        assert seen is not None
        assert alive is False
        client.replicaof("NO", "ONE")
    assert await asker.ask(asker.create("u")) == Created(new=True, owed=True)


async def test_a_full_server(asker: Asker, server: RedisServer) -> None:
    await asker.make(TaskStatus.RUNNING)
    with server.client() as client:
        client.config_set("maxmemory", "1")
        failed, seen = await asker.store.apply([asker.create("u"), Read(task_id="t")])
        assert type(failed) is StateStoreError
        check_text(failed, f"127.0.0.1:{server.port}", "maxmemory")
        assert seen.status is TaskStatus.RUNNING
        client.config_set("maxmemory", "0")
    assert await asker.is_gone("u")


async def test_somebody_elses_keys(asker: Asker, server: RedisServer) -> None:
    with server.client() as client:
        client.set("test:{string}:state", "x")
        client.hset("test:{hash}:state", "x", "y")
        client.hset("test:{odd}:state", mapping={"status": "lost", "fence": "many"})
    string, a_hash, odd, new = await asker.store.apply(
        [
            asker.create("string"),
            Read(task_id="hash"),
            asker.claim("odd"),
            asker.create("new"),
        ]
    )
    for answer in (string, a_hash, odd):
        assert type(answer) is StateCorrupt
        check_text(answer, f"127.0.0.1:{server.port}")
    assert new == Created(new=True, owed=True)


async def test_scripts_are_loaded_again(asker: Asker, server: RedisServer) -> None:
    with server.client() as client:
        client.script_flush()
        answers = await asker.store.apply(
            [
                Beat(owner="w1", ttl=HOUR, info="{}"),
                asker.create(),
                asker.claim(),
                Beat(owner="w2", ttl=HOUR, info="{}"),
            ]
        )
        first, created, granted, second = answers
        assert (first, second) == (False, False)  # not sent twice, or they would be known
        assert created == Created(new=True, owed=True)
        assert isinstance(granted, Granted)
        client.script_flush()
        assert await asker.ask(asker.settle(granted.fence)) == "written"
    assert (await asker.read()).status is TaskStatus.FINISHED


# ----------------------------------------------------------------- lost servers


async def test_a_server_that_is_killed_and_comes_back(asker: Asker, server: RedisServer) -> None:
    await asker.make(TaskStatus.RUNNING)
    server.kill()
    for _ in range(2):
        with pytest.raises(StateStoreUnavailable) as raised:
            await asker.ask(asker.create())
        check_text(raised.value, f"127.0.0.1:{server.port}", "state_url")
    server.start()
    assert await asker.is_gone()
    await asker.make(TaskStatus.FINISHED)


async def test_a_server_that_restarts_while_nobody_looks(asker: Asker, server: RedisServer) -> None:
    await asker.make(TaskStatus.RUNNING)
    server.restart()
    # The news that the old connection was closed is there; the loop has to look at it.
    for _ in range(10):
        await anyio.lowlevel.checkpoint()
    assert await asker.is_gone()


async def test_a_server_that_hangs(server: RedisServer) -> None:
    asker = Asker(make_store(server.url, timeout=SHORT), time.time)
    async with asker.store.open():
        await asker.make(TaskStatus.RUNNING)
        server.pause()
        began = time.monotonic()
        with pytest.raises(StateStoreUnavailable) as raised:
            await asker.ask(asker.create("u"))
        assert time.monotonic() - began < SHORT + 5
        check_text(raised.value, f"127.0.0.1:{server.port}", f"{SHORT:g} s")
        server.resume()
        # Were the late replies read by others, these would get the wrong answers.
        for _ in range(3):
            assert await asker.ask(IsAlive(owner="w")) is False
            assert (await asker.read()).status is TaskStatus.RUNNING


async def test_cancelled_while_the_server_hangs(asker: Asker, server: RedisServer) -> None:
    await asker.make(TaskStatus.RUNNING)
    server.pause()
    with anyio.move_on_after(0.05) as scope:
        await asker.store.apply([asker.create("u"), IsAlive(owner="w")])
    assert scope.cancelled_caught
    server.resume()
    assert (await asker.read()).status is TaskStatus.RUNNING


@pytest.mark.parametrize("native", [False, True], ids=["scope", "native"])
async def test_cancelled_in_every_phase(server: RedisServer, native: bool) -> None:
    """Connecting, sending, waiting for the answers, and for the index; then all is well."""
    phase, was_reached = 0, True
    while was_reached:
        phase += 1
        store = make_store(server.url)
        asker = Asker(store, time.time)
        batch = [asker.create(f"t{phase}"), IsAlive(owner="w")]
        was_reached = await _cancel_at(phase, store.apply(batch), native=native)
        # More than the pool has connections: each must have come back to it.
        answers = await asyncio.gather(*(store.apply(batch) for _ in range(20)))
        assert [list(answer) for answer in answers] == [[Created(new=True, owed=True), False]] * 20
        async with store.open():
            assert (await asker.read(f"t{phase}")).nonce == "n1"
            assert await asker.list_ids(prefix=f"t{phase}") == [f"t{phase}"]
    assert phase > 4


async def _cancel_at(phase: int, work: Coroutine[Any, Any, object], *, native: bool) -> bool:
    """Run `work`; cancel it when it begins to wait for the `phase`-th time, if it does.

    Return whether it did. It may be done all the same: what it waits for can be faster.
    """
    waits = 0
    scope = anyio.CancelScope()
    task: asyncio.Task[object]

    def count() -> None:
        nonlocal waits
        waits += 1
        if waits == phase:
            if native:
                task.cancel()
            else:
                scope.cancel()

    async def run() -> None:
        with scope:
            await _watched(work, count)

    task = asyncio.ensure_future(run())
    await asyncio.wait([task])
    return waits >= phase


@types.coroutine
def _watched(work: Coroutine[Any, Any, T], on_wait: Callable[[], None]) -> Generator[Any, Any, T]:
    """Run `work`; call `on_wait` each time that it begins to wait."""
    step: Callable[[Any], Any] = work.send
    value: Any = None
    while True:
        try:
            awaited = step(value)
        except StopIteration as stop:
            result: T = stop.value
            return result
        on_wait()
        try:
            step, value = work.send, (yield awaited)
        except BaseException as error:
            step, value = work.throw, error
