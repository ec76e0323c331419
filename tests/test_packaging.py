"""The wheel: what is in it, and that it works without the checkout."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Mapping
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]

SMOKE = """
import sys
sys.path.insert(0, sys.argv[1])

import anyio
import amqp_tasks
from amqp_tasks import TaskApp
from amqp_tasks.drivers.redis import RedisStore

assert amqp_tasks.__file__.startswith(sys.argv[1]), amqp_tasks.__file__
RedisStore("redis://127.0.0.1/0", prefix="p:", timeout=1, connect_timeout=1)

app = TaskApp(broker_url="memory://", state_url="memory://")

@app.task
async def double(number: int) -> int:
    return 2 * number

async def main():
    async with app.worker():
        handle = await double(21)
        print(await handle.result(timeout=30))

anyio.run(main)
"""


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """Run a command that succeeds, and return what it printed."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    # With the hatchling that is installed: nothing is fetched.
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    run(*build, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    [wheel] = dist.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the wheel, and it alone, is installed."""
    folder = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-I", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
    run(*pip, "--target", folder, wheel, cwd=folder)
    return folder


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    there = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert files == there
    assert "amqp_tasks/py.typed" in files
    assert any(name.endswith(".lua") for name in files)


def test_the_wheel_says_what_it_is_and_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    [info] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = message_from_bytes(archive.read(info))
    for field, key in (("Name", "name"), ("Requires-Python", "requires-python")):
        assert metadata[field] == PROJECT["project"][key]
    assert metadata.get_payload(), "no README"
    needed = " ".join(metadata.get_all("Requires-Dist", []))
    assert "aiormq" in needed
    assert "pytest" not in needed
    [licence] = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_the_source_distribution_brings_its_tests(dist: Path) -> None:
    [source] = dist.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "README.md", "pyproject.toml", "tests/test_packaging.py"} <= files
    assert not any(name.startswith((".venv", ".git/")) for name in files)


def test_the_installed_package_works_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    script = tmp_path / "smoke.py"
    script.write_text(SMOKE)
    assert run(sys.executable, "-I", script, installed, cwd=tmp_path) == "42\n"


def test_the_command_is_installed(installed: Path, tmp_path: Path) -> None:
    [info] = installed.glob("*.dist-info")
    command = installed / "bin" / "amqp-tasks"
    printed = run(command, "--version", cwd=tmp_path, env={"PYTHONPATH": str(installed)})
    assert printed.split()[-1] == info.name.removesuffix(".dist-info").partition("-")[2]
