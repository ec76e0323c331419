"""``g amqp-worker``: guillotina's application, started to run tasks and nothing else."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from wsgiref.simple_server import WSGIServer

import anyio
import anyio.to_thread
import prometheus_client
from guillotina import app_settings
from guillotina.commands.server import ServerCommand

from amqp_tasks import AmqpTasksError, SettingsError

from ..application import EXIT_SERVER, EXIT_USAGE, assemble, opened_by_command
from ..service import BridgeService
from ..settings import address, read_settings

__all__ = ["WorkerCommand"]

log = logging.getLogger(__name__)

_EPILOG = """
The first SIGTERM or SIGINT stops the intake, and tasks that run may finish within
amqp.shutdown_grace; a second one gives them back to the queue at once.

Exit codes:
  0  stopped by SIGTERM or SIGINT, everything settled or given back
  1  the broker or the state store cannot be used, or was lost for too long, or the address
     of the metrics is taken; also, with --auto-kill-timeout, if not even the watchdog could run
  2  wrong usage: a flag or a setting
  3  a task captured the event loop for good (--auto-kill-timeout)
"""


class WorkerCommand(ServerCommand):
    """Runs a worker until SIGTERM or SIGINT."""

    description = "Run the tasks that guillotina's web servers have queued."

    exit_code = 0

    def get_parser(self) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser()
        parser.prog = "g amqp-worker"
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = _EPILOG
        parser.add_argument(
            "--auto-kill-timeout",
            type=float,
            metavar="SECONDS",
            help="Seconds that a task may capture the event loop before the watchdog stops it; 0 "
            "turns that off.  [amqp.auto_kill_timeout; default: 0]",
        )
        parser.add_argument(
            "--max-running-tasks",
            type=int,
            metavar="N",
            help="Tasks that run at the same time.  [amqp.max_running_tasks; default: 20]",
        )
        parser.add_argument(
            "--metrics-server",
            action="store_true",
            help="Serve Prometheus metrics at /metrics, on --host and --port.",
        )
        return parser

    def parse_arguments(self) -> None:
        parser = self.get_parser()
        self.arguments, rest = parser.parse_known_args()
        # Among the rest is the command's name. guillotina lets mistyped flags pass as well.
        unknown = [argument for argument in rest if argument.startswith("-")]
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")

    def run_command(self, settings: Any = None, loop: Any = None) -> None:
        """Run it, and leave the process with its exit code if that is not 0."""
        with opened_by_command():
            # What it returns is ignored, and so is what `run` returns.
            super().run_command(settings=settings, loop=loop)
        if self.exit_code:
            sys.exit(self.exit_code)

    async def run(self, arguments: argparse.Namespace, settings: Any, app: Any) -> None:
        """Work until a signal comes. Raises nothing: guillotina would not shut down."""
        try:
            _log_to_stderr(arguments.debug)
            # A task of its own: guillotina's command goes on in this one.
            await asyncio.create_task(self._work(arguments))
        except SettingsError as error:
            self._fail(error, EXIT_USAGE)
        except (AmqpTasksError, OSError) as error:
            self._fail(error, EXIT_SERVER)
        except Exception:
            log.exception("the worker has failed")
            self.exit_code = EXIT_SERVER

    async def cleanup(self, app: Any) -> None:
        """Shut the application down."""
        try:
            await app.shutdown()
        except Exception:
            log.exception("guillotina could not be shut down in good order")
            self.exit_code = self.exit_code or EXIT_SERVER
        # guillotina's own method waits for what applications have left running as well, and
        # for itself.
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            await asyncio.wait(left, timeout=1)

    async def _work(self, arguments: argparse.Namespace) -> None:
        # First of all: a signal that comes while it connects is heeded.
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            service = _assemble(arguments)
            raised: Exception | None = None
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_stop_on_signal, signals, service)
                try:
                    await _serve(service, arguments)
                except Exception as error:
                    raised = error
                tasks.cancel_scope.cancel()
            raised = raised or service.error
            if raised is not None:
                raise raised

    def _fail(self, error: Exception, code: int) -> None:
        sys.stderr.write(f"Error: {error}\n")
        log.debug("the traceback", exc_info=error)
        self.exit_code = code


def _assemble(arguments: argparse.Namespace) -> BridgeService:
    settings = read_settings(app_settings)
    if settings.in_memory:
        raise SettingsError(
            f"amqp.persistent_manager={settings.persistent_manager!r} keeps tasks in the memory of "
            "the web server, where no other process finds them: set it to redis, or let the "
            "web server run them (amqp.embedded_worker)"
        )
    flags: dict[str, Any] = {}
    if arguments.auto_kill_timeout is not None:
        # guillotina_amqp turns it off by -1.
        flags["auto_kill_timeout"] = max(arguments.auto_kill_timeout, 0.0)
    if arguments.max_running_tasks is not None:
        flags["max_running_tasks"] = arguments.max_running_tasks
    return assemble(settings, "command", flags=flags)


async def _serve(service: BridgeService, arguments: argparse.Namespace) -> None:
    await service.start()
    if service.worker_id is None:
        return  # it was told to stop before it had connected
    try:
        async with _metrics(arguments):
            library = service.settings.library
            sys.stderr.write(
                f"worker {service.worker_id} runs tasks from {library.queue!r} at "
                f"{address(library.broker_url)}, states at {address(library.state_url)}\n"
            )
            await service.wait_ended()
    except BaseException:
        service.stop_soon(0)  # what it has taken meanwhile, it gives back
        raise
    finally:
        await service.wait_ended()  # noqa: ASYNC102  shields itself, and has a grace


async def _stop_on_signal(signals: AsyncIterator[signal.Signals], service: BridgeService) -> None:
    grace: float | None = None
    async for number in signals:
        log.info("%s: stopping", number.name)
        service.stop_soon(grace)
        grace = 0


@asynccontextmanager
async def _metrics(arguments: argparse.Namespace) -> AsyncGenerator[None, None]:
    """Serve the metrics, if that is wanted, for as long as the block.

    Raises:
        OSError: the address is taken, or is none.
    """
    if not arguments.metrics_server:
        yield
        return
    host = arguments.host or app_settings.get("host") or "127.0.0.1"
    port = int(arguments.port or app_settings.get("address") or app_settings.get("port") or 8080)
    try:
        server, thread = prometheus_client.start_http_server(port, host)
    except OSError as error:
        raise OSError(f"metrics cannot be served at {host}:{port}: {error}") from error
    log.info("metrics at http://%s:%d/metrics", host, port)
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(_close, server, thread)


def _close(server: WSGIServer, thread: threading.Thread) -> None:
    server.shutdown()
    server.server_close()
    thread.join()


def _log_to_stderr(debug: bool) -> None:
    """Show what the worker has to say, unless the configuration says what is logged."""
    if "logging" in app_settings:
        return
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("amqp_tasks", "guillotina_bridge"):
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.INFO)
