"""An exception as the text that is kept of it."""

from __future__ import annotations

import traceback
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final

from pydantic_core import from_json

from ..core.message import clean
from ..core.outcome import Failure, Reason

__all__ = ["Edge", "describe", "failure_from_text", "single_error"]

MAX_MESSAGE: Final = 10_000
MAX_TRACEBACK: Final = 100_000
"""Characters that are kept of each. What a message holds must not fill logs and states."""

_HERE = str(Path(__file__).parent)


def describe(error: BaseException, reason: Reason | None = None) -> Failure:
    """Return what is kept of an exception. Never fails, whatever the exception does."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else _dotted(kind)
    return Failure(
        type=clean(name), message=_text(error), traceback=_traceback(error), reason=reason
    )


def _dotted(kind: type[BaseException]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _text(error: BaseException) -> str:
    try:
        return _cut(clean(str(error)), MAX_MESSAGE)
    except Exception as broken:
        return f"(its text cannot be had: {type(broken).__name__})"


def _traceback(error: BaseException) -> str:
    try:
        lines = traceback.format_exception(type(error), error, _from_task(error.__traceback__))
        return _cut(clean("".join(lines)), MAX_TRACEBACK)
    except Exception as broken:
        return f"(its traceback cannot be had: {type(broken).__name__})"


def _cut(text: str, limit: int) -> str:
    """Leave out what is too much of a text, in its middle."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"


def _from_task(frames: TracebackType | None) -> TracebackType | None:
    """Skip the frames that are this package's own, down to the task's first."""
    first = frames
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_HERE):
        frames = frames.tb_next
    return frames or first


def failure_from_text(text: str | None) -> Failure:
    """Return the failure that a state keeps as JSON text."""
    known = from_json(text) if text else {}
    reason = known.get("reason")
    return Failure(
        type=known.get("type", "unknown"),
        message=known.get("message", ""),
        traceback=known.get("traceback", ""),
        reason=None if reason is None else Reason(reason),
    )


class Edge:
    """The public edge of a context manager of ours: within is the block of its user."""

    def __init__(self) -> None:
        self.theirs: BaseException | None = None
        """What the block raised."""

    @contextmanager
    def block(self) -> Generator[None, None, None]:
        """Hold what the user's block raises apart from what we raise."""
        try:
            yield
        except BaseException as error:  # noqa: ASYNC103  raised again
            self.theirs = error
            raise


def _is_same(group: BaseExceptionGroup[BaseException], error: BaseException | None) -> bool:
    # Trio makes a new group when it has to look into one.
    return isinstance(error, BaseExceptionGroup) and group.exceptions == error.exceptions


@contextmanager
def single_error() -> Generator[Edge, None, None]:
    """Raise, in place of a group of ours that holds one error, that error.

    For the public edge: that task groups are at work inside is no business of whoever
    catches `BrokerUnavailable`. A group that the user's block raised stays one.
    """
    edge = Edge()
    try:
        yield edge
    except BaseExceptionGroup as group:
        only: BaseException = group
        while (
            isinstance(only, BaseExceptionGroup)
            and len(only.exceptions) == 1
            and not _is_same(only, edge.theirs)
        ):
            only = only.exceptions[0]
        if only is group:
            raise
        raise only from only.__cause__
