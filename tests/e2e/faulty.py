"""Tasks that fail until they are repaired, for the tests of the error queue."""

from __future__ import annotations

from pathlib import Path

from amqp_tasks import RetryPolicy, TaskApp, current_attempt

from .shop import record

app = TaskApp()

NO_RETRIES = RetryPolicy(max_retries=0)


def repair(path: Path) -> None:
    path.with_suffix(".repaired").touch()


def unrepair(path: Path) -> None:
    path.with_suffix(".repaired").unlink()


@app.task(retry=NO_RETRIES)
async def work(path: str, name: str) -> str:
    """Fail, or say that it ends."""
    attempt = current_attempt()
    if not Path(path).with_suffix(".repaired").exists():
        raise LookupError(f"{name} is not there\nsecond line")
    record(path, "end", name, attempt.number, attempt.fence)
    return name


@app.task(retry=NO_RETRIES)
async def other(path: str, name: str) -> None:
    await work.func(path, name)
