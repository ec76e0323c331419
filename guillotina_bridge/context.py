"""A request, and who asks, as JSON and back: what a task sees of who scheduled it.

The shape is that of guillotina_amqp's messages. Credentials are never written into it, and
are dropped from messages that have them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote, unquote, unquote_plus

from guillotina import app_settings, task_vars
from guillotina.auth.groups import GuillotinaGroup
from guillotina.auth.users import (
    ANONYMOUS_USER_ID,
    ROOT_USER_ID,
    AnonymousUser,
    GuillotinaUser,
    SystemUser,
)
from guillotina.auth.utils import set_authenticated_user
from guillotina.component import get_utility
from guillotina.interfaces import (
    ACTIVE_LAYERS_KEY,
    Allow,
    AllowSingle,
    Deny,
    IApplication,
    IContainer,
    IDatabase,
    IPrincipal,
    Unset,
)
from guillotina.request import Request
from guillotina.utils import get_authenticated_user, get_object_url, get_registry, import_class
from pydantic_core import PydanticSerializationError, to_jsonable_python
from zope.interface import alsoProvides

from amqp_tasks import ArgumentsError

from .exceptions import ContainerNotFound
from .settings import SECRET_HEADERS, secret_headers

__all__ = [
    "clear_task_vars",
    "enter_container",
    "enter_request",
    "find_database",
    "make_request",
    "public_extra",
    "request_data",
    "restore_user",
    "serialize_request",
    "serialize_user",
    "without_credentials",
]

log = logging.getLogger(__name__)

SECRET_PARAMETER: Final = "ws_token"  # noqa: S105  the name of guillotina's, in a query
IN_PATHS: Final = "/:@!$&'()*+,;="
IN_HOSTS: Final = ":[]"
"""What they may contain beside letters and digits (RFC 3986, 3.2 and 3.3)."""

_SETTINGS: Final = {setting.get_name(): setting for setting in (Allow, AllowSingle, Deny)}
"""What a role or a permission can be set to, by names that JSON has."""

TASK_VARS: Final = (
    *("request", "authenticated_user", "security_policies", "futures"),
    *("db", "tm", "txn", "container", "registry"),
)


# ------------------------------------------------------------------------ writing


def request_data(request: Request) -> dict[str, Any]:
    """Return all that a message says about the request that schedules a task.

    Raises:
        ArgumentsError: its annotations, or its user's data, cannot be written as JSON.
    """
    data = serialize_request(request)
    user = get_authenticated_user()
    if user is not None:
        data["user"] = serialize_user(user)
    container = task_vars.container.get()
    if container is not None:
        data["container_url"] = get_object_url(container, request)
    return data


def serialize_request(request: Request) -> dict[str, Any]:
    """Return a request as JSON values, without its body and without credentials.

    Raises:
        ArgumentsError: its annotations cannot be written as JSON.
    """
    # guillotina's own `url` quotes nothing, and cannot be taken apart again.
    host = quote(request.host or "", safe=IN_HOSTS)
    url = f"{request.scheme}://{host}{quote(request.path, safe=IN_PATHS)}"
    annotations = getattr(request, "annotations", None) or {}
    data = {
        "url": f"{url}?{request.query_string}",
        "method": request.method,
        "headers": {
            str(name): values[0] if len(values) == 1 else values
            for name in dict.fromkeys(request.headers)
            if (values := request.headers.getall(name))
        },
        "annotations": _as_json(annotations, "the request's annotations"),
    }
    return without_credentials(data)


def serialize_user(user: IPrincipal) -> dict[str, Any]:
    """Return a user as JSON values: id, roles, groups and `data`, and whatever else decides
    what he may do: permissions of his own, and what the groups give that came with him.

    Raises:
        ArgumentsError: its data cannot be written as JSON.
    """
    known = getattr(user, "_groups_cache", None) or {}
    more = {
        # Not by its id, which anybody might have been given.
        "is_system": user is SystemUser or isinstance(user, SystemUser),
        "permissions": _settings_of(user, "permissions"),
        "group_grants": {
            name: {key: _settings_of(group, key) for key in ("roles", "permissions")}
            for name, group in known.items()
        },
    }
    return {
        "id": user.id,
        "roles": [
            name
            for name, setting in _settings_of(user, "roles").items()
            if _SETTINGS.get(setting, Deny) is not Deny
        ],
        "groups": list(getattr(user, "groups", None) or ()),
        "data": _as_json(getattr(user, "data", None) or {}, "the user's data"),
        **{key: value for key, value in more.items() if value},
    }


def _settings_of(principal: IPrincipal, name: str) -> dict[str, str]:
    """Return roles or permissions with the names of their settings; without those unset."""
    settings = getattr(principal, name, None) or {}
    # A setting is an object or, just as well, 1 or 0.
    return {
        key: (setting if hasattr(setting, "get_name") else Allow if setting else Deny).get_name()
        for key, setting in settings.items()
        if setting not in (None, Unset)
    }


def _as_json(value: Any, name: str) -> Any:
    try:
        return to_jsonable_python(value)
    except PydanticSerializationError as error:
        raise ArgumentsError(f"{name}={value!r:.200}: must be values that JSON has") from error


# ------------------------------------------------------------------------ reading


def public_extra(extra: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a message has beside the call, without credentials."""
    request = extra.get("req_data")
    if not isinstance(request, Mapping):
        return extra
    return {**extra, "req_data": without_credentials(request)}


