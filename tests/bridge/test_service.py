"""The service: opened and closed with guillotina, kept open when servers go away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import anyio
import pytest
from guillotina import app_settings
from guillotina.event import notify
from guillotina.events import ApplicationCleanupEvent, ApplicationInitializedEvent

from amqp_tasks import (
    BrokerUnavailable,
    NotConnected,
    PublishFailed,
    SettingsError,
    StateStoreError,
    Task,
    TaskApp,
    TaskHandle,
    TaskStatus,
)
from guillotina_bridge.application import start_service
from guillotina_bridge.exceptions import AMQPConfigurationNotFoundError
from guillotina_bridge.service import BridgeService, Role, get_service
from guillotina_bridge.settings import read_settings

from ..chaos.proxy import TcpProxy
from ..servers.process import free_port
from . import site as test_site
from .conftest import StartGuillotina, in_empty_context

pytestmark = pytest.mark.anyio

Settings = dict[str, Any]

outside: ContextVar[str] = ContextVar("outside", default="nothing")


class Stage:
    """What tasks of these tests have reached, and may go on to."""

    began: asyncio.Event
    go_on: asyncio.Event
    ended: list[str]


@pytest.fixture(autouse=True)
async def stage(anyio_backend: object) -> None:
    Stage.began, Stage.go_on, Stage.ended = asyncio.Event(), asyncio.Event(), []


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """No thread is left."""
    before = set(threading.enumerate())
    yield
    # guillotina's own, for passwords; AnyIO's have nothing to do and end with the loop.
    left = {
        thread
        for thread in set(threading.enumerate()) - before
        if not thread.name.startswith(("ThreadPoolExecutor", "AnyIO worker thread"))
    }
    assert not left


async def nap(name: str) -> str:
    Stage.began.set()
    await Stage.go_on.wait()
    Stage.ended.append(name)
    return name


async def spawn_in_the_end(name: str) -> None:
    """Spawn something that goes on when the last task has ended, and then queues another."""
    Stage.began.set()
    await Stage.go_on.wait()

    async def later() -> None:
        await asyncio.sleep(0.1)
        await get_service().app.add_task(nap, name, task_id=name)
        Stage.ended.append("queued")

    get_service().spawn(later())


def make_service(
    role: Role = "embedded",
    *,
    beside: Any = None,
    keep_trying: bool = False,
    settings: Settings | None = None,
    **amqp: Any,
) -> BridgeService:
    """A service that knows nothing of guillotina's tasks; in memory, or with `settings`."""
    known = settings or {"amqp": {}}
    read = read_settings({**known, "amqp": {**known["amqp"], "beacon_ttl": 0, **amqp}})
    app = TaskApp(**read.app_keywords)
    for function in (nap, spawn_in_the_end):
        app.task(function)
    return BridgeService(app, read, role, beside=beside, keep_trying=keep_trying)


@asynccontextmanager
async def running(service: BridgeService) -> AsyncIterator[BridgeService]:
    await service.start()
    try:
        yield service
    finally:
        Stage.go_on.set()
        await service.stop()
        assert left_tasks() == []


def left_tasks() -> list[str]:
    """Tasks of the loop beside the test's own."""
    return [
        repr(task)
        for task in asyncio.all_tasks()
        if task is not asyncio.current_task() and "TestRunner" not in repr(task)
    ]


# ------------------------------------------------------------------------ with guillotina


async def test_it_is_there_from_the_start_to_the_end(start_guillotina: StartGuillotina) -> None:
    with pytest.raises(AMQPConfigurationNotFoundError, match="guillotina_bridge does not run"):
        get_service()
    site = await start_guillotina()

    service = get_service()
    assert service.role == "embedded"
    assert service.worker_id is not None
    handle = await service.app.add_task(test_site.add.func, 1, 2)
    assert await handle.result(timeout=10) == 3

    await site.stop()
    with pytest.raises(AMQPConfigurationNotFoundError):
        get_service()
    assert service.worker_id is None


