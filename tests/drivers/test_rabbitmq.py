"""What is particular to RabbitMQ: refusals, alarms, crashes, and cancellation in mid-call."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager

import anyio
import pytest

from amqp_tasks.abc import BrokerSession
from amqp_tasks.core.topology import LADDER_MS, QueueSpec
from amqp_tasks.drivers.rabbitmq import RabbitBroker
from amqp_tasks.drivers.rabbitmq.errors import mismatch
from amqp_tasks.drivers.rabbitmq.link import GOODBYE
from amqp_tasks.drivers.rabbitmq.wire import quiet_context
from amqp_tasks.exceptions import (
    BrokerError,
    BrokerRefused,
    BrokerUnavailable,
    PublishFailed,
    QueueMismatch,
)

from ..servers.process import free_port
from ..servers.rabbitmq import RabbitServer, rabbit_server  # noqa: F401  fixture
from .brokers import (  # noqa: F401  fixtures
    LIMIT,
    RabbitRig,
    choose_real_backend,
    make_broker,
    nothing_left,
    open_rabbit,
    take,
)

pytestmark = pytest.mark.anyio


# ------------------------------------------------------------------- connecting


@contextmanager
def listener(*, backlog: int = 8) -> Iterator[int]:
    """A port on which the connections are taken, and nothing is said."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(backlog)
        yield sock.getsockname()[1]


async def refusal(broker: RabbitBroker) -> str:
    """Return what is said when the connection fails, after a look at its form."""
    with pytest.raises(BrokerError) as caught, anyio.fail_after(LIMIT):
        async with broker.session():
            pytest.fail("there is a session")
    text = str(caught.value)
    assert text.startswith(f"cannot connect to RabbitMQ at {broker.address}: ")
    assert "secret" not in text
    assert "\n" not in text
    return f"{type(caught.value).__name__}: {text}"


async def test_wrong_password(rabbit: RabbitRig) -> None:
    said = await refusal(make_broker(rabbit.server, url=rabbit.server.url_for(password="secret")))
    assert "BrokerRefused" in said
    assert "guest:***@127.0.0.1" in said
    assert "login refused for user 'guest'" in said


async def test_wrong_vhost(rabbit: RabbitRig) -> None:
    said = await refusal(make_broker(rabbit.server, url=rabbit.server.url_for(vhost="a%2Fb")))
    assert "BrokerRefused" in said
    assert "virtual host 'a/b' (NOT_ALLOWED - vhost a/b not found)" in said


async def test_vhost_without_permission(rabbit: RabbitRig) -> None:
    rabbit.server.add_user("nobody", "secret")
    try:
        url = rabbit.server.url_for("nobody", "secret")
        said = await refusal(make_broker(rabbit.server, url=url))
    finally:
        rabbit.server.delete_user("nobody")
    assert "BrokerRefused" in said
    assert "user 'nobody' cannot use virtual host '/'" in said


@pytest.mark.parametrize("path", ["", "/", "/%2F", "/%2f"])
async def test_ways_to_write_the_usual_vhost(rabbit: RabbitRig, path: str) -> None:
    url = f"amqp://127.0.0.1:{rabbit.server.port}{path}"
    async with make_broker(rabbit.server, url=url).session() as session:
        await rabbit.declare(session)


async def test_vhost_with_a_slash(rabbit: RabbitRig) -> None:
    rabbit.server.add_vhost("a/b c")
    try:
        url = rabbit.server.url_for(vhost="a%2Fb%20c")
        async with make_broker(rabbit.server, url=url).session() as session:
            await rabbit.publish(session, b"1")
    finally:
        rabbit.server.delete_vhost("a/b c")


async def test_nobody_listens(rabbit: RabbitRig) -> None:
    url = f"amqp://guest:secret@127.0.0.1:{free_port()}/"
    said = await refusal(make_broker(rabbit.server, url=url))
    assert "BrokerUnavailable" in said
    assert "nobody listens there" in said


async def test_no_such_host(rabbit: RabbitRig) -> None:
    said = await refusal(make_broker(rabbit.server, url="amqp://u:secret@nowhere.invalid/"))
    assert "BrokerUnavailable" in said
    assert "no such host" in said


