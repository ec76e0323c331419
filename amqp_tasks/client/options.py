"""What one call of a task can say beyond its arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import uuid4

import anyio

from ..core.checks import check_instant, check_seconds
from ..core.message import FilterExtra, Message, check_members, check_task_id, filtered
from ..exceptions import ArgumentsError
from ..registry import TaskDefinition

__all__ = ["CallOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """How one call is queued."""

    task_id: str | None = None
    """None for a new random one. An id that is known already stands for that task."""
    timeout: float | None = None
    """Seconds that one attempt may take; None for what the task says."""
    deadline: datetime | None = None
    """When nobody needs the result any more: a task past it is not started, and one that
    runs is stopped. None for the deadline of the caller's own cancel scopes."""
    inherit_deadline: bool = True
    """Whether the deadline of the caller's cancel scopes travels along."""
    countdown: float | None = None
    """Seconds from now before which the task is not started."""
    eta: datetime | None = None
    """The time before which the task is not started."""
    extra: Mapping[str, Any] | None = None
    """Members of the message's body beside the call itself, values that JSON has; the task
    finds them in ``current_attempt().extra``."""
    keep_unqueued: bool = False
    """Whether the state of a task that certainly could not be queued is kept, as errored
    with the reason ``not_queued``. For calls that nobody could repeat; otherwise the state
    is taken back."""

    def updated(self, **given: Any) -> CallOptions:
        """Return these options with those of `given` that are not None."""
        return replace(self, **{key: value for key, value in given.items() if value is not None})

    def message(
        self,
        task: TaskDefinition,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        now: float,
        parent: str | None,
        parent_owner: str | None = None,
        filter_extra: FilterExtra | None = None,
    ) -> Message:
        """Return the message of a call.

        Args:
            now: seconds since the epoch.
            parent: id of the task that calls.
            parent_owner: incarnation of who waits for the task, and must be alive.
            filter_extra: says what of `extra` is kept.

        Raises:
            ArgumentsError: an argument or an option is not what it must be.
        """
        plain_args, plain_kwargs = task.signature.encode_arguments(args, kwargs)
        return Message.compose(
            extra=filtered(self._extra(), filter_extra),
            task_id=uuid4().hex if self.task_id is None else check_task_id(self.task_id),
            func=task.name,
            args=plain_args,
            kwargs=plain_kwargs,
            timeout=check_seconds(self.timeout, "timeout"),
            deadline=self._deadline(now),
            due=self._due(now),
            parent=parent,
            parent_owner=parent_owner,
        )

    def _extra(self) -> Mapping[str, Any]:
        extra = {} if self.extra is None else self.extra
        return check_members(extra, f"extra={extra!r:.200}")

    def _deadline(self, now: float) -> float | None:
        deadline = check_instant(self.deadline, "deadline")
        if deadline is not None or not self.inherit_deadline:
            return deadline
        left = anyio.current_effective_deadline() - anyio.current_time()
        return None if left == math.inf else now + max(left, 0.0)

    def _due(self, now: float) -> float | None:
        if self.countdown is not None and self.eta is not None:
            raise ArgumentsError(
                f"countdown={self.countdown!r} and eta={self.eta!r}: only one of them can be given"
            )
        seconds = check_seconds(self.countdown, "countdown", zero=True)
        return check_instant(self.eta, "eta") if seconds is None else now + seconds
