"""A flag for every setting, made of its field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args, get_origin

import click

from ..settings import ENV_PREFIX, Settings, hide_password

__all__ = ["given_settings", "setting_flags"]

F = TypeVar("F", bound=Callable[..., Any])


def setting_flags(command: F) -> F:
    """Add a flag for each field of `Settings`. Values are checked by the settings."""
    for name, field in reversed(Settings.model_fields.items()):
        default: Any = field.default
        shown = hide_password(default) if name.endswith("_url") else default
        text = (field.description or "").replace("`", "")
        help_text = f"{text}  [{ENV_PREFIX}{name.upper()}; default: {_shown(shown)}]"
        flag = "--" + name.replace("_", "-")
        metavar = _choices(field.annotation) or _metavar(name)
        command = click.option(flag, name, default=None, metavar=metavar, help=help_text)(command)
    return command


def given_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Return those flags that were given on the command line."""
    return {name: value for name, value in values.items() if value is not None}


def _shown(value: Any) -> str:
    if value is None or value == ():
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _choices(annotation: Any) -> str:
    """Return the words that a setting can have, if it has some only."""
    words = get_args(annotation) if get_origin(annotation) is Literal else ()
    return f"[{'|'.join(words)}]" if words else ""


def _metavar(name: str) -> str:
    if name.endswith("_url"):
        return "URL"
    if name.endswith("_ms"):
        return "MS"
    numbers = ("heartbeat", "timeout", "grace", "interval", "ttl", "guard_after")
    if name.endswith(numbers):
        return "SECONDS"
    return "N" if name.startswith("max_") else "TEXT"
