"""Functions and other things of a module that somebody might make a task of."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from json import dumps
from typing import Any

__all__ = ["dumps"]


async def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b


def add_in_thread(a: int) -> int:
    return a + 1


async def narrate() -> AsyncIterator[int]:
    yield 1


def generate() -> Iterator[int]:
    yield 1


async def later(item: Later) -> Later:
    """Annotated with what is defined further down."""
    return item


async def unknown_annotation(item: NowhereDefined) -> None:  # type: ignore[name-defined]  # noqa: F821
    """Annotated with what is defined nowhere."""


async def socket_like(item: Connection) -> None:
    """Annotated with what cannot be JSON."""


@dataclass
class Later:
    """Defined after it was named."""

    x: int


class Connection:
    """Nothing that pydantic can read or write."""


class Shop:
    async def method(self) -> None: ...

    @staticmethod
    async def static() -> None: ...

    @classmethod
    async def of_class(cls) -> None: ...

    async def __call__(self) -> None: ...


def make_closure(number: int) -> Any:
    async def closure() -> int:
        return number

    return closure


def make_local() -> Any:
    async def local() -> int:
        return 1

    return local


nameless = lambda: 1  # noqa: E731
partial = functools.partial(add, 1)
