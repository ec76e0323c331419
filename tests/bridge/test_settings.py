"""The settings: guillotina_amqp's, amqp_tasks', and what is said about wrong ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import guillotina_bridge
from amqp_tasks import Settings, SettingsError
from guillotina_bridge.settings import (
    DEFAULTS,
    BridgeSettings,
    address,
    read_settings,
    secret_headers,
    served_packages,
)

SERVERS: dict[str, Any] = {"redis": {"host": "redis.example", "port": 6380}}


def read(amqp: Mapping[str, Any] | None = None, **others: Any) -> BridgeSettings:
    return read_settings({"amqp": {**DEFAULTS, **(amqp or {})}, **others})


def read_redis(amqp: Mapping[str, Any] | None = None, **others: Any) -> BridgeSettings:
    """Read, with RabbitMQ and Redis."""
    return read({"persistent_manager": "redis", **(amqp or {})}, **{**SERVERS, **others})


def complaint(amqp: Any, **others: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        read_settings({"amqp": amqp, **others})
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"AMQP_TASKS_{name.upper()}", raising=False)


# ------------------------------------------------------------------------ names and defaults


def test_the_names_and_defaults_of_guillotina_amqp() -> None:
    assert guillotina_bridge.app_settings["amqp"] == {
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
        "queue_type": "classic",
        "embedded_worker": False,
        "on_broker_down": "fail",
        "after_commit_wait": 1.0,
    }


def test_they_become_settings_of_amqp_tasks() -> None:
    settings = read_redis()
    library = settings.library
    assert library.broker_url == "amqp://guest:guest@localhost:5672/%2F"
    assert library.state_url == "redis://redis.example:6380/0"
    assert library.state_prefix == "amqpjobs-"
    assert (library.exchange, library.queue) == ("guillotina", "guillotina")
    assert (library.queue_type, library.heartbeat) == ("classic", 120)
    assert (library.max_running_tasks, library.max_task_retries) == (20, 5)
    assert (library.delayed_ttl_ms, library.errored_ttl_ms) == (120_000, 604_800_000)
    assert library.state_ttl == 86_400
    assert not settings.in_memory
    assert (settings.embedded_worker, settings.on_broker_down) == (False, "fail")
    assert settings.after_commit_wait == 1.0
    assert settings.warnings == ()


def test_in_memory_is_the_default_and_says_so() -> None:
    settings = read({"host": "rabbit.example", "port": 5673})
    assert settings.in_memory
    assert settings.library.broker_url == settings.library.state_url == "memory://"
    [warning] = settings.warnings
    assert "end with it" in warning
    assert "RabbitMQ at rabbit.example:5673 is not used" in warning


def test_numbers_and_truths_may_be_texts() -> None:
    settings = read_redis(
        {
            "port": "5673",
            "heartbeat": "10",
            "max_running_tasks": "7",
            "max_task_retries": "none",
            "state_ttl": "60",
            "delayed_ttl_ms": "1000",
            "errored_ttl_ms": "2000",
            "auto_kill_timeout": "1.5",
            "after_commit_wait": "0.25",
            "embedded_worker": "true",
        },
        redis={"host": "127.0.0.1", "port": "6390", "pool": {"db": "3"}},
    )
    library = settings.library
    assert urlsplit(library.broker_url).port == 5673
    assert library.state_url == "redis://127.0.0.1:6390/3"
    assert (library.heartbeat, library.max_running_tasks, library.state_ttl) == (10, 7, 60)
    assert library.max_task_retries is None
    assert (library.delayed_ttl_ms, library.errored_ttl_ms) == (1000, 2000)
    assert library.auto_kill_timeout == 1.5
    assert settings.after_commit_wait == 0.25
    assert settings.embedded_worker is True


def test_null_retries_for_ever() -> None:
    assert read_redis({"max_task_retries": None}).library.max_task_retries is None


def test_a_number_may_be_a_name_or_a_password() -> None:
    settings = read_redis({"login": 7, "password": 1234, "vhost": 5}, redis={"password": 99})
    assert settings.library.broker_url == "amqp://7:1234@localhost:5672/5"
    assert settings.library.state_url == "redis://:99@localhost:6379/0"


def test_every_setting_of_amqp_tasks_can_be_given() -> None:
    values: dict[str, Any] = {
        "broker_url": "amqps://me:sesame@rabbit.example/shop",
        "state_url": "rediss://redis.example/2",
        "exchange": "e",
        "queue": "q",
        "queue_type": "quorum",
        "state_prefix": "p:",
        "heartbeat": 11,
        "connect_timeout": 1.0,
        "publish_timeout": 2.0,
        "state_timeout": 3.0,
        "reconnect_timeout": 4.0,
        "beacon_ttl": 5.0,
        "on_beacon_lost": "exit",
        "guard_after": 6.0,
        "max_running_tasks": 12,
        "max_task_retries": 13,
        "max_crashes": 14,
        "shutdown_grace": 7.0,
        "cancel_grace": 8.0,
        "cancel_poll_interval": 9.0,
        "auto_kill_timeout": 10.0,
        "on_blocked_loop": "kill",
        "presence_ttl": 11.0,
        "delayed_ttl_ms": 15,
        "errored_ttl_ms": 16,
        "state_ttl": 12.0,
    }
    assert values.keys() | {"serve"} == Settings.model_fields.keys()
    library = read_redis(values, redis_prefix_key="not this").library
    assert {name: getattr(library, name) for name in values} == values
    # What may be run is asked of the bridge alone.
    assert read_redis({"serve": ["shop"]}).library.serve == ()


def test_the_environment_of_amqp_tasks_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMQP_TASKS_QUEUE", "from-outside")
    assert read_redis({"queue": "inside"}).library.queue == "from-outside"


# ------------------------------------------------------------------------ servers


def test_special_characters_are_escaped() -> None:
    settings = read_redis(
        {"login": "me@home", "password": "p/w:@%?#", "vhost": "/shop/1"},
        redis={"host": "redis", "port": 1, "password": "s/e:s@m#e"},
    )
    broker, redis = urlsplit(settings.library.broker_url), urlsplit(settings.library.state_url)
    assert (broker.hostname, broker.port) == ("localhost", 5672)
    assert unquote(broker.username or "") == "me@home"
    assert unquote(broker.password or "") == "p/w:@%?#"
    assert unquote(broker.path) == "//shop/1"
    assert unquote(redis.password or "") == "s/e:s@m#e"
    assert (redis.hostname, redis.port, redis.path) == ("redis", 1, "/0")


def test_an_address_of_ipv6() -> None:
    settings = read_redis({"host": "::1"}, redis={"host": "[::1]"})
    assert urlsplit(settings.library.broker_url).hostname == "::1"
    assert urlsplit(settings.library.state_url).hostname == "::1"


@pytest.mark.parametrize(
    "redis",
    [
        {"host": "r", "port": 1, "password": "sesame", "db": 4, "cluster_mode": False},
        {"host": "r", "port": 1, "pool": {"password": "sesame", "db": 4, "minsize": 5}},
        {"host": "r", "port": 1, "db": 4, "pool": {"password": "sesame", "db": 7}},
    ],
)
def test_password_and_database_of_redis(redis: dict[str, Any]) -> None:
    assert read_redis(redis=redis).library.state_url == "redis://:sesame@r:1/4"


def test_the_prefix_of_its_keys() -> None:
    assert read_redis(redis_prefix_key="shop-").library.state_prefix == "shop-"


def test_a_custom_manager_has_redis_or_one_process() -> None:
    custom = read({"persistent_manager": "mine"}, **SERVERS)
    assert custom.library.state_url == "redis://redis.example:6380/0"
    assert custom.persistent_manager == "mine"
    assert read({"persistent_manager": "mine"}).in_memory


def test_urls_win_over_what_would_be_composed() -> None:
    settings = read({"broker_url": "amqp://a/", "state_url": "redis://b/1"})
    assert not settings.in_memory
    assert settings.library.broker_url == "amqp://a/"
    settings = read({"persistent_manager": "redis", "state_url": "redis://b/1"})
    assert settings.library.state_url == "redis://b/1"


# ------------------------------------------------------------------------ wrong ones


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("port", "x", "amqp.port='x': must be a valid integer"),
        ("port", 0, "amqp.port=0: must be greater than or equal to 1"),
        ("host", "a b", "amqp.host='a b': "),
        ("host", "user@host", "amqp.host='user@host': "),
        ("embedded_worker", "perhaps", "amqp.embedded_worker='perhaps': must be a valid boolean"),
        ("on_broker_down", "cry", "amqp.on_broker_down='cry': must be 'fail' or 'retry'"),
        ("after_commit_wait", -1, "amqp.after_commit_wait=-1: must be greater than or equal to 0"),
        ("heartbeat", "soon", "amqp.heartbeat='soon': must be a valid integer"),
        ("max_running_tasks", 0, "amqp.max_running_tasks=0: must be greater than"),
        ("queue_type", "fast", "amqp.queue_type='fast': must be 'quorum' or 'classic'"),
        ("exchange", "", "amqp.exchange='': "),
        ("state_ttl", None, "amqp.state_ttl=None: must be a valid number"),
        ("persistent_manager", "", "amqp.persistent_manager='': "),
    ],
)
def test_a_wrong_value_is_named(name: str, value: Any, said: str) -> None:
    text = complaint({**DEFAULTS, "persistent_manager": "redis", name: value}, **SERVERS)
    assert text.startswith(said), text


def test_all_wrong_values_are_named_at_once() -> None:
    text = complaint({"heartbeat": "a", "state_ttl": "b"})
    assert "amqp.heartbeat='a': " in text
    assert "; amqp.state_ttl='b': " in text


def test_a_wrong_value_of_the_environment_is_named_as_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AMQP_TASKS_HEARTBEAT", "soon")
    assert complaint({}).startswith("AMQP_TASKS_HEARTBEAT='soon': ")


def test_a_wrong_redis_is_named() -> None:
    redis: dict[str, Any] = {"persistent_manager": "redis"}
    assert complaint(redis, redis={"port": "x"}).startswith("redis.port='x': must be ")
    assert complaint(redis, redis="redis://host").startswith("redis: must be a mapping")
    assert complaint(redis).startswith("redis: must say host and port")
    assert complaint(redis, **SERVERS, redis_prefix_key="").startswith("redis_prefix_key='': ")


def test_a_section_that_is_none() -> None:
    assert complaint(7).startswith("amqp=7: must be a mapping")


def test_trying_again_is_for_producers() -> None:
    text = complaint({"embedded_worker": True, "on_broker_down": "retry"})
    assert text.startswith("amqp.on_broker_down='retry': must be 'fail'")


@pytest.mark.parametrize(
    ("amqp", "others"),
    [
        ({"broker_url": "http://me:sesame@host/"}, SERVERS),
        ({"state_url": "redis://:sesame@host:port/"}, SERVERS),
        ({"password": ["sesame"]}, SERVERS),
        ({"heartbeat": "x", "password": "sesame"}, SERVERS),
        ({}, {"redis": {"password": ["sesame"]}}),
        ({}, {"redis": {"port": "x", "password": "sesame"}}),
        ({}, {"redis": {"port": "x", "pool": {"password": "sesame"}}}),
    ],
)
def test_no_password_is_shown(amqp: dict[str, Any], others: dict[str, Any]) -> None:
    assert "sesame" not in complaint({"persistent_manager": "redis", **amqp}, **others)


def test_nor_in_a_representation() -> None:
    settings = read_redis(
        {"password": "sesame"}, redis={"host": "redis.example", "password": "sesame"}
    )
    assert "sesame" in settings.library.broker_url
    assert "sesame" in settings.library.state_url
    assert "sesame" not in repr(settings)
    for url in (settings.library.broker_url, settings.library.state_url):
        assert "sesame" not in address(url)
    assert address(settings.library.broker_url) == "amqp://localhost:5672/%2F"
    assert address(settings.library.state_url) == "redis://redis.example:6379/0"


# ------------------------------------------------------------------------ warnings


def test_what_is_not_used_is_warned_about() -> None:
    [warning] = read_redis({"connection_factory": "aioamqp.connect"}).warnings
    assert "amqp.connection_factory is not used any more" in warning
    [warning] = read_redis({"max_runing_tasks": 3}).warnings
    assert warning == "amqp.max_runing_tasks is not a setting; is max_running_tasks meant?"
    [warning] = read_redis({"colour": "red"}).warnings
    assert "amqp.colour is not a setting" in warning


def test_a_custom_manager_may_keep_its_settings_there() -> None:
    custom = {"persistent_manager": "mine", "colour": "red", "max_runing_tasks": 3}
    [warning] = read_redis(custom).warnings
    assert "max_runing_tasks" in warning


# ------------------------------------------------------------------------ what is served


def test_applications_and_those_they_depend_on_are_served() -> None:
    settings = {
        "applications": ["guillotina_bridge", "tests.bridge.site", "guillotina.contrib.redis"],
        "amqp": {"serve": ["other.tasks"]},
    }
    assert served_packages(settings) == ("tests.bridge.site", "other.tasks")
    assert served_packages({"applications": None, "amqp": {"serve": "a, b"}}) == ("a", "b")


@pytest.mark.parametrize("name", ["serve", "secret_headers"])
@pytest.mark.parametrize("value", [5, {"shop": 1}, ["shop", 5], [""]])
def test_names_that_are_none(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=rf"amqp\.{name}=.*must be a list of names"):
        read_settings({"amqp": {name: value}})


@pytest.mark.parametrize("value", [["X-Api-Key", "x-token"], "X-API-Key, X-Token"])
def test_secret_headers_are_these_and_those_of_the_standard(value: Any) -> None:
    settings = {"amqp": {"secret_headers": value}}
    standard = {"authorization", "cookie", "proxy-authorization"}
    assert secret_headers(settings) == standard | {"x-api-key", "x-token"}
    assert secret_headers({}) == standard
    assert [text for text in read_settings(settings).warnings if "secret" in text] == []


def test_dependencies_are_found_at_any_depth(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, needs in {"depth_a": ["depth_b"], "depth_b": ["depth_c", "depth_a"]}.items():
        (tmp_path / f"{name}.py").write_text(f"app_settings = {{'applications': {needs}}}\n")
    (tmp_path / "depth_c.py").write_text("")
    found = served_packages({"applications": ["depth_a"]})
    assert found == ("depth_a", "depth_b", "depth_c")
