"""What aiormq and the sockets raise, and what it means to us: one table."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Mapping
from typing import Any, Final

from aiormq import exceptions as amqp

from ...exceptions import BrokerError, BrokerRefused, BrokerUnavailable, QueueMismatch

__all__ = ["explain", "mismatch", "translate"]

_NOBODY: Final = "nobody listens there; check that it runs, and host and port"
_NOT_AMQP: Final = "it does not speak AMQP 0-9-1; check the port, usually 5672"
_NOT_TRUSTED: Final = "its certificate is not trusted ({0}); check `cafile` in the URL"

_MEANINGS: Final[tuple[tuple[type[BaseException], type[BrokerError], str], ...]] = (
    # From the particular to the general; the first that fits is taken. {0} is what the
    # broker or the system said.
    #
    # The broker said no.
    (amqp.ProbableAuthenticationError, BrokerRefused, "{0}"),
    (amqp.AuthenticationError, BrokerRefused, "it does not take logins with a password"),
    (amqp.ConnectionNotAllowed, BrokerRefused, "{0}"),
    (amqp.ConnectionNotImplemented, BrokerRefused, "{0}"),
    (amqp.ChannelAccessRefused, BrokerRefused, "{0}"),
    (amqp.ChannelNotFoundEntity, BrokerRefused, "{0}"),
    (amqp.ChannelLockedResource, BrokerRefused, "{0}"),
    (amqp.ChannelPreconditionFailed, BrokerRefused, "{0}"),
    # The broker went away, or we did.
    (amqp.ConnectionClosed, BrokerUnavailable, "the broker closed the connection ({0})"),
    (amqp.ChannelClosed, BrokerUnavailable, "the broker closed the channel ({0})"),
    (amqp.ChannelInvalidStateError, BrokerUnavailable, "the channel is closed"),
    (amqp.IncompatibleProtocolError, BrokerUnavailable, _NOT_AMQP),
    (amqp.ProtocolSyntaxError, BrokerUnavailable, _NOT_AMQP),
    (amqp.AMQPConnectionError, BrokerUnavailable, "the connection was cut"),
    (amqp.AMQPError, BrokerUnavailable, "{0}"),
    # Sockets.
    (socket.gaierror, BrokerUnavailable, "no such host ({0}); check its name"),
    (ssl.SSLCertVerificationError, BrokerUnavailable, _NOT_TRUSTED),
    (ssl.SSLError, BrokerUnavailable, "no TLS there ({0}); check the port, usually 5671"),
    (ConnectionRefusedError, BrokerUnavailable, _NOBODY),
    (OSError, BrokerUnavailable, "{0}"),
    # A lost connection looks like this to all that waits on it, and a connection that
    # the other side ended without a word gives a plain Exception.
    (asyncio.CancelledError, BrokerUnavailable, "the connection was lost"),
    (Exception, BrokerUnavailable, "the connection was lost"),
)

_MISMATCH: Final = re.compile(
    r"inequivalent arg '(?P<argument>[^']*)' for (?P<kind>queue|exchange) "
    # Reply texts end after 255 bytes, wherever that is: what follows may be missing.
    r"(?:.*?: received (?:none|the value )?.*? but current is (?P<theirs>.+))?",
    re.DOTALL,
)
_VALUE: Final = re.compile(r"(?:the value )?'(.*?)'(?: of type '[^']*')?", re.DOTALL)


def translate(error: BaseException, doing: str) -> BrokerError:
    """Return our error for one of aiormq's or the system's.

    Args:
        doing: what failed, to begin the message with: "cannot …".
    """
    if isinstance(error, BrokerError):
        return type(error)(*error.args)  # a new one: several callers may get it
    for known, ours, words in _MEANINGS:
        if isinstance(error, known):
            return ours(f"{doing}: {words.format(_text(error))}")
    raise error


def explain(error: BaseException | None) -> str:
    """Say in words why a connection was lost."""
    if error is None:
        return "the connection ended without a word from the broker"
    for known, _, words in _MEANINGS:
        if isinstance(error, known):
            return words.format(_text(error))
    return repr(error)


def mismatch(text: str, name: str, ours: Mapping[str, Any]) -> QueueMismatch | None:
    """Read RabbitMQ's answer 406; return None if it is about something else.

    Args:
        text: what RabbitMQ said.
        name: of the queue or exchange that was declared.
        ours: what it was declared with.
    """
    found = _MISMATCH.search(text)
    if found is None:
        return None
    argument, kind = found["argument"], found["kind"]
    theirs = _their_value(found["theirs"])
    return QueueMismatch(
        f"{kind} {name!r} exists with {argument}={theirs}; "
        f"this app wants {argument}={ours.get(argument)!r}. "
        f"Change the setting, use another {kind}, or delete the {kind} when nobody needs it"
    )


def _their_value(text: str | None) -> str:
    if text is None:
        return "another value"
    value = _VALUE.fullmatch(text)
    if value is None:
        return "None" if text.startswith("none") else text
    number = value[1].lstrip("-").isdigit()
    return value[1] if number else repr(value[1])


def _text(error: BaseException) -> str:
    """Return what was said, in one line, without aiormq's words around it."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else None
    if said is None:
        said = next((arg for arg in reversed(error.args) if isinstance(arg, str)), "")
    return " ".join((said or type(error).__name__).split())
