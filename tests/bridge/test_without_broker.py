"""Scheduling without a broker: in hooks nobody is told, so it is written down."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread
import pytest
from guillotina.request import Request
from prometheus_client import REGISTRY

from amqp_tasks import NotConnected, PublishFailed
from guillotina_bridge.exceptions import TaskNotFoundException
from guillotina_bridge.service import get_service
from guillotina_bridge.state import TaskState, get_state_manager

from ..conftest import REAL_CLOCKS
from ..servers.process import free_port
from ..servers.rabbitmq import RabbitServer
from . import by_hand
from .conftest import Database, Site, StartGuillotina
from .scheduling import note, note_once, within_request

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """One is enough: what is slow here is the broker."""
    return REAL_CLOCKS["asyncio"]()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A broker of these tests' own, which they may stop."""
    server = RabbitServer(tmp_path_factory.mktemp("rabbitmq"))
    server.start()
    yield server
    server.stop()


@asynccontextmanager
async def stopped(broker: RabbitServer) -> AsyncIterator[None]:
    await anyio.to_thread.run_sync(broker.kill)
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(broker.start_again)


@pytest.fixture
async def producer(
    start_guillotina: StartGuillotina,
    server_settings: dict[str, Any],
    postgres_database: Database,
    broker: RabbitServer,
) -> Site:
    """A site with few connections to its database, and nobody who runs tasks."""
    amqp = {
        **server_settings.pop("amqp"),
        "port": broker.port,
        "publish_timeout": 1.5,
        "connect_timeout": 2,
        "after_commit_wait": 0.3,
    }
    database = {**postgres_database, "pool_size": 2}
    site = await start_guillotina(
        database, amqp=amqp, applications=["tests.bridge.scheduling"], **server_settings
    )
    await site.make_container("a")
    return site


def errors() -> float:
    return REGISTRY.get_sample_value("amqp_schedule_errors_total") or 0


async def until(is_so: Callable[[], Any]) -> None:
    with anyio.fail_after(30):
        while not is_so():
            await anyio.sleep(0.02)


def not_queued(log: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in log.records
        if record.levelno == logging.ERROR and "queued" in record.getMessage()
    ]


