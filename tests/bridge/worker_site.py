"""An application for worker processes, whose tasks write down what they do."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from guillotina import app_settings as settings
from guillotina import configure
from guillotina.interfaces import IApplicationCleanupEvent

app_settings: dict[str, Any] = {"applications": ["guillotina_bridge"]}


@configure.subscriber(for_=IApplicationCleanupEvent)
async def at_the_end(event: object) -> None:
    """Show that guillotina was shut down, and after the last task."""
    note("shut down")


def note(word: str) -> None:
    with Path(settings["site_oracle"]).open("a") as file:
        file.write(f"{word}\n")


async def which_loop() -> str:
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]


async def nap(seconds: float) -> None:
    note("start")
    await asyncio.sleep(seconds)
    note("end")


async def block(seconds: float) -> None:
    """Capture the loop."""
    note("start")
    time.sleep(seconds)  # noqa: ASYNC251  blocking is what it is for
    note("end")
