"""The conformance suite of brokers: what `abc` says of them, and the runtime relies on."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import anyio
import pytest

from amqp_tasks.abc import BrokerSession
from amqp_tasks.core.topology import QueueSpec
from amqp_tasks.exceptions import BrokerRefused, BrokerUnavailable, PublishFailed, QueueMismatch

from ..servers.rabbitmq import rabbit_server  # noqa: F401  fixture
from .brokers import LIMIT, Rig, choose_backend, choose_case, open_rig, take  # noqa: F401  fixtures

pytestmark = pytest.mark.anyio

MEGABYTE = 1_000_000


# ----------------------------------------------------------------------- declare


async def test_declaring_again_changes_nothing(rig: Rig) -> None:
    async with rig.broker.session() as session, rig.broker.session() as other:
        await rig.declare(session)
        await rig.publish(session, b"1")
        await rig.declare(session)
        await rig.declare(other)
        assert await rig.bodies(other, rig.topology.queue, 1) == [b"1"]


async def test_mismatch_names_queue_argument_and_both_values(rig: Rig) -> None:
    changed = replace(rig.topology, delayed_ttl_ms=77_000)
    async with rig.broker.session() as session:
        await rig.declare(session)
        with pytest.raises(QueueMismatch) as caught:
            await session.declare(changed.exchange, changed.always())
        for part in (repr(changed.delay.name), "x-message-ttl", "300", "77000"):
            assert part in str(caught.value)
        # The session is none the worse for it.
        await rig.publish(session, b"1")
        assert await rig.bodies(session, rig.topology.queue, 1) == [b"1"]


async def test_argument_that_the_queue_lacks(rig: Rig) -> None:
    spec = rig.topology.error
    without = {k: v for k, v in spec.arguments.items() if k != "x-message-ttl"}
    async with rig.broker.session() as session:
        await session.declare(rig.topology.exchange, [QueueSpec(spec.name, without)])
        with pytest.raises(QueueMismatch, match=r"x-message-ttl=None.*604800000"):
            await session.declare(rig.topology.exchange, [spec])


# ------------------------------------------------------------------------- count


async def test_count_is_of_what_is_ready_and_not_of_what_is_out(rig: Rig) -> None:
    queue = rig.topology.queue
    async with rig.broker.session() as session, rig.broker.session() as other:
        await rig.declare(session)
        assert await session.count(queue) == 0
        await rig.publish(session, *[b"%d" % number for number in range(5)])
        assert await session.count(queue) == await other.count(queue) == 5
        async with session.consume(queue, 2) as deliveries:
            first, second = await take(deliveries, 2)
            assert await session.count(queue) == await other.count(queue) == 3
            first.ack()
            second.requeue()
    async with rig.broker.session() as session:
        assert await session.count(queue) == 4


async def test_count_of_no_queue_is_refused_and_harms_nothing(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await rig.declare(session)
        await rig.publish(session, b"1")
        async with session.consume(rig.topology.queue, 1) as deliveries:
            (delivery,) = await take(deliveries, 1)
            with pytest.raises(BrokerRefused, match=f"'{rig.topology.queue}-other'.* no "):
                await session.count(f"{rig.topology.queue}-other")
            delivery.ack()
    async with rig.broker.session() as session:
        assert await session.count(rig.topology.queue) == 0


async def test_count_on_a_lost_session(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await rig.declare(session)
        await rig.drop_connections()
        await session.wait_closed()
        with pytest.raises(BrokerUnavailable):
            await session.count(rig.topology.queue)


# ----------------------------------------------------------------------- publish


async def test_published_message_is_in_the_queue(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await rig.declare(session)
        await rig.publish(session, b"1")
    async with rig.broker.session() as session:
        assert await rig.bodies(session, rig.topology.queue, 1) == [b"1"]


async def test_publish_declares_what_nobody_declared(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await rig.publish(session, b"1")
        assert await rig.bodies(session, rig.topology.queue, 1) == [b"1"]


async def test_publish_after_the_queue_was_deleted(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await rig.declare(session)
        await rig.publish(session, b"1")
        await rig.delete_queue(rig.topology.queue)
        await rig.publish(session, b"2")
        assert await rig.bodies(session, rig.topology.queue, 1) == [b"2"]


async def test_publish_to_a_queue_that_is_not_ours(rig: Rig) -> None:
    other = QueueSpec(rig.topology.queue, {**rig.topology.main.arguments, "x-max-length": 5})
    async with rig.broker.session() as session:
        await rig.declare(session)
        with pytest.raises(PublishFailed, match="x-max-length") as caught:
            await session.publish(rig.topology.exchange, rig.message(queue=other), LIMIT)
        assert not caught.value.maybe


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", bytes(range(256)), b"x" * 131_064, b"xy" * (5 * MEGABYTE // 2)],
    ids=["empty", "object", "bytes", "frame", "5MB"],
)
async def test_body_comes_back_as_it_was(rig: Rig, body: bytes) -> None:
    async with rig.broker.session() as session:
        await rig.publish(session, body)
        assert await rig.bodies(session, rig.topology.queue, 1) == [body]


HEADERS: dict[str, Any] = {
    "small": 1,
    "negative": -129,
    "unsigned": 40_000,
    "long": 2**31,
    "longest": -(2**63),
    "time": 1_700_000_000.123456,
    "third": 1 / 3,
    "whole": 2.0,
    "empty": "",
    "text": "ünï 日本 \U0001f600 \n\t\"'",
    "long-text": "x" * 70_000,
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
}


async def test_headers_come_back_as_they_were(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await session.publish(rig.topology.exchange, rig.message(b"{}", **HEADERS), LIMIT)
        async with session.consume(rig.topology.queue, 1) as deliveries:
            [delivery] = await take(deliveries, 1)
        delivery.ack()
        got = {key: delivery.headers[key] for key in HEADERS}
        assert got == HEADERS
        assert {k: type(v) for k, v in got.items()} == {k: type(v) for k, v in HEADERS.items()}


async def test_no_headers(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await rig.publish(session, b"1")
        async with session.consume(rig.topology.queue, 1) as deliveries:
            [delivery] = await take(deliveries, 1)
        delivery.ack()
        assert dict(delivery.headers) == {}


async def test_many_publishers_at_once(rig: Rig) -> None:
    bodies = {str(number).encode() for number in range(1_000)}
    async with rig.broker.session() as session:
        async with anyio.create_task_group() as tg:
            for body in bodies:
                tg.start_soon(rig.publish, session, body)
        assert set(await rig.bodies(session, rig.topology.queue, 1_000)) == bodies


# ----------------------------------------------------------------------- consume


async def test_messages_come_in_order(rig: Rig) -> None:
    bodies = [str(number).encode() for number in range(50)]
    async with rig.broker.session() as session:
        await rig.publish(session, *bodies)
        async with session.consume(rig.topology.queue, 7) as deliveries:
            for body in bodies:
                [delivery] = await take(deliveries, 1)
                assert (delivery.body, delivery.redelivered) == (body, False)
                delivery.ack()


async def test_a_message_wakes_who_waits_for_it(rig: Rig) -> None:
    async with rig.broker.session() as session, rig.broker.session() as producer:
        await rig.declare(session)
        async with (
            session.consume(rig.topology.queue, 10) as deliveries,
            anyio.create_task_group() as tg,
        ):
            tg.start_soon(rig.publish, producer, b"1", b"2")
            taken = await take(deliveries, 2)
        assert [delivery.body for delivery in taken] == [b"1", b"2"]


async def test_prefetch_is_respected(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await rig.publish(session, b"1", b"2", b"3", b"4", b"5")
        async with session.consume(rig.topology.queue, 2) as deliveries:
            first, second = await take(deliveries, 2)
            # The rest goes to somebody else, ...
            assert await rig.bodies(session, rig.topology.queue, 3) == [b"3", b"4", b"5"]
            # ... and here it goes on after a verdict.
            first.ack()
            await rig.publish(session, b"6")
            [third] = await take(deliveries, 1)
            assert (second.body, third.body) == (b"2", b"6")


async def test_two_queues_in_one_session(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await rig.declare(session)
        error = rig.message(b"bad", rig.topology.error)
        async with (
            session.consume(rig.topology.queue, 1) as main,
            session.consume(rig.topology.error.name, 1) as errors,
        ):
            await session.publish(rig.topology.exchange, error, LIMIT)
            await rig.publish(session, b"good")
            assert [d.body for d in await take(errors, 1)] == [b"bad"]
            assert [d.body for d in await take(main, 1)] == [b"good"]


# ---------------------------------------------------------------------- verdicts


async def test_acked_message_is_gone(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await rig.publish(session, b"1", b"2")
        assert await rig.bodies(session, rig.topology.queue, 1) == [b"1"]
    async with rig.broker.session() as session:
        assert await rig.bodies(session, rig.topology.queue, 1) == [b"2"]


async def test_requeued_message_comes_again(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await rig.publish(session, b"1")
        async with session.consume(rig.topology.queue, 1) as deliveries:
            [delivery] = await take(deliveries, 1)
            assert not delivery.redelivered
            delivery.requeue()
            [again] = await take(deliveries, 1)
            assert (again.body, again.redelivered) == (b"1", True)
            again.ack()


async def test_rejected_message_goes_to_the_error_queue(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await rig.declare(session)
        await session.publish(rig.topology.exchange, rig.message(b"1", note="x"), LIMIT)
        async with session.consume(rig.topology.queue, 1) as deliveries:
            [delivery] = await take(deliveries, 1)
            delivery.reject()
            async with session.consume(rig.topology.error.name, 1) as errors:
                [dead] = await take(errors, 1)
        dead.ack()
        assert (dead.body, dead.headers["note"]) == (b"1", "x")


async def test_acks_out_of_order(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await rig.publish(session, *(b"%d" % number for number in range(1, 9)))
        async with session.consume(rig.topology.queue, 10) as deliveries:
            taken = dict(enumerate(await take(deliveries, 8), start=1))
            for number in (1, 3, 2):
                taken[number].ack()
            await anyio.lowlevel.checkpoint()
            for number in (6, 8):
                taken[number].ack()
            await anyio.lowlevel.checkpoint()
            taken[4].ack()
    async with rig.broker.session() as session, session.consume(rig.topology.queue, 10) as rest:
        back = await take(rest, 2)
        assert [(d.body, d.redelivered) for d in back] == [(b"5", True), (b"7", True)]
        await _assert_no_more(rig, session, rest)


async def test_prefix_with_other_verdicts_in_it(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await rig.declare(session)
        await rig.publish(session, *(b"%d" % number for number in range(1, 7)))
        async with session.consume(rig.topology.queue, 10) as deliveries:
            taken = await take(deliveries, 6)
        for number, verdict in enumerate(["reject", "ack", "requeue", "ack", "reject", "ack"]):
            getattr(taken[number], verdict)()
        dead = await rig.bodies(session, rig.topology.error.name, 2)
        assert sorted(dead) == [b"1", b"5"]
        async with session.consume(rig.topology.queue, 10) as rest:
            assert [d.body for d in await take(rest, 1)] == [b"3"]
            await _assert_no_more(rig, session, rest)


async def test_verdicts_of_many_turns(rig: Rig) -> None:
    """All acks of some hundred messages arrive, whatever order they are given in."""
    async with rig.broker.session() as session:
        await rig.publish(session, *(b"%d" % number for number in range(300)))
        async with session.consume(rig.topology.queue, 300) as deliveries:
            taken = await take(deliveries, 300)
            for number in range(300):
                taken[number * 7 % 300].ack()
                if number % 11 == 0:
                    await anyio.lowlevel.checkpoint()
    async with rig.broker.session() as session, session.consume(rig.topology.queue, 10) as rest:
        await _assert_no_more(rig, session, rest)


async def test_a_second_verdict_does_nothing(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await rig.publish(session, b"1")
        async with session.consume(rig.topology.queue, 1) as deliveries:
            [delivery] = await take(deliveries, 1)
            delivery.ack()
            delivery.requeue()
            delivery.reject()
            await _assert_no_more(rig, session, deliveries)


async def _assert_no_more(rig: Rig, session: BrokerSession, deliveries: Any) -> None:
    # What was given back stands at the head of the queue, so it would come first.
    await rig.publish(session, b"last")
    [delivery] = await take(deliveries, 1)
    assert delivery.body == b"last"
    delivery.ack()


# ----------------------------------------------------------------------- leaving


async def test_leaving_gives_back_what_nobody_took(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await rig.publish(session, b"1", b"2", b"3", b"4")
        async with session.consume(rig.topology.queue, 10) as deliveries:
            [first] = await take(deliveries, 1)
        # By now another consumer can have the others, and this one its verdict.
        async with session.consume(rig.topology.queue, 10) as rest:
            others = await take(rest, 3)
            assert sorted(d.body for d in others) == [b"2", b"3", b"4"]
            first.ack()
            for delivery in others:
                delivery.ack()
            await _assert_no_more(rig, session, rest)
    async with rig.broker.session() as session, session.consume(rig.topology.queue, 10) as rest:
        await _assert_no_more(rig, session, rest)


async def test_iterating_after_leaving_ends(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await rig.publish(session, b"1")
        async with session.consume(rig.topology.queue, 10) as deliveries:
            pass
        assert [d async for d in deliveries] == []


async def test_closing_a_session_gives_back_what_has_no_verdict(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await rig.publish(session, b"1", b"2", b"3")
        async with session.consume(rig.topology.queue, 2) as deliveries:
            _, second = await take(deliveries, 2)
            second.ack()
    async with rig.broker.session() as session, session.consume(rig.topology.queue, 10) as rest:
        back = await take(rest, 2)
        assert (back[0].body, back[0].redelivered) == (b"1", True)
        assert back[1].body == b"3"


async def test_leaving_by_an_error(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await rig.publish(session, b"1", b"2")
        with suppress(ZeroDivisionError):
            async with session.consume(rig.topology.queue, 10) as deliveries:
                [first] = await take(deliveries, 1)
                first.ack()
                raise ZeroDivisionError
        assert await rig.bodies(session, rig.topology.queue, 1) == [b"2"]


async def test_leaving_by_a_cancellation(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await rig.publish(session, b"1", b"2")
        with anyio.CancelScope() as scope:
            async with session.consume(rig.topology.queue, 10) as deliveries:
                [first] = await take(deliveries, 1)
                scope.cancel()
                await anyio.sleep_forever()
        first.ack()
        assert await rig.bodies(session, rig.topology.queue, 1) == [b"2"]


# ----------------------------------------------------------------------- waiting


async def test_a_step_of_the_ladder_brings_the_message_back(rig: Rig) -> None:
    step = rig.topology.step(250)
    async with rig.broker.session() as session:
        await rig.declare(session)
        before = anyio.current_time()
        await session.publish(rig.topology.exchange, rig.message(b"1", step, n=1.5), LIMIT)
        async with session.consume(rig.topology.queue, 1) as deliveries:
            [delivery] = await take(deliveries, 1)
        delivery.ack()
        assert anyio.current_time() - before >= 0.25
        assert (delivery.body, delivery.headers["n"]) == (b"1", 1.5)


async def test_the_delay_queue_loses_nothing(rig: Rig) -> None:
    bodies = {b"%d" % number for number in range(50)}
    async with rig.broker.session() as session:
        await rig.declare(session)
        async with anyio.create_task_group() as tg:
            for body in bodies:
                message = rig.message(body, rig.topology.delay)
                tg.start_soon(session.publish, rig.topology.exchange, message, LIMIT)
        assert set(await rig.bodies(session, rig.topology.queue, 50)) == bodies


# -------------------------------------------------------------------------- loss


async def test_a_lost_session(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await rig.publish(session, b"1", b"2")
        async with session.consume(rig.topology.queue, 1) as deliveries:
            [delivery] = await take(deliveries, 1)
            await rig.drop_connections()
            with anyio.fail_after(LIMIT):
                assert [d async for d in deliveries] == []
                assert await session.wait_closed() != ""
            delivery.ack()  # too late, and no harm
        with pytest.raises(PublishFailed) as caught:
            await rig.publish(session, b"3")
        assert not caught.value.maybe
        with pytest.raises(BrokerUnavailable):
            await rig.declare(session)
        with pytest.raises(BrokerUnavailable):
            async with session.consume(rig.topology.queue, 1):
                pass
    async with rig.broker.session() as session, session.consume(rig.topology.queue, 2) as again:
        first, second = await take(again, 2)
        assert (first.body, first.redelivered, second.body) == (b"1", True, b"2")


async def test_waiting_consumer_of_a_lost_session(rig: Rig) -> None:
    async def consume() -> None:
        async with session.consume(rig.topology.queue, 1) as deliveries:
            consuming.set()
            async for _ in deliveries:
                pytest.fail("there is nothing")

    consuming = anyio.Event()
    async with rig.broker.session() as session:
        await rig.declare(session)
        with anyio.fail_after(LIMIT):
            async with anyio.create_task_group() as tg:
                tg.start_soon(consume)
                tg.start_soon(session.wait_closed)
                await consuming.wait()
                await rig.drop_connections()


async def test_consumer_of_a_deleted_queue(rig: Rig) -> None:
    async with rig.broker.session() as session:
        await rig.publish(session, b"1")
        async with session.consume(rig.topology.queue, 1) as deliveries:
            [delivery] = await take(deliveries, 1)
            await rig.delete_queue(rig.topology.queue)
            with anyio.fail_after(LIMIT):
                assert [d async for d in deliveries] == []
            delivery.ack()
        # The session goes on.
        await rig.publish(session, b"2")
        assert await rig.bodies(session, rig.topology.queue, 1) == [b"2"]
