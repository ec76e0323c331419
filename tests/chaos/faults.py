"""The faults, each as a context manager: injected when it is entered, lifted when it is left.

Each gives the workers that it hits. The arguments of all are the world and a random number
generator, which chooses victims.
"""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Final, Literal

import redis as redis_client

from .fleet import Fleet, Part, Post, Servers
from .load import Load
from .proxy import TcpProxy

__all__ = ["FAULTS", "Fault", "Hit", "World"]

Lane = Literal["workers", "servers"]


@dataclass(frozen=True, slots=True)
class World:
    """All that can be broken."""

    servers: Servers
    fleet: Fleet
    load: Load


@dataclass(slots=True)
class Hit:
    """What a fault has hit: who has to come back before it counts as overcome."""

    posts: Sequence[Post] = ()
    producer: bool = False
    gone: int | None = None
    """Process id of a worker that has ended; others have to take its tasks over."""


Apply = Callable[[World, random.Random], AbstractContextManager[Hit]]


@dataclass(frozen=True, slots=True)
class Fault:
    """A class of faults.

    Attributes:
        lane: faults of one lane are injected one after the other.
        hold: seconds from injecting to lifting it, from and to.
    """

    name: str
    lane: Lane
    hold: tuple[float, float]
    apply: Apply

    @property
    def part(self) -> Part:
        """What is wrong meanwhile, as far as those who are hit can tell."""
        if "amqp" in self.name or "RabbitMQ" in self.name:
            return "broker"
        return "store" if "redis" in self.name.lower() else "worker"


FAULTS: Final[dict[str, Fault]] = {}


def fault(
    name: str, lane: Lane, hold: tuple[float, float] = (0, 0)
) -> Callable[[Callable[[World, random.Random], Generator[Hit, None, None]]], Apply]:
    def define(function: Callable[[World, random.Random], Generator[Hit, None, None]]) -> Apply:
        apply = contextmanager(function)
        FAULTS[name] = Fault(name, lane, hold, apply)
        return apply

    return define


# ------------------------------------------------------------------------------- links


def _link_fault(
    name: str,
    which: Literal["amqp", "redis"],
    hold: tuple[float, float],
    do: Callable[[TcpProxy], None],
) -> None:
    """Define a fault of the links of one worker, or of all, to one server."""

    @fault(f"{name}, {which} link", "workers", hold)
    def apply(world: World, rng: random.Random) -> Generator[Hit, None, None]:
        posts = world.fleet.posts if rng.random() < 0.3 else [rng.choice(world.fleet.posts)]
        links: list[TcpProxy] = [getattr(post.links, which) for post in posts]
        for link in links:
            do(link)
        yield Hit(posts)
        for link in links:
            link.restore()


def _refuse_and_cut(link: TcpProxy) -> None:
    link.refuse()
    link.cut()


for _which in ("amqp", "redis"):
    _link_fault("reset", _which, (0, 0), TcpProxy.cut)
    _link_fault("half-closed by the server", _which, (0, 0), lambda link: link.half_close("client"))
    _link_fault("half-closed by the client", _which, (0, 0), lambda link: link.half_close("server"))
    _link_fault("reset and refused", _which, (1, 3), _refuse_and_cut)
    _link_fault("slow", _which, (1, 3), lambda link: link.delay(to_client=0.2, to_server=0.2))
    _link_fault("down for a while", _which, (1, 2), TcpProxy.black_hole)
    _link_fault(
        "dead for good", _which, (12, 12), lambda link: link.black_hole(new=False, for_good=True)
    )
_link_fault("down beyond the presence TTL", "redis", (4, 6), TcpProxy.black_hole)


@fault("both links down beyond the presence TTL", "workers", (4, 6))
def _cut_off(world: World, rng: random.Random) -> Generator[Hit, None, None]:
    post = rng.choice(world.fleet.posts)
    post.links.amqp.black_hole()
    post.links.redis.black_hole()
    yield Hit([post])
    post.links.restore()


@fault("producer's links reset", "workers")
def _producer_reset(world: World, rng: random.Random) -> Generator[Hit, None, None]:
    world.load.links.amqp.cut()
    world.load.links.redis.cut()
    yield Hit(producer=True)


@fault("producer's links down for a while", "workers", (2, 7))
def _producer_hole(world: World, rng: random.Random) -> Generator[Hit, None, None]:
    link = rng.choice((world.load.links.amqp, world.load.links.redis))
    link.black_hole()
    yield Hit(producer=True)
    link.restore()


