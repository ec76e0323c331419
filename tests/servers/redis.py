"""Redis servers of the tests' own, each in a folder and on ports of its own."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from .process import ServerProcess, free_port

__all__ = ["RedisServer", "redis_cluster", "redis_server"]


class RedisServer:
    """One ``redis-server``.

    Args:
        folder: of its own; is made if need be.
        persistent: keep on disk what was acknowledged, so that it survives a restart;
            otherwise nothing does.
        password: what clients have to give.
        cluster_enabled: make it a cluster of one node, which refuses to touch keys of
            several slots in one command or script.
        replica_of: make it a read-only replica of another server.
    """

    def __init__(
        self,
        folder: Path,
        *,
        persistent: bool = False,
        password: str | None = None,
        cluster_enabled: bool = False,
        replica_of: RedisServer | None = None,
    ) -> None:
        self.port = free_port()
        self.password = password
        self._cluster_enabled = cluster_enabled
        self._primary = replica_of
        options = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(folder),
            "save": "",
            "appendonly": "yes" if persistent else "no",
            "appendfsync": "always",
            "repl-diskless-sync-delay": "0",
        }
        if password is not None:
            options["requirepass"] = password
        if replica_of is not None:
            options["replicaof"] = f"127.0.0.1 {replica_of.port}"
        if cluster_enabled:
            options |= {"cluster-enabled": "yes", "cluster-port": str(free_port())}
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "redis.conf"
        config.write_text("".join(f"{k} {v or chr(34) * 2}\n" for k, v in options.items()))
        self._process = ServerProcess(
            ["redis-server", str(config)], log=folder / "log", is_ready=self._is_ready
        )

    @property
    def url(self) -> str:
        """Where it is, with the password."""
        login = "" if self.password is None else f":{self.password}@"
        return f"redis://{login}127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self._process.start()

    def stop(self) -> None:
        """Stop it; unless it is persistent it forgets everything."""
        self._process.signal(signal.SIGCONT)
        self._process.stop()

    def kill(self) -> None:
        self._process.kill()

    def restart(self) -> None:
        """Kill it and start it again, empty if not persistent, on the same port."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Let it hang: it stays connected, and answers nothing until `resume`."""
        self._process.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.signal(signal.SIGCONT)

    @contextlib.contextmanager
    def client(self) -> Iterator[redis.Redis]:
        """A plain client, to look behind the store's back. Answers are bytes."""
        client = redis.Redis(port=self.port, password=self.password, protocol=2)
        try:
            yield client
        finally:
            client.close()

    def _is_ready(self) -> bool:
        with contextlib.suppress(OSError):
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(b"PING\r\n")
                if not connection.recv(64).startswith((b"+PONG", b"-NOAUTH")):
                    return False
            with self.client() as client:
                return self._has_all_slots(client) and self._has_its_primary(client)
        return False

    def _has_all_slots(self, client: redis.Redis) -> bool:
        if not self._cluster_enabled:
            return True
        with contextlib.suppress(redis.ResponseError):  # it has them already
            _command(client, "CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        return b"cluster_state:ok" in _command(client, "CLUSTER", "INFO")

    def _has_its_primary(self, client: redis.Redis) -> bool:
        return self._primary is None or client.info("replication")["master_link_status"] == "up"


def _command(client: redis.Redis, *arguments: str) -> Any:
    return client.execute_command(*arguments)  # type: ignore[no-untyped-call]  # it has no types


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis server for all tests; each takes a prefix of its own and leaves it running."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis Cluster of one node, likewise."""
    server = RedisServer(tmp_path_factory.mktemp("redis-cluster"), cluster_enabled=True)
    server.start()
    yield server
    server.stop()
