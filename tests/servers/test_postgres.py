"""The tests' PostgreSQL servers: what tests rely on when they let one crash or hang."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .postgres import (
    PostgresServer,
    is_alive,
    postgres_folder,
    postgres_server,  # noqa: F401  fixture
)


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    with postgres_folder() as folder:
        server = PostgresServer(folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@contextlib.contextmanager
def session(server: PostgresServer, database: str) -> Iterator[subprocess.Popen[bytes]]:
    """A client that is connected, in a statement that takes minutes."""
    with subprocess.Popen(
        [*server.psql(database), "-c", "SELECT pg_sleep(300)"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as client:
        try:
            asleep = f"SELECT 1 FROM pg_stat_activity WHERE datname = '{database}'"
            while not server.execute(f"{asleep} AND query LIKE 'SELECT pg_sleep%'"):
                assert client.poll() is None
            yield client
        finally:
            client.kill()


def is_listened_on(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


def test_each_database_is_fresh(postgres_server: PostgresServer) -> None:  # noqa: F811
    first, second = postgres_server.create_database(), postgres_server.create_database()

    postgres_server.execute("CREATE TABLE things (a int, b text)", database=first)

    count = "SELECT count(*) FROM pg_tables WHERE tablename = 'things'"
    assert postgres_server.execute(count, database=first) == [["1"]]
    assert postgres_server.execute(count, database=second) == [["0"]]


def test_rows_come_back_as_they_are(postgres_server: PostgresServer) -> None:  # noqa: F811
    assert postgres_server.execute("SELECT 1 WHERE false") == []
    assert postgres_server.execute("SELECT NULL") == [[""]]
    assert postgres_server.execute(r"VALUES (1, E'a|b\nc'), (2, E'\u00e9\n')") == [
        ["1", "a|b\nc"],
        ["2", "é\n"],
    ]


def test_what_postgres_refuses_is_told(postgres_server: PostgresServer) -> None:  # noqa: F811
    with pytest.raises(RuntimeError, match='relation "nothing" does not exist'):
        postgres_server.execute("SELECT * FROM nothing")


def test_dsn_says_where_it_is(postgres_server: PostgresServer) -> None:  # noqa: F811
    assert postgres_server.dsn("shop") == {
        "scheme": "postgres",
        "dbname": "shop",
        "user": "postgres",
        "host": "127.0.0.1",
        "port": postgres_server.port,
        "password": "",
    }
    assert postgres_server.execute("SHOW max_connections") == [["200"]]
    assert postgres_server.execute("SHOW port") == [[str(postgres_server.port)]]


def test_only_the_connections_to_one_database_end(
    postgres_server: PostgresServer,  # noqa: F811
) -> None:
    ended, spared = postgres_server.create_database(), postgres_server.create_database()
    with session(postgres_server, ended) as client, session(postgres_server, spared) as other:
        assert postgres_server.terminate_connections(ended) == 1

        _, said = client.communicate(timeout=30)
        assert b"terminating connection due to administrator command" in said
        assert other.poll() is None


def test_a_crash_keeps_the_data_and_leaves_no_process(own_server: PostgresServer) -> None:
    database = own_server.create_database()
    own_server.execute("CREATE TABLE things AS SELECT 7 AS a", database=database)
    with session(own_server, database) as client:
        before = own_server.processes()
        assert len(before) > 2

        own_server.kill()

        assert [pid for pid in before if is_alive(pid)] == []
        assert client.wait(timeout=30) != 0
    own_server.start()
    assert own_server.execute("SELECT a FROM things", database=database) == [["7"]]
    own_server.restart()
    assert own_server.execute("SELECT a FROM things", database=database) == [["7"]]


def test_it_stops_under_a_client_and_leaves_no_process(own_server: PostgresServer) -> None:
    database = own_server.create_database()
    with session(own_server, database) as client:
        before = own_server.processes()

        own_server.stop()

        assert [pid for pid in before if is_alive(pid)] == []
        assert client.wait(timeout=30) != 0
    assert not is_listened_on(own_server.port)
    own_server.start()
    assert own_server.execute("SELECT 1", database=database) == [["1"]]


def test_while_paused_no_process_of_it_runs(own_server: PostgresServer) -> None:
    database = own_server.create_database()
    with session(own_server, database) as client:
        own_server.pause()
        stats = [Path(f"/proc/{pid}/stat").read_text() for pid in own_server.processes()]
        assert {stat.rpartition(")")[2].split()[0] for stat in stats} == {"T"}
        assert is_listened_on(own_server.port)  # by the kernel

        own_server.resume()
        assert own_server.execute("SELECT 1", database=database) == [["1"]]
        assert client.poll() is None


def test_it_stops_while_paused(own_server: PostgresServer) -> None:
    before = own_server.processes()
    own_server.pause()

    own_server.stop()

    assert [pid for pid in before if is_alive(pid)] == []
