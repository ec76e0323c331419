"""Variables of the running task, beside guillotina's own in `guillotina.task_vars`."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .job import Job

__all__ = ["amqp_job"]

amqp_job: ContextVar[Job | None] = ContextVar("amqp_job", default=None)
"""The `Job` that runs; None outside of tasks."""