def without_credentials(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a message says about a request without the credentials in it, if any.

    guillotina_amqp wrote them down, twice.
    """
    clean = {**data, **_public_headers(data)}
    if isinstance(url := data.get("url"), str):
        path, _, query = url.partition("?")
        query = _public_query(query)
        clean["url"] = f"{path}?{query}" if query else path
    if isinstance(user := data.get("user"), Mapping):
        clean["user"] = {
            **{key: value for key, value in user.items() if key.lower() not in SECRET_HEADERS},
            **_public_headers(user),
        }
    return clean


def _public_headers(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headers without those that are secret; none, if they are no mapping."""
    if "headers" not in data:
        return {}
    headers, secret = data["headers"], secret_headers(app_settings)
    if not isinstance(headers, Mapping):
        return {"headers": {}}
    return {"headers": {name: headers[name] for name in headers if name.lower() not in secret}}


def _public_query(query: str) -> str:
    parts = query.split("&")
    return "&".join(
        part for part in parts if unquote_plus(part.partition("=")[0]) != SECRET_PARAMETER
    )


def make_request(base_request: Request | None, serialized: Mapping[str, Any]) -> Request:
    """Return the request that `serialize_request` was given; its body is empty.

    Args:
        base_request: a request whose class and items the new one gets; None for guillotina's
            class, and no items.
    """
    serialized = without_credentials(serialized)
    scheme, host, path, query = _split(serialized.get("url") or "/")
    headers = list(_headers(serialized, host))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": serialized.get("method") or "POST",
        "scheme": scheme,
        "path": path,
        "raw_path": quote(path, safe=IN_PATHS).encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": headers,
        "client": None,
        "server": None,
    }
    kind = Request if base_request is None else type(base_request)
    request = kind.factory(scope, None, _no_body)
    if base_request is not None:
        for key in base_request:
            request[key] = base_request[key]
    request.annotations = dict(serialized.get("annotations") or {})
    return request


async def _no_body() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


