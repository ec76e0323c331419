"""PostgreSQL servers of the tests' own, each in a folder and on a port of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .process import ServerProcess, free_port

__all__ = ["PostgresServer", "is_alive", "postgres_folder", "postgres_server"]

_UNIX_USER = "postgres"  # Debian's package makes it
_END_OF_FIELD, _END_OF_ROW = "\x1f", "\x1e"


class PostgresServer:
    """One ``postgres``, with all its databases.

    Args:
        folder: of its own; is made if need be. PostgreSQL does not run as root: for root it
            runs as the user ``postgres``, who gets the folder and must be able to reach it,
            which holds for `postgres_folder` and not for pytest's ``tmp_path``.
    """

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self._data = folder / "data"
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            "fsync": "off",
            # In the folder, and not in /dev/shm, where a killed server would leave it.
            "dynamic_shared_memory_type": "mmap",
        }
        settings = [f"--{name}={value}" for name, value in options.items()]
        self._process = _PostgresProcess(
            [*_as_owner(), _program("postgres"), "-D", str(self._data), *settings],
            log=folder / "log",
            is_ready=self._is_ready,
        )

    def dsn(self, database: str) -> dict[str, Any]:
        """Where one of its databases is, in the shape of guillotina's settings."""
        return {
            "scheme": "postgres",
            "dbname": database,
            "user": "postgres",
            "host": "127.0.0.1",
            "port": self.port,
            "password": "",
        }

    def start(self) -> None:
        if not self._data.exists():
            self._make_cluster()
        self._process.start()

    def stop(self) -> None:
        """Stop it, whoever is connected; what was committed is there at the next start."""
        self._process.signal(signal.SIGCONT)
        self._process.stop()

    def kill(self) -> None:
        """Let it crash; what was committed is there at the next start all the same."""
        self._process.kill()

    def restart(self) -> None:
        """Kill it and start it again, with its data, on the same port."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Let it hang: it stays connected, and answers nothing until `resume`."""
        self._process.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.signal(signal.SIGCONT)

    def processes(self) -> list[int]:
        """The ids of its processes that live, the first one's among them."""
        return self._process.living()

    def create_database(self) -> str:
        """Make an empty database, and return its name."""
        name = f"test_{secrets.token_hex(8)}"
        self.execute(f"CREATE DATABASE {name}")
        return name

    def psql(self, database: str) -> list[str]:
        """The command of an interactive client, without what it is to do."""
        quiet = ["-Xq", "-v", "ON_ERROR_STOP=1"]
        return [_program("psql"), *quiet, *self._address(), "-d", database]

    def execute(self, sql: str, *, database: str = "postgres") -> list[list[str]]:
        """Run a statement behind everybody's back.

        Returns:
            The rows, with each value as PostgreSQL writes it; NULL is ``""``.

        Raises:
            RuntimeError: it has failed, with what PostgreSQL said, or has taken over a minute.
        """
        layout = ["-F", _END_OF_FIELD, "-R", _END_OF_ROW]
        output = _run([*self.psql(database), "-At", *layout, "-c", sql], self._folder)
        if not output:
            return []
        rows = output.removesuffix("\n").split(_END_OF_ROW)
        return [row.split(_END_OF_FIELD) for row in rows]

    def terminate_connections(self, database: str) -> int:
        """End all connections to a database but this method's own; return how many it ended."""
        ended = self.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            f" WHERE datname = '{database}' AND backend_type = 'client backend'"
            " AND pid <> pg_backend_pid()"
        )
        return ended.count(["t"])

    def _make_cluster(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if _is_root():
            shutil.chown(self._folder, _UNIX_USER, _UNIX_USER)
        options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"]
        initdb = [_program("initdb"), "-D", str(self._data), "--no-sync", *options]
        _run([*_as_owner(), *initdb], self._folder)

    def _address(self) -> list[str]:
        return ["-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres"]

    def _is_ready(self) -> bool:
        """Whether it lets clients in, which takes a moment after a crash."""
        asked = [_program("pg_isready"), "-q", *self._address(), "-d", "postgres"]
        return subprocess.run(asked, check=False).returncode == 0


class _PostgresProcess(ServerProcess):
    """All processes of a server: its children leave the first one's group at once."""

    def signal(self, number: signal.Signals) -> None:
        if number == signal.SIGTERM:
            super().signal(signal.SIGINT)  # SIGTERM waits until the last client has gone
            return
        if number in (signal.SIGSTOP, signal.SIGKILL):
            super().signal(signal.SIGSTOP)  # it starts and buries no more children
        children = _children(self.pid)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
        awaited = {signal.SIGSTOP: "TtZX", signal.SIGKILL: "ZX"}.get(number)
        while awaited and any(_state(child) not in awaited for child in children):
            time.sleep(0.005)
        super().signal(number)

    def living(self) -> list[int]:
        return [pid for pid in [self.pid, *_children(self.pid)] if is_alive(pid)]


def is_alive(pid: int) -> bool:
    """Whether a process is there, and not merely waits to be buried."""
    return _state(pid) not in "ZX"


def _children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def _state(pid: int) -> str:
    """The kernel's one letter; ``X`` for a process that is no longer there."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "X"


def _program(name: str) -> str:
    """Debian's newest, which is not on the PATH; without one, what is."""
    found = Path("/usr/lib/postgresql").glob(f"*/bin/{name}")
    newest = max(found, key=lambda file: float(file.parts[-3]), default=None)
    return str(newest or name)


def _is_root() -> bool:
    return os.geteuid() == 0


def _as_owner() -> list[str]:
    """What to put before a command that root must not run."""
    if not _is_root():
        return []
    return ["setpriv", f"--reuid={_UNIX_USER}", f"--regid={_UNIX_USER}", "--clear-groups"]


def _run(command: list[str], folder: Path) -> str:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=60
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(str(error)) from error
    if done.returncode != 0:
        raise RuntimeError(f"{command} has failed:\n{done.stdout}{done.stderr}")
    return done.stdout


@contextlib.contextmanager
def postgres_folder() -> Iterator[Path]:
    """A folder that the user ``postgres`` can reach, until the end of the block."""
    with tempfile.TemporaryDirectory(prefix="postgres-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server for all tests; each makes a database of its own and leaves it running."""
    with postgres_folder() as folder:
        server = PostgresServer(folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()