async def test_black_hole(rabbit: RabbitRig) -> None:
    with listener() as port:
        url = f"amqp://guest:secret@127.0.0.1:{port}/"
        said = await refusal(make_broker(rabbit.server, url=url, connect_timeout=0.2))
    assert "BrokerUnavailable" in said
    assert "says nothing for 0.2 seconds" in said


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"AMQP\x00\x01\x00\x00", b""]
)
async def test_not_a_rabbitmq(rabbit: RabbitRig, answer: bytes) -> None:
    async def serve(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.receive()
            if answer:
                await stream.send(answer)

    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1") as server,
        anyio.create_task_group() as tg,
    ):
        tg.start_soon(server.serve, serve)
        url = f"amqp://127.0.0.1:{server.extra(anyio.abc.SocketAttribute.local_port)}"
        assert "BrokerUnavailable" in await refusal(make_broker(rabbit.server, url=url))
        tg.cancel_scope.cancel()


async def test_no_tls_on_this_port(rabbit: RabbitRig) -> None:
    url = f"amqps://guest:secret@127.0.0.1:{rabbit.server.port}/?no_verify_ssl=1"
    said = await refusal(make_broker(rabbit.server, url=url))
    assert "BrokerUnavailable" in said
    assert "no TLS there" in said


async def test_cancelled_while_connecting(rabbit: RabbitRig) -> None:
    with listener() as port:
        broker = make_broker(rabbit.server, url=f"amqp://127.0.0.1:{port}/")
        with anyio.move_on_after(0.1) as scope:
            async with broker.session():
                pytest.fail("there is a session")
        assert scope.cancelled_caught


async def test_the_connection_has_a_name(rabbit: RabbitRig) -> None:
    async with make_broker(rabbit.server, name="tasks of mine").session():
        known = 'io_lib:format("~p", [rabbit_networking:connection_info_all([client_properties])])'
        assert "tasks of mine" in rabbit.server.evaluate(f"lists:flatten({known})")


async def test_nothing_is_logged_but_with_other_connections_in_mind(
    rabbit: RabbitRig, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("aiormq.connection")
    quiet_context().run(log.error, "of ours")
    with caplog.at_level(logging.DEBUG, "aiormq.connection"):
        quiet_context().run(log.error, "of ours, when asked for")
    quiet_context().run(log.warning, "Connection %r was blocked by: %r", "c", "low on memory")
    log.error("of others")
    assert [
        (r.levelname, r.msg.partition(" ")[0], r.getMessage()[-9:]) for r in caplog.records
    ] == [
        ("DEBUG", "of", "asked for"),
        ("WARNING", "Connection", "n memory'"),
        ("ERROR", "of", "of others"),
    ]
    caplog.clear()


# ----------------------------------------------------------------------- declare


async def test_exchange_of_another_type(rabbit: RabbitRig) -> None:
    import aiormq

    async with aiormq.connect(rabbit.server.url) as connection:
        channel = await connection.channel()
        await channel.exchange_declare(
            rabbit.topology.exchange, exchange_type="topic", durable=True
        )
    async with rabbit.broker.session() as session:
        with pytest.raises(QueueMismatch, match=r"exchange .* type='topic'.* type='direct'"):
            await rabbit.declare(session)
        with pytest.raises(PublishFailed, match="type='topic'") as caught:
            await rabbit.publish(session, b"1")
        assert not caught.value.maybe


async def test_mismatch_of_a_queue_with_a_long_name(rabbit: RabbitRig) -> None:
    """RabbitMQ's text ends within the name."""
    name = rabbit.topology.queue + "x" * (255 - len(rabbit.topology.queue))
    async with rabbit.broker.session() as session:
        await session.declare(rabbit.topology.exchange, [QueueSpec(name, {"x-expires": 60_000})])
        with pytest.raises(QueueMismatch, match=r"x-expires=another value; .*x-expires=50000"):
            await session.declare(
                rabbit.topology.exchange, [QueueSpec(name, {"x-expires": 50_000})]
            )
    await rabbit.delete([name])


async def test_arguments_that_the_broker_does_not_take(rabbit: RabbitRig) -> None:
    async with rabbit.broker.session() as session:
        spec = QueueSpec(rabbit.topology.queue, {"x-message-ttl": -1})
        with pytest.raises(BrokerRefused, match="invalid arg 'x-message-ttl'"):
            await session.declare(rabbit.topology.exchange, [spec])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "PRECONDITION_FAILED - inequivalent arg 'x-message-ttl' for queue 'q' in vhost '/': "
            "received the value '2' of type 'long' but current is the value '100' of type 'long'",
            "queue 'q' exists with x-message-ttl=100; this app wants x-message-ttl=2. ",
        ),
        (
            "inequivalent arg 'x-queue-type' for queue 'q' in vhost 'it's: received': "
            "received the value 'quorum' of type 'longstr' but current is none",
            "queue 'q' exists with x-queue-type=None; this app wants x-queue-type='quorum'. ",
        ),
        (
            "inequivalent arg 'durable' for queue 'q' in vhost '/': received 'true' but "
            "current is 'false'",
            "queue 'q' exists with durable='false'; this app wants durable=True. ",
        ),
        ("inequivalent arg 'durable' for queue 'a-long-na", "durable=another value; "),
        ("invalid arg 'x-message-ttl' for queue 'q' in vhost '/'", None),
        ("something else", None),
    ],
)
def test_reading_what_the_broker_says(text: str, expected: str | None) -> None:
    ours = {"x-message-ttl": 2, "x-queue-type": "quorum", "durable": True}
    found = mismatch(text, "q", ours)
    if expected is None:
        assert found is None
    else:
        assert expected in str(found)


