"""A TCP proxy that breaks connections in every way that networks know.

It runs an event loop in a thread of its own; all methods may be called from any other.
What it does to a connection is one of

- normal: bytes go through, after the delay of their direction;
- a black hole: bytes are taken and kept, nothing is forwarded and nobody is told. That is a
  link that is down: nothing is lost by it, and what was kept goes on when it is up again.
  Or, if it is for good, a firewall that has forgotten the connection: the bytes are dropped
  and it stays silent for as long as both sides believe in it;
- cut: both sides get a reset;
- half closed: one side gets a FIN, and may go on sending.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Final, Literal, TypeVar

__all__ = ["HOST", "RESET_ON_CLOSE", "Side", "TcpProxy"]

T = TypeVar("T")

Side = Literal["client", "server"]

HOST: Final = "127.0.0.1"
_CHUNK: Final = 65_536
RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
"""SO_LINGER, on and zero seconds: what is unsent is dropped, and the peer gets a reset."""


class TcpProxy:
    """Listens on a port of its own and forwards to `target`, a port of this machine.

    Attributes:
        port: where it listens, also while it refuses.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        # Bound and never listening: it keeps the port while nobody listens there.
        self._placeholder = _bound(0)
        self.port: int = self._placeholder.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy {self.port}")
        self._listener: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._handlers: set[asyncio.Task[None]] = set()
        self._delays: dict[Side, float] = {"client": 0.0, "server": 0.0}
        self._is_open = asyncio.Event()
        """Whether new connections are forwarded; those of a black hole wait for that."""
        self._is_open.set()

    @contextlib.contextmanager
    def running(self) -> Generator[TcpProxy, None, None]:
        """Forward for as long as the block."""
        self._thread.start()
        try:
            self._call(self._listen)
            yield self
        finally:
            self._call(self._shut_down)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._placeholder.close()

    @property
    def connections(self) -> int:
        """How many connections go through it, dead ones that nobody has closed included."""
        return len(self._connections)

    def cut(self) -> None:
        """Reset all connections. New ones are as before."""
        self._each(_Connection.reset)

    def half_close(self, towards: Side = "client") -> None:
        """Tell one side of all connections that the other sends no more."""
        self._each(lambda connection: connection.end(towards))

    def black_hole(
        self, *, existing: bool = True, new: bool = True, for_good: bool = False
    ) -> None:
        """Forward nothing, and say nothing.

        Args:
            existing: on the connections that are there.
            new: on those that come; they are accepted.
            for_good: the existing ones stay dead after `restore`.
        """

        async def begin() -> None:
            if new:
                self._is_open.clear()
            if existing:
                for connection in self._connections:
                    connection.hold(for_good=for_good)

        self._call(begin)

    def delay(self, *, to_client: float = 0.0, to_server: float = 0.0) -> None:
        """Let bytes take so many seconds longer; they stay in order."""
        self._delays.update({"client": to_client, "server": to_server})

    def refuse(self) -> None:
        """Refuse new connections. Those that are there go on."""
        self._call(self._stop_listening)

    def restore(self) -> None:
        """Be a good proxy again. What a black hole has kept goes on its way."""

        async def end() -> None:
            self._delays.update({"client": 0.0, "server": 0.0})
            self._is_open.set()
            for connection in self._connections:
                connection.go_on()
            await self._listen()

        self._call(end)

    def _each(self, do: Callable[[_Connection], None]) -> None:
        async def all_of_them() -> None:
            for connection in list(self._connections):
                do(connection)
            await asyncio.sleep(0)  # transports close in the next pass

        self._call(all_of_them)

    def _call(self, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return asyncio.run_coroutine_threadsafe(function(), self._loop).result(timeout=10)

    # On the thread's loop

    async def _listen(self) -> None:
        if self._listener is None:
            self._listener = await asyncio.start_server(self._accept, sock=_bound(self.port))

    async def _stop_listening(self) -> None:
        if self._listener is not None:
            # Not `wait_closed`, which in later Pythons waits for the connections as well.
            self._listener.close()
            self._listener = None
            await asyncio.sleep(0)

    async def _shut_down(self) -> None:
        await self._stop_listening()
        for connection in self._connections:
            connection.reset()
        for handler in self._handlers:
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)
        await asyncio.sleep(0)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of ours: one of the stream's own is reported when it is cancelled.
        handler = self._loop.create_task(self._handle(reader, writer))
        self._handlers.add(handler)
        handler.add_done_callback(self._handlers.discard)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self._delays, reader, writer)
        self._connections.add(connection)
        try:
            if not self._is_open.is_set():
                await self._is_open.wait()
            await connection.run(self.target)
        finally:
            connection.reset()
            self._connections.discard(connection)


class _Connection:
    """One connection, both of its sides, on the proxy's loop."""

    def __init__(
        self,
        delays: dict[Side, float],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._delays = delays
        self._reader = reader
        self._writers: dict[Side, asyncio.StreamWriter] = {"client": writer}
        self._ended: set[Side] = set()
        self._was_reset = False
        self._dead = False
        self._flows = asyncio.Event()
        self._flows.set()

    def hold(self, *, for_good: bool) -> None:
        self._flows.clear()
        self._dead = self._dead or for_good

    def go_on(self) -> None:
        if not self._dead:
            self._flows.set()

    def reset(self) -> None:
        self._was_reset = True
        for writer in self._writers.values():
            if not writer.is_closing():
                transport_socket = writer.get_extra_info("socket")
                with contextlib.suppress(OSError):
                    transport_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            writer.transport.abort()

    def end(self, side: Side) -> None:
        """Tell `side` that no more comes."""
        writer = self._writers.get(side)
        if writer is not None and side not in self._ended:
            self._ended.add(side)
            with contextlib.suppress(OSError):
                writer.write_eof()

    async def run(self, target: int) -> None:
        """Forward until both directions have ended, or one has broken."""
        try:
            from_server, self._writers["server"] = await asyncio.open_connection(HOST, target)
        except OSError:
            return  # nobody there: the client is reset
        if self._was_reset:
            self.reset()
            return
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._forward(self._reader, "server"))
            tasks.create_task(self._forward(from_server, "client"))

    async def _forward(self, reader: asyncio.StreamReader, to: Side) -> None:
        """Forward one direction to its end, be it a good one or not."""
        chunks: asyncio.Queue[tuple[float, bytes | None]] = asyncio.Queue()
        sending = asyncio.create_task(self._send(chunks, to))
        clock = asyncio.get_running_loop().time
        try:
            data: bytes | None = b"more"
            while data:
                try:
                    data = await reader.read(_CHUNK)
                except OSError:
                    data = None
                chunks.put_nowait((clock() + self._delays[to], data))
            await sending
        finally:
            sending.cancel()

    async def _send(self, chunks: asyncio.Queue[tuple[float, bytes | None]], to: Side) -> None:
        """Send what was read: bytes, none for a FIN, None for a reset."""
        clock = asyncio.get_running_loop().time
        while True:
            due, data = await chunks.get()
            await asyncio.sleep(max(0.0, due - clock()))
            await self._flows.wait()
            if data is None:
                self.reset()
                return
            if not data:
                self.end(to)
                return
            if to not in self._ended:
                try:
                    self._writers[to].write(data)
                    await self._writers[to].drain()
                except OSError:
                    self.reset()
                    return


def _bound(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((HOST, port))
    return sock