def _split(url: str) -> tuple[str, str, str, str]:
    """Return scheme, host, path and query. Takes what a strict parser refuses: it was served."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "http", url
    rest, _, query = rest.partition("?")
    host, slash, path = rest.partition("/")
    return scheme, unquote(host), slash + unquote(path) or "/", query


def _headers(serialized: Mapping[str, Any], host: str) -> Iterator[tuple[bytes, bytes]]:
    user = serialized.get("user") or {}
    # guillotina_amqp writes them down twice, and the second ones win.
    headers = {**(serialized.get("headers") or {}), **(user.get("headers") or {})}
    names = {name.lower() for name in headers}
    if "host" not in names and host:
        yield b"host", host.encode()
    for name, value in headers.items():
        for one in value if isinstance(value, list) else [value]:
            yield name.encode(), str(one).encode()


def restore_user(data: Mapping[str, Any] | None) -> IPrincipal | None:
    """Return the user that `serialize_user` was given; None if there was none."""
    if not data or "id" not in data:
        return None
    if data["id"] == ROOT_USER_ID:
        return get_utility(IApplication, name="root").root_user
    if data["id"] == ANONYMOUS_USER_ID:
        return AnonymousUser()
    if data.get("is_system") is True:
        return SystemUser  # guillotina's security policy knows it by the class
    user = GuillotinaUser(
        data["id"],
        groups=list(data.get("groups") or ()),
        roles=dict.fromkeys(data.get("roles") or (), Allow),
        permissions=_settings(data.get("permissions")),
        groups_cache={
            name: _restore_group(name, grants)
            for name, grants in (data.get("group_grants") or {}).items()
        },
    )
    user.data = dict(data.get("data") or {})
    return user


def _restore_group(name: str, grants: Mapping[str, Any]) -> GuillotinaGroup:
    group = GuillotinaGroup(name)
    group.roles.clear()  # guillotina gives some to a group of a certain name
    group.permissions.clear()
    group.roles.update(_settings(grants.get("roles")))
    group.permissions.update(_settings(grants.get("permissions")))
    return group


def _settings(named: Mapping[str, str] | None) -> dict[str, Any]:
    return {key: _SETTINGS[name] for key, name in (named or {}).items() if name in _SETTINGS}


# ------------------------------------------------------------------------ entering


def clear_task_vars() -> None:
    """Set all of guillotina's variables to what they are before a request.

    Those that hold collections get empty ones: guillotina makes them when it needs them
    first, and if that is in a child task, its parent never sees them.
    """
    for name in TASK_VARS:
        getattr(task_vars, name).set(None)
    task_vars.futures.set({})
    task_vars.security_policies.set({})


def enter_request(serialized: Mapping[str, Any]) -> Request:
    """Make a request of a message, and its user, the current ones."""
    request = make_request(None, serialized)
    request.application = get_utility(IApplication, name="root")
    task_vars.request.set(request)
    # Before a transaction is begun, which notes down who it is for.
    set_authenticated_user(restore_user(serialized.get("user")))
    return request


async def find_database(db_id: str) -> IDatabase:
    """Return a database.

    Raises:
        ContainerNotFound: there is no such database (any more).
    """
    db = await get_utility(IApplication, name="root").async_get(db_id)
    if not IDatabase.providedBy(db):
        raise ContainerNotFound(f"there is no database {db_id!r}")
    return db


async def enter_container(container_id: str, request: Request) -> IContainer:
    """Make a container of the current database the current one, with its registry and layers.

    Raises:
        ContainerNotFound: there is no such container (any more).
    """
    db, tm = task_vars.db.get(), task_vars.tm.get()
    root = await tm.get_root()
    container = await root.async_get(container_id, suppress_events=True)
    if not IContainer.providedBy(container):
        raise ContainerNotFound(f"there is no container {container_id!r} in database {db.id!r}")
    task_vars.container.set(container)
    registry = await get_registry(container) or {}
    for layer in registry.get(ACTIVE_LAYERS_KEY, ()):
        try:
            alsoProvides(request, import_class(layer))
        except ModuleNotFoundError:
            # As guillotina: the rest of the container works without an addon that has gone.
            log.error("container %r: its layer %s cannot be imported", container_id, layer)
    return container
