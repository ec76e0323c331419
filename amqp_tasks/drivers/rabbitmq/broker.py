"""How to reach a RabbitMQ, and what is wrong when that fails."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from ...exceptions import BrokerError, BrokerRefused, BrokerUnavailable
from ...settings import hide_password
from .errors import translate
from .link import Link
from .session import RabbitSession
from .wire import Connection, Streams

__all__ = ["RabbitBroker"]


class RabbitBroker:
    """A RabbitMQ.

    Args:
        url: ``amqp://user:password@host:port/vhost``, or ``amqps://``. No virtual host is
            ``/``; a slash in its name is ``%2F``. For TLS the query may have ``cafile``,
            ``capath``, ``cadata``, ``certfile``, ``keyfile`` and ``no_verify_ssl=1``.
        heartbeat: seconds; a dead peer is noticed after three times as much and three more.
        connect_timeout: seconds from the first packet until the session is open.
        name: of the connections, for people who look at RabbitMQ's.
    """

    def __init__(
        self, url: str, *, heartbeat: int, connect_timeout: float, name: str = "amqp_tasks"
    ) -> None:
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query)) | {"heartbeat": str(heartbeat), "name": name}
        self._url = parts._replace(query=urlencode(query)).geturl()
        self._address = hide_password(parts._replace(query="", fragment="").geturl())
        self._user = unquote(parts.username or "guest")
        self._connect_timeout = connect_timeout
        self._careful = False

    @property
    def address(self) -> str:
        """The URL without the password and without options."""
        return self._address

    @asynccontextmanager
    async def session(self) -> AsyncGenerator[RabbitSession]:
        """Connect; see `abc.Broker.session`. Leaving takes a few seconds at most."""
        streams = Streams(careful=self._careful)
        connection = Connection(self._url, transport_factory=streams)
        link = Link(connection, streams, self._address)
        session = RabbitSession(link)
        try:
            try:
                await link.open(self._connect_timeout)
            except Exception as error:
                raise self._refusal(error, streams, connection.vhost) from error
            yield session
        finally:
            self._careful = self._careful or link.met_unreadable
            await link.close(session.flush)  # noqa: ASYNC102  shields and limits itself

    def _refusal(self, error: Exception, streams: Streams, vhost: str) -> BrokerError:
        doing = f"cannot connect to RabbitMQ at {self._address}"
        refusal = streams.refusal()
        if refusal is not None:
            match refusal.reply_code:
                case 403:
                    return BrokerRefused(
                        f"{doing}: login refused for user {self._user!r}; check user and password"
                    )
                case 530:
                    return BrokerRefused(
                        f"{doing}: user {self._user!r} cannot use virtual host {vhost!r} "
                        f"({refusal.reply_text}); check its name and the user's permissions"
                    )
                case _:
                    return BrokerUnavailable(f"{doing}: {refusal.reply_text}")
        if isinstance(error, TimeoutError):
            seconds = f"{self._connect_timeout:g} seconds"
            if streams.connected:
                return BrokerUnavailable(
                    f"{doing}: it takes connections but says nothing for {seconds}; "
                    "check that this is RabbitMQ's AMQP port, and how it fares"
                )
            return BrokerUnavailable(
                f"{doing}: no answer within {seconds}; check host, port and firewall"
            )
        return translate(error, doing)
