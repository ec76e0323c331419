"""guillotina in this process: its app on the test's event loop, and a browser for it.

::

    pytestmark = pytest.mark.anyio

    async def test_a_task(start_guillotina: StartGuillotina, database: Database) -> None:
        site = await start_guillotina(database, amqp={"queue": "shop"})
        await site.make_container("a")
        site.add_user("bob", roles=["guillotina.Reader"])
        response = await site.request("GET", "/db/a", user="bob")

At the end of the test each app is shut down, and must have left no asyncio task behind.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import warnings
import zlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextvars import Context
from pathlib import Path
from typing import Any, Protocol, TypeVar

import argon2
import httpx
import pytest

from ..conftest import ALL_LOOPS, REAL_CLOCKS
from ..servers.postgres import PostgresServer, postgres_server
from ..servers.rabbitmq import RabbitServer, rabbit_server
from ..servers.redis import RedisServer, redis_server

with warnings.catch_warnings():
    # What guillotina imports has been renamed since, in jsonschema and mypy_extensions.
    warnings.simplefilter("ignore", DeprecationWarning)
    import guillotina.catalog.catalog
    import guillotina.catalog.index
    import guillotina.commands

    # Before any contrib: what a contrib registers counts as guillotina's own in the apps that
    # do not name it, in the order of the imports, and its grants need these roles.
    import guillotina.permissions  # noqa: F401
    from guillotina import app_settings
    from guillotina.auth import validators
    from guillotina.component import globalregistry
    from guillotina.factory import make_app

    # guillotina's commands install uvloop for the whole process; the tests choose themselves.
    asyncio.set_event_loop_policy(None)

# root's password is hashed at each start, and checked again. As dear as it should be, that is
# a third of what these tests take.
validators.ph = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)

__all__ = [
    "Database",
    "Site",
    "StartGuillotina",
    "in_empty_context",
    "postgres_server",
    "rabbit_server",
    "redis_server",
]

R = TypeVar("R")

Database = dict[str, Any]
"""One entry of guillotina's setting `databases`."""

ROOT_PASSWORD = "open sesame"
EVENT_LOOPS = ("asyncio", "uvloop")
HERE = Path(__file__).parent


