"""The settings: guillotina_amqp's names in guillotina's configuration, and amqp_tasks' own.

They are composed into those of amqp_tasks, which then says what is wrong with them. A setting
of amqp_tasks that is given by its own name (``broker_url``) wins over what would be composed
(of ``host``, ``port``...), and its environment variable over both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote, urlsplit

from guillotina.utils import resolve_dotted_name
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from amqp_tasks import Settings, SettingsError, TaskApp

__all__ = [
    "DEFAULTS",
    "SECRET_HEADERS",
    "BridgeSettings",
    "address",
    "read_settings",
    "secret_headers",
    "served_packages",
]

DEFAULTS: Final[Mapping[str, Any]] = {
    # guillotina_amqp's names, and its values
    "host": "localhost",
    "port": 5672,
    "login": "guest",
    "password": "guest",
    "vhost": "/",
    "heartbeat": 120,
    "exchange": "guillotina",
    "queue": "guillotina",
    "persistent_manager": "memory",
    "max_running_tasks": 20,
    "max_task_retries": 5,
    "state_ttl": 86_400,
    "delayed_ttl_ms": 120_000,
    "errored_ttl_ms": 604_800_000,
    # amqp_tasks'; classic queues, because guillotina_amqp's are
    "queue_type": "classic",
    # the bridge's own
    "embedded_worker": False,
    "on_broker_down": "fail",
    "after_commit_wait": 1.0,
}

PREFIX: Final = "amqpjobs-"
"""What guillotina_amqp's keys in Redis begin with, without the setting `redis_prefix_key`."""

_OBSOLETE: Final = {
    "connection_factory": "connections are made by amqp_tasks",
}
_UNSERVED: Final = ("guillotina", "guillotina_bridge")
"""Applications, as they are, whose functions are no tasks."""

SECRET_HEADERS: Final = frozenset({"authorization", "cookie", "proxy-authorization"})
"""Of requests; in small letters."""

_BY_OTHER_NAMES: Final = {"state_prefix": "redis_prefix_key"}
"""Where a setting of amqp_tasks comes from, if it is not in the section under its own name."""


class _Own(BaseModel):
    """The settings that amqp_tasks does not have."""

    model_config = ConfigDict(
        extra="ignore", frozen=True, coerce_numbers_to_str=True, hide_input_in_errors=True
    )

    host: str = Field(pattern=r"^[^\s/@?#]+$")
    port: int = Field(ge=1, le=65_535)
    login: str
    password: str = Field(repr=False)
    vhost: str
    persistent_manager: str = Field(min_length=1)
    embedded_worker: bool
    on_broker_down: Literal["fail", "retry"]
    after_commit_wait: float = Field(ge=0, allow_inf_nan=False)


