"""A RabbitMQ of the tests' own: Debian's package, a private node, nothing on default ports."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .process import ServerProcess, free_port

__all__ = ["RabbitServer", "rabbit_server"]

_INSTALLED = Path("/usr/lib/rabbitmq")
_ERLANG = Path("/usr/lib/erlang/lib")

# What the `rabbit` application needs of the 70 directories that come with it. Erlang's
# code server looks for every module in every directory of its path: with all of them a
# start takes twice as long.
_LIBRARIES = (
    *(
        "amqp10_common",
        "aten",
        "credentials_obfuscation",
        "cuttlefish",
        "enough",
        "gen_batch_server",
        "getopt",
        "jsx",
    ),
    *(
        "observer_cli",
        "osiris",
        "ra",
        "rabbit",
        "rabbit_common",
        "rabbitmq_prelaunch",
        "ranch",
        "recon",
        "seshat",
    ),
    *("stdout_formatter", "sysmon_handler", "syslog", "systemd"),
)

_WITHOUT_STEPS = (
    *("asn1", "compiler", "crypto", "inets", "mnesia", "os_mon", "public_key", "ssl"),
    *("syntax_tools", "tools", "xmerl"),
    *("cuttlefish", "getopt", "jsx", "recon"),
)
"""Applications that RabbitMQ looks through for boot steps of its own: it loads each of their
modules to ask it, which is half of a start. They are told to have none."""


class RabbitServer:
    """One RabbitMQ node with its own data, name, cookie and ports, on 127.0.0.1 only.

    Args:
        folder: an empty folder for everything that it writes.
    """

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self._started = False
        self._node = f"rabbit-{secrets.token_hex(4)}@localhost"
        self._cookie = secrets.token_hex(16)
        self._epmd_port = free_port()
        self._prepare()
        self._epmd = ServerProcess(
            # In the foreground, so that it can be stopped: Erlang would start a daemon.
            ["epmd", "-port", str(self._epmd_port), "-address", "127.0.0.1"],
            log=folder / "epmd.log",
            is_ready=lambda: _answers(self._epmd_port, b""),
        )
        self._process = ServerProcess(
            # Not the `rabbitmq-server` script: it keeps a shell in between, and on Debian
            # changes the user.
            [
                *("erl", "-noinput", "-s", "rabbit", "boot", "-boot", "start_sasl", "+W", "w"),
                *("+S", "1:1", "+SDio", "2", "+sbwt", "none", "+sbwtdcpu", "none"),
                *("+sbwtdio", "none", "+B", "i", "-pa", str(folder / "applications")),
                *("-kernel", "inet_dist_use_interface", "{127,0,0,1}"),
                *("-kernel", "prevent_overlapping_partitions", "false"),
                *("-syslog", "logger", "[]", "-syslog", "syslog_error_logger", "false"),
            ],
            log=folder / "rabbitmq.log",
            is_ready=lambda: _answers(self.port, b"AMQP\x00\x00\x09\x01"),
            env=self._environment(),
        )

    @property
    def url(self) -> str:
        return self.url_for()

    def url_for(self, user: str = "guest", password: str = "guest", vhost: str = "%2F") -> str:
        """Return the URL for a user and a virtual host, which is quoted already."""
        return f"amqp://{user}:{password}@127.0.0.1:{self.port}/{vhost}"

    def start(self) -> None:
        """Start, and return when it takes connections."""
        self._epmd.start()
        self._process.start()
        self._started = True

    def stop(self) -> None:
        """Stop it in good order, and everything that was started with it."""
        if self._started:
            self._process.signal(signal.SIGCONT)
        self._process.stop()
        self._epmd.stop()

    def kill(self) -> None:
        """SIGKILL: no goodbye, and nothing written that was not written yet."""
        self._process.kill()

    def restart(self) -> None:
        """Kill it and bring it back with the data that it had."""
        self.kill()
        self._process.start()

    def shut_down(self) -> None:
        """Stop the broker in good order; `start_again` brings it back."""
        self._process.stop()

    def start_again(self) -> None:
        """Bring it back after `kill` or `shut_down`, with the data that it had."""
        self._process.start()

    def suspend(self) -> None:
        """SIGSTOP: its sockets stay open, and nobody answers there."""
        self._process.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.signal(signal.SIGCONT)

    def evaluate(self, expression: str) -> str:
        """Evaluate an Erlang expression in it and return the result.

        It takes some milliseconds, where rabbitmqctl would burn a second of CPU.

        Raises:
            RuntimeError: it failed; has what was printed.
        """
        done = subprocess.run(
            ["erl_call", "-sname", self._node, "-c", self._cookie, "-e"],
            env={**os.environ, **self._addresses()},
            input=f"{expression}.\n",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
            text=True,
        )
        if done.returncode != 0 or not done.stdout.startswith("{ok,"):
            raise RuntimeError(f"{expression}: {done.stdout}")
        return done.stdout.strip().removeprefix("{ok, ").removesuffix("}")

    def add_vhost(self, name: str, user: str = "guest") -> None:
        """Add a virtual host in which `user` may do everything."""
        self.evaluate(f"ok = rabbit_vhost:add({_text(name)}, {_text('tests')})")
        self.set_permissions(user, ".*", vhost=name)

    def delete_vhost(self, name: str) -> None:
        self.evaluate(f"rabbit_vhost:delete({_text(name)}, {_text('tests')})")

    def add_user(self, name: str, password: str) -> None:
        """Add a user who may do nothing anywhere; see `set_permissions`."""
        what = ", ".join(map(_text, (name, password, "tests")))
        self.evaluate(f"ok = rabbit_auth_backend_internal:add_user({what})")

    def delete_user(self, name: str) -> None:
        what = ", ".join(map(_text, (name, "tests")))
        self.evaluate(f"rabbit_auth_backend_internal:delete_user({what})")

    def set_permissions(self, user: str, may: str, *, vhost: str = "/") -> None:
        """Let a user configure, write and read what matches a regular expression."""
        what = ", ".join(map(_text, (user, vhost, may, may, may, "tests")))
        self.evaluate(f"ok = rabbit_auth_backend_internal:set_permissions({what})")

    def close_connections(self, reason: str) -> None:
        """Close all connections, as an administrator would."""
        # One after the other, because one that is gone by then raises.
        self.evaluate(
            f'[catch rabbit_networking:close_connection(Pid, "{reason}") || '
            "Pid <- rabbit_networking:connections()]"
        )

    def set_memory_limit(self, fraction: float) -> None:
        """Set the part of the machine's memory above which nobody may publish; 0.4 at first."""
        self.evaluate(f"vm_memory_monitor:set_vm_memory_high_watermark({fraction!r})")

    def _prepare(self) -> None:
        libraries = self._folder / "libraries"
        libraries.mkdir()
        for name in _LIBRARIES:
            [library] = _INSTALLED.glob(f"lib/rabbitmq_server-*/plugins/{name}-[0-9]*")
            (libraries / library.name).symlink_to(library)
        applications = self._folder / "applications"
        applications.mkdir()
        for name in _WITHOUT_STEPS:
            for there in (_ERLANG, libraries):
                for found in there.glob(f"{name}-[0-9]*/ebin/{name}.app"):
                    text = re.sub(r"{modules,\s*\[[^]]*]\s*}", "{modules,[]}", found.read_text())
                    (applications / found.name).write_text(text)
        cookie = self._folder / ".erlang.cookie"
        cookie.write_text(self._cookie)
        cookie.chmod(0o400)  # Erlang refuses one that others can read
        # Erlang terms: to read a rabbitmq.conf takes half a second, even an empty one.
        (self._folder / "rabbitmq.config").write_text("[].\n")
        (self._folder / "enabled_plugins").write_text("[].\n")
        (self._folder / "environment").touch()

    def _addresses(self) -> dict[str, str]:
        return {
            "HOME": str(self._folder),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_CONF_ENV_FILE": str(self._folder / "environment"),
        }

    def _environment(self) -> dict[str, str]:
        return {
            **self._addresses(),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_HOME": str(self._folder),
            "RABBITMQ_PLUGINS_DIR": str(self._folder / "libraries"),
            "RABBITMQ_MNESIA_BASE": str(self._folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self._folder / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_CONFIG_FILE": str(self._folder / "rabbitmq.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._folder / "enabled_plugins"),
            "ERL_LIBS": str(self._folder / "libraries"),
            "ERL_MAX_ETS_TABLES": "50000",
            "SYS_PREFIX": "",
        }


def _text(text: str) -> str:
    """Return a text as an Erlang binary."""
    return f"<<{','.join(str(byte) for byte in text.encode())}>>"


def _answers(port: int, greeting: bytes) -> bool:
    """Tell whether somebody listens on `port` and, if greeted, says something."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5.0) as sock:
            if not greeting:
                return True
            sock.sendall(greeting)
            return bool(sock.recv(1))
    except OSError:
        return False


@pytest.fixture(scope="session")
def rabbit_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A RabbitMQ for all tests of the run. To be imported by the modules that use it."""
    if shutil.which("erl") is None or not _INSTALLED.exists():
        pytest.skip("needs Debian's package rabbitmq-server")
    server = RabbitServer(tmp_path_factory.mktemp("rabbitmq"))
    try:
        server.start()
        yield server
    finally:
        server.stop()
