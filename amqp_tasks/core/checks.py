"""Checks of values that come from outside, with errors that name them."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

from ..exceptions import AmqpTasksError, ArgumentsError

__all__ = ["check_count", "check_instant", "check_seconds"]


def check_count(value: Any, name: str) -> int:
    """Return `value` if it is a positive integer.

    Raises:
        ArgumentsError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentsError(f"{name}={value!r:.80}: must be an integer of 1 or more")
    return value


def check_seconds(
    value: Any,
    name: str,
    *,
    error: type[AmqpTasksError] = ArgumentsError,
    zero: bool = False,
) -> float | None:
    """Return `value` as a number of seconds; None stays None.

    Args:
        name: what the value is called, for the error.
        error: what to raise.
        zero: whether 0 is possible.

    Raises:
        ArgumentsError: (or `error`) it is no number, not finite, or too small.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise error(f"{name}={value!r}: must be a number of seconds, or None")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds) or seconds < 0 or (seconds == 0 and not zero):
        least = "0 or more" if zero else "above 0"
        raise error(f"{name}={value!r:.80}: must be a finite number of seconds, {least}")
    return seconds


def check_instant(value: Any, name: str) -> float | None:
    """Return an aware datetime as seconds since the epoch; None stays None.

    Raises:
        ArgumentsError: it is no datetime, or has no time zone.
    """
    if value is None:
        return None
    if not isinstance(value, datetime):
        raise ArgumentsError(f"{name}={value!r}: must be a datetime with a time zone, or None")
    if value.tzinfo is None:
        raise ArgumentsError(
            f"{name}={value!r}: has no time zone, so it could be any of 24 hours; add one: "
            "datetime.now(UTC), or value.replace(tzinfo=...)"
        )
    return value.timestamp()