# ----------------------------------------------------------------------------- workers


@fault("worker SIGKILLed and replaced", "workers")
def _kill(world: World, rng: random.Random) -> Generator[Hit, None, None]:
    post = rng.choice(world.fleet.posts)
    with world.fleet.lock:
        pid = post.pid
        post.kill()
        yield Hit([post], gone=pid)
        post.start()
        post.wait_ready()


@fault("worker SIGSTOPped beyond the presence TTL", "workers", (4, 6))
def _suspend(world: World, rng: random.Random) -> Generator[Hit, None, None]:
    post = rng.choice(world.fleet.posts)
    post.signal(signal.SIGSTOP)
    yield Hit([post])
    post.signal(signal.SIGCONT)


@fault("worker replaced with a short grace", "workers")
def _replace(world: World, rng: random.Random) -> Generator[Hit, None, None]:
    post = rng.choice(world.fleet.posts)
    with world.fleet.lock:
        pid = post.pid
        code = post.terminate()
        if code != 0:
            post.deaths.append(f"{post.name}: SIGTERM, then exit code {code}:\n{post.output()}")
        yield Hit([post], gone=pid)
        post.start()
        post.wait_ready()


# ----------------------------------------------------------------------------- servers


def _everybody(world: World) -> Hit:
    return Hit(world.fleet.posts, producer=True)


@fault("RabbitMQ SIGKILLed and restarted", "servers")
def _rabbit_kill(world: World, rng: random.Random) -> Generator[Hit, None, None]:
    world.servers.rabbit.kill()
    yield _everybody(world)
    world.servers.rabbit.start_again()


@fault("RabbitMQ stopped and started", "servers")
def _rabbit_stop(world: World, rng: random.Random) -> Generator[Hit, None, None]:
    world.servers.rabbit.shut_down()
    yield _everybody(world)
    world.servers.rabbit.start_again()


@fault("RabbitMQ SIGSTOPped for a while", "servers", (1, 3))
def _rabbit_suspend(world: World, rng: random.Random) -> Generator[Hit, None, None]:
    world.servers.rabbit.suspend()
    yield _everybody(world)
    world.servers.rabbit.resume()


@fault("all connections closed by RabbitMQ", "servers")
def _close_connections(world: World, rng: random.Random) -> Generator[Hit, None, None]:
    world.servers.rabbit.close_connections("chaos")
    yield _everybody(world)


@fault("memory alarm of RabbitMQ", "servers", (1, 4))
def _alarm(world: World, rng: random.Random) -> Generator[Hit, None, None]:
    world.servers.rabbit.set_memory_limit(0.0001)
    yield _everybody(world)
    world.servers.rabbit.set_memory_limit(0.4)


@fault("Redis SIGSTOPped for a while", "servers", (3, 5))
def _redis_pause(world: World, rng: random.Random) -> Generator[Hit, None, None]:
    world.servers.redis.pause()
    yield _everybody(world)
    world.servers.redis.resume()


@fault("Redis SIGKILLed and restarted", "servers", (0, 2))
def _redis_kill(world: World, rng: random.Random) -> Generator[Hit, None, None]:
    world.servers.redis.kill()
    yield _everybody(world)
    world.servers.redis.start()


@fault("Redis read-only for a while", "servers", (1, 2))
def _redis_read_only(world: World, rng: random.Random) -> Generator[Hit, None, None]:
    with world.servers.redis.client() as client:
        # As after a failover: a replica, of a primary that is not there.
        client.replicaof("127.0.0.1", "1")
        yield _everybody(world)
        client.replicaof("NO", "ONE")


@fault("Redis out of memory for a while", "servers", (1, 2))
def _redis_full(world: World, rng: random.Random) -> Generator[Hit, None, None]:
    with world.servers.redis.client() as client:
        client.config_set("maxmemory", "1")
        yield _everybody(world)
        client.config_set("maxmemory", "0")


@fault("Redis closes all connections", "servers")
def _redis_closes(world: World, rng: random.Random) -> Generator[Hit, None, None]:
    with world.servers.redis.client() as client, contextlib.suppress(redis_client.RedisError):
        client.client_kill_filter(_type="normal", skipme=True)
        client.client_kill_filter(_type="pubsub", skipme=True)
    yield _everybody(world)
