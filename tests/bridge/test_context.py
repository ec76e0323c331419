"""What a task sees is what the request saw that scheduled it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from guillotina import app_settings, task_vars
from guillotina.auth.users import ANONYMOUS_USER_ID as NOBODY
from guillotina.auth.users import AnonymousUser, GuillotinaUser, SystemUser
from guillotina.content import create_content_in_container
from guillotina.interfaces import Allow, Deny, Unset
from guillotina.request import Request
from guillotina.utils import (
    get_authenticated_user,
    get_current_container,
    get_current_request,
    get_security_policy,
)
from hypothesis import given
from hypothesis import strategies as st

from amqp_tasks import ArgumentsError
from guillotina_bridge.context import (
    make_request,
    restore_user,
    serialize_request,
    serialize_user,
    without_credentials,
)

from .attempts import StartSite, message, start_site, working
from .conftest import Database
from .task_site import what_is_seen

__all__ = ["start_site"]

SECRETS = {
    "Authorization": "Bearer t0ken-of-bob",
    "Cookie": "session=c00kie-of-bob",
    "Proxy-Authorization": "Basic pr0xy-of-bob",
}
SECRET_NAMES = {name.lower() for name in SECRETS}


async def look() -> dict[str, Any]:
    return {**await what_is_seen(), "body": await get_current_request().text()}


async def current_user() -> list[Any]:
    user = get_authenticated_user()
    return [type(user).__name__, getattr(user, "id", None), task_vars.txn.get().user]


# ------------------------------------------------------------------ by way of requests


@pytest.mark.anyio
@pytest.mark.parametrize("user", ["bob", "root"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-VirtualHost-Monster": "https://shop.example/api"},
        {"X-VirtualHost-Path": "/behind"},
        {"X-Forwarded-Proto": "https", "Host": "shop.example:8443"},
    ],
    ids=["plain", "monster", "path", "forwarded"],
)
async def test_a_task_sees_what_the_request_saw(
    start_site: StartSite, database: Database, user: str, headers: dict[str, str]
) -> None:
    site = await start_site(database, "a")
    site.add_user("bob", roles=["guillotina.Reader", "guillotina.Member"], groups=["readers"])
    await site.request("POST", "/db/a/@addons", json={"id": "layered"})
    response = await site.request(
        "POST",
        "/db/a/@scheduling?q=one&q=two%20words&empty=",
        user=user,
        headers={**headers, "Cookie": SECRETS["Cookie"], "X-Corr-Id": "abc"},
        content=b"the body",
    )
    assert response.status_code == 200, response.text
    scheduling = response.json()
    async with working() as tasks:
        seen = await tasks.run(look, extra=scheduling["extra"])

    expected = scheduling["seen"]
    assert expected["layer"], "the test itself"
    expected["headers"] = [
        [name, value] for name, value in expected["headers"] if name not in SECRET_NAMES
    ]
    # Of a request, guillotina knows the user only when it has begun the transaction.
    assert seen == {**expected, "txn_user": user, "body": ""}


@pytest.mark.anyio
async def test_a_message_has_no_credentials(start_site: StartSite, database: Database) -> None:
    site = await start_site(database, "a")
    response = await site.client.post(
        "/db/a/@scheduling?ws_token=t0ken-of-bob&q=1&ws_token=again",
        headers={**SECRETS, "Authorization": "Basic cm9vdDpvcGVuIHNlc2FtZQ=="},
    )
    assert response.status_code == 200, response.text
    text = json.dumps(response.json()["extra"]).lower()
    for secret in (*SECRET_NAMES, "t0ken", "c00kie", "pr0xy", "again", "cm9vd"):
        assert secret not in text
    assert response.json()["extra"]["req_data"]["url"].endswith("/@scheduling?q=1")


@pytest.mark.anyio
async def test_headers_that_are_said_to_be_secret_are_in_no_message(
    start_site: StartSite, database: Database
) -> None:
    site = await start_site(database, "a", amqp={"secret_headers": ["X-API-Key"]})
    headers = {"x-api-key": "k3y", "x-other": "1"}
    response = await site.request("POST", "/db/a/@scheduling", headers=headers)
    sent = response.json()["extra"]["req_data"]["headers"]
    assert (sent.get("x-api-key"), sent.get("x-other")) == (None, "1")
    # Nor does a task see them that somebody else has put there.
    extra = message()
    extra["req_data"]["headers"] = {"Host": "testserver", "X-Api-Key": "k3y"}
    async with working() as tasks:
        assert "k3y" not in str(await tasks.run(look, extra=extra))


@pytest.mark.anyio
async def test_a_message_of_guillotina_amqp(start_site: StartSite, database: Database) -> None:
    site = await start_site(database, "a")
    await site.request("POST", "/db/a/@addons", json={"id": "layered"})
    headers = {"Host": "shop.example", "X-Ours": "1", "AUTHORIZATION": "Bearer t0ken"}
    extra = {
        "db_id": "db",
        "container_id": "a",
        "req_data": {
            "url": "http://shop.example/db/a/%C3%BC%20b/@go?x=1&x=2",
            "headers": headers,
            "method": "PATCH",
            "annotations": {"_corr_id": "abc"},
            "user": {
                "id": "bob",
                "roles": ["guillotina.Owner"],
                "groups": ["readers"],
                "Authorization": "Bearer t0ken",
                "headers": {**headers, "X-Only-Here": "2"},
                "data": {"colour": "blue"},
            },
            "container_url": "http://shop.example/db/a",
        },
    }
    async with working() as tasks:
        seen = await tasks.run(look, extra=extra)
    assert seen == {
        **seen,
        "db": "db",
        "container": "a",
        "container_url": "http://shop.example/db/a",
        "may_add": True,
        "user": "bob",
        "roles": ["guillotina.Authenticated", "guillotina.Owner"],
        "groups": ["readers"],
        "user_data": {"colour": "blue"},
        "txn_user": "bob",
        "layer": True,
        "method": "PATCH",
        "url": "http://shop.example/db/a/ü b/@go?x=1&x=2",
        "query": [["x", "1"], ["x", "2"]],
        "headers": [["host", "shop.example"], ["x-only-here", "2"], ["x-ours", "1"]],
        "annotations": {"_corr_id": "abc"},
        "body": "",
    }


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, ["NoneType", None, None]),
        ({"user": {}}, ["NoneType", None, None]),
        ({"user": {"id": NOBODY}}, ["AnonymousUser", NOBODY, NOBODY]),
        ({"user": {"id": "root", "roles": []}}, ["RootUser", "root", "root"]),
        ({"user": {"id": "bob"}}, ["GuillotinaUser", "bob", "bob"]),
    ],
)
async def test_who_a_task_runs_as(
    start_site: StartSite, database: Database, data: dict[str, Any], expected: list[Any]
) -> None:
    await start_site(database, "a")
    async with working() as tasks:
        seen = await tasks.run(current_user, extra=message(req_data=data))
    assert seen == expected


# ------------------------------------------------------------------ by themselves


def request(
    path: str = "/db/a", query: bytes = b"", headers: dict[str, str] | None = None, **scope: Any
) -> Request:
    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    return Request("https", "PUT", path, query, raw, **scope)


texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    path=texts.map("/{}".format),
    query=st.text(st.characters(codec="ascii", exclude_characters="#")).filter(
        lambda text: "ws_token=" not in text
    ),
    headers=st.dictionaries(st.sampled_from(["Host", "X-One", "X-Two"]), texts),
    annotations=st.dictionaries(texts, st.none() | st.integers(-9, 9) | texts),
)
def test_a_request_is_the_same_again(
    path: str, query: str, headers: dict[str, str], annotations: dict[str, Any]
) -> None:
    first = request(path, query.encode(), headers)
    first.annotations = annotations
    data = json.loads(json.dumps(serialize_request(first)))
    second = make_request(None, data)
    assert second.path == path
    assert second.query_string == query
    assert second.method == "PUT"
    assert second.scheme == "https"
    assert list(second.headers.items()) == list(first.headers.items())
    assert second.annotations == annotations
    assert second.url == first.url
    assert serialize_request(second) == data


def test_a_header_that_was_sent_twice() -> None:
    raw = [(b"X-One", b"a"), (b"Host", b"h"), (b"x-one", b"b"), (b"cookie", b"c=d")]
    data = serialize_request(Request("http", "GET", "/", b"", raw))
    assert data["headers"] == {"X-One": ["a", "b"], "Host": "h"}
    again = make_request(None, json.loads(json.dumps(data)))
    assert again.headers.getall("x-one") == ["a", "b"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h/db/a?x=1", ("http", "h", "/db/a", "x=1")),
        ("https://h:81", ("https", "h:81", "/", "")),
        ("/db/a", ("http", None, "/db/a", "")),
        ("http:///db/a", ("http", None, "/db/a", "")),
        ("http://[/db", ("http", "[", "/db", "")),
    ],
)
def test_urls_of_any_kind(url: str, expected: tuple[Any, ...]) -> None:
    made = make_request(None, {"url": url})
    assert (made.scheme, made.host, made.path, made.query_string) == expected
    assert made.method == "POST"


class OtherRequest(Request):
    pass


def test_a_request_like_another() -> None:
    base = OtherRequest("http", "GET", "/", b"", [(b"x", b"y")])
    base["item"] = 1
    made = make_request(base, {"url": "http://h/db"})
    assert type(made) is OtherRequest
    assert made["item"] == 1
    assert list(made.headers) == ["host"]


def test_annotations_that_are_not_json() -> None:
    one = request()
    one.annotations = {"tool": object()}
    with pytest.raises(ArgumentsError, match="the request's annotations="):
        serialize_request(one)


def test_a_users_roles_are_those_that_count() -> None:
    user = GuillotinaUser(
        "bob",
        groups=["g"],
        roles={"guillotina.Reader": 1, "guillotina.Editor": Allow, "guillotina.Owner": Deny},
    )
    data = serialize_user(user)
    assert data == {
        "id": "bob",
        "roles": ["guillotina.Reader", "guillotina.Editor"],
        "groups": ["g"],
        "data": {},
    }
    again = restore_user(data)
    assert again is not None
    assert again.roles == {"guillotina.Reader": Allow, "guillotina.Editor": Allow}
    assert again.groups == ["g"]


async def what_a_user_of_a_group_may() -> dict[str, Any]:
    await create_content_in_container(get_current_container(), "Item", "item")
    policy, container = get_security_policy(), get_current_container()
    return {name: bool(policy.check_permission(name, container)) for name in PERMISSIONS}


PERMISSIONS = ["guillotina.AddContent", "guillotina.ManageAddons", "guillotina.DeleteContent"]


# Of what guillotina.contrib.catalog.pg imports.
@pytest.mark.filterwarnings("ignore:mypy_extensions.TypedDict:DeprecationWarning")
@pytest.mark.anyio
async def test_what_a_group_in_the_database_may_its_users_tasks_may(
    start_site: StartSite, database: Database
) -> None:
    site = await start_site(
        database,
        "a",
        applications=["guillotina.contrib.dbusers", "tests.bridge.task_site"],
        auth_user_identifiers=["guillotina.contrib.dbusers.users.DBUserIdentifier"],
    )
    group = {"@type": "Group", "id": "editors", "name": "editors"}
    user = {"@type": "User", "id": "bob", "username": "bob", "password": "bob"}
    for path, content in (
        ("@addons", {"id": "dbusers"}),
        ("groups", {**group, "user_roles": ["guillotina.Owner"]}),
        ("users", {**user, "user_groups": ["editors"]}),
    ):
        response = await site.request("POST", f"/db/a/{path}", json=content)
        assert response.status_code in (200, 201), response.text
    response = await site.request("POST", "/db/a/@scheduling", user="bob")
    assert response.status_code == 200, response.text
    scheduling = response.json()
    assert scheduling["seen"]["may_add"], "the test itself: it comes by the group"
    assert "guillotina.Owner" not in scheduling["seen"]["roles"]
    async with working() as tasks:
        may = await tasks.run(what_a_user_of_a_group_may, extra=scheduling["extra"])
    assert may["guillotina.AddContent"]
    assert not may["guillotina.ManageAddons"]


def test_a_users_own_permissions_and_those_of_his_groups() -> None:
    group = GuillotinaUser("g", roles={"guillotina.Editor": 1}, permissions={"my.Other": Allow})
    user = GuillotinaUser(
        "bob",
        groups=["g", "unknown"],
        permissions={"my.Perm": Allow, "guillotina.DeleteContent": Deny, "my.Unset": Unset},
        properties={"token": object()},  # nothing that a task is told
        groups_cache={"g": group},
    )
    data = json.loads(json.dumps(serialize_user(user)))
    again = restore_user(data)
    assert again is not None
    assert again.permissions == {"my.Perm": Allow, "guillotina.DeleteContent": Deny}
    assert again.properties == {}
    assert again._groups_cache["g"].roles == {"guillotina.Editor": Allow}
    assert again._groups_cache["g"].permissions == {"my.Other": Allow}
    assert list(again._groups_cache) == ["g"]


def test_a_group_gives_no_more_than_it_gave() -> None:
    """guillotina gives roles to any group that is called so."""
    group = GuillotinaUser("Managers", roles={"guillotina.Reader": 1})
    user = GuillotinaUser("bob", groups=["Managers"], groups_cache={"Managers": group})
    again = restore_user(serialize_user(user))
    assert again is not None
    assert again._groups_cache["Managers"].roles == {"guillotina.Reader": Allow}


def test_the_system_user() -> None:
    assert restore_user(json.loads(json.dumps(serialize_user(SystemUser)))) is SystemUser


def test_a_user_who_is_called_like_the_system_user() -> None:
    again = restore_user(serialize_user(GuillotinaUser(SystemUser.id)))
    assert again is not None
    assert again is not SystemUser
    assert (again.id, again.roles) == (SystemUser.id, {})


def test_what_a_user_has_is_no_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(app_settings, "amqp", {"secret_headers": ["Id", "X-Key"]})
    user = {"id": "bob", "headers": [["X-Key", "k3y"]], "Authorization": "t0ken"}
    assert without_credentials({"user": user}) == {"user": {"id": "bob", "headers": {}}}


@pytest.mark.parametrize(
    "query", ["ws_token=t0ken&q=1", "ws%5Ftoken=t0ken&q=1", "q=1&%77s_token=t0ken"]
)
def test_a_token_in_the_query_is_dropped_however_it_is_written(query: str) -> None:
    old = {"url": f"http://h/db?{query}", "headers": {"Cookie": "c"}, "user": {"cookie": "c"}}
    assert without_credentials(old) == {"url": "http://h/db?q=1", "headers": {}, "user": {}}
    assert make_request(None, old).query_string == "q=1"


def test_an_anonymous_user() -> None:
    assert isinstance(restore_user(serialize_user(AnonymousUser())), AnonymousUser)