@asynccontextmanager
async def restricted(rabbit: RabbitRig) -> AsyncGenerator[BrokerSession]:
    """A session whose user may do nothing in the virtual host."""
    rabbit.server.add_user("guarded", "secret")
    try:
        rabbit.server.set_permissions("guarded", "^$")
        broker = make_broker(rabbit.server, url=rabbit.server.url_for("guarded", "secret"))
        async with broker.session() as session:
            yield session
    finally:
        rabbit.server.delete_user("guarded")


async def test_no_permission(rabbit: RabbitRig) -> None:
    queue = rabbit.topology.queue
    async with rabbit.broker.session() as owner:
        await rabbit.declare(owner)
    async with restricted(rabbit) as session:
        with pytest.raises(BrokerRefused, match=r"cannot declare exchange .*ACCESS_REFUSED"):
            await rabbit.declare(session)
        with pytest.raises(BrokerRefused, match=f"cannot consume .*'{queue}'.*ACCESS_REFUSED"):
            async with session.consume(queue, 1):
                pytest.fail("it may")
        with pytest.raises(PublishFailed, match="ACCESS_REFUSED") as caught:
            await rabbit.publish(session, b"1")
        assert not caught.value.maybe


async def test_consuming_from_no_queue(rabbit: RabbitRig) -> None:
    async with rabbit.broker.session() as session:
        with pytest.raises(BrokerRefused, match=f"'{rabbit.topology.queue}'.*NOT_FOUND"):
            async with session.consume(rabbit.topology.queue, 1):
                pytest.fail("there is one")
        await rabbit.publish(session, b"1")


# ----------------------------------------------------------------------- publish


@contextmanager
def server_option(server: RabbitServer, name: str, value: int) -> Generator[None]:
    """Change an option for channels that are opened from now on."""
    before = server.evaluate(f"element(2, application:get_env(rabbit, {name}))")
    server.evaluate(f"application:set_env(rabbit, {name}, {value})")
    try:
        yield
    finally:
        server.evaluate(f"application:set_env(rabbit, {name}, {before})")


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (object(), "Unknown type"),
        (2**64, "Unsupported numeric value"),
        ("x" * 131_072, "its headers take 131"),
        ("\ud800", "surrogates not allowed"),
    ],
    ids=["object", "number", "size", "surrogate"],
)
async def test_headers_that_amqp_does_not_have(rabbit: RabbitRig, value: object, why: str) -> None:
    async with rabbit.broker.session() as session:
        message = rabbit.message(b"1", bad=value)
        with pytest.raises(PublishFailed, match=why) as caught:
            await session.publish(rabbit.topology.exchange, message, LIMIT)
        assert not caught.value.maybe
        await rabbit.publish(session, b"2")
        assert await rabbit.bodies(session, rabbit.topology.queue, 1) == [b"2"]


