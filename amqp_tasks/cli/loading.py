"""Find the app that a command is about."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from ..app import TaskApp
from ..exceptions import AmqpTasksError, AppNotFound

__all__ = ["load_app"]


def load_app(spec: str, default: TaskApp) -> TaskApp:
    """Import ``module:attribute`` and return the `TaskApp` there.

    With a module alone, its attribute ``app`` is meant, or the only `TaskApp` in it; or,
    if it has none, the default app, whose tasks the import has registered.

    Raises:
        AppNotFound: it cannot be imported, or is no `TaskApp`. Has the cause, if any.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or module_name.startswith("."):
        raise AppNotFound(f"--app {spec!r}: must be module:attribute, as in shop.tasks:app")
    module = _import(spec, module_name)
    if not attribute:
        return _only_app(spec, module, default)
    found = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise AppNotFound(f"--app {spec!r}: {module_name} has no {attribute!r}{_hint(module)}")
        found = getattr(found, name)
    if not isinstance(found, TaskApp):
        kind = type(found).__name__
        raise AppNotFound(f"--app {spec!r}: must be a TaskApp, is of type {kind}{_hint(module)}")
    return found


def _import(spec: str, module_name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        # As `python -m` does: a program's own modules are found where it is started.
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except AmqpTasksError as error:
        raise AppNotFound(
            f"--app {spec!r}: {module_name} defines what cannot be: {error}"
        ) from error
    except ModuleNotFoundError as error:
        raise AppNotFound(
            f"--app {spec!r}: {error}; looked in {here} and the installed packages"
        ) from error
    except Exception as error:
        raise AppNotFound(
            f"--app {spec!r}: importing {module_name} raised {type(error).__name__}: {error}"
        ) from error


def _only_app(spec: str, module: Any, default: TaskApp) -> TaskApp:
    apps = _apps(module)
    if "app" in apps:
        return apps["app"]
    if len(apps) == 1:
        return next(iter(apps.values()))
    if not apps and len(default.tasks):
        return default
    raise AppNotFound(
        f"--app {spec!r}: there is no `app` in that module"
        + (_hint(module) or "; make one: app = TaskApp(...)")
    )


def _apps(module: Any) -> dict[str, TaskApp]:
    return {name: value for name, value in vars(module).items() if isinstance(value, TaskApp)}


def _hint(module: Any) -> str:
    names = ", ".join(f"{module.__name__}:{name}" for name in _apps(module))
    return f"; did you mean {names}?" if names else ""
