"""What the tasks themselves wrote down, independently of the framework."""

from __future__ import annotations

from pathlib import Path

import anyio

__all__ = ["lines"]


async def lines(path: Path, at_least: int, word: str = "") -> list[list[str]]:
    """Return the oracle's lines that begin with `word`, when there are enough."""
    with anyio.fail_after(60):
        while True:
            text = path.read_text() if path.exists() else ""
            found = [line.split() for line in text.splitlines() if line.startswith(word)]
            if len(found) >= at_least:
                return found
            await anyio.sleep(0.02)
