"""What Prometheus is told, in its client's default registry."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from amqp_tasks import CancelReason, current_attempt

__all__ = ["JOB_DURATION", "RUNNING_JOBS", "SCHEDULE_ERRORS", "watch_job"]

RUNNING_JOBS: Final = Gauge("amqp_running_jobs", "Attempts that run in this process now.")

JOB_DURATION: Final = Histogram(
    "amqp_job_duration",
    "Seconds that attempts have taken, by how they ended: finished, errored, canceled.",
    labelnames=["dotted_name", "final_status", "container_id"],
    buckets=(0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800, 7200),
)

SCHEDULE_ERRORS: Final = Counter(
    "amqp_schedule_errors", "Tasks that were not queued, when nobody was there to be told."
)

_CANCELED: Final = {CancelReason.USER, CancelReason.PARENT}
_OF_NO_ACCOUNT: Final = {CancelReason.SHUTDOWN, CancelReason.LEASE_LOST}
"""Such an attempt has not ended the task: it is run again, or elsewhere."""


@contextmanager
def watch_job(dotted_name: str, container_id: Callable[[], str]) -> Generator[None, None, None]:
    """Measure the running attempt, which is the block.

    Args:
        dotted_name: of the function.
        container_id: asked at the end. There have to be few of both, in all.
    """
    began = time.monotonic()
    error: BaseException | None = None
    RUNNING_JOBS.inc()
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        RUNNING_JOBS.dec()
        status = _final_status(error)
        if status is not None:
            labels = JOB_DURATION.labels(dotted_name, status, container_id())
            labels.observe(time.monotonic() - began)


def _final_status(error: BaseException | None) -> str | None:
    # What finishes although it was cancelled has finished: so it is recorded, too.
    if error is None:
        return "finished"
    reason = current_attempt().cancel_reason
    if reason in _OF_NO_ACCOUNT:
        return None
    return "canceled" if reason in _CANCELED else "errored"
