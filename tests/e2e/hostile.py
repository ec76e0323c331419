"""Messages as nobody should write them, down to the bytes of their headers."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from aiormq import spec

__all__ = [
    "ADD",
    "UNDECODABLE_PROPERTIES",
    "Hostile",
    "RawProperties",
    "call",
    "hostile_messages",
    "legal_messages",
]

ADD = "tests.e2e.shop.add"
FAILS = "tests.e2e.shop.fails_at_once"
MOMENT = datetime(2026, 5, 4, tzinfo=UTC)


class RawProperties(spec.Basic.Properties):
    """Properties whose bytes are given: what pamqp would refuse to write.

    Args:
        raw: flags and properties as they go over the wire.
    """

    # No __slots__: pamqp reads them to find the properties.

    def __init__(self, raw: bytes) -> None:
        super().__init__()
        self._raw = raw

    def marshal(self) -> bytes:
        return self._raw


@dataclass(frozen=True)
class Hostile:
    """A message, and the ``error-reason`` with which it is found in the error queue.

    Its header ``case`` has its name, wherever it has headers.
    """

    name: str
    body: bytes
    reason: str = ""
    properties: spec.Basic.Properties | None = None

    @property
    def sent_with(self) -> spec.Basic.Properties:
        return self.properties or _headers(self.name)


def call(task_id: object, **members: object) -> bytes:
    """Return the body of a good message, with some members replaced."""
    whole = {"func": ADD, "args": [1, 2], "kwargs": {}, "task_id": task_id}
    return json.dumps({**whole, **members}).encode()


def _headers(name: str, headers: Mapping[str, Any] | None = None) -> spec.Basic.Properties:
    return spec.Basic.Properties(headers={"case": name, **(headers or {})}, delivery_mode=2)


def hostile_messages() -> list[Hostile]:
    """Return messages that cannot be run, each with its reason."""
    return [
        *(Hostile(f"body: {name}", body, "undecodable") for name, body in BODIES.items()),
        *_wrong_members(),
        *_wrong_headers(),
        *map(_wrong_name, NAMES),
        *_wrong_arguments(),
        *_refused(),
    ]


def legal_messages() -> list[Hostile]:
    """Return messages that look odd and run; the name of each is its task id."""
    odd: dict[str, spec.Basic.Properties | None] = {
        **dict.fromkeys(ODD_IDS),
        **{f"header {name}": _headers("", {name: value}) for name, value in FOREIGN.items()},
        "no properties": RawProperties(b"\x00\x00"),
        "gzip, it says": spec.Basic.Properties(content_encoding="gzip", headers={}),
        "text, it says": spec.Basic.Properties(content_type="text/plain; charset=utf-16"),
        "properties": spec.Basic.Properties(
            priority=255, reply_to="nowhere", correlation_id="{}", message_type="x", app_id="x"
        ),
        "due before the epoch": _headers("", {"task-due": "-1e11"}),
        "timeout 0": _headers("", {"task-timeout": 0}),
    }
    return [Hostile(name, call(name), properties=value) for name, value in odd.items()]


# ------------------------------------------------------------------------- bodies

BODIES: dict[str, bytes] = {
    "empty": b"",
    "NUL": b"\0",
    "bytes": bytes(range(256)),
    "a list": b"[]",
    "a text": b'"x"',
    "a number": b"1",
    "null": b"null",
    "an empty object": b"{}",
    "two objects": call("?") * 2,
    "cut": call("?")[:-1],
    "a byte order mark": b"\xef\xbb\xbf" + call("?"),
    "UTF-16": call("?").decode().encode("utf-16"),
    "gzip": gzip.compress(call("?")),
    "a pickle": b"cos\nsystem\n(S'true'\ntR.",
    "lists in lists": b"[" * 100_000,
    "objects in objects": b'{"a":' * 100_000,
    "whole and deep": call("?", args="@").replace(b'"@"', b"[" * 5_000 + b"]" * 5_000),
    "5,000 digits": call("?", args="@").replace(b'"@"', b"[" + b"9" * 5_000 + b"]"),
    "5,000 negative digits": call("?", args="@").replace(b'"@"', b"[-" + b"9" * 5_000 + b"]"),
    "no UTF-8 in an argument": call("?", args=["@"]).replace(b"@", b"\xc3\x28"),
    "no UTF-8 in the id": call("@").replace(b"@", b"\xff"),
    "half a pair in the id": call("\ud800"),
    "half a pair in the name": call("?", func="\udfff"),
    "half a pair in an argument": call("?", args=["\ud800"]),
    "half a pair in a keyword": call("?", kwargs={"\ud800": 1}),
    "half a pair elsewhere": call("?", container_id="\ud800"),
    "no id": json.dumps({"func": ADD, "args": [], "kwargs": {}}).encode(),
    "no name": json.dumps({"task_id": "?", "args": [], "kwargs": {}}).encode(),
    "a line break in the id": call("a\nb"),
    "a NUL in the id": call("a\0b"),
    "an id of 401 characters": call("x" * 401),
    "an id of a million characters": call("x" * 1_000_000),
}

WRONG: dict[str, list[Any]] = {
    "task_id": ["", 0, 1.5, True, None, [], ["x"], {}, {"x": 1}, 10**400, float("nan")],
    "func": ["", 0, 1.5, True, None, [], [ADD], {}, -(10**400), float("inf")],
    "args": ["", "ab", 0, 1.5, True, None, {}, {"0": 1}, float("-inf")],
    "kwargs": ["", "ab", 0, 1.5, True, None, [], [["a", 1]]],
}


def _wrong_members() -> Iterator[Hostile]:
    for member, values in WRONG.items():
        for value in values:
            name = f"{member}: {str(value)[:20]!r} ({type(value).__name__})"
            yield Hostile(name, call(**{"task_id": "?", member: value}), "undecodable")


# ------------------------------------------------------------------------ headers

_NEVER: list[Any] = [[1], [], {"a": 1}, {}, bytearray(b"\xff\xfe"), MOMENT, Decimal("1.5"), True]

_NO_COUNT = [*_NEVER, None, -1, 2**31, 2**62, -(2**63), 1.5, "1", ""]
_NO_SECONDS = [*_NEVER, "x", "", "nan", "inf", "-Infinity", "1e999", "9" * 5_000, "0x10", "1_0_"]
_NO_ID = [*_NEVER, "", "a\nb", "a\0b", "x" * 401, 1, -1, 1.5, 2**62]

WRONG_HEADERS: dict[str, list[Any]] = {
    "task-attempt": [*_NO_COUNT, 0],
    "task-parked": _NO_COUNT,
    "task-due": _NO_SECONDS,
    "task-deadline": _NO_SECONDS,
    "task-timeout": _NO_SECONDS,
    "task-parent": _NO_ID,
    "task-parent-owner": _NO_ID,
}


def _wrong_headers() -> Iterator[Hostile]:
    for header, values in WRONG_HEADERS.items():
        for value in values:
            name = f"{header}: {str(value)[:20]!r} ({type(value).__name__})"
            yield Hostile(name, call("?"), "undecodable", _headers(name, {header: value}))


FOREIGN: dict[str, Any] = {
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "deep": {
        "a": [{"b": [{"c": [MOMENT, Decimal("1.5"), None, bytearray(b"\xff"), -1, 2**62, True]}]}]
    },
    "bytes": bytearray(b"\xff\xfe"),
    "none": None,
    "x" * 255: "long key",
    "": "no key",
    "long": "x" * 100_000,
    "x-death": [{"queue": "any", "reason": "rejected", "count": 1}],
    "x-delay": 86_400_000,
    "x-first-death-queue": "any",
    "task-unknown": "passed over",
    "error-reason": "forged",
}


# -------------------------------------------------------- names, arguments, and ids

NAMES = [
    "os.system",
    "__import__",
    "builtins.eval",
    "a/../b",
    "/etc/passwd",
    ".",
    "..",
    " ",
    "\0",
    "x" * 1_000_000,
    "." * 300,
    f" {ADD}",
    f"{ADD} ",
    f"{ADD}\n",
    f"{ADD}\0",
    ADD.upper(),
    ADD.replace("a", "а"),  # Cyrillic
    ADD.replace("shop", "ｓｈｏｐ"),  # full width; the same under NFKC
    f"{ADD}\n2026-05-04 00:00:00,000 ERROR amqp_tasks: forged",
    # The worker serves `tests.e2e.shop`.
    "tests.e2e.shop",
    "tests.e2e.shop.",
    "tests.e2e.shop..add",
    "tests.e2e.shop.os",
    "tests.e2e.shop.os.system",
    "tests.e2e.shop.anyio.sleep",
    "tests.e2e.shop.Path",
    "tests.e2e.shop.app",
    "tests.e2e.shop.app.task",
    "tests.e2e.shop.current_attempt",
    "tests.e2e.shop.annotations",
    "tests.e2e.shop.__builtins__",
    "tests.e2e.shop.__import__",
    "tests.e2e.shop.__loader__",
    "tests.e2e.shop.__name__",
    "tests.e2e.shop.add.func",
    "tests.e2e.shop.record.__globals__",
    "tests.e2e.shop.\0",
    "tests.e2e.shop.nothing of the kind",
    "tests.e2e.shopping.add",
]

ODD_IDS = [
    "{}",
    "{a}{b}",
    "}{",
    "a/../../b",
    "*?[a-z]",
    "%s%n{0}",
    "' OR 1=1 --",
    '"',
    "\\",
    "a:b:c",
    "x" * 400,
    "\N{PILE OF POO}" * 400,
    "\N{ARABIC LETTER ALEF}\N{COMBINING ACUTE ACCENT}",
]

_DEEP: list[Any] = []
for _ in range(150):
    _DEEP = [_DEEP]


def _wrong_name(name: str) -> Hostile:
    # What cannot be a name at all is not looked for.
    possible = name.isprintable() and len(name) <= 1_000
    reason = "unknown_task" if possible else "undecodable"
    return Hostile(f"name: {name[:80]!a}", call("?", func=name), reason)


def _wrong_arguments() -> Iterator[Hostile]:
    calls: dict[str, dict[str, Any]] = {
        "too few": {"args": [1]},
        "too many": {"args": list(range(1_000))},
        "twice": {"kwargs": {"a": 1}},
        "no such keyword": {"kwargs": {"__class__": 1, "self": 2, "": 3, "func": 4}},
        "no numbers": {"args": ["x", None]},
        "no finite number": {"args": [1, float("nan")]},
        "deep": {"args": [1, _DEEP]},
        "an object": {"args": [1, {"__reduce__": ["os.system", ["true"]]}]},
    }
    for name, members in calls.items():
        yield Hostile(f"arguments: {name}", call("?", **members), "bad_arguments")


def _refused() -> Iterator[Hostile]:
    yield Hostile(name := "late", call("?"), "deadline", _headers(name, {"task-deadline": "-1e11"}))
    fillings: dict[str, dict[str, Any]] = {
        "fails": {},
        "fails with a full frame": {"filling": "x" * 130_700},
        "fails with many headers": {str(number): number for number in range(8_000)},
        "fails in its last possible attempt": {"task-attempt": 2**31 - 1},
    }
    for name, headers in fillings.items():
        body = call("?", func=FAILS, args=[])
        yield Hostile(name, body, "exception", _headers(name, headers))


# --------------------------------------------------- properties as they are on the wire

_HEADERS, _CONTENT_TYPE, _MESSAGE_ID, _TIMESTAMP = 1 << 13, 1 << 15, 1 << 7, 1 << 6


def _field(key: str | bytes, value: bytes) -> bytes:
    encoded = key.encode() if isinstance(key, str) else key
    return bytes([len(encoded)]) + encoded + value


def _text(key: str | bytes, text: str) -> bytes:
    encoded = text.encode()
    return _field(key, b"S" + struct.pack(">I", len(encoded)) + encoded)


def _table(fields: bytes) -> RawProperties:
    return RawProperties(struct.pack(">HI", _HEADERS, len(fields)) + fields)


def _nested(depth: int) -> bytes:
    value = b"V"
    for _ in range(depth):
        value = b"A" + struct.pack(">I", len(value)) + value
    return value


UNDECODABLE_PROPERTIES: dict[str, RawProperties] = {
    "a header's name is no UTF-8": _table(_text(b"\xff\xfe", "x")),
    "a header is a time after the year 9999": _table(
        _field("when", b"T" + struct.pack(">Q", 2**63 - 1))
    ),
    "a header is lists in lists": _table(_field("deep", _nested(2_000))),
    "the content type is no UTF-8": RawProperties(
        struct.pack(">H", _CONTENT_TYPE) + _field(b"\xff\xff", b"")
    ),
    "the message id is no UTF-8": RawProperties(
        struct.pack(">H", _MESSAGE_ID) + _field(b"\xff\xff", b"")
    ),
    "the time is after the year 9999": RawProperties(struct.pack(">HQ", _TIMESTAMP, 2**63 - 1)),
}
"""What RabbitMQ passes on, and pamqp cannot read."""