async def test_message_that_is_too_large(rabbit: RabbitRig) -> None:
    with server_option(rabbit.server, "max_message_size", 10_000):
        async with rabbit.broker.session() as session:
            await rabbit.declare(session)
            with pytest.raises(PublishFailed, match="larger than") as caught:
                await rabbit.publish(session, b"x" * 20_000)
            assert not caught.value.maybe
            await rabbit.publish(session, b"2")
            assert await rabbit.bodies(session, rabbit.topology.queue, 1) == [b"2"]


async def test_exchange_was_deleted(rabbit: RabbitRig) -> None:
    async with rabbit.broker.session() as session:
        await rabbit.declare(session)
        await rabbit.publish(session, b"1")
        await rabbit.delete([], exchange=True)
        await rabbit.publish(session, b"2")
        assert await rabbit.bodies(session, rabbit.topology.queue, 2) == [b"1", b"2"]


async def test_publish_channel_dies_under_many_publishers(rabbit: RabbitRig) -> None:
    """The channel is closed by the broker, over and over; the connection stays."""
    published: list[bytes] = []

    async def publish(number: int) -> None:
        for turn in range(10):
            body = b"%d-%d" % (number, turn)
            try:
                await rabbit.publish(session, body)
            except PublishFailed:
                continue
            published.append(body)

    async with rabbit.broker.session() as session:
        await rabbit.declare(session)
        async with anyio.create_task_group() as tg:
            for number in range(50):
                tg.start_soon(publish, number)
            for _ in range(5):
                await rabbit.delete([], exchange=True)
        # Had the connection been closed, this would fail.
        await rabbit.publish(session, b"last")
        taken = set()
        async with session.consume(rabbit.topology.queue, 100) as deliveries:
            while b"last" not in taken:
                [delivery] = await take(deliveries, 1)
                delivery.ack()
                taken.add(delivery.body)
        assert taken >= set(published)
        assert published


async def test_time_is_up_before_anything_was_sent(rabbit: RabbitRig) -> None:
    async with rabbit.broker.session() as session:
        with pytest.raises(PublishFailed, match="no confirm in time") as caught:
            await session.publish(rabbit.topology.exchange, rabbit.message(b"1"), 0.0)
        assert not caught.value.maybe
        await rabbit.publish(session, b"2")
        assert await rabbit.bodies(session, rabbit.topology.queue, 1) == [b"2"]


async def test_memory_alarm(rabbit: RabbitRig, caplog: pytest.LogCaptureFixture) -> None:
    async with rabbit.broker.session() as session:
        await rabbit.declare(session)
        await rabbit.publish(session, b"1")
        rabbit.server.set_memory_limit(0.0)
        try:
            with pytest.raises(PublishFailed, match="memory or disk alarm") as caught:
                await session.publish(rabbit.topology.exchange, rabbit.message(b"2"), 0.5)
            assert caught.value.maybe
        finally:
            rabbit.server.set_memory_limit(0.4)
        await rabbit.publish(session, b"3")
        assert await rabbit.bodies(session, rabbit.topology.queue, 3) == [b"1", b"2", b"3"]
    assert [r.message.partition(">")[2].split(":")[0] for r in caplog.records] == [
        " was blocked by",
        " was unblocked",
    ]
    caplog.clear()


# -------------------------------------------------------------- broker goes away


@contextmanager
def suspended(server: RabbitServer) -> Generator[None]:
    server.suspend()
    try:
        yield
    finally:
        server.resume()


async def test_killed_while_publishing(rabbit: RabbitRig) -> None:
    """What was confirmed is there afterwards; what was surely not published is not."""
    confirmed: set[bytes] = set()
    refused: set[bytes] = set()

    async def publish(number: int) -> None:
        for turn in range(100_000):
            body = b"%d-%d" % (number, turn)
            try:
                await rabbit.publish(session, body)
            except PublishFailed as error:
                if not error.maybe:
                    refused.add(body)
                    return
            else:
                confirmed.add(body)
                if len(confirmed) > 300:
                    enough.set()

    enough = anyio.Event()
    with anyio.fail_after(3 * LIMIT):
        async with rabbit.broker.session() as session:
            await rabbit.declare(session)
            async with anyio.create_task_group() as tg:
                for number in range(20):
                    tg.start_soon(publish, number)
                await enough.wait()
                rabbit.server.kill()
            reason = await session.wait_closed()
        assert "connection" in reason
        await anyio.to_thread.run_sync(rabbit.server.restart)
        taken = set()
        async with rabbit.broker.session() as session:
            await rabbit.publish(session, b"last")
            async with session.consume(rabbit.topology.queue, 1_000) as deliveries:
                while b"last" not in taken:
                    [delivery] = await take(deliveries, 1)
                    delivery.ack()
                    taken.add(delivery.body)
    assert len(refused) == 20
    assert taken >= confirmed
    assert not taken & refused


