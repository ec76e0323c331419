"""A task that starts anew: out of the error queue, or out of its state."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Final

from ..core.message import Message
from ..core.operations import Reopen

__all__ = ["UNCONFIRMED_TTL", "as_new", "reopening"]

UNCONFIRMED_TTL: Final = 3600.0
"""Seconds after which a state is forgotten whose producer never said that the message is
in the queue. Should the message be there all the same, it carries all that is needed; so
does the letter of a task that was to start anew."""


def as_new(message: Message, *, now: float) -> Message:
    """Return the message to start anew with.

    Nobody waits for it any more who would have it canceled by being gone, and a deadline
    that is over would keep it from starting.
    """
    late = message.deadline is not None and message.deadline <= now
    deadline = None if late else message.deadline
    new = message.for_attempt(1, due=None)
    return replace(new, deadline=deadline, parent_owner=None)


def reopening(message: Message, *, now: float) -> Reopen:
    """Return what makes a state ready for `message`, before that is published."""
    return Reopen(
        task_id=message.task_id,
        name=message.func,
        job=message.body.decode(),
        nonce=secrets.token_hex(8),
        now=now,
        ttl=UNCONFIRMED_TTL,
        deadline=message.deadline,
        timeout=message.timeout,
        parent=message.parent,
    )
