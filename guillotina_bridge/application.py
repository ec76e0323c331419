"""Where it all comes together: the settings, amqp_tasks' app, how tasks run, the service.

Everything below is told what it needs: `service` knows no task, and `job`, `utils` and the
others ask `service.get_service` for the app that is open, when they are called.

guillotina's own way to start such things, ``load_utilities``, awaits nothing and swallows
errors; so they are started and stopped by the events of the application, which are awaited.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from guillotina import app_settings, configure
from guillotina.interfaces import IApplicationCleanupEvent, IApplicationInitializedEvent
from guillotina.utils import resolve_dotted_name

from amqp_tasks import AmqpTasksError, SettingsError, TaskApp

from .context import public_extra
from .job import run_attempt
from .managers import find_manager
from .mirror import Mirror
from .service import BridgeService, Role
from .settings import BridgeSettings, read_settings
from .utils import find

__all__ = ["EXIT_SERVER", "EXIT_USAGE", "assemble", "opened_by_command"]

log = logging.getLogger(__name__)

EXIT_SERVER: Final = 1
EXIT_USAGE: Final = 2

_by_command: ContextVar[bool] = ContextVar("guillotina_bridge.by_command", default=False)

_services: list[tuple[Any, BridgeService]] = []
"""Of guillotina's applications in this process; usually one."""


def assemble(
    settings: BridgeSettings,
    role: Role,
    *,
    keep_trying: bool = False,
    flags: Mapping[str, Any] | None = None,
) -> BridgeService:
    """Return the service of a process, to be started.

    Args:
        flags: settings of amqp_tasks that win over all others.

    Raises:
        SettingsError: one of the flags is wrong, or there is no such state manager.
    """
    find_manager(settings.persistent_manager)
    is_custom = settings.persistent_manager not in ("memory", "redis")
    mirror = Mirror() if is_custom and role != "producer" else None
    middleware = [run_attempt] if mirror is None else [mirror.middleware, run_attempt]
    app = TaskApp(
        find=find, middleware=middleware, filter_extra=public_extra, **settings.app_keywords
    )
    if flags:
        app.configure(**flags)
    for text in settings.warnings:
        log.warning("%s", text)
    return BridgeService(
        app,
        settings,
        role,
        keep_trying=keep_trying,
        beside=None if mirror is None else mirror.open,
    )


@contextmanager
def opened_by_command() -> Generator[None, None, None]:
    """Leave the service of an application that is started in this block to its caller."""
    token = _by_command.set(True)
    try:
        yield
    finally:
        _by_command.reset(token)


# ------------------------------------------------------------------------ guillotina's events


@configure.subscriber(for_=IApplicationInitializedEvent)
async def start_service(event: IApplicationInitializedEvent) -> None:
    """Start the service of a guillotina that has just started."""
    # An application that is configured twice in one process is told twice.
    if _by_command.get() or any(app is event.app for app, _ in _services):
        return
    try:
        service = _service_of_this_process()
        if service is None:
            return
        await service.start()
    except AmqpTasksError as error:
        _end_command(error)
        raise
    _services.append((event.app, service))


@configure.subscriber(for_=IApplicationCleanupEvent, priority=0)  # first: others may be needed
async def stop_service(event: IApplicationCleanupEvent) -> None:
    """Stop the service of a guillotina that is about to stop, when its tasks have ended."""
    for entry in [entry for entry in _services if entry[0] is event.app]:
        try:
            await entry[1].stop()
        finally:
            _services.remove(entry)
        if entry[1].error is not None:
            log.error("it could not be stopped in good order: %s", entry[1].error)


def _service_of_this_process() -> BridgeService | None:
    settings = read_settings(app_settings)
    if not _is_server():
        # `g shell`, `g migrate`...: whoever runs them has something else in mind than tasks. In
        # memory these would end with the process, undone: there it takes none.
        return None if settings.in_memory else assemble(settings, "producer", keep_trying=True)
    if settings.in_memory and not settings.embedded_worker:
        raise SettingsError(
            f"amqp.persistent_manager={settings.persistent_manager!r} keeps tasks in the memory of "
            "this process, which runs none: set amqp.embedded_worker to true, or "
            "amqp.persistent_manager to redis"
        )
    if settings.embedded_worker:
        return assemble(settings, "embedded")
    return assemble(settings, "producer", keep_trying=settings.on_broker_down == "retry")


def _is_server() -> bool:
    """Tell whether this process serves requests: an ASGI server's, or that of ``g serve``."""
    name = app_settings.get("__run_command__")
    if name is None:
        return True
    # Here, because guillotina's commands install uvloop for the whole process.
    from guillotina.commands.server import ServerCommand

    command = resolve_dotted_name(app_settings["commands"][name])
    return issubclass(command, ServerCommand)


def _end_command(error: AmqpTasksError) -> None:
    """Under a command of guillotina's: say in one line what is wrong, and end it.

    guillotina would print the traceback, twice.
    """
    if app_settings.get("__run_command__") is None:
        return
    sys.stderr.write(f"Error: {error}\n")
    sys.exit(EXIT_USAGE if isinstance(error, SettingsError) else EXIT_SERVER)
