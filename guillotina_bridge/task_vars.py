"""Variables of the running task, beside guillotina's own in `guillotina.task_vars`."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

__all__ = ["amqp_job"]

amqp_job: ContextVar[Any] = ContextVar("amqp_job", default=None)
"""The `job.Job` that runs; None outside of tasks."""
