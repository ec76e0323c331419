"""Worker processes of the end-to-end tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

__all__ = ["WorkerProcess", "run_python", "start_python"]

ROOT = Path(__file__).parents[2]


def environment(env: Mapping[str, str]) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("AMQP_TASKS_")}
    return {**inherited, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **env}


def run_python(
    *arguments: str, env: Mapping[str, str], cwd: Path = ROOT, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run Python to its end and return what it printed."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(env),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


@contextmanager
def start_python(
    *arguments: str, env: Mapping[str, str]
) -> Generator[subprocess.Popen[bytes], None, None]:
    """Run Python for as long as the block."""
    process = subprocess.Popen(
        [sys.executable, *arguments], env=environment(env), cwd=ROOT, stdin=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class WorkerProcess:
    """``python -m amqp_tasks worker``, started and ready when the constructor returns."""

    def __init__(
        self,
        log: Path,
        env: Mapping[str, str],
        *flags: str,
        app: str = "tests.e2e.shop:app",
    ) -> None:
        self.log = log
        self._file = log.open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "amqp_tasks", "worker", "--app", app, *flags],
            env=environment(env),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
        )
        self.wait_for_output("worker ")

    @property
    def pid(self) -> int:
        return self._process.pid

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for_output(self, text: str, timeout: float = 30) -> None:
        """Return when `text` is in what it printed."""
        deadline = time.monotonic() + timeout
        while text not in self.output():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{text!r} is not in the worker's output:\n{self.output()}")
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout: float = 60) -> int:
        """Return its exit code."""
        return self._process.wait(timeout)

    def terminate(self, timeout: float = 60) -> int:
        """SIGTERM; return the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout)

    def close(self) -> None:
        """Make sure that it is gone."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._file.close()
