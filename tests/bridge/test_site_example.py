"""The example of a site, started as its README says, and the session that is written there."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..servers.process import free_port
from .processes import ROOT, Browser, GuillotinaProcess

EXAMPLE = ROOT / "examples" / "guillotina_site"
ASKS_ONLY = re.compile(r"ask [^-]")
"""A command that changes nothing, and is repeated until what was begun has come that far."""
END = "--- end of the answer ---"


def session() -> Iterator[tuple[str, str]]:
    """The commands of the README, each with the answer that is written there."""
    text = (EXAMPLE / "README.md").read_text()
    for block in re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, answer = step.partition("\n")
            yield command, answer


def pattern(answer: str) -> re.Pattern[str]:
    """What an answer has to look like; three dots in the README stand for anything."""
    return re.compile(".*".join(map(re.escape, answer.split("..."))))


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """The site, on a port of its own."""
    port = free_port()
    flags = ("--host", "127.0.0.1", "--port", str(port))
    config = EXAMPLE / "config.yaml"
    site = GuillotinaProcess(
        tmp_path / "site", "serve", config, *flags, more_paths=(EXAMPLE.parent,)
    )
    try:
        site.wait_until(Browser(port).answers)
        yield port
        site.terminate()
        assert site.trouble() == [], site.output()
    finally:
        site.kill()


@pytest.fixture
def shell() -> Iterator[Callable[[str], str]]:
    """Runs commands in one shell, as somebody who types them."""
    with subprocess.Popen(
        ["bash"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:

        def run(command: str) -> str:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{command}\necho '{END}'\n")
            process.stdin.flush()
            return "".join(iter(process.stdout.readline, f"{END}\n"))

        yield run
        process.communicate()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_session_goes_as_it_is_written(port: int, shell: Callable[[str], str]) -> None:
    steps = list(session())
    assert len(steps) > 10
    for command, answer in steps:
        typed, right = (text.replace("8080", str(port)) for text in (command, answer))
        deadline = time.monotonic() + 10
        while not pattern(right).fullmatch(got := shell(typed)):
            assert ASKS_ONLY.match(command), (command, right, got)
            assert time.monotonic() < deadline, (command, right, got)
