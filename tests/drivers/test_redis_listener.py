"""Listening to Redis over links that come and go."""

from __future__ import annotations

import time
from pathlib import Path

import anyio
import pytest

from amqp_tasks.abc import Listener
from amqp_tasks.core.lifecycle import TaskStatus

from ..servers.redis import RedisServer
from .redis_stores import LONG, SHORT, choose_loop, make_store, open_own_store, start_server  # noqa: F401  fixtures
from .state_stores import Asker, until

pytestmark = pytest.mark.anyio


async def test_a_listener_comes_back_after_a_restart(asker: Asker, server: RedisServer) -> None:
    async with asker.store.listen() as listener:
        await listener.subscribe("ended:before")
        await listener.subscribe("ended:dropped")
        await asker.make(TaskStatus.FINISHED, "before")
        assert await _first(listener) == ("ended:before", "finished")
        server.kill()
        with anyio.fail_after(LONG):
            await listener.subscribe("ended:while away")
            await listener.unsubscribe("ended:dropped")
        server.start()
        await _publish_until_heard(server, listener, "ended:while away")
        await asker.make(TaskStatus.FINISHED, "dropped")
        await asker.make(TaskStatus.ERRORED, "before")
        await _skip_to(listener, ("ended:before", "errored"), not_on="ended:dropped")


async def test_a_listener_opened_before_its_server(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "redis")
    async with make_store(server.url).listen() as listener:
        await listener.subscribe("ended:t")
        server.start()
        try:
            await _publish_until_heard(server, listener, "ended:t")
        finally:
            server.stop()


async def test_a_listener_whose_link_is_silently_dead(server: RedisServer) -> None:
    async with make_store(server.url, timeout=SHORT).listen() as listener:
        await listener.subscribe("ended:t")
        with server.client() as client:
            (before,) = (each["id"] for each in client.client_list(_type="pubsub"))
            server.pause()
            began = time.monotonic()
            await listener.subscribe("ended:u")
            assert time.monotonic() - began < SHORT + 5
            await anyio.sleep(3 * SHORT)  # no other way to let a link be silent
            server.resume()
            await _publish_until_heard(server, listener, "ended:u")
            await _publish_until_heard(server, listener, "ended:t")
            assert before not in [each["id"] for each in client.client_list(_type="pubsub")]


async def test_a_quiet_link_is_kept(server: RedisServer) -> None:
    async with make_store(server.url, timeout=0.3).listen() as listener:
        await listener.subscribe("ended:t")
        with server.client() as client:
            (before,) = (each["id"] for each in client.client_list(_type="pubsub"))

            async def was_asked_twice() -> bool:
                return bool(client.info("commandstats")["cmdstat_ping"]["calls"] >= 3)

            await until(was_asked_twice)
            assert [each["id"] for each in client.client_list(_type="pubsub")] == [before]
            client.publish("test:ended:t", "finished")
        assert await _first(listener) == ("ended:t", "finished")


async def test_a_listener_that_nobody_reads_drops(asker: Asker, server: RedisServer) -> None:
    async with asker.store.listen() as listener:
        await listener.subscribe("ended:t")
        with server.client() as client:
            pipeline = client.pipeline(transaction=False)
            for number in range(10_050):
                pipeline.publish("test:ended:t", str(number))
            pipeline.execute()
        await listener.subscribe("ended:u")  # confirmed after all of that
        for number in range(10_000):
            assert await _first(listener) == ("ended:t", str(number))
        await asker.make(TaskStatus.FINISHED, "u")
        assert await _first(listener) == ("ended:u", "finished")


async def test_leaving_a_listener_closes_its_connection(asker: Asker, server: RedisServer) -> None:
    async with asker.store.listen() as listener:
        await listener.subscribe("ended:t")
    with server.client() as client:

        async def is_closed() -> bool:
            return client.client_list(_type="pubsub") == []

        await until(is_closed)


async def _first(listener: Listener) -> tuple[str, str]:
    with anyio.fail_after(LONG):
        async for announcement in listener:
            return announcement
    raise AssertionError("the iteration has ended")


async def _skip_to(listener: Listener, wanted: tuple[str, str], *, not_on: str) -> None:
    while (heard := await _first(listener)) != wanted:
        assert heard[0] != not_on


async def _publish_until_heard(server: RedisServer, listener: Listener, topic: str) -> None:
    async def publish() -> None:
        with server.client() as client:
            while True:
                client.publish(f"test:{topic}", "finished")
                await anyio.sleep(0.05)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(publish)
        await _skip_to(listener, (topic, "finished"), not_on="ended:dropped")
        tasks.cancel_scope.cancel()
