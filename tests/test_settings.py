"""Settings: who wins, what is said about a bad value, and what is never said."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amqp_tasks import TaskApp
from amqp_tasks.exceptions import SettingsError
from amqp_tasks.settings import ENV_PREFIX, Settings, hide_password, load_settings

SECRET = "s3cret"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(ENV_PREFIX + name.upper(), raising=False)


# --------------------------------------------------------------------- precedence

KINDS: list[tuple[str, tuple[Any, Any], tuple[str, Any], tuple[Any, Any]]] = [
    # name, (keyword, its value), (text in the environment, its value), (flag, its value)
    ("queue", ("a", "a"), ("b", "b"), ("c", "c")),
    ("broker_url", ("amqp://a/", "amqp://a/"), ("amqps://b/v", "amqps://b/v"), ("amqp://c", "amqp://c")),
    ("state_url", ("redis://a", "redis://a"), ("unix:///b", "unix:///b"), ("rediss://c", "rediss://c")),
    ("queue_type", ("classic", "classic"), ("quorum", "quorum"), ("classic", "classic")),
    ("heartbeat", (5, 5), ("6", 6), ("7", 7)),
    ("shutdown_grace", (1, 1.0), ("2.5", 2.5), (0, 0.0)),
    ("max_task_retries", (None, None), ("3", 3), ("none", None)),
    ("max_task_retries", (2, 2), ("None", None), (0, 0)),
    ("serve", (("a", "b"), ("a", "b")), ("c, d.e,", ("c", "d.e")), ("f", ("f",))),
    ("errored_ttl_ms", (1, 1), ("2", 2), ("3", 3)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "keyword", "environment", "flag"), KINDS, ids=[kind[0] for kind in KINDS]
)
def test_a_flag_beats_the_environment_which_beats_a_keyword_which_beats_the_default(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    keyword: tuple[Any, Any],
    environment: tuple[str, Any],
    flag: tuple[Any, Any],
) -> None:
    def value(**given: Any) -> Any:
        return getattr(load_settings(**given), name)

    assert value(keywords={}) == Settings.model_fields[name].default
    assert value(keywords={name: keyword[0]}) == keyword[1]
    assert value(keywords={}, flags={name: flag[0]}) == flag[1]
    assert value(keywords={name: keyword[0]}, flags={name: flag[0]}) == flag[1]
    monkeypatch.setenv(ENV_PREFIX + name.upper(), environment[0])
    assert value(keywords={}) == environment[1]
    assert value(keywords={name: keyword[0]}) == environment[1]
    assert value(keywords={name: keyword[0]}, flags={name: flag[0]}) == flag[1]


def test_each_setting_has_its_own_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMQP_TASKS_QUEUE", "environment")
    settings = load_settings({"queue": "keyword", "exchange": "keyword"}, {"heartbeat": 3})
    assert (settings.queue, settings.exchange, settings.heartbeat) == ("environment", "keyword", 3)


def test_the_order_does_not_depend_on_which_value_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMQP_TASKS_HEARTBEAT", "often")
    assert load_settings({}, {"heartbeat": 3}).heartbeat == 3
    with pytest.raises(SettingsError, match="AMQP_TASKS_HEARTBEAT='often'"):
        load_settings({"heartbeat": 3})


def test_settings_cannot_be_changed() -> None:
    settings = load_settings({})
    with pytest.raises(ValueError, match="frozen"):
        settings.queue = "other"  # type: ignore[misc]  # that it is wrong is the point


# ------------------------------------------------------------------------ defaults


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_described_with_its_unit_and_has_a_default(name: str) -> None:
    field = Settings.model_fields[name]
    assert field.description
    assert not field.is_required()
    if name.endswith("_ms"):
        assert "Milliseconds" in field.description
    elif "float" in str(field.annotation) or name == "heartbeat":
        assert "Seconds" in field.description


def test_the_defaults_are_valid_and_for_servers_on_this_machine() -> None:
    settings = load_settings({})
    assert settings.broker_url.startswith("amqp://guest:guest@127.0.0.1")
    assert settings.state_url.startswith("redis://127.0.0.1")
    assert not settings.in_memory


def test_memory_is_for_both_or_neither() -> None:
    both = {"broker_url": "memory://", "state_url": "memory://"}
    assert load_settings(both).in_memory
    for name in both:
        with pytest.raises(SettingsError, match="broker_url and state_url must both be memory://"):
            load_settings({name: "memory://"})


# ---------------------------------------------------------------------- bad values

BAD: list[tuple[str, str, str]] = [
    ("broker_url", "http://localhost/", "must begin with one of amqp://, amqps://, memory://"),
    ("broker_url", "amqp:///vhost", "must name a host"),
    ("broker_url", "amqp://localhost:many/", "must be a URL"),
    ("broker_url", "amqp://localhost:70000/", "must be a URL"),
    ("state_url", "localhost:6379", "must begin with one of redis://, rediss://, unix://, memory"),
    ("state_url", "redis://", "must name a host"),
    ("queue", "", "at least 1 character"),
    ("queue", "a\nb", "pattern"),
    ("exchange", "x" * 201, "at most 200 bytes"),
    ("queue_type", "stream", "'quorum' or 'classic'"),
    ("state_prefix", "", "at least 1 character"),
    ("heartbeat", "0", "greater than or equal to 1"),
    ("heartbeat", "soon", "valid integer"),
    ("heartbeat", "1.5", "valid integer"),
    ("connect_timeout", "0", "greater than 0"),
    ("connect_timeout", "nan", "finite number"),
    ("state_timeout", "inf", "finite number"),
    ("shutdown_grace", "-1", "greater than or equal to 0"),
    ("max_running_tasks", "0", "greater than or equal to 1"),
    ("max_running_tasks", "65536", "less than or equal to 65535"),
    ("max_task_retries", "-1", "greater than or equal to 0"),
    ("max_task_retries", "many", "valid integer"),
    ("max_crashes", "0", "greater than or equal to 1"),
    ("delayed_ttl_ms", "4294967296", "less than 4294967296"),
    ("errored_ttl_ms", "0", "greater than or equal to 1"),
    ("state_ttl", "0", "greater than 0"),
]


@pytest.mark.parametrize(("name", "value", "right"), BAD, ids=lambda text: text[:20])
def test_a_bad_value_is_named_with_where_it_was_set_and_what_is_right(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, right: str
) -> None:
    def complaint(**given: Any) -> str:
        with pytest.raises(SettingsError) as caught:
            load_settings(**given)
        assert caught.value.__suppress_context__
        return str(caught.value)

    flag = "--" + name.replace("_", "-")
    assert complaint(keywords={name: value}).startswith(f"{name}={value!r}: ")
    assert complaint(keywords={}, flags={name: value}).startswith(f"{flag}={value!r}: ")
    monkeypatch.setenv(ENV_PREFIX + name.upper(), value)
    said = complaint(keywords={name: value})
    assert said.startswith(f"{ENV_PREFIX}{name.upper()}={value!r}: ")
    assert right in said


def test_a_variable_in_small_letters_is_read_and_named_as_it_was_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("amqp_tasks_heartbeat", "often")
    with pytest.raises(SettingsError, match=r"(?i)^amqp_tasks_heartbeat='often'"):
        load_settings({})


def test_all_bad_values_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMQP_TASKS_QUEUE", "")
    with pytest.raises(SettingsError) as caught:
        load_settings({"heartbeat": 0}, {"max_crashes": "x"})
    said = str(caught.value)
    assert "heartbeat=0" in said
    assert "AMQP_TASKS_QUEUE=''" in said
    assert "--max-crashes='x'" in said


@pytest.mark.parametrize("where", ["keywords", "flags"])
def test_what_is_no_setting_is_refused_by_name(where: str) -> None:
    given: dict[str, Any] = {"keywords": {}, where: {"quueue": "a"}}
    with pytest.raises(SettingsError, match="'quueue' is not a setting"):
        load_settings(**given)


def test_a_bad_entry_of_a_list_is_named_by_its_setting() -> None:
    with pytest.raises(SettingsError, match=r"^serve=\[1\]: "):
        load_settings({"serve": [1]})


@pytest.mark.parametrize("name", ["queue", "exchange"])
def test_a_name_that_amqp_cannot_carry_is_refused(name: str) -> None:
    # 255 bytes of UTF-8; the other queues are named after the main one.
    with pytest.raises(SettingsError, match=name):
        load_settings({name: "ä" * 200})


# ----------------------------------------------------------------------- passwords

URLS = [
    "amqp://user:{}@host/",
    "amqp://user:{}@host:bad/",
    "amqp://user:{}@host:99999/",
    "amqp://:{}@host/",
    "http://user:{}@host/",
    "amqp://user:{}@/",
    "amqp://us@er:{}@host:bad/",
    "user:{}@host",
    "amqp:user:{}@host",
    "redis://host/0?password={}",
    "redis://host:bad/0?password={}",
    "unix://user:{}@/socket",
    "unix:///socket?password={}",
]
PASSWORDS = [SECRET, f"{SECRET}#", f"#{SECRET}", f"{SECRET}/", f"/{SECRET}", f"?{SECRET}",
             f"{SECRET}@", f"@{SECRET}", f"[{SECRET}", f"{SECRET}]", f":{SECRET}", f"a#{SECRET}",
             f"a/{SECRET}", f"a?{SECRET}", f"a@{SECRET}", f"a:{SECRET}", f"%{SECRET}"]  # fmt: skip


def said_about(name: str, url: str) -> str:
    """All that a program would print about a URL."""
    try:
        settings = load_settings({name: url})
    except SettingsError as error:
        return str(error)
    return f"{settings!r} {settings} {hide_password(url)}"


@pytest.mark.parametrize("url", URLS)
def test_a_password_is_never_said(url: str) -> None:
    # Characters that should have been escaped are the usual reason why a URL is refused.
    told = [
        (name, password)
        for name in ("broker_url", "state_url")
        for password in PASSWORDS
        if SECRET in said_about(name, url.format(password))
    ]
    assert told == []


def test_a_password_in_the_environment_is_never_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMQP_TASKS_BROKER_URL", f"http://user:{SECRET}@host/")
    with pytest.raises(SettingsError) as caught:
        load_settings({})
    assert SECRET not in str(caught.value)
    assert "user:***@host" in str(caught.value)


def test_a_password_in_another_settings_error_is_never_said() -> None:
    good = f"amqp://user:{SECRET}@host/"
    with pytest.raises(SettingsError) as caught:
        load_settings({"broker_url": good, "heartbeat": 0})
    assert SECRET not in str(caught.value)
    with pytest.raises(SettingsError) as caught:
        load_settings({"broker_url": good, "state_url": "memory://"})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "hidden"),
    [
        ("amqp://user:pw@host:5672/vhost", "amqp://user:***@host:5672/vhost"),
        ("amqp://host/", "amqp://host/"),
        ("amqp://user@host/", "amqp://user@host/"),
        ("redis://:pw@host/0", "redis://:***@host/0"),
        ("redis://user:@host/0", "redis://user:***@host/0"),
        ("amqp://user:p@w@host/", "amqp://user:***@host/"),
        ("memory://", "memory:"),
    ],
)
def test_hiding_a_password_leaves_the_rest(url: str, hidden: str) -> None:
    assert hide_password(url).rstrip("/") == hidden.rstrip("/")


@given(password=st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=6))
def test_a_url_with_any_plain_password_is_shown_without_it(password: str) -> None:
    assert hide_password(f"amqp://u:{password}@h/v") == "amqp://u:***@h/v"


def test_a_wrong_flag_is_forgotten() -> None:
    app = TaskApp(queue="before")
    with pytest.raises(SettingsError, match="queue_typ"):
        app.configure(queue_typ="classic")
    assert app.settings.queue == "before"
    app.configure(queue="after")
    assert app.settings.queue == "after"
