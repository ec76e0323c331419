"""guillotina's commands as processes, and a browser for them."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "Answer", "Browser", "GuillotinaProcess", "eventually"]

ROOT = Path(__file__).parents[2]
SIGNS_OF_TROUBLE = (
    *("never retrieved", "never awaited", "Task was destroyed", "different task"),
    *("Unhandled exception", "unhandled exception during", "Timeout for "),
)


def eventually(ask: Callable[[], Any], *, timeout: float = 30) -> Any:
    """Ask the world outside until the answer is true, and return it."""
    deadline = time.monotonic() + timeout
    while not (answer := ask()):
        assert time.monotonic() < deadline, f"not within {timeout:g} s; at last: {answer!r}"
        time.sleep(0.02)
    return answer


@dataclass(frozen=True)
class Answer:
    """What a server answered."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class Browser:
    """Asks a server on 127.0.0.1, as root unless somebody else is named."""

    def __init__(self, port: int) -> None:
        self.port = port

    def __call__(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        user: str | None = "root:root",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        sent = {"Content-Type": "application/json", **(headers or {})}
        if user is not None:
            sent["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, sent)
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read().decode())
        finally:
            connection.close()

    def answers(self, path: str = "/") -> bool:
        """Whether there is a server by now."""
        try:
            return self("GET", path).status == 200
        except OSError:
            return False


class GuillotinaProcess:
    """One command of guillotina, as ``g COMMAND -c CONFIGURATION ...`` starts it.

    Args:
        folder: for its configuration and its log.
        more_paths: where it finds modules, beside the project's.
    """

    def __init__(
        self,
        folder: Path,
        command: str,
        configuration: Mapping[str, Any] | Path,
        *arguments: str,
        more_paths: tuple[Path, ...] = (),
    ) -> None:
        folder.mkdir(parents=True)
        self._log = folder / "log"
        if not isinstance(configuration, Path):
            text, configuration = json.dumps(configuration), folder / "config.json"
            configuration.write_text(text)
        inherited = {
            k: v for k, v in os.environ.items() if not k.lower().startswith(("amqp_tasks_", "g_"))
        }
        paths = os.pathsep.join(map(str, (ROOT, *more_paths)))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [_program(), command, "-c", str(configuration), *arguments],
                cwd=folder,
                env={**inherited, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def output(self) -> str:
        """What it has printed so far, to standard error as well."""
        return self._log.read_text(errors="replace")

    def wait_until(self, is_ready: Callable[[], Any], timeout: float = 30) -> None:
        """Return when it is ready.

        Raises:
            AssertionError: it has ended, or is not ready in time. Has its output.
        """
        deadline = time.monotonic() + timeout
        while not is_ready():
            ended = self._process.poll() is not None
            assert not ended, f"it has ended, and was not ready:\n{self.output()}"
            assert time.monotonic() < deadline, f"it is not ready:\n{self.output()}"
            time.sleep(0.02)

    def wait_for_output(self, text: str, timeout: float = 30) -> None:
        self.wait_until(lambda: text in self.output(), timeout)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout: float = 30) -> int:
        """Return its exit code."""
        return self._process.wait(timeout)

    def terminate(self) -> int:
        """SIGTERM; return the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        self._process.kill()
        self._process.wait()

    def trouble(self) -> list[str]:
        """Lines of its output that no good process prints."""
        return [
            line
            for line in self.output().splitlines()
            if any(sign in line for sign in SIGNS_OF_TROUBLE)
        ]


def _program() -> str:
    """Guillotina's script, of the same environment as this Python."""
    return str(Path(sys.executable).with_name("guillotina"))
