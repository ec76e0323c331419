"""The proxy does to connections what it says, seen with plain sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from .proxy import HOST, RESET_ON_CLOSE, TcpProxy

SILENCE = 0.15
"""Seconds without a byte that count as silence."""


class EchoServer:
    """Sends back what it gets, and notes how its connections end."""

    def __init__(self) -> None:
        self.ends: list[str] = []
        self._socket = socket.create_server((HOST, 0))
        self.port: int = self._socket.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def wait_for_end(self) -> str:
        deadline = time.monotonic() + 10
        while not self.ends:
            assert time.monotonic() < deadline, "no connection has ended"
            time.sleep(0.005)
        return self.ends[0]

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._accepting.join()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._echo, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _echo(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65_536):
                    connection.sendall(data)
                self.ends.append("fin")
            except OSError:
                self.ends.append("reset")


@pytest.fixture
def server() -> Iterator[EchoServer]:
    server = EchoServer()
    yield server
    server.close()


@pytest.fixture
def proxy(server: EchoServer) -> Iterator[TcpProxy]:
    with TcpProxy(server.port).running() as proxy:
        yield proxy


@pytest.fixture
def client(proxy: TcpProxy) -> Iterator[socket.socket]:
    with connect(proxy) as client:
        assert ask(client, b"hello") == b"hello"
        yield client


def connect(proxy: TcpProxy) -> socket.socket:
    return socket.create_connection((HOST, proxy.port), timeout=10)


def ask(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    return receive(client, len(data))


def receive(client: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        data = client.recv(size - len(received))
        assert data, f"the connection has ended after {received!r}"
        received += data
    return received


def assert_silent(client: socket.socket) -> None:
    client.settimeout(SILENCE)
    with pytest.raises(TimeoutError):
        client.recv(1)
    client.settimeout(10)


def test_it_forwards_both_ways_and_the_end_too(client: socket.socket, server: EchoServer) -> None:
    data = bytes(range(256)) * 4_000
    sender = threading.Thread(target=client.sendall, args=(data,))
    sender.start()
    assert receive(client, len(data)) == data
    sender.join()
    client.shutdown(socket.SHUT_WR)
    assert server.wait_for_end() == "fin"
    assert client.recv(1) == b""


def test_a_cut_resets_both_sides_and_lets_new_connections_in(
    proxy: TcpProxy, client: socket.socket, server: EchoServer
) -> None:
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert server.wait_for_end() == "reset"
    with connect(proxy) as another:
        assert ask(another, b"again") == b"again"


def test_half_closed_towards_the_client_it_still_forwards_to_the_server(
    proxy: TcpProxy, client: socket.socket, server: EchoServer
) -> None:
    proxy.half_close("client")
    assert client.recv(1) == b""
    client.sendall(b"the server does not know")
    assert not server.ends
    client.shutdown(socket.SHUT_WR)
    assert server.wait_for_end() == "fin"


def test_half_closed_towards_the_server_it_still_forwards_to_the_client(
    proxy: TcpProxy, client: socket.socket, server: EchoServer
) -> None:
    proxy.half_close("server")
    assert server.wait_for_end() == "fin"
    assert client.recv(1) == b""  # the echo server ends as well, and that comes through


def test_a_black_hole_keeps_what_comes_and_gives_it_away_when_it_ends(
    proxy: TcpProxy, client: socket.socket
) -> None:
    proxy.black_hole()
    client.sendall(b"kept")
    assert_silent(client)
    with connect(proxy) as another:
        another.sendall(b"new")
        assert_silent(another)
        proxy.restore()
        assert receive(another, 3) == b"new"
    assert receive(client, 4) == b"kept"


def test_a_black_hole_for_good_stays_silent_while_new_connections_work(
    proxy: TcpProxy, client: socket.socket, server: EchoServer
) -> None:
    proxy.black_hole(new=False, for_good=True)
    client.sendall(b"dropped")
    with connect(proxy) as another:
        assert ask(another, b"new") == b"new"
        proxy.restore()
        assert ask(another, b"again") == b"again"
    assert_silent(client)
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_a_black_hole_hides_that_the_client_is_gone(
    proxy: TcpProxy, client: socket.socket, server: EchoServer
) -> None:
    proxy.black_hole()
    client.close()
    time.sleep(SILENCE)
    assert not server.ends
    proxy.restore()
    assert server.wait_for_end() == "fin"


def test_a_black_hole_holds_back_a_reset_too(
    proxy: TcpProxy, client: socket.socket, server: EchoServer
) -> None:
    proxy.black_hole()
    client.sendall(b"kept")
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    client.close()
    time.sleep(SILENCE)
    assert not server.ends
    proxy.restore()
    assert server.wait_for_end() == "reset"


def test_a_black_hole_for_new_connections_only(proxy: TcpProxy, client: socket.socket) -> None:
    proxy.black_hole(existing=False)
    assert ask(client, b"on") == b"on"
    with connect(proxy) as another:
        another.sendall(b"new")
        assert_silent(another)


@pytest.mark.parametrize("direction", ["to_client", "to_server"])
def test_delays_hold_bytes_back_and_keep_their_order(
    proxy: TcpProxy, client: socket.socket, direction: str
) -> None:
    proxy.delay(**{direction: 0.2})
    began = time.monotonic()
    for number in range(20):
        client.sendall(b"%02d" % number)
    assert receive(client, 40) == b"".join(b"%02d" % number for number in range(20))
    assert time.monotonic() - began >= 0.2
    proxy.restore()
    assert ask(client, b"fast") == b"fast"


def test_it_refuses_new_connections_and_takes_them_again(
    proxy: TcpProxy, client: socket.socket
) -> None:
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    assert ask(client, b"still there") == b"still there"
    proxy.restore()
    with connect(proxy) as another:
        assert ask(another, b"back") == b"back"


def test_without_a_server_the_client_is_reset(proxy: TcpProxy) -> None:
    nobody = socket.socket()
    nobody.bind((HOST, 0))  # and does not listen
    proxy.target = nobody.getsockname()[1]
    with nobody, pytest.raises(ConnectionResetError), connect(proxy) as client:
        client.recv(1)
