"""Worker processes, each with a link of its own to each server, which can be broken."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from ..e2e.workers import ROOT, environment
from ..servers.rabbitmq import RabbitServer
from ..servers.redis import RedisServer
from .proxy import TcpProxy

__all__ = ["APP", "Fleet", "Links", "Part", "Post", "Servers"]

Part = Literal["broker", "store", "worker"]

APP: Final = "tests.chaos.shop:app"

_BROKER = r"lost the connection|no beacon|cannot (publish|reconnect|consume)|was cancelled"
_STORE = r"Redis at|state store|cannot renew the presence"
_WORKER = r"was not seen for|taken over|taken it over|is gone|stopping, within"

_SIGNS: Final = {
    "broker": re.compile(_BROKER),
    "store": re.compile(_STORE),
    "worker": re.compile(f"{_BROKER}|{_STORE}|{_WORKER}"),
}
"""What a worker says when it has noticed that something is wrong."""


class Servers:
    """A RabbitMQ and a Redis that keep what they have acknowledged, and where they are."""

    def __init__(self, rabbit: RabbitServer, redis: RedisServer, name: str) -> None:
        self.rabbit = rabbit
        self.redis = redis
        self.queue = name
        self.queue_type = "quorum"

    def settings(self, links: Links | None = None) -> dict[str, Any]:
        """Return where they are, behind `links` or directly."""
        broker, state = self.rabbit.url, self.redis.url
        if links is not None:
            broker = broker.replace(f":{self.rabbit.port}/", f":{links.amqp.port}/")
            state = state.replace(f":{self.redis.port}/", f":{links.redis.port}/")
        return {
            "broker_url": broker,
            "state_url": state,
            "exchange": self.queue,
            "queue": self.queue,
            "state_prefix": f"{self.queue}:",
            "queue_type": self.queue_type,
            "delayed_ttl_ms": "1000",
        }


class Links:
    """A link to each server. `running` them is the caller's."""

    def __init__(self, servers: Servers) -> None:
        self.amqp = TcpProxy(servers.rabbit.port)
        self.redis = TcpProxy(servers.redis.port)

    @contextmanager
    def running(self) -> Generator[Links, None, None]:
        with self.amqp.running(), self.redis.running():
            yield self

    def restore(self) -> None:
        self.amqp.restore()
        self.redis.restore()


class Post:
    """A place for one worker process at a time."""

    def __init__(
        self, number: int, backend: str, links: Links, env: Mapping[str, str], folder: Path
    ) -> None:
        self.name = f"worker {number} ({backend})"
        self.links = links
        self.logs: list[Path] = []
        self.deaths: list[str] = []
        """How processes ended that nobody had told to."""
        self._backend = backend
        self._number = number
        self._env = dict(env)
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start a process; see `wait_ready`."""
        log = self._folder / f"worker-{self._number}-{len(self.logs)}.log"
        self.logs.append(log)
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "amqp_tasks", "worker"),
                    *("--app", APP, "--backend", self._backend),
                ],
                env=environment(self._env),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def wait_ready(self, timeout: float = 60) -> None:
        """Return when it runs. Start it again if a server was away when it started."""
        deadline = time.monotonic() + timeout
        while "tasks from" not in self.output():
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.name} does not start:\n{self.output()}")
            assert self._process is not None
            if self._process.poll() is not None:
                self.start()
            time.sleep(0.05)

    def output(self) -> str:
        """Return what the present process has said."""
        return self.logs[-1].read_text(errors="replace")

    def last_words(self) -> str:
        return "\n".join(self.output().splitlines()[-40:])

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait(10)

    def terminate(self, timeout: float = 60) -> int:
        """SIGTERM; return the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout)

    def has_ended(self) -> bool:
        assert self._process is not None
        return self._process.poll() is not None

    def look_after(self) -> None:
        """If its process has ended, note that and start another."""
        assert self._process is not None
        code = self._process.poll()
        if code is not None:
            self.deaths.append(
                f"{self.name} ended by itself with code {code}:\n{self.last_words()}"
            )
            self.start()
            self.wait_ready()

    def noticed(self, since: float, what: Part) -> float | None:
        """Return when it first said, after `since`, that something is wrong with `what`."""
        for log in self.logs:
            if log.stat().st_mtime < since:
                continue
            for line in log.read_text(errors="replace").splitlines():
                at = _time_of(line)
                if at is not None and at >= since and _SIGNS[what].search(line):
                    return at
        return None

    def close(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGCONT)
                self._process.kill()
            self._process.wait()

    def wait(self, timeout: float = 60) -> int:
        """Return its exit code."""
        assert self._process is not None
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} does not end:\n{self.output()}") from None


class Fleet:
    """Some workers on both backends, behind links of their own."""

    def __init__(self, posts: Sequence[Post]) -> None:
        self.posts = posts
        self.lock = threading.Lock()
        """Held while a process is replaced on purpose."""

    @classmethod
    @contextmanager
    def started(
        cls, servers: Servers, folder: Path, size: int, env: Mapping[str, str]
    ) -> Generator[Fleet, None, None]:
        """Run `size` workers for as long as the block."""
        with ExitStack() as stack:
            posts: list[Post] = []
            for number in range(size):
                links = stack.enter_context(Links(servers).running())
                where = as_environment(servers.settings(links))
                backend = ("asyncio", "trio")[number % 2]
                post = Post(number, backend, links, {**where, **env}, folder)
                stack.callback(post.close)
                posts.append(post)
                post.start()
            for post in posts:
                post.wait_ready()
            yield cls(posts)

    def look_after(self) -> None:
        """Replace workers that have ended though nobody told them to."""
        with self.lock:
            for post in self.posts:
                post.look_after()

    def stop(self) -> list[int]:
        """Stop all in good order; return their exit codes."""
        for post in self.posts:
            post.signal(signal.SIGTERM)
        return [post.wait() for post in self.posts]

    @property
    def deaths(self) -> list[str]:
        return [death for post in self.posts for death in post.deaths]


def as_environment(settings: Mapping[str, str]) -> dict[str, str]:
    return {f"AMQP_TASKS_{name.upper()}": value for name, value in settings.items()}


def _time_of(line: str) -> float | None:
    """Return when a line was logged, in seconds since the epoch."""
    try:
        seconds = time.mktime(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S"))
        return seconds + int(line[20:23]) / 1000
    except ValueError:
        return None