async def test_suspended_broker(rabbit: RabbitRig) -> None:
    """Time is up for one publish; the loss of the connection ends what waits longer."""
    ended: list[str] = []

    async def publish(timeout: float) -> None:
        with pytest.raises(PublishFailed) as caught:
            await session.publish(rabbit.topology.exchange, rabbit.message(b"2"), timeout)
        assert caught.value.maybe
        ended.append(f"publish {timeout}")

    async def consume() -> None:
        async with session.consume(rabbit.topology.queue, 1) as deliveries:
            consuming.set()
            async for _ in deliveries:
                pytest.fail("there is nothing")
        ended.append("consume")

    async def declare() -> None:
        with pytest.raises(BrokerUnavailable, match="no sign of life"):
            await rabbit.declare(session)
        ended.append("declare")

    consuming = anyio.Event()
    broker = make_broker(rabbit.server, heartbeat=1)
    async with broker.session() as session:
        await rabbit.publish(session, b"1")
        assert await rabbit.bodies(session, rabbit.topology.queue, 1) == [b"1"]
        with anyio.fail_after(LIMIT):
            async with anyio.create_task_group() as tg:
                tg.start_soon(consume)
                await consuming.wait()
                with suspended(rabbit.server):
                    tg.start_soon(publish, 0.2)
                    tg.start_soon(publish, 1e4)
                    tg.start_soon(declare)
                    assert await session.wait_closed() == (
                        "no sign of life from the broker for 6 seconds"
                    )
                    while len(ended) < 4:
                        await anyio.sleep(0.01)
    assert ended[0] == "publish 0.2"
    assert sorted(ended[1:]) == ["consume", "declare", "publish 10000.0"]


async def test_closing_while_the_broker_is_suspended(rabbit: RabbitRig) -> None:
    """Leaving a consumer and a session takes its time for the goodbye, and no more."""
    resume = asyncio.get_running_loop().call_later(LIMIT, rabbit.server.resume)
    try:
        async with rabbit.broker.session() as session:
            await rabbit.publish(session, b"1", b"2")
            async with session.consume(rabbit.topology.queue, 10) as deliveries:
                [delivery] = await take(deliveries, 1)
                rabbit.server.suspend()
                delivery.ack()
                before = anyio.current_time()
        assert anyio.current_time() - before < 3 * GOODBYE
    finally:
        resume.cancel()
        rabbit.server.resume()


async def test_killed_while_closing(rabbit: RabbitRig) -> None:
    async with rabbit.broker.session() as session:
        await rabbit.publish(session, b"1")
        async with session.consume(rabbit.topology.queue, 10) as deliveries:
            await take(deliveries, 1)
            rabbit.server.kill()
    await anyio.to_thread.run_sync(rabbit.server.restart)


async def test_reason_when_nobody_but_us_closed_it(rabbit: RabbitRig) -> None:
    async def wait(session: BrokerSession) -> None:
        reasons.append(await session.wait_closed())

    reasons: list[str] = []
    async with anyio.create_task_group() as tg, rabbit.broker.session() as session:
        tg.start_soon(wait, session)
        await rabbit.declare(session)
    assert reasons == ["closed by this side"]


async def test_channel_closed_by_the_server(rabbit: RabbitRig) -> None:
    """A delivery that is held too long costs its channel, not the session."""
    server = rabbit.server
    with (
        server_option(server, "channel_tick_interval", 100),
        server_option(server, "consumer_timeout", 300),
    ):
        async with rabbit.broker.session() as session:
            await rabbit.publish(session, b"1", b"2")
            async with session.consume(rabbit.topology.queue, 1) as deliveries:
                [held] = await take(deliveries, 1)
                with anyio.fail_after(LIMIT):
                    assert [d async for d in deliveries] == []
                held.ack()
            async with session.consume(rabbit.topology.queue, 2) as again:
                first, second = await take(again, 2)
                first.ack()
                second.ack()
            assert (first.body, first.redelivered, second.body) == (b"1", True, b"2")