async def test_with_servers_nothing_is_left(
    start_guillotina: StartGuillotina, server_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    server_settings["amqp"]["embedded_worker"] = True
    site = await start_guillotina(**server_settings)
    handle = await get_service().app.add_task(test_site.add.func, 1, 2)
    assert await handle.result(timeout=10) == 3
    await site.stop()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_one_service_for_an_application_that_is_told_twice(
    start_guillotina: StartGuillotina,
) -> None:
    site = await start_guillotina()
    service = get_service()
    await notify(ApplicationInitializedEvent(site.app, asyncio.get_running_loop()))
    assert get_service() is service
    await notify(ApplicationCleanupEvent(site.app))
    with pytest.raises(AMQPConfigurationNotFoundError):
        get_service()


async def test_two_applications_have_a_service_each(start_guillotina: StartGuillotina) -> None:
    await start_guillotina()
    service, other = get_service(), object()
    await notify(ApplicationInitializedEvent(other, asyncio.get_running_loop()))
    assert get_service() is not service
    await notify(ApplicationCleanupEvent(other))
    assert get_service() is service


async def test_an_application_can_schedule_when_it_is_told_of_the_start(
    start_guillotina: StartGuillotina, monkeypatch: pytest.MonkeyPatch
) -> None:
    handles = []

    async def schedule() -> None:
        handles.append(await get_service().app.add_task(test_site.add.func, 3, 4))

    monkeypatch.setattr(test_site, "AT_START", [schedule])
    await start_guillotina()
    assert await handles[0].result(timeout=10) == 7


async def test_what_was_scheduled_is_drained(start_guillotina: StartGuillotina) -> None:
    site = await start_guillotina()
    service = get_service()
    await service.app.add_task(test_site.add.func, 1, 1)  # which is there
    service.app.task(nap)
    await service.app.add_task(nap, "drained")
    await Stage.began.wait()
    stopping = asyncio.create_task(site.stop())
    await asyncio.sleep(0)
    Stage.go_on.set()
    await stopping
    assert Stage.ended == ["drained"]


async def test_a_server_in_memory_must_be_the_worker(start_guillotina: StartGuillotina) -> None:
    with pytest.raises(SettingsError, match=r"set amqp\.embedded_worker to true"):
        await start_guillotina(amqp={})


async def test_without_a_broker_the_start_fails_and_leaves_nothing(
    start_guillotina: StartGuillotina, server_settings: Settings
) -> None:
    port = server_settings["amqp"]["port"] = free_port()
    server_settings["amqp"]["password"] = "sesame"
    before = set(left_tasks())
    with pytest.raises(BrokerUnavailable, match=str(port)) as caught:
        await start_guillotina(**server_settings)
    assert "sesame" not in str(caught.value)
    with pytest.raises(AMQPConfigurationNotFoundError):
        get_service()
    # guillotina has begun with its own utilities.
    assert [task for task in set(left_tasks()) - before if "bridge" in task] == []


@pytest.mark.parametrize("command", ["serve", ""])
@pytest.mark.parametrize(("port", "code"), [(1, 1), (0, 2)])
async def test_under_a_command_one_line_says_so(
    start_guillotina: StartGuillotina,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    port: int,
    code: int,
) -> None:
    await start_guillotina()
    monkeypatch.setitem(app_settings, "__run_command__", command)
    monkeypatch.setitem(app_settings, "amqp", {"persistent_manager": "redis"})
    redis = {"host": "127.0.0.1", "port": port, "password": "sesame"}
    monkeypatch.setitem(app_settings, "redis", redis)
    with pytest.raises(SystemExit) as caught:
        await start_service(ApplicationInitializedEvent(object(), asyncio.get_running_loop()))
    assert caught.value.code == code
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: ")
    assert ("127.0.0.1:1" if port else "redis.port=0") in line
    assert "sesame" not in line


@pytest.mark.parametrize("command", ["shell", "migrate"])
async def test_other_commands_do_not_need_servers_and_are_no_workers(
    start_guillotina: StartGuillotina,
    server_settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setitem(app_settings, "__run_command__", command)
    server_settings["amqp"] |= {"port": free_port(), "embedded_worker": True}
    server_settings["amqp"]["publish_timeout"] = 0.5
    await start_guillotina(**server_settings)
    assert get_service().role == "producer"
    with pytest.raises(PublishFailed, match=str(server_settings["amqp"]["port"])):
        await get_service().app.add_task(test_site.add.func, 1, 2)


@pytest.mark.parametrize("command", ["shell", "migrate"])
async def test_other_commands_take_no_tasks_into_their_memory(
    start_guillotina: StartGuillotina, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setitem(app_settings, "__run_command__", command)
    await start_guillotina()
    with pytest.raises(AMQPConfigurationNotFoundError, match="only `g serve` can have any"):
        await test_site.add(1, 2)


async def test_warnings_are_said_once_at_the_start(
    start_guillotina: StartGuillotina, caplog: pytest.LogCaptureFixture
) -> None:
    await start_guillotina(amqp={"embedded_worker": True, "connection_factory": "aioamqp.connect"})
    said = [r.message for r in caplog.records if r.name.startswith("guillotina_bridge")]
    assert len(said) == 2, said
    assert "connection_factory" in said[0]
    assert "RabbitMQ at localhost:5672 is not used" in said[1]


# ------------------------------------------------------------------------ its own task


async def test_it_sees_nothing_of_its_callers_context() -> None:
    seen: list[str] = []

    @asynccontextmanager
    async def beside(app: TaskApp) -> AsyncIterator[None]:
        seen.append(outside.get())
        yield

    outside.set("a transaction")
    async with running(make_service(beside=beside)):
        pass
    assert seen == ["nothing"]


async def test_stopping_takes_as_long_as_tasks_in_their_grace() -> None:
    service = make_service(shutdown_grace=30)
    async with running(service):
        handle = await service.app.add_task(nap, "in time")
        await Stage.began.wait()
        stopping = asyncio.create_task(service.stop())
        await asyncio.sleep(0.05)
        assert not stopping.done()
        Stage.go_on.set()
        await stopping
        assert Stage.ended == ["in time"]
    assert handle.task_id


@pytest.mark.parametrize("how", ["at once", "a second time", "cancelled"])
async def test_hurrying(how: str) -> None:
    service = make_service(shutdown_grace=300)
    async with running(service):
        await service.app.add_task(nap, "too late")
        await Stage.began.wait()
        began = time.monotonic()
        if how == "at once":
            await service.stop(0)
        else:
            stopping = asyncio.create_task(service.stop())
            await asyncio.sleep(0.05)
            assert not stopping.done()
            if how == "cancelled":
                stopping.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await stopping
            else:
                service.stop_soon(0)
                await stopping
        assert time.monotonic() - began < 20
        assert Stage.ended == []
        assert left_tasks() == []


async def test_a_scope_that_is_cancelled_does_not_spin_while_it_stops() -> None:
    service = make_service(shutdown_grace=300)
    async with running(service):
        await service.app.add_task(nap, "in time")
        await Stage.began.wait()
        asyncio.get_running_loop().call_later(0.3, Stage.go_on.set)
        used = time.thread_time()
        with anyio.move_on_after(0.05):
            await service.stop()
        assert Stage.ended == ["in time"]
        assert time.thread_time() - used < 0.25


@pytest.mark.parametrize("which", ["broker", "states"])
@pytest.mark.parametrize("role", ["producer", "embedded"])
async def test_a_start_that_is_cancelled_leaves_nothing(
    server_settings: Settings, which: str, role: Role
) -> None:
    where = server_settings["amqp" if which == "broker" else "redis"]
    with TcpProxy(where["port"]).running() as proxy:
        proxy.black_hole()
        where["port"] = proxy.port
        service = make_service(role, settings=server_settings, connect_timeout=300)
        starting = asyncio.create_task(service.start())
        while not proxy.connections:
            await asyncio.sleep(0.01)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError), anyio.fail_after(30):
            await starting
        assert left_tasks() == []
    with pytest.raises(AMQPConfigurationNotFoundError):
        get_service()


async def test_a_start_that_is_cancelled_before_it_begins() -> None:
    starting = asyncio.create_task(make_service().start())
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert left_tasks() == []


async def test_it_can_be_cancelled_by_force() -> None:
    service = make_service()
    await service.start()
    [owner] = [task for task in asyncio.all_tasks() if task.get_name() == "guillotina_bridge"]
    owner.cancel()
    await service.wait_ended()
    assert owner.cancelled()
    while left_tasks():
        await asyncio.sleep(0)


# ------------------------------------------------------------------------ servers away


async def log_has(caplog: pytest.LogCaptureFixture, text: str) -> None:
    with anyio.fail_after(30):
        while text not in caplog.text:
            await asyncio.sleep(0.02)


async def queued_when_connected(service: BridgeService, name: str) -> TaskHandle[Any]:
    with anyio.fail_after(30):
        while True:
            with contextlib.suppress(NotConnected, PublishFailed):
                return await service.app.add_task(nap, name)
            await asyncio.sleep(0.05)


async def test_a_producer_may_start_without_servers(
    server_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    with TcpProxy(server_settings["amqp"]["port"]).running() as proxy:
        proxy.refuse()
        server_settings["amqp"] |= {"port": proxy.port, "publish_timeout": 0.5}
        service = make_service("producer", keep_trying=True, settings=server_settings)
        async with running(service):
            with pytest.raises(PublishFailed, match=f"{proxy.port}.*nothing was queued"):
                await service.app.add_task(nap, "in vain")
            assert f"{proxy.port}" in caplog.text
            assert await service.app.list_tasks() == []
            proxy.restore()
            handle = await queued_when_connected(service, "once more")
            assert await handle.status() is TaskStatus.SCHEDULED


async def test_a_producer_may_start_without_states(
    server_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    with TcpProxy(server_settings["redis"]["port"]).running() as proxy:
        proxy.refuse()
        server_settings["redis"]["port"] = proxy.port
        service = make_service("producer", keep_trying=True, settings=server_settings)
        async with running(service):
            with pytest.raises(NotConnected, match=f"{proxy.port}.*tried again in the background"):
                _ = service.app
            errors = [r for r in caplog.records if r.levelno == logging.ERROR]
            assert [r.name for r in errors] == ["guillotina_bridge.service"]
            assert errors[0].exc_info is None
            proxy.restore()
            handle = await queued_when_connected(service, "once more")
            assert await handle.status() is TaskStatus.SCHEDULED


@pytest.mark.parametrize("which", ["amqp", "redis"])
async def test_stopping_ends_its_attempts_to_connect(server_settings: Settings, which: str) -> None:
    with TcpProxy(server_settings[which]["port"]).running() as proxy:
        proxy.refuse()
        server_settings[which]["port"] = proxy.port
        service = make_service("producer", keep_trying=True, settings=server_settings)
        async with running(service):
            proxy.restore()
            proxy.black_hole()
            while not proxy.connections:
                await asyncio.sleep(0.01)
            with anyio.fail_after(5):
                await service.stop()


@pytest.mark.parametrize("role", ["producer", "embedded"])
async def test_lost_servers_do_not_end_it(
    server_settings: Settings, role: Role, caplog: pytest.LogCaptureFixture
) -> None:
    with TcpProxy(server_settings["amqp"]["port"]).running() as proxy:
        server_settings["amqp"] |= {"port": proxy.port, "reconnect_timeout": 0.1}
        server_settings["amqp"]["publish_timeout"] = 0.5
        service = make_service(role, settings=server_settings)
        async with running(service):
            first = service.worker_id
            known = await service.app.add_task(nap, "known")
            proxy.refuse()
            proxy.cut()
            await log_has(caplog, "reconnect_timeout=0.1" if role == "embedded" else "tried again")
            # States can be looked at all the while, and it is they that say what has failed.
            assert await known.status() in (TaskStatus.SCHEDULED, TaskStatus.RUNNING)
            lost: Task[Any, Any] = Task(nap, service.app)
            lost = lost.options(task_id="lost", keep_unqueued=True)
            with pytest.raises(PublishFailed, match=str(proxy.port)):
                await lost("lost")
            assert (await service.app.handle("lost").state()).reason == "not_queued"
            proxy.restore()
            handle = await queued_when_connected(service, "again")
            if role == "embedded":
                Stage.go_on.set()
                assert await handle.result(timeout=30) == "again"
                assert service.worker_id not in (None, first)
            assert service.error is None


async def test_a_worker_s_command_ends_when_servers_are_lost(server_settings: Settings) -> None:
    with TcpProxy(server_settings["amqp"]["port"]).running() as proxy:
        server_settings["amqp"] |= {"port": proxy.port, "reconnect_timeout": 0.1}
        service = make_service("command", settings=server_settings)
        async with running(service):
            proxy.refuse()
            proxy.cut()
            with anyio.fail_after(30):
                await service.wait_ended()
            assert isinstance(service.error, BrokerUnavailable)


async def test_connections_that_are_lost_together_are_one_error(server_settings: Settings) -> None:
    @asynccontextmanager
    async def beside(app: TaskApp) -> AsyncIterator[None]:
        try:
            yield
        finally:
            raise BrokerUnavailable("lost as well")

    with TcpProxy(server_settings["amqp"]["port"]).running() as proxy:
        server_settings["amqp"] |= {"port": proxy.port, "reconnect_timeout": 0.1}
        service = make_service("command", settings=server_settings, beside=beside)
        async with running(service):
            proxy.refuse()
            proxy.cut()
            with anyio.fail_after(30):
                await service.wait_ended()
            assert isinstance(service.error, BrokerUnavailable)


async def test_a_worker_that_never_started_does_not_go_on_trying(
    server_settings: Settings,
) -> None:
    server_settings["redis"]["port"] = free_port()
    service = make_service("embedded", settings=server_settings)
    with pytest.raises(StateStoreError):
        await service.start()
    assert left_tasks() == []


# ------------------------------------------------------------------------ spawn


async def test_what_is_spawned_outlives_its_caller_and_is_awaited() -> None:
    outcome: list[str] = []

    async def later() -> None:
        await Stage.go_on.wait()
        outcome.append(outside.get())

    async def caller() -> None:
        outside.set("of the request")
        get_service().spawn(later())

    async with running(make_service("producer")) as service:
        await in_empty_context(caller())
        stopping = asyncio.create_task(service.stop())
        await asyncio.sleep(0.05)
        assert not stopping.done()
        Stage.go_on.set()
        await stopping
    assert outcome == ["of the request"]


async def test_a_worker_s_last_task_can_spawn(server_settings: Settings) -> None:
    service = make_service("command", settings=server_settings)
    async with running(service):
        await service.app.add_task(spawn_in_the_end, "spawned")
        await Stage.began.wait()
        service.stop_soon()
        Stage.go_on.set()
        await service.wait_ended()
    assert Stage.ended == ["queued"]
    async with running(make_service("producer", settings=server_settings)) as other:
        assert await other.app.handle("spawned").status() is TaskStatus.SCHEDULED


async def test_what_fails_when_spawned_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise LookupError("no such thing")

    async with running(make_service("producer")) as service:
        service.spawn(fail())
        service.spawn(asyncio.sleep(0))
    [record] = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert "LookupError: no such thing" in caplog.text
    assert record.exc_info is not None
    assert service.error is None


async def test_there_is_an_end_to_waiting_for_what_was_spawned() -> None:
    async with running(make_service("producer")) as service:
        service.spawn(anyio.sleep_forever())
        stopping = asyncio.create_task(service.stop())
        await asyncio.sleep(0.05)
        service.stop_soon(0)
        await stopping
        service = make_service("producer", publish_timeout=0.05, state_timeout=0.05)
        await service.start()
        service.spawn(anyio.sleep_forever())
        await service.stop()


async def test_nothing_is_spawned_afterwards() -> None:
    async with running(make_service("producer")) as service:
        pass
    with pytest.raises(AMQPConfigurationNotFoundError):
        service.spawn(anyio.sleep_forever())  # and is not complained about, for not being awaited


async def test_what_never_began_is_not_complained_about() -> None:
    async with running(make_service("producer")) as service:
        service.stop_soon(0)
        service.spawn(anyio.sleep_forever())
        await service.wait_ended()
