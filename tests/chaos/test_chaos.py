"""Workers and producers go through everything that networks, servers and operators do.

Whatever happens: no task is lost, each has one recorded end, and no end counts twice.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from .campaign import Campaign, explain, story, table
from .faults import FAULTS, Fault
from .fleet import Servers

BRIEF: Sequence[tuple[str, float]] = (
    ("reset, amqp link", 0.3),
    ("half-closed by the server, amqp link", 0.3),
    ("slow, amqp link", 0.7),
    ("reset and refused, amqp link", 0.5),
    ("down for a while, amqp link", 1),
    ("worker SIGKILLed and replaced", 0),
    ("reset, redis link", 0.3),
    ("half-closed by the client, redis link", 0.3),
    ("worker SIGSTOPped beyond the presence TTL", 4),
    ("down beyond the presence TTL, redis link", 4),
    ("worker replaced with a short grace", 0),
    ("producer's links reset", 0),
)
"""Faults of single workers, and for how many seconds, one after the other; meanwhile:"""

BRIEF_OF_SERVERS: Sequence[tuple[str, float]] = (
    ("Redis SIGSTOPped for a while", 2.5),
    ("Redis SIGKILLed and restarted", 0),
    ("memory alarm of RabbitMQ", 1),
    ("all connections closed by RabbitMQ", 0.5),
    ("RabbitMQ SIGKILLed and restarted", 0),
    ("Redis read-only for a while", 1),
    ("Redis out of memory for a while", 1),
)


def test_every_kind_of_fault_once(servers: Servers, tmp_path: Path, seed: int) -> None:
    """Nobody waits until one is overcome before the next one comes."""

    def one_after_the_other(faults: Sequence[tuple[str, float]], name: str) -> None:
        rng = random.Random(f"{seed} {name}")
        for fault, hold in faults:
            campaign.inject(FAULTS[fault], rng, hold)

    # Not quorum queues: RabbitMQ 3.10 may leave one that is seconds old without a leader when
    # it is killed, and then nothing goes on whatever we do.
    servers.queue_type = "classic"
    with Campaign.begun(servers, tmp_path, seed=seed, longest=3.5) as campaign:
        campaign.inject_in_lanes(
            partial(one_after_the_other, BRIEF, "workers"),
            partial(one_after_the_other, BRIEF_OF_SERVERS, "servers"),
        )
        campaign.wait_until_all_work()
        counted = campaign.settle()
    print(counted, dict(campaign.load.errors), sep="\n")
    assert counted.recorded == counted.accepted > 100


def test_as_long_as_wanted(
    servers: Servers,
    tmp_path: Path,
    seed: int,
    minutes: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """First each fault by itself, then two at a time, in any order."""
    until = time.monotonic() + minutes * 60
    with Campaign.begun(servers, tmp_path, seed=seed) as campaign:

        def lane(name: str) -> None:
            faults = [fault for fault in FAULTS.values() if fault.lane == name]
            _go_on(campaign, faults, f"{seed} {name}", lambda: time.monotonic() < until)

        alone = len(FAULTS)
        try:
            _go_on(campaign, list(FAULTS.values()), f"{seed} all", lambda: True, rounds=1)
            campaign.inject_in_lanes(partial(lane, "workers"), partial(lane, "servers"))
            counted = campaign.settle()
        finally:
            with capsys.disabled():
                print(f"\nAMQP_TASKS_CHAOS_SEED={seed}, {minutes:g} minutes")
                (tmp_path / "story").write_text(story(campaign.observations))
                print(f"\neach by itself:\n{table(campaign.observations[:alone])}")
                print(f"\ntwo at a time:\n{table(campaign.observations[alone:])}")
                print(f"\n{len(campaign.observations)} faults")
                print(f"calls of the producer that failed: {dict(campaign.load.errors)}")
    with capsys.disabled():
        print(counted)


def _go_on(
    campaign: Campaign,
    faults: list[Fault],
    seed: str,
    may_go_on: Callable[[], bool],
    rounds: int = 1_000_000,
) -> None:
    rng = random.Random(seed)
    for _ in range(rounds):
        rng.shuffle(faults)
        for fault in faults:
            if not may_go_on():
                return
            campaign.overcome(fault, rng)


def test_a_redis_that_comes_back_empty(servers: Servers, tmp_path: Path, seed: int) -> None:
    """What was recorded is forgotten with it; every task is run all the same."""
    with Campaign.begun(servers, tmp_path, workers=2, rate=50, seed=seed, longest=3) as campaign:
        for _ in range(2):
            time.sleep(1)
            with servers.redis.client() as client:
                client.flushall()
            servers.redis.restart()
        wrong = campaign.drain()
        assert not wrong, explain(wrong, campaign.oracle)
        assert set(campaign.load.accepted) <= campaign.oracle.ended()
