"""``python -m amqp_tasks worker``"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import anyio
import click

import amqp_tasks

from ..app import TaskApp
from ..exceptions import (
    AmqpTasksError,
    AppNotFound,
    BrokerError,
    DefinitionError,
    SettingsError,
    StateStoreError,
)
from ..runtime.worker import Worker
from ..settings import hide_password
from .flags import given_settings, setting_flags
from .loading import load_app

__all__ = ["worker"]

log = logging.getLogger(__name__)

EXIT_SERVER = 1
EXIT_USAGE = 2

_EPILOG = """
\b
Exit codes:
  0  stopped by SIGTERM or SIGINT, everything settled or given back
  1  the broker or the state store cannot be used, or was lost for too long; also, with
     --auto-kill-timeout, if not even the watchdog could run
  2  wrong usage: a flag, a setting, or --app
  3  a task captured the event loop for good (--auto-kill-timeout)
"""


@click.command(epilog=_EPILOG)
@click.option(
    "--app",
    "app_spec",
    required=True,
    metavar="MODULE:ATTRIBUTE",
    envvar="AMQP_TASKS_APP",
    help="The TaskApp whose tasks to run, as in shop.tasks:app.  [AMQP_TASKS_APP]",
)
@click.option(
    "--backend",
    type=click.Choice(["asyncio", "uvloop", "trio"]),
    default="asyncio",
    envvar="AMQP_TASKS_BACKEND",
    help="The event loop that tasks run on.  [AMQP_TASKS_BACKEND; default: asyncio]",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
    default="info",
    envvar="AMQP_TASKS_LOG_LEVEL",
    help="Messages of at least this level go to standard error; debug adds tracebacks of "
    "errors at start.  [AMQP_TASKS_LOG_LEVEL; default: info]",
)
@setting_flags
def worker(app_spec: str, backend: str, log_level: str, **settings: Any) -> None:
    """Run tasks until SIGTERM or SIGINT.

    The first signal stops the intake, and tasks that run may finish within
    --shutdown-grace; a second one gives them back to the queue at once. A flag wins over
    its variable, and that over what the program says.
    """
    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        app = load_app(app_spec, amqp_tasks.default_app)
        app.configure(**given_settings(settings))
        anyio.run(_work, app, **_on(backend))
    except (SettingsError, AppNotFound, DefinitionError) as error:
        _fail(error, EXIT_USAGE)
    except (BrokerError, StateStoreError) as error:
        _fail(error, EXIT_SERVER)


def _on(backend: str) -> dict[str, Any]:
    if backend == "trio":
        return {"backend": "trio"}
    return {"backend": "asyncio", "backend_options": {"use_uvloop": backend == "uvloop"}}


async def _work(app: TaskApp) -> None:
    settings = app.settings
    # First of all: a signal that comes while it connects is heeded when it has.
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with app.worker() as running, anyio.create_task_group() as tasks:
            tasks.start_soon(_stop_on_signal, signals, running, settings.shutdown_grace)
            click.echo(
                f"worker {running.id} runs {len(app.tasks)} tasks from {settings.queue!r} at "
                f"{hide_password(settings.broker_url)}, states at "
                f"{hide_password(settings.state_url)}",
                err=True,
            )
            await running.wait_ended()
            tasks.cancel_scope.cancel()


async def _stop_on_signal(
    signals: AsyncIterator[signal.Signals], running: Worker, grace: float
) -> None:
    async for number in signals:
        log.info("%s: stopping, within %g s", number.name, grace)
        running.stop(grace)
        grace = 0


def _fail(error: AmqpTasksError, code: int) -> None:
    click.echo(f"Error: {error}", err=True)
    log.debug("the traceback", exc_info=error)
    sys.exit(code)
