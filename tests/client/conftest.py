"""Fixtures of the tests of the client."""

from __future__ import annotations

import pytest

from ..runtime.harness import (
    app,
    clean_environment,
    forbid_hanging,
    journal,
    make_app,
    no_task_is_left_over,
)

__all__ = [
    "app",
    "clean_environment",
    "forbid_hanging",
    "journal",
    "make_app",
    "no_task_is_left_over",
]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "patience(seconds): how long the test may really take")
