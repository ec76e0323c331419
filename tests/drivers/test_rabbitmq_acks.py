"""Verdicts and the commands for them, against a model of a channel."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from amqp_tasks.drivers.rabbitmq.acks import Command, Unsettled, Verdict


class Channel:
    """A broker's side of a channel: what it has delivered, and what became of it."""

    def __init__(self) -> None:
        self.open: set[int] = set()
        self.settled: dict[int, Verdict] = {}

    def receive(self, command: Command) -> None:
        assert command.tag in self.open, "RabbitMQ closes the channel for an unknown tag"
        tags = {tag for tag in self.open if tag <= command.tag}
        for tag in tags if command.multiple else {command.tag}:
            self.open.remove(tag)
            self.settled[tag] = command.verdict


@given(st.data())
def test_every_delivery_gets_its_verdict(data: st.DataObject) -> None:
    unsettled, channel = Unsettled(), Channel()
    said: dict[int, Verdict] = {}
    delivered = 0
    for _ in range(data.draw(st.integers(1, 12), label="turns")):
        for _ in range(data.draw(st.integers(0, 4), label="deliveries")):
            delivered += 1
            unsettled.add(delivered)
            channel.open.add(delivered)
        still_open = sorted(set(range(1, delivered + 1)) - said.keys())
        for tag in data.draw(st.permutations(still_open), label="order"):
            verdict = data.draw(st.sampled_from([*Verdict, *3 * [Verdict.ACK], None]))
            if verdict is not None:
                assert unsettled.settle(tag, verdict)
                assert not unsettled.settle(tag, Verdict.REQUEUE)
                said[tag] = verdict
        for command in unsettled.take():
            channel.receive(command)
        assert channel.settled == said
        assert len(unsettled) == len(channel.open)


def test_a_finished_prefix_leaves_as_one_command() -> None:
    unsettled = Unsettled()
    for tag in range(1, 8):
        unsettled.add(tag)
    for tag in (3, 1, 2, 6):
        unsettled.settle(tag, Verdict.ACK)
    assert unsettled.take() == [
        Command(3, Verdict.ACK, multiple=True),
        Command(6, Verdict.ACK),
    ]
    assert unsettled.take() == []
    for tag in (4, 5, 7):
        unsettled.settle(tag, Verdict.ACK)
    assert unsettled.take() == [Command(7, Verdict.ACK, multiple=True)]


def test_nothing_is_said_after_the_channel_is_gone() -> None:
    unsettled = Unsettled()
    unsettled.add(1)
    unsettled.add(2)
    unsettled.settle(1, Verdict.ACK)
    unsettled.forget()
    assert not unsettled.settle(2, Verdict.ACK)
    assert unsettled.take() == []
    assert len(unsettled) == 0
