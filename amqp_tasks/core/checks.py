"""Checks of values that come from outside, with errors that name them."""

from __future__ import annotations

import math
from typing import Any

from ..exceptions import AmqpTasksError, ArgumentsError

__all__ = ["check_seconds"]


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
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        least = "0 or more" if zero else "above 0"
        raise error(f"{name}={value!r}: must be a finite number of seconds, {least}")
    return float(value)
