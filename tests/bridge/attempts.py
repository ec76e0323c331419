"""Attempts in guillotina and nothing around them: a worker in memory, and messages by hand."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Protocol

import pytest
from guillotina.component import globalregistry
from guillotina.factory import make_app

from amqp_tasks import RetryPolicy, Task, TaskApp, TaskHandle
from guillotina_bridge.context import public_extra
from guillotina_bridge.job import run_attempt

from .conftest import ROOT_PASSWORD, Database, Site, in_empty_context

__all__ = ["StartSite", "Tasks", "message", "start_site", "working"]


def message(container: str | None = "a", *, user: str = "bob", **extra: Any) -> dict[str, Any]:
    """Return what a message says beside the call: here by `user`, who may do everything there."""
    return {
        "db_id": "db",
        "container_id": container,
        "req_data": {
            "url": f"http://testserver/db/{container}/@something",
            "method": "POST",
            "headers": {"Host": "testserver"},
            "annotations": {},
            "user": {"id": user, "roles": ["guillotina.Member", "guillotina.Owner"]},
        },
        **extra,
    }


class Tasks:
    """Queues functions of modules as tasks."""

    def __init__(self, app: TaskApp) -> None:
        self.app = app
        self._tasks: dict[Callable[..., Any], Task[..., Any]] = {}

    async def __call__(
        self,
        func: Callable[..., Any],
        *args: Any,
        extra: dict[str, Any] | None = None,
        retries: int = 0,
        **kwargs: Any,
    ) -> TaskHandle[Any]:
        """Queue a call. It is retried at once, if at all."""
        if func not in self._tasks:
            define = self.app.task(retry=RetryPolicy(max_retries=retries, delay=0.01))
            self._tasks[func] = define(func)
        task = self._tasks[func].options(extra=message() if extra is None else extra)
        return await task(*args, **kwargs)

    async def run(self, func: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Queue a call, and return its result."""
        return await (await self(func, *args, **options)).result(timeout=30)


@asynccontextmanager
async def working(**settings: Any) -> AsyncIterator[Tasks]:
    """Run a worker in memory that knows guillotina by the middleware alone."""
    defaults: dict[str, Any] = {
        "broker_url": "memory://",
        "state_url": "memory://",
        "middleware": [run_attempt],
        "filter_extra": public_extra,
    }
    app = TaskApp(**{**defaults, **settings})
    async with app.worker():
        yield Tasks(app)


class StartSite(Protocol):
    async def __call__(self, database: Database, *containers: str, **settings: Any) -> Site:
        """Start guillotina, without the bridge, and make containers."""


@pytest.fixture
async def start_site(anyio_backend: object) -> AsyncIterator[StartSite]:
    async with AsyncExitStack() as sites:

        async def start(database: Database, *containers: str, **settings: Any) -> Site:
            globalregistry.reset()
            app = make_app(
                loop=asyncio.get_running_loop(),
                settings={
                    "applications": ["tests.bridge.task_site"],
                    "databases": {"db": database},
                    "root_user": {"password": ROOT_PASSWORD},
                    "jwt": {"secret": secrets.token_hex(32)},
                    **settings,
                },
            )
            await in_empty_context(app.startup())
            site = Site(app)
            sites.push_async_callback(site.stop)
            for container in containers:
                await site.make_container(container)
            return site

        yield start