@pytest.fixture(params=EVENT_LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """guillotina knows asyncio only."""
    return REAL_CLOCKS[request.param]()


@pytest.fixture
def postgres_database(postgres_server: PostgresServer) -> Database:
    """An empty database in PostgreSQL."""
    return {
        "storage": "postgresql",
        "dsn": postgres_server.dsn(postgres_server.create_database()),
    }


@pytest.fixture(params=["DUMMY", "postgresql"])
def database(request: pytest.FixtureRequest) -> Database:
    """An empty database, once in memory and once in PostgreSQL."""
    if request.param == "DUMMY":
        return {"storage": "DUMMY"}
    found: Database = request.getfixturevalue("postgres_database")
    return found


@pytest.fixture
def server_settings(rabbit_server: RabbitServer, redis_server: RedisServer) -> dict[str, Any]:
    """Settings of a site with real servers: they are everybody's, the names the test's own.

    For ``start_guillotina(**server_settings)``, or for a configuration file.
    """
    name = f"test-{secrets.token_hex(4)}"
    return {
        "amqp": {
            "host": "127.0.0.1",
            "port": rabbit_server.port,
            "exchange": name,
            "queue": name,
            "persistent_manager": "redis",
        },
        "redis": {"host": "127.0.0.1", "port": redis_server.port},
        "redis_prefix_key": f"{name}-",
    }


async def in_empty_context(call: Coroutine[Any, Any, R]) -> R:
    """Await a coroutine in a task and a context of its own, as a server runs each request."""
    return await asyncio.create_task(call, context=Context())


class _EachInItsContext(httpx.AsyncBaseTransport):
    """httpx's own transport runs the app in the context of its caller, and would change it."""

    def __init__(self, app: Any) -> None:
        self._transport = httpx.ASGITransport(app=app)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await in_empty_context(self._transport.handle_async_request(request))


class Site:
    """guillotina's app, started.

    Attributes:
        app: guillotina's ASGI app.
        client: for requests of any kind; knows no user.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self.client = httpx.AsyncClient(
            transport=_EachInItsContext(app), base_url="http://testserver", timeout=None
        )

    @property
    def root(self) -> Any:
        """guillotina's application root: ``site.root["db"]`` is a database."""
        return self.app.root

    async def request(
        self,
        method: str,
        path: str,
        *,
        user: str | None = "root",
        headers: dict[str, str] | None = None,
        **options: Any,
    ) -> httpx.Response:
        """Ask as a user; as nobody if that is None. `options` are httpx's: json, params..."""
        sent = dict(headers or {})
        if user is not None:
            password = ROOT_PASSWORD if user == "root" else user
            login = base64.b64encode(f"{user}:{password}".encode()).decode()
            sent["Authorization"] = f"Basic {login}"
        return await self.client.request(method, path, headers=sent, **options)

    async def make_container(self, container_id: str, *, db: str = "db") -> None:
        """Make a container: ``/{db}/{container_id}``."""
        response = await self.request(
            "POST", f"/{db}", json={"@type": "Container", "id": container_id}
        )
        assert response.status_code == 200, response.text

    def add_user(
        self, user_id: str, *, roles: Sequence[str] = (), groups: Sequence[str] = ()
    ) -> None:
        """Make a user, whose password is the id, with roles everywhere."""
        app_settings["site_users"][user_id] = {
            "password": validators.hash_password(user_id, algorithm="sha512"),
            "roles": list(roles),
            "groups": list(groups),
        }

    async def share(self, path: str, principal: str, role: str, *, setting: str = "Allow") -> None:
        """Give somebody a role in an object, as POST @sharing does."""
        response = await self.request(
            "POST",
            f"{path}/@sharing",
            json={"prinrole": [{"principal": principal, "role": role, "setting": setting}]},
        )
        assert response.status_code == 200, response.text

    async def stop(self) -> None:
        """Shut it down. Once more does nothing."""
        await self.client.aclose()
        await in_empty_context(self.app.shutdown())


class StartGuillotina(Protocol):
    async def __call__(
        self,
        database: Database | None = None,
        *,
        amqp: dict[str, Any] | None = None,
        applications: Sequence[str] = (),
        **settings: Any,
    ) -> Site:
        """Start guillotina, with the applications `guillotina_bridge` and `tests.bridge.site`.

        Args:
            database: its database ``db``; one of the kind DUMMY, if None.
            amqp: the section of that name. If it is None, tasks are in memory and the
                worker is embedded.
            applications: more of them.
            settings: guillotina's, by name. Replaces what is set here.
        """


@pytest.fixture
async def start_guillotina(anyio_backend: object) -> AsyncIterator[StartGuillotina]:
    """Starts guillotina; at the end of the test it is shut down and leaves nothing behind."""
    sites: list[Site] = []
    before = asyncio.all_tasks()

    async def start(
        database: Database | None = None,
        *,
        amqp: dict[str, Any] | None = None,
        applications: Sequence[str] = (),
        **settings: Any,
    ) -> Site:
        globalregistry.reset()
        app = make_app(
            loop=asyncio.get_running_loop(),
            settings={
                "applications": ["guillotina_bridge", "tests.bridge.site", *applications],
                "databases": {"db": database or {"storage": "DUMMY"}},
                "root_user": {"password": ROOT_PASSWORD},
                "jwt": {"secret": secrets.token_hex(32)},
                "amqp": {"embedded_worker": True} if amqp is None else amqp,
                **settings,
            },
        )
        site = Site(app)
        sites.append(site)  # before: what has failed to start has begun to
        # In a context of its own: it sets guillotina's variables.
        await in_empty_context(app.startup())
        return site

    yield start
    for site in reversed(sites):
        await site.stop()
    await _nothing_is_left(before)


async def _nothing_is_left(before: set[asyncio.Task[Any]]) -> None:
    # Each step of a fixture is a task of the test runner's.
    runner = {task for task in asyncio.all_tasks() if "TestRunner" in repr(task.get_coro())}
    left = asyncio.all_tasks() - before - runner
    if left:
        # Those that are about to end; guillotina does not wait for its own.
        _, left = await asyncio.wait(left, timeout=5)
    assert not left, f"still there after the shutdown: {left}"


ON_BOTH = ("test_aio.py", "test_service.py", "test_over_tcp.py")
"""Whose tests are about the event loop itself, or the last word about the whole."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run each test on one event loop, unless ``AMQP_TASKS_ALL_LOOPS`` is set.

    Starting guillotina takes most of the time. With the storage DUMMY it is asyncio, with
    PostgreSQL uvloop, and where there is no choice of storages the name decides.
    """
    if ALL_LOOPS:
        return
    there = {(_without_loop(item), _loop_of(item)) for item in items}

    def runs_elsewhere(item: pytest.Item) -> bool:
        loop, name = _loop_of(item), _without_loop(item)
        chosen = _chosen_loop(item, name)
        return loop is not None and loop != chosen and (name, chosen) in there

    config.hook.pytest_deselected(items=[item for item in items if runs_elsewhere(item)])
    items[:] = [item for item in items if not runs_elsewhere(item)]


def _params(item: pytest.Item) -> dict[str, object]:
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None else dict(callspec.params)


def _loop_of(item: pytest.Item) -> str | None:
    """Return the event loop of a test of this folder that can run on either."""
    if item.path.parent != HERE or item.path.name in ON_BOTH:
        return None
    params = _params(item)
    loop = params.get("anyio_backend", params.get("loop"))
    return loop if isinstance(loop, str) and loop in EVENT_LOOPS else None


def _without_loop(item: pytest.Item) -> str:
    return item.nodeid.replace(_loop_of(item) or "", "", 1)


def _chosen_loop(item: pytest.Item, name: str) -> str:
    match _params(item).get("database"):
        case "DUMMY":
            return "asyncio"
        case "postgresql":
            return "uvloop"
        case _:
            return EVENT_LOOPS[zlib.crc32(name.encode()) % 2]
