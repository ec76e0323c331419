"""Names of keys and channels, and texts as bytes."""

from __future__ import annotations

from dataclasses import dataclass

from ...exceptions import SettingsError

__all__ = ["Keys", "from_bytes", "to_bytes"]


def to_bytes(text: str) -> bytes:
    """Return `text` in UTF-8, whose order is that of the code points.

    An id out of somebody's JSON may hold a lone surrogate: it makes the round trip too,
    rather than failing the batch that it is in.
    """
    return text.encode("utf-8", "surrogatepass")


def from_bytes(data: bytes) -> str:
    """Undo `to_bytes`."""
    return data.decode("utf-8", "surrogatepass")


@dataclass(frozen=True, slots=True)
class Keys:
    """Names of keys and channels.

    Args:
        prefix: begins all of them.

    Raises:
        SettingsError: `prefix` holds ``{}`` as its first brace, which makes Redis Cluster
            look at whole keys, so that a task's keys would be on different nodes.
    """

    prefix: bytes

    def __post_init__(self) -> None:
        before, brace, after = self.prefix.partition(b"{")
        if brace and after.startswith(b"}"):
            raise SettingsError(
                f"state_prefix={from_bytes(self.prefix)!r}: must not hold '{{}}'; "
                f"{from_bytes(before + after[1:])!r} would do"
            )

    def task(self, task_id: str) -> tuple[bytes, bytes]:
        """Return the keys of a task's state and of its events, both in one slot.

        The part in braces decides the slot. It ends at the first closing brace and must
        not be empty, hence the escapes.
        """
        tag = task_id.replace("%", "%25").replace("{", "%7B").replace("}", "%7D") or "%"
        stem = self.prefix + b"{" + to_bytes(tag) + b"}"
        return stem + b":state", stem + b":events"

    def presence(self, owner: str) -> bytes:
        return self.prefix + b"presence:" + to_bytes(owner)

    def ended(self, task_id: str) -> bytes:
        """Return the channel that a task's end is announced on."""
        return self.prefix + b"ended:" + to_bytes(task_id)

    def cancel(self) -> bytes:
        """Return the channel for cancel requests, the owner left out."""
        return self.prefix + b"cancel:"