# ------------------------------------------------------------------- cancellation


async def test_waiting_for_a_message_can_be_given_up(rabbit: RabbitRig) -> None:
    async with rabbit.broker.session() as session:
        await rabbit.declare(session)
        async with session.consume(rabbit.topology.queue, 10) as deliveries:
            with anyio.move_on_after(0.01):
                await anext(deliveries)
            await rabbit.publish(session, b"1")
            assert [d.body for d in await take(deliveries, 1)] == [b"1"]


Operation = Callable[[RabbitRig, BrokerSession, int], Awaitable[None]]


async def publish_one(rabbit: RabbitRig, session: BrokerSession, _: int) -> None:
    await rabbit.publish(session, b"cancelled")


async def publish_to_a_new_queue(rabbit: RabbitRig, session: BrokerSession, turn: int) -> None:
    step = rabbit.topology.step(LADDER_MS[-1 - turn % len(LADDER_MS)])
    await session.publish(rabbit.topology.exchange, rabbit.message(queue=step), LIMIT)


async def declare_all(rabbit: RabbitRig, session: BrokerSession, _: int) -> None:
    await rabbit.declare(session)


async def consume_one(rabbit: RabbitRig, session: BrokerSession, _: int) -> None:
    async with session.consume(rabbit.topology.queue, 5) as deliveries:
        delivery = await anext(deliveries)
        delivery.requeue()


async def enter_and_leave(rabbit: RabbitRig, session: BrokerSession, _: int) -> None:
    async with session.consume(rabbit.topology.queue, 5):
        pass


async def cancel_after(passes: int, operation: Callable[[], Awaitable[None]], how: str) -> bool:
    """Cancel an operation after some passes of the event loop; tell if it was too late."""
    finished = False

    async def run() -> None:
        nonlocal finished
        await operation()
        finished = True

    if how == "scope":
        async with anyio.create_task_group() as tg:
            tg.start_soon(run)
            for _ in range(passes):
                await anyio.lowlevel.checkpoint()
            tg.cancel_scope.cancel()
    else:
        task = asyncio.create_task(run())
        for _ in range(passes):
            await anyio.lowlevel.checkpoint()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or task.exception() is None
    return finished


def growing() -> Iterator[int]:
    """Numbers of passes: every one at first, then in steps that grow."""
    passes = 0
    while True:
        yield passes
        passes += 1 + passes // 8


@pytest.mark.parametrize("how", ["scope", "task"])
@pytest.mark.parametrize(
    "operation",
    [publish_one, publish_to_a_new_queue, declare_all, consume_one, enter_and_leave],
)
async def test_cancelling_in_every_phase(rabbit: RabbitRig, operation: Operation, how: str) -> None:
    async with rabbit.broker.session() as session:
        await rabbit.publish(session, b"waiting")
        for turn, passes in enumerate(growing()):

            async def once(turn: int = turn) -> None:
                await operation(rabbit, session, turn)

            if await cancel_after(passes, once, how):
                break
        assert turn > 2
        # Everything still works, and no consumer that was left behind takes the message.
        await rabbit.declare(session)
        await rabbit.publish(session, b"last")
        taken: set[bytes] = set()
        async with session.consume(rabbit.topology.queue, 1) as deliveries:
            while b"last" not in taken:
                [delivery] = await take(deliveries, 1)
                delivery.ack()
                taken.add(delivery.body)
        assert b"waiting" in taken


async def test_cancelling_the_first_publish(rabbit: RabbitRig) -> None:
    """Its channel is opened for all; giving up on the message does not stop that."""
    for passes in growing():
        async with rabbit.broker.session() as session:

            async def once(session: BrokerSession = session) -> None:
                await rabbit.publish(session, b"1")

            finished = await cancel_after(passes, once, "scope")
            await rabbit.publish(session, b"2")
        if finished:
            break


async def test_cancelling_a_session(rabbit: RabbitRig) -> None:
    for passes in growing():

        async def once() -> None:
            async with rabbit.broker.session() as session:
                await rabbit.publish(session, b"1")

        if await cancel_after(passes, once, "scope"):
            break