class _Redis(BaseModel):
    """Redis, as guillotina.contrib.redis has it; password and db there, or in `pool`."""

    model_config = _Own.model_config

    host: str = Field("localhost", pattern=r"^[^\s/@?#]+$")
    port: int = Field(6379, ge=1, le=65_535)
    password: Annotated[str | None, Field(repr=False)] = None
    db: int = Field(0, ge=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeSettings:
    """The settings, checked."""

    app_keywords: Mapping[str, Any] = field(repr=False)  # with passwords
    """What `TaskApp` is to be made with."""
    library: Settings
    """What comes of that, with the environment."""
    persistent_manager: str
    """Name of the utility that keeps states: ``memory``, ``redis``, or an application's own."""
    embedded_worker: bool
    """Whether ``g serve`` is a worker as well."""
    on_broker_down: Literal["fail", "retry"]
    """What a web server that is no worker does when it starts and the servers cannot be
    used: it fails, or goes on and tries again."""
    after_commit_wait: float
    """Seconds that a hook waits for the queueing of a task while it has a connection to the
    database."""
    warnings: tuple[str, ...]
    """What people are to be told, once."""

    @property
    def in_memory(self) -> bool:
        """True if tasks and their states are in this process, and end with it."""
        return self.library.in_memory


def read_settings(app_settings: Mapping[str, Any]) -> BridgeSettings:
    """Read the settings of a started guillotina.

    Raises:
        SettingsError: one is wrong; names it, and never shows a password.
    """
    section = app_settings.get("amqp", {})
    if not isinstance(section, Mapping):
        raise SettingsError(f"amqp={section!r:.100}: must be a mapping of settings")
    given = {**DEFAULTS, **section}
    own = _read(_Own, given, "amqp")
    for check in (served_packages, secret_headers):
        check(app_settings)
    if own.embedded_worker and own.on_broker_down == "retry":
        raise SettingsError(
            "amqp.on_broker_down='retry': must be 'fail' with amqp.embedded_worker, which has "
            "nothing to do without a broker"
        )
    keywords = {**_servers(own, app_settings)}
    keywords |= {name: given[name] for name in Settings.model_fields if name in given}
    keywords.pop("serve", None)  # `find` alone decides what is run
    library = _library(keywords, section)
    return BridgeSettings(
        app_keywords=keywords,
        library=library,
        persistent_manager=own.persistent_manager,
        embedded_worker=own.embedded_worker,
        on_broker_down=own.on_broker_down,
        after_commit_wait=own.after_commit_wait,
        warnings=tuple(_warnings(section, own, library)),
    )


def served_packages(app_settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the packages whose functions messages may name.

    Those are the configured applications, those that they depend on, and what
    ``amqp.serve`` names; of guillotina's own none.

    Raises:
        SettingsError: ``amqp.serve`` is no list of names.
    """
    applications = tuple(app_settings.get("applications") or ())
    return _with_dependencies(applications, _names(app_settings, "serve"))


def secret_headers(app_settings: Mapping[str, Any]) -> frozenset[str]:
    """Return the names, in small letters, of headers that are written into no message.

    Those are what carries credentials by standard, and what ``amqp.secret_headers`` names.

    Raises:
        SettingsError: ``amqp.secret_headers`` is no list of names.
    """
    return SECRET_HEADERS.union(name.lower() for name in _names(app_settings, "secret_headers"))


def address(url: str) -> str:
    """Return where a server is, for people to read: no user, no password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


# ------------------------------------------------------------------------ composing


def _servers(own: _Own, app_settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return where the broker and the states are."""
    redis = app_settings.get("redis")
    # A manager of an application's own keeps a copy: what holds needs Redis, or one process.
    if own.persistent_manager == "memory" or (own.persistent_manager != "redis" and not redis):
        return {"broker_url": "memory://", "state_url": "memory://"}
    login = f"{_quoted(own.login)}:{_quoted(own.password)}"
    return {
        "broker_url": f"amqp://{login}@{_host(own.host)}:{own.port}/{_quoted(own.vhost)}",
        **({} if redis is None else {"state_url": _redis_url(redis)}),
        "state_prefix": app_settings.get("redis_prefix_key", PREFIX),
    }


def _redis_url(redis: Any) -> str:
    if not isinstance(redis, Mapping):
        raise SettingsError("redis: must be a mapping, with host and port")
    pool = redis.get("pool")
    in_pool = pool if isinstance(pool, Mapping) else {}
    found = _read(
        _Redis,
        {**{name: in_pool[name] for name in ("password", "db") if name in in_pool}, **redis},
        "redis",
    )
    login = f":{_quoted(found.password)}@" if found.password else ""
    return f"redis://{login}{_host(found.host)}:{found.port}/{found.db}"


def _quoted(text: str) -> str:
    return quote(text, safe="")


def _host(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


@cache
def _with_dependencies(applications: tuple[str, ...], more: tuple[str, ...]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    waiting = list(applications)
    while waiting:
        name = waiting.pop(0)
        if name in found:
            continue
        found[name] = None
        module = resolve_dotted_name(name)
        waiting += getattr(module, "app_settings", {}).get("applications") or []
    return tuple(name for name in found if name.partition(".")[0] not in _UNSERVED) + more


# ------------------------------------------------------------------------ checking


def _names(app_settings: Mapping[str, Any], setting: str) -> tuple[str, ...]:
    """Return a setting of names, which are a list, or one text with commas."""
    value = (app_settings.get("amqp") or {}).get(setting) or ()
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    if isinstance(value, list | tuple) and all(name and isinstance(name, str) for name in value):
        return tuple(value)
    raise SettingsError(
        f"amqp.{setting}={value!r:.200}: must be a list of names, or one text with commas between"
    )


def _read(model: Any, values: Mapping[str, Any], section: str) -> Any:
    try:
        return model(**values)
    except ValidationError as error:
        wrong = []
        for detail in error.errors(include_url=False):
            name = detail["loc"][0]
            shown = "" if name == "password" else f"={values.get(str(name))!r:.100}"
            wrong.append(f"{section}.{name}{shown}: {_as_demand(detail['msg'])}")
        raise SettingsError("; ".join(wrong)) from None


def _library(keywords: Mapping[str, Any], section: Mapping[str, Any]) -> Settings:
    """Return amqp_tasks' settings, or what it says about them in the words of the section."""
    if "state_url" not in keywords:
        raise SettingsError(
            "redis: must say host and port, with amqp.persistent_manager='redis' (or "
            "amqp.state_url must be given)"
        )
    try:
        return TaskApp(**keywords).settings
    except SettingsError as error:
        names = "|".join(keywords)
        text = re.sub(
            rf"(^|; )({names})=", lambda match: match[1] + _origin(match[2], section), str(error)
        )
        raise SettingsError(_as_demand(text)) from None


def _origin(name: str, section: Mapping[str, Any]) -> str:
    if name in _BY_OTHER_NAMES and name not in section:
        return f"{_BY_OTHER_NAMES[name]}="
    return f"amqp.{name}="


def _as_demand(text: str) -> str:
    """Return what pydantic says, in the words of other errors."""
    return re.sub(r"\b(Input|String) should\b", "must", text.removeprefix("Value error, "))


def _warnings(section: Mapping[str, Any], own: _Own, library: Settings) -> Iterator[str]:
    known = [*_Own.model_fields, *Settings.model_fields, "secret_headers"]
    is_custom = own.persistent_manager not in ("memory", "redis")
    for name in section:
        if name in _OBSOLETE:
            yield f"amqp.{name} is not used any more: {_OBSOLETE[name]}"
        elif name not in known:
            close = get_close_matches(str(name), known, 1, cutoff=0.75)
            if close:
                yield f"amqp.{name} is not a setting; is {close[0]} meant?"
            elif not is_custom:  # which may keep settings of its own there
                yield f"amqp.{name} is not a setting, and is not used"
    if library.in_memory:
        yield (
            f"tasks are in the memory of this process (amqp.persistent_manager="
            f"{own.persistent_manager!r}), and end with it: RabbitMQ at {own.host}:{own.port} is "
            "not used"
        )
