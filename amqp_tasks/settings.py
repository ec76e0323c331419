"""Every setting, once: its name, type, unit, default and the reason for it.

A setting can be given as a keyword of `TaskApp`, as ``AMQP_TASKS_<NAME>`` in the
environment and, for the worker, as a flag; the later of these wins over the earlier. An
operator can thereby change what a program says without changing the program.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from .exceptions import SettingsError

__all__ = ["ENV_PREFIX", "Settings", "hide_password", "load_settings"]

ENV_PREFIX = "AMQP_TASKS_"

_FLAGS = "flags_"
"""Key under which `load_settings` hands the flags to the settings class."""


def _none_from_text(value: object) -> object:
    if isinstance(value, str) and value.strip().lower() in ("", "none", "null"):
        return None
    return value


def _names_from_text(value: object) -> object:
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    return value


def _url(*schemes: str) -> AfterValidator:
    def check(value: str) -> str:
        try:
            parts = urlsplit(value)
            parts.port  # noqa: B018  a port that is no number raises here
        except ValueError:
            # Not what urlsplit says: a password with a slash in it looks like a port.
            raise ValueError(
                "must be a URL; check the port, and write special characters of user and "
                "password as %XX"
            ) from None
        if parts.scheme not in schemes:
            raise ValueError(f"must begin with one of {', '.join(s + '://' for s in schemes)}")
        if parts.scheme in ("amqp", "amqps", "redis", "rediss") and not parts.hostname:
            raise ValueError("must name a host")
        return value

    return AfterValidator(check)


_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_TtlMs = Annotated[int, Field(ge=1, lt=2**32)]


def _short_name(value: str) -> str:
    if len(value.encode("utf-8", "replace")) > 200:
        raise ValueError("must have at most 200 bytes of UTF-8: AMQP's names have 255, with suffix")
    return value


_QueueName = Annotated[
    str, Field(min_length=1, pattern=r"^[^\x00-\x1f]+$"), AfterValidator(_short_name)
]


class Settings(BaseSettings):
    """The settings of an app. Made by `load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    # Where
    broker_url: Annotated[str, _url("amqp", "amqps", "memory")] = Field(
        "amqp://guest:guest@127.0.0.1:5672/",
        repr=False,  # may hold a password
        description="RabbitMQ: `amqp://user:password@host:port/vhost`, `amqps://` for TLS, "
        "or `memory://` for one process.",
    )
    state_url: Annotated[str, _url("redis", "rediss", "unix", "memory")] = Field(
        "redis://127.0.0.1:6379/0",
        repr=False,
        description="Redis: `redis://user:password@host:port/db`, `rediss://` for TLS, "
        "`unix:///path`, or `memory://` for one process.",
    )
    exchange: _QueueName = Field("amqp_tasks", description="Durable direct exchange of all queues.")
    queue: _QueueName = Field(
        "amqp_tasks", description="Main queue; the others are named after it."
    )
    queue_type: Literal["quorum", "classic"] = Field(
        "quorum",
        description="`quorum` is replicated and dead-letters at least once; `classic` declares "
        "guillotina_amqp's arguments.",
    )
    state_prefix: str = Field(
        "amqp_tasks:", min_length=1, description="Begins every key and channel in Redis."
    )
    serve: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names_from_text)] = Field(
        (),
        description="Modules or packages, separated by commas, whose functions a worker runs by "
        "their dotted name although they are not decorated.",
    )

    # Connections
    heartbeat: Annotated[int, Field(ge=1, le=3600)] = Field(
        10,
        description="Seconds between AMQP heartbeats; a dead peer is noticed after about three.",
    )
    connect_timeout: _Positive = Field(
        10.0, description="Seconds that a connection may take to be made."
    )
    publish_timeout: _Positive = Field(
        30.0, description="Seconds that the broker may take to confirm a message."
    )
    state_timeout: _Positive = Field(
        5.0, description="Seconds that the state store may take to answer."
    )
    reconnect_timeout: _Positive = Field(
        300.0,
        description="Seconds after which a worker that cannot reconnect exits, and the block of "
        "`app.connect()` ends.",
    )
    beacon_ttl: _NotNegative = Field(
        5.0,
        description="Seconds between messages that a worker sends to itself; a connection that "
        "carries none is replaced within three times as long. 0 turns them off.",
    )
    on_beacon_lost: Literal["reconnect", "exit"] = Field(
        "reconnect",
        description="What a worker does when no beacon comes back: `reconnect`, or `exit` with 1.",
    )
    guard_after: _Positive = Field(
        900.0,
        description="Seconds for which a worker holds a delivery; a task that runs for longer is "
        "kept by a copy of its message. Less than RabbitMQ's `consumer_timeout` (30 min).",
    )

    # Running
    max_running_tasks: Annotated[int, Field(ge=1, le=65_535)] = Field(
        100, description="Attempts that one worker runs at the same time."
    )
    max_task_retries: Annotated[
        Annotated[int, Field(ge=0)] | None, BeforeValidator(_none_from_text)
    ] = Field(
        5,
        description="Retries of a task that has no `RetryPolicy` of its own; `none` for ever.",
    )
    max_crashes: Annotated[int, Field(ge=1)] = Field(
        3, description="Workers that one task may take down before it is given up."
    )
    shutdown_grace: _NotNegative = Field(
        30.0, description="Seconds that running tasks may go on when the worker is told to stop."
    )
    cancel_grace: _Positive = Field(
        10.0,
        description="Seconds that a cancelled task may take to stop before it is named in the log.",
    )
    cancel_poll_interval: _Positive = Field(
        1.0, description="Seconds between looks for cancel requests; announcements are faster."
    )
    auto_kill_timeout: _NotNegative = Field(
        0.0,
        description="Seconds that a task may capture the event loop before the watchdog acts; "
        "0 turns it off.",
    )
    on_blocked_loop: Literal["interrupt", "kill"] = Field(
        "interrupt",
        description="What the watchdog does: `interrupt` the task, and end the process if it "
        "goes on for `cancel_grace`; or `kill`, end the process at once.",
    )
    presence_ttl: _Positive = Field(
        8.0, description="Seconds without a sign of life after which a worker's tasks are free."
    )

    # Keeping
    delayed_ttl_ms: _TtlMs = Field(
        120_000,
        description="Milliseconds that the delay queue holds a failed task which has no "
        "`RetryPolicy` of its own.",
    )
    errored_ttl_ms: _TtlMs = Field(
        604_800_000, description="Milliseconds that the error queue keeps a message (1 week)."
    )
    state_ttl: _Positive = Field(
        86_400.0, description="Seconds that the state of an ended task is kept (1 day)."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        assert isinstance(init_settings, InitSettingsSource)
        keywords = dict(init_settings.init_kwargs)
        flags = keywords.pop(_FLAGS, {})
        return (
            InitSettingsSource(settings_cls, flags),
            env_settings,
            InitSettingsSource(settings_cls, keywords),
        )

    @model_validator(mode="after")
    def _one_process_or_servers(self) -> Settings:
        if self.broker_url.startswith("memory:") != self.state_url.startswith("memory:"):
            raise ValueError(
                "broker_url and state_url must both be memory://, or neither: what is in memory "
                "is seen by one process only"
            )
        return self

    @property
    def in_memory(self) -> bool:
        """True if the broker and the state store live in this process."""
        return self.broker_url.startswith("memory:")


def load_settings(keywords: dict[str, Any], flags: dict[str, Any] | None = None) -> Settings:
    """Read the settings: `keywords`, under the environment, under `flags`.

    Raises:
        SettingsError: names each setting that is wrong, where it was set, and what would be
            right.
    """
    flags = flags or {}
    try:
        values: dict[str, Any] = {**keywords, _FLAGS: flags}
        return Settings(**values)
    except ValidationError as error:
        raise SettingsError(_explain(error, keywords, flags)) from None


def hide_password(url: str) -> str:
    """Return a URL, or what was meant to be one, without its password, for people to read."""
    scheme, colon, rest = url.partition("://")
    if not colon:
        return f"***@{url.rpartition('@')[2]}" if "@" in url else url
    before, found, _ = rest.partition("password=")
    if found:
        rest = f"{before}{found}***"
    # The last @: in a password it should have been escaped, but that may be what is wrong.
    credentials, at, host = rest.rpartition("@")
    if at and ":" in credentials:
        credentials = credentials.partition(":")[0] + ":***"
    return f"{scheme}{colon}{credentials}{at}{host}"


def _explain(error: ValidationError, keywords: dict[str, Any], flags: dict[str, Any]) -> str:
    lines: list[str] = []
    for detail in error.errors(include_url=False):
        name = str(detail["loc"][0]) if detail["loc"] else ""
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            lines.append(f"{name!r} is not a setting; see Settings for those there are")
            continue
        variable = _variable(name)
        if name in flags:
            where, value = "--" + name.replace("_", "-"), flags[name]
        elif variable is not None:
            where, value = variable, os.environ[variable]
        else:
            where, value = name, keywords.get(name)
        if name.endswith("_url") and isinstance(value, str):
            value = hide_password(value)
        lines.append(f"{where}={value!r}: {message}" if name else message)
    return "; ".join(lines)


def _variable(name: str) -> str | None:
    """Return the environment's variable for a setting, as it is written there."""
    wanted = f"{ENV_PREFIX}{name}".upper()
    return next((variable for variable in os.environ if variable.upper() == wanted), None)
