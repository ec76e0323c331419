"""The demo, as a user would start it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_demo_comes_out_as_it_says(backend: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", DEMO, "--backend", backend],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    *table, summary = done.stdout.splitlines()
    assert summary == "28 tasks: 25 finished, 2 errored, 1 canceled; 21,221 primes"
    rows = [line for line in table if "count_primes" in line]
    assert len(rows) == 24