@pytest.mark.parametrize("way", ["after_commit", "after_request"])
async def test_the_answer_comes_and_the_task_is_errored(
    producer: Site, broker: RabbitServer, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    ids = ["one", "two", "three"]  # more than there are connections to the database
    coming = iter(ids)

    async def view(context: Any, request: Request) -> None:
        getattr(note_once, way)(1, _task_id=next(coming))
        context.title = "stored"
        context.register()

    before = errors()
    async with stopped(broker):
        began = time.monotonic()
        for _ in ids:
            assert (await within_request(producer, view)).status_code == 200
        assert time.monotonic() - began < 1.5  # of the publish_timeout alone
        pool = producer.root["db"].storage.pool
        assert pool.get_idle_size() == pool.get_size()
        assert (await producer.request("GET", "/db/a")).json()["title"] == "stored"
        await until(lambda: errors() == before + len(ids))
    for task_id in ids:
        state = await TaskState(task_id).get_state()
        assert (state["status"], state["reason"]) == ("errored", "not_queued")
        assert str(broker.port) in state["error"]
        assert f"{task_id} (tests.bridge.scheduling.note_once) was not queued" in caplog.text
    assert len(not_queued(caplog)) == len(ids)


async def test_so_it_is_if_there_never_was_a_broker(
    start_guillotina: StartGuillotina,
    server_settings: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def now(context: Any, request: Request) -> None:
        with pytest.raises(PublishFailed, match="nobody listens there"):
            await note(1, _retries=0, _task_id="told")

    async def view(context: Any, request: Request) -> None:
        note_once.after_commit(1, _task_id=ours)

    server_settings["amqp"] |= {
        "port": free_port(),
        "on_broker_down": "retry",
        "publish_timeout": 0.5,
    }
    site = await start_guillotina(applications=["tests.bridge.scheduling"], **server_settings)
    await site.make_container("a")
    ours = "task:db-a-one"
    before = errors()
    assert (await within_request(site, now)).status_code == 200
    with pytest.raises(TaskNotFoundException):
        await TaskState("told").get_status()  # who calls is told, and may try again
    assert (await within_request(site, view)).status_code == 200
    await until(lambda: errors() == before + 1)
    assert f"{ours} (tests.bridge.scheduling.note_once) was not queued" in caplog.text
    state = (await site.request("GET", f"/db/a/@amqp-tasks/{ours}")).json()
    assert (state["status"], state["reason"]) == ("errored", "not_queued")


async def test_without_states_nothing_can_be_written_down(
    start_guillotina: StartGuillotina, caplog: pytest.LogCaptureFixture
) -> None:
    async def now(context: Any, request: Request) -> None:
        with pytest.raises(NotConnected):
            await note(1, _retries=0)

    async def view(context: Any, request: Request) -> None:
        note_once.after_commit(1, _task_id="mine")

    amqp = {"persistent_manager": "redis", "port": free_port(), "on_broker_down": "retry"}
    redis = {"host": "127.0.0.1", "port": free_port()}
    site = await start_guillotina(amqp=amqp, redis=redis, applications=["tests.bridge.scheduling"])
    await site.make_container("a")
    before = errors()
    assert (await within_request(site, now)).status_code == 200
    assert (await within_request(site, view)).status_code == 200
    await until(lambda: errors() == before + 1)
    assert "mine (tests.bridge.scheduling.note_once) was not queued" in caplog.text


async def test_a_state_manager_of_an_applications_own_is_told(
    start_guillotina: StartGuillotina, server_settings: dict[str, Any], broker: RabbitServer
) -> None:
    async def view(context: Any, request: Request) -> None:
        note.after_commit(1, _retries=0, _task_id="hook")
        with pytest.raises(PublishFailed):
            await note(1, _retries=0, _task_id="call")

    server_settings["amqp"] |= {
        "port": broker.port,
        "persistent_manager": "own",
        "publish_timeout": 0.5,
    }
    site = await start_guillotina(applications=["tests.bridge.own_manager"], **server_settings)
    await site.make_container("a")
    before, manager = errors(), get_state_manager()
    async with stopped(broker):
        assert (await within_request(site, view)).status_code == 200
        await until(lambda: errors() == before + 1)
    for task_id in ("hook", "call"):
        assert manager.history(task_id) == ["scheduled", "errored"]
        assert manager.states[task_id]["reason"] == "not_queued"
        assert str(broker.port) in manager.states[task_id]["error"]
        assert (await TaskState(task_id).join())["status"] == "errored"


async def test_what_may_be_queued_is_tried_again_until_it_is_certain(
    producer: Site, broker: RabbitServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def first(context: Any, request: Request) -> None:
        await note(0)  # from then on, there is all that it takes to publish

    async def view(context: Any, request: Request) -> None:
        note_once.after_commit(1, _task_id="mine")

    assert (await within_request(producer, first)).status_code == 200
    before, queue = errors(), get_service().app.settings.queue
    await anyio.to_thread.run_sync(broker.suspend)
    try:
        assert (await within_request(producer, view)).status_code == 200
        await until(lambda: "mine (tests.bridge.scheduling.note_once) may be queued" in caplog.text)
    finally:
        await anyio.to_thread.run_sync(broker.resume)
    await producer.stop()  # which waits for those that still try
    queued = await anyio.to_thread.run_sync(by_hand.look_into, broker.url, queue)
    assert "mine" in [json.loads(body)["task_id"] for body, _ in queued]
    assert errors() == before
    assert not_queued(caplog) == []


async def test_before_the_commit_nothing_is_stored_that_could_not_be_queued(
    producer: Site, broker: RabbitServer
) -> None:
    async def view(context: Any, request: Request) -> None:
        note.before_commit(1, _retries=0, _task_id="mine")
        context.title = "stored"
        context.register()

    async with stopped(broker):
        for _ in range(3):
            assert (await within_request(producer, view)).status_code == 500
        assert (await producer.request("GET", "/db/a")).json()["title"] != "stored"
        with pytest.raises(TaskNotFoundException):
            await TaskState("mine").get_status()


async def test_a_call_is_tried_again_until_the_broker_is_back(
    producer: Site, broker: RabbitServer
) -> None:
    async def without(context: Any, request: Request) -> None:
        with pytest.raises(PublishFailed):
            await note(1, _retries=0, _task_id="none")

    async def meanwhile(context: Any, request: Request) -> None:
        await note(2, _retries=50, _task_id="one")

    async with anyio.create_task_group() as tasks, stopped(broker):
        assert (await within_request(producer, without)).status_code == 200
        tasks.start_soon(within_request, producer, meanwhile)
        await anyio.sleep(2)  # longer than one try takes
    assert await TaskState("one").get_status() == "scheduled"
    with pytest.raises(TaskNotFoundException):
        await TaskState("none").get_status()


async def test_what_is_not_queued_when_the_service_ends_is_told(
    producer: Site, broker: RabbitServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def view(context: Any, request: Request) -> None:
        note.after_commit(1, _retries=1000, _task_id="mine")

    before = errors()
    async with stopped(broker):
        assert (await within_request(producer, view)).status_code == 200
        await producer.stop()
    assert "mine (tests.bridge.scheduling.note) was not queued" in caplog.text
    assert errors() == before + 1
