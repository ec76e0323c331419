"""What one call of a task can say beyond its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from ..core.checks import check_seconds
from ..core.message import Message, check_task_id
from ..registry import TaskDefinition

__all__ = ["CallOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """How one call is queued."""

    task_id: str | None = None
    """None for a new random one. An id that is known already stands for that task."""
    timeout: float | None = None
    """Seconds that one attempt may take; None for what the task says."""

    def message(
        self, task: TaskDefinition, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Message:
        """Return the message of a call.

        Raises:
            ArgumentsError: an argument or an option is not what it must be.
        """
        plain_args, plain_kwargs = task.signature.encode_arguments(args, kwargs)
        return Message.compose(
            task_id=uuid4().hex if self.task_id is None else check_task_id(self.task_id),
            func=task.name,
            args=plain_args,
            kwargs=plain_kwargs,
            timeout=check_seconds(self.timeout, "timeout"),
        )
