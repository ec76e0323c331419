"""An exception as the text that is kept of it."""

from __future__ import annotations

import traceback
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from pydantic_core import from_json

from ..core.message import clean
from ..core.outcome import Failure, Reason

__all__ = ["describe", "failure_from_text", "single_error"]

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
        return clean(str(error))
    except Exception as broken:
        return f"(its text cannot be had: {type(broken).__name__})"


def _traceback(error: BaseException) -> str:
    try:
        lines = traceback.format_exception(type(error), error, _from_task(error.__traceback__))
        return clean("".join(lines))
    except Exception as broken:
        return f"(its traceback cannot be had: {type(broken).__name__})"


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


@contextmanager
def single_error() -> Generator[None, None, None]:
    """Raise, in place of a group that holds one error, that error.

    For the public edge: that task groups are at work inside is no business of whoever
    catches `BrokerUnavailable`.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        only: BaseException = group
        while isinstance(only, BaseExceptionGroup) and len(only.exceptions) == 1:
            only = only.exceptions[0]
        if only is group:
            raise
        raise only from only.__cause__
