"""Retry policies: how often, how long, and what cannot be one."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from amqp_tasks.core.retry import RetryPolicy
from amqp_tasks.exceptions import DefinitionError

SECONDS = st.floats(min_value=0, max_value=1e9) | st.integers(0, 10**9)
ATTEMPTS = st.integers(1, 60) | st.sampled_from([1_000, 10_000, 10**6])
SPREADS = st.floats(min_value=-1, max_value=1)


@st.composite
def policies(draw: st.DrawFn) -> RetryPolicy:
    return RetryPolicy(
        max_retries=draw(st.none() | st.integers(0, 100)),
        delay=draw(SECONDS),
        backoff=draw(st.floats(min_value=1, max_value=1e6) | st.integers(1, 2)),
        max_delay=draw(SECONDS),
        jitter=draw(st.floats(min_value=0, max_value=1)),
    )


@given(policy=policies(), attempt=ATTEMPTS, spread=SPREADS)
def test_a_delay_is_finite_never_negative_and_within_the_limit_and_its_jitter(
    policy: RetryPolicy, attempt: int, spread: float
) -> None:
    delay = policy.delay_after(attempt, spread)
    assert math.isfinite(delay)
    assert 0 <= delay <= policy.max_delay * (1 + policy.jitter)
    base = policy.delay_after(attempt, 0)
    assert abs(delay - base) <= base * (policy.jitter + 1e-12)


@given(policy=policies(), attempt=st.integers(1, 60))
def test_a_delay_follows_the_formula(policy: RetryPolicy, attempt: int) -> None:
    exact = Fraction(policy.delay) * Fraction(policy.backoff) ** (attempt - 1)
    expected = min(Fraction(policy.max_delay), exact)
    seen = Fraction(policy.delay_after(attempt, 0))
    assert abs(seen - expected) <= expected * Fraction(1, 10**9)


@given(policy=policies(), attempts=st.tuples(ATTEMPTS, ATTEMPTS))
def test_delays_without_jitter_never_shrink(policy: RetryPolicy, attempts: tuple[int, int]) -> None:
    earlier, later = sorted(attempts)
    assert policy.delay_after(earlier, 0) <= policy.delay_after(later, 0)


@given(attempt=ATTEMPTS, backoff=st.sampled_from([1, 1.0, 2, 2.0, 1e6]))
@example(attempt=10**6, backoff=2.0)
def test_a_task_that_is_retried_at_once_is_always_retried_at_once(
    attempt: int, backoff: float
) -> None:
    policy = RetryPolicy(max_retries=None, delay=0, backoff=backoff)
    assert policy.delay_after(attempt, 1.0) == 0


def test_the_defaults_are_as_documented() -> None:
    policy = RetryPolicy()
    assert [policy.delay_after(n, 0) for n in range(1, 5)] == [1, 2, 4, 8]
    assert policy.delay_after(50, 0) == 3600
    assert policy.delay_after(1, 1) == pytest.approx(1.1)
    assert policy.delay_after(1, -1) == pytest.approx(0.9)


@given(retries=st.integers(0, 10**6), attempt=st.integers(1, 10**6))
def test_as_many_retries_follow_the_first_attempt_as_the_policy_says(
    retries: int, attempt: int
) -> None:
    assert RetryPolicy(max_retries=retries).allows(attempt) == (attempt < retries + 1)


@given(attempt=st.integers(1, 10**9))
def test_without_a_limit_there_is_always_another_attempt(attempt: int) -> None:
    assert RetryPolicy(max_retries=None).allows(attempt)


BAD: list[tuple[str, Any]] = [
    *((name, value) for name in ("delay", "backoff", "max_delay", "jitter")
      for value in (-1, -0.5, math.nan, math.inf, -math.inf, "1", None, True, 10**400)),
    ("backoff", 0.99),
    ("backoff", 0),
    ("jitter", 1.01),
    *(("max_retries", value) for value in (-1, 1.0, "3", True, math.inf)),
    *(("retry_on", value) for value in (("ValueError",), (ValueError, 1), "ValueError", 3, (int,))),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda value: repr(value)[:20])
def test_what_cannot_be_a_policy_is_refused_with_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(DefinitionError) as caught:
        RetryPolicy(**{field: value})
    text = str(caught.value)
    assert f"RetryPolicy.{field}=" in text
    assert repr(value)[:20] in text
    assert "must be" in text


def test_one_class_of_exceptions_may_stand_for_itself_or_in_a_tuple() -> None:
    assert RetryPolicy(retry_on=(OSError, ValueError)).retry_on == (OSError, ValueError)
