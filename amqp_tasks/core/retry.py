"""When a failed attempt is followed by another one, and after how long."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ..exceptions import DefinitionError

__all__ = ["RetryPolicy"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a failing task is tried again, and after which delays.

    The n-th retry waits ``min(max_delay, delay * backoff ** (n - 1))`` seconds, spread
    by up to ``± jitter`` of itself so that tasks which failed together do not return
    together.
    """

    max_retries: int | None = 3
    """Retries after the first attempt; None retries for ever, 0 never."""
    delay: float = 1.0
    """Seconds before the first retry."""
    backoff: float = 2.0
    """Factor from one delay to the next; 1 keeps it constant."""
    max_delay: float = 3600.0
    """Seconds that no delay exceeds, jitter aside."""
    jitter: float = 0.1
    """Share of the delay, between 0 and 1, by which it varies either way."""
    retry_on: tuple[type[BaseException], ...] = (Exception,)
    """Exceptions that are worth another attempt. A timeout always is."""

    def __post_init__(self) -> None:
        for name in ("delay", "backoff", "max_delay", "jitter"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise DefinitionError(f"RetryPolicy.{name}={value!r}: must be a number")
            if not 0 <= value <= sys.float_info.max:
                raise DefinitionError(
                    f"RetryPolicy.{name}={value!r:.80}: must be a finite number, 0 or more"
                )
        kinds = self.retry_on
        if not isinstance(kinds, tuple) or not all(
            isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds
        ):
            raise DefinitionError(
                f"RetryPolicy.retry_on={kinds!r}: must be a tuple of exception classes"
            )
        if self.backoff < 1:
            raise DefinitionError(f"RetryPolicy.backoff={self.backoff!r}: must be 1 or more")
        if self.jitter > 1:
            raise DefinitionError(f"RetryPolicy.jitter={self.jitter!r}: must be at most 1")
        retries = self.max_retries
        if retries is not None and (
            isinstance(retries, bool) or not isinstance(retries, int) or retries < 0
        ):
            raise DefinitionError(
                f"RetryPolicy.max_retries={retries!r}: must be a whole number, 0 or more, "
                "or None for no limit"
            )

    def allows(self, attempt: int) -> bool:
        """Say whether attempt number `attempt` (from 1) may be followed by another."""
        return self.max_retries is None or attempt <= self.max_retries

    def delay_after(self, attempt: int, spread: float) -> float:
        """Return the seconds to wait after attempt number `attempt` (from 1) failed.

        `spread` is a random number between -1 and 1; it decides the jitter.
        """
        if self.delay == 0:
            return 0.0
        try:
            delay = min(self.max_delay, self.delay * float(self.backoff) ** (attempt - 1))
        except OverflowError:
            delay = self.max_delay
        return delay * (1 + self.jitter * spread)
