"""What is stored of a task that is cancelled, collides, or loses its database."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
import asyncpg
import pytest
from guillotina import task_vars
from guillotina.content import create_content_in_container
from guillotina.exceptions import ConflictError
from guillotina.transactions import abort, commit, get_tm, get_transaction, transaction
from guillotina.utils import execute, get_current_container, get_current_request

from amqp_tasks import Attempt, Task, TaskHandle, TaskStatus, current_attempt
from guillotina_bridge import transaction as bridge_transaction
from guillotina_bridge.service import get_service

from ..servers.postgres import PostgresServer
from .attempts import StartSite, message, start_site, working
from .conftest import Database, Site, StartGuillotina

__all__ = ["start_site"]

pytestmark = pytest.mark.anyio

notes: list[Any] = []
"""What the tasks of a test have noted down."""


class Stage:
    """Where a task waits for its test, which steps in."""

    attempt: Attempt
    task: asyncio.Task[Any]
    reached: asyncio.Event
    go_on: asyncio.Event


@pytest.fixture(autouse=True)
def _nothing_noted() -> Iterator[None]:
    Stage.reached, Stage.go_on = asyncio.Event(), asyncio.Event()
    yield
    notes.clear()


def note(what: Any) -> None:
    notes.append(what)


def enter_stage() -> None:
    task = asyncio.current_task()
    assert task is not None
    Stage.attempt, Stage.task = current_attempt(), task


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge_transaction, "PATIENCE", 0.1)


async def wait_on_stage(*_: Any) -> None:
    Stage.reached.set()
    await Stage.go_on.wait()


async def create_item(item_id: str) -> Any:
    return await create_content_in_container(get_current_container(), "Item", item_id)


async def take_connection() -> None:
    """Have the transaction hold a connection, as a search in the catalog of PostgreSQL does."""
    await get_transaction().get_connection()


async def titles(site: Site) -> dict[str, str | None]:
    """The items of container ``a`` and their titles."""
    found = {}
    for item_id in (await site.request("GET", "/db/a/@ids")).json():
        response = await site.request("GET", f"/db/a/{item_id}")
        found[item_id] = response.json()["title"]
    return found


async def make_items(site: Site, *item_ids: str, title: str = "0") -> None:
    for item_id in item_ids:
        body = {"@type": "Item", "id": item_id, "title": title}
        response = await site.request("POST", "/db/a", json=body)
        assert response.status_code == 201, response.text


def connections_in_use(site: Site) -> int:
    pool = getattr(site.root["db"].storage, "pool", None)
    return 0 if pool is None else pool.get_size() - pool.get_idle_size()


def as_a_user(handle: TaskHandle[Any]) -> Awaitable[Any]:
    return handle.cancel()


async def natively(handle: TaskHandle[Any]) -> None:
    Stage.task.cancel()


CANCELS = [as_a_user, natively]
Cancel = Callable[[TaskHandle[Any]], Awaitable[Any]]


def status_after(cancel: Cancel) -> TaskStatus:
    """A cancellation that nobody of ours has asked for is an error."""
    return TaskStatus.CANCELED if cancel is as_a_user else TaskStatus.ERRORED


async def cancel_on_stage(handle: TaskHandle[Any], cancel: Cancel) -> None:
    """Cancel a task that waits on the stage, and return when it has been told."""
    await Stage.reached.wait()
    await cancel(handle)
    if cancel is as_a_user:
        while Stage.attempt.cancel_reason is None:
            await asyncio.sleep(0.001)
    else:
        await asyncio.sleep(0)
        await cancel(handle)  # whoever does so once, does so again


# ------------------------------------------------------------------ cancelled


async def write_and_wait() -> None:
    enter_stage()
    await create_item("item")
    await take_connection()
    await get_transaction().initialize_tid()
    await wait_on_stage()


@pytest.mark.parametrize("cancel", CANCELS)
async def test_cancelled_in_user_code(
    start_site: StartSite, database: Database, cancel: Cancel
) -> None:
    site = await start_site(database, "a")
    async with working() as tasks:
        handle = await tasks(write_and_wait)
        await cancel_on_stage(handle, cancel)
        assert await handle.join(timeout=30) == status_after(cancel)
        assert connections_in_use(site) == 0
    assert await titles(site) == {}


async def query() -> None:
    enter_stage()
    await create_item("item")
    connection = await get_transaction().get_connection()
    Stage.reached.set()
    await connection.fetch("SELECT pg_sleep(60)")


@pytest.mark.parametrize("cancel", CANCELS)
async def test_cancelled_in_a_query(
    start_site: StartSite, postgres_database: Database, cancel: Cancel
) -> None:
    site = await start_site(postgres_database, "a")
    async with working() as tasks:
        handle = await tasks(query)
        await cancel_on_stage(handle, cancel)
        await handle.join(timeout=30)
        assert connections_in_use(site) == 0
    assert await titles(site) == {}


async def write_and_commit(phase: str, outcome: str = "") -> str:
    enter_stage()
    note("begun")
    await create_item("item")
    txn = get_transaction()
    if phase == "before":
        txn.add_before_commit_hook(wait_on_stage)
        if outcome == "conflict":
            txn.add_before_commit_hook(collide)
    else:
        txn.add_after_commit_hook(wait_on_stage)
        if outcome == "cancelled":
            txn.add_after_commit_hook(cancel_itself)
    txn.add_after_commit_hook(after_commit)
    execute.after_request(note, "future")
    return "done"


def after_commit(status: bool) -> None:
    note("after")


def collide() -> None:
    raise ConflictError("on purpose")


def cancel_itself() -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize("cancel", CANCELS)
@pytest.mark.parametrize("phase", ["before", "after"])
async def test_cancelled_during_the_commit(
    start_site: StartSite, database: Database, cancel: Cancel, phase: str
) -> None:
    site = await start_site(database, "a")
    async with working() as tasks:
        handle = await tasks(write_and_commit, phase)
        await cancel_on_stage(handle, cancel)
        Stage.go_on.set()
        assert await handle.join(timeout=30) == TaskStatus.FINISHED
        assert await handle.result() == "done"
        assert notes == ["begun", "after", "future"]
        assert Stage.task.cancelling() == 0
        assert connections_in_use(site) == 0
    assert "item" in await titles(site)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("cancel", CANCELS)
@pytest.mark.parametrize("phase", ["before", "after"])
async def test_cancelled_in_a_hook_that_does_not_end(
    start_site: StartSite,
    database: Database,
    phase: str,
    cancel: Cancel,
) -> None:
    site = await start_site(database, "a")
    async with working() as tasks:
        handle = await tasks(write_and_commit, phase)
        await cancel_on_stage(handle, cancel)
        status = await handle.join(timeout=30)
        assert connections_in_use(site) == 0
    if phase == "after":  # and so it was stored already
        assert status == TaskStatus.FINISHED
        assert "item" in await titles(site)
    else:
        assert status == status_after(cancel)
        assert "item" not in await titles(site)


async def write_and_hang_in_the_cache() -> str:
    """The cache comes between COMMIT and the status that says so."""
    enter_stage()
    await create_item("item")
    get_transaction()._cache.close = wait_on_stage
    return "done"


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("cancel", CANCELS)
async def test_cancelled_when_it_is_stored_and_nobody_says_so(
    start_site: StartSite, database: Database, cancel: Cancel
) -> None:
    site = await start_site(database, "a")
    async with working() as tasks:
        handle = await tasks(write_and_hang_in_the_cache)
        await cancel_on_stage(handle, cancel)
        assert await handle.join(timeout=30) == TaskStatus.FINISHED
        assert connections_in_use(site) == 0
    assert "item" in await titles(site)


async def heed_nothing() -> None:
    Stage.reached.set()
    while not Stage.go_on.is_set():
        with contextlib.suppress(asyncio.CancelledError):
            await Stage.go_on.wait()
    note("gone on")


async def write_and_heed_nothing() -> None:
    enter_stage()
    await create_item("item")
    get_transaction().add_before_commit_hook(heed_nothing)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("cancel", CANCELS)
async def test_cancelled_in_a_hook_that_goes_on_all_the_same(
    start_site: StartSite, database: Database, cancel: Cancel
) -> None:
    site = await start_site(database, "a")
    async with working() as tasks:
        handle = await tasks(write_and_heed_nothing)
        await cancel_on_stage(handle, cancel)
        assert await handle.join(timeout=30) == status_after(cancel)
        Stage.go_on.set()
        while "gone on" not in notes:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # for what comes after the hook, if anything did
        assert connections_in_use(site) == 0
    assert "item" not in await titles(site)


async def set_title(item_id: str, title: str) -> str:
    enter_stage()
    item = await get_current_container().async_get(item_id)
    item.title = title
    item.register()
    note("begun")
    Stage.reached.set()
    return title


@asynccontextmanager
async def locked(server: PostgresServer, name: str) -> AsyncIterator[None]:
    """Let nobody write to an object of a database that exists."""
    connection = await asyncpg.connect(
        host="127.0.0.1", port=server.port, user="postgres", database=name
    )
    try:
        async with connection.transaction():
            await connection.execute("SELECT * FROM objects FOR UPDATE")
            yield
    finally:
        await connection.close()


async def wait_for_locks(server: PostgresServer, name: str, count: int) -> None:
    """Return when so many connections to a database wait for a lock."""
    sql = (
        "SELECT count(*) FROM pg_stat_activity"
        f" WHERE wait_event_type = 'Lock' AND datname = '{name}'"
    )
    with anyio.fail_after(30):
        while int((await anyio.to_thread.run_sync(server.execute, sql))[0][0]) < count:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("cancel", CANCELS)
async def test_cancelled_while_the_database_writes(
    start_site: StartSite,
    postgres_server: PostgresServer,
    postgres_database: Database,
    cancel: Cancel,
) -> None:
    name = postgres_database["dsn"]["dbname"]
    site = await start_site(postgres_database, "a")
    await make_items(site, "item")
    async with working() as tasks:
        async with locked(postgres_server, name):
            handle = await tasks(set_title, "item", "new")
            await wait_for_locks(postgres_server, name, 1)
            await cancel_on_stage(handle, cancel)
        assert await handle.result(timeout=30) == "new"
    assert await titles(site) == {"item": "new"}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("cancel", CANCELS)
async def test_cancelled_during_a_commit_that_does_not_end(
    start_site: StartSite,
    postgres_server: PostgresServer,
    postgres_database: Database,
    cancel: Cancel,
) -> None:
    name = postgres_database["dsn"]["dbname"]
    site = await start_site(postgres_database, "a")
    await make_items(site, "item")
    async with working() as tasks, locked(postgres_server, name):
        handle = await tasks(set_title, "item", "new")
        await wait_for_locks(postgres_server, name, 1)
        await cancel_on_stage(handle, cancel)
        assert await handle.join(timeout=30) == status_after(cancel)
        assert connections_in_use(site) == 0
    assert await titles(site) == {"item": "0"}


@pytest.mark.parametrize("cancel", CANCELS)
async def test_cancelled_during_a_commit_that_fails(
    start_site: StartSite, database: Database, cancel: Cancel
) -> None:
    site = await start_site(database, "a")
    async with working() as tasks:
        handle = await tasks(write_and_commit, "before", "conflict")
        await cancel_on_stage(handle, cancel)
        Stage.go_on.set()
        assert await handle.join(timeout=30) == status_after(cancel)
        assert notes == ["begun"], "it was tried again"
        assert connections_in_use(site) == 0
    assert await titles(site) == {}


async def test_what_is_committed_has_happened(
    start_site: StartSite, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    site = await start_site(database, "a")
    async with working() as tasks:
        handle = await tasks(write_and_commit, "after", "cancelled")
        Stage.go_on.set()
        assert await handle.result(timeout=30) == "done"
    assert "item" in await titles(site)
    assert "what came then failed" in caplog.text


async def with_a_slow_future() -> str:
    enter_stage()
    await create_item("item")
    execute.after_request(wait_on_stage)
    execute.after_request(note, "future")
    get_current_request().add_future("made already", wait_on_stage())
    return "done"


@pytest.mark.parametrize("cancel", CANCELS)
@pytest.mark.parametrize("ends", [True, False])
async def test_cancelled_in_a_future(
    start_site: StartSite,
    database: Database,
    cancel: Cancel,
    ends: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site = await start_site(database, "a")
    if not ends:
        monkeypatch.setattr(bridge_transaction, "PATIENCE", 0.1)
    async with working() as tasks:
        handle = await tasks(with_a_slow_future)
        await cancel_on_stage(handle, cancel)
        if ends:
            Stage.go_on.set()
        assert await handle.result(timeout=10) == "done"
    assert notes == ["future"] * ends
    assert "item" in await titles(site)


# ------------------------------------------------------------------ many at a time


class Crowd:
    all_there: asyncio.Barrier
    tries: int


async def increment(item_id: str) -> int:
    item = await get_current_container().async_get(item_id)
    Crowd.tries += 1
    if Crowd.tries <= Crowd.all_there.parties:
        await Crowd.all_there.wait()
    item.title = str(int(item.title) + 1)
    item.register()
    return int(item.title)


async def test_four_that_increment_at_a_time(
    start_site: StartSite, postgres_database: Database
) -> None:
    site = await start_site(postgres_database, "a")
    await make_items(site, "counter")
    Crowd.all_there, Crowd.tries = asyncio.Barrier(4), 0
    async with working() as tasks:
        handles = [await tasks(increment, "counter") for _ in range(4)]
        assert sorted([await one.result(timeout=30) for one in handles]) == [1, 2, 3, 4]
        assert [(await one.state()).attempt for one in handles] == [1] * 4
    assert Crowd.tries > 4
    assert await titles(site) == {"counter": "4"}


async def change(item_id: str) -> None:
    item = await get_current_container().async_get(item_id)
    item.title = "changed"
    item.register()


async def search_and_change(item_id: str) -> None:
    await take_connection()
    Crowd.tries += 1
    if Crowd.tries == 13:
        Stage.go_on.set()
    with anyio.move_on_after(0.5):
        await Stage.go_on.wait()
    await change(item_id)


@pytest.fixture
async def forty(start_site: StartSite, postgres_database: Database) -> AsyncIterator[list[str]]:
    """The ids of so many items, which all must have been changed in the end."""
    site = await start_site(postgres_database, "a")
    assert site.root["db"].storage.pool.get_max_size() == 13
    Crowd.tries = 0
    items = [f"item-{number}" for number in range(40)]
    await make_items(site, *items)
    yield items
    assert connections_in_use(site) == 0
    assert await titles(site) == dict.fromkeys(items, "changed")


async def test_forty_searches_with_a_pool_of_thirteen(forty: list[str]) -> None:
    async with working(max_running_tasks=40) as tasks:
        handles = [await tasks(search_and_change, item_id) for item_id in forty]
        with anyio.fail_after(15):
            for handle in handles:
                await handle.result()


async def change_within(item_id: str) -> None:
    async with transaction(db=task_vars.db.get()):
        await change(item_id)


@pytest.mark.parametrize("task", [change, change_within])
async def test_forty_commits_with_a_pool_of_thirteen(
    forty: list[str],
    postgres_server: PostgresServer,
    postgres_database: Database,
    task: Callable[..., Any],
) -> None:
    name = postgres_database["dsn"]["dbname"]
    async with working(max_running_tasks=40) as tasks:
        async with locked(postgres_server, name):
            handles = [await tasks(task, item_id) for item_id in forty]
            await wait_for_locks(postgres_server, name, 12)
            # There would be one more by now.
            await asyncio.sleep(0.3)
        with anyio.fail_after(15):
            for handle in handles:
                await handle.result()


async def meet() -> None:
    await Crowd.all_there.wait()


async def test_tasks_without_a_connection_are_in_nobodys_way(
    start_site: StartSite, postgres_database: Database
) -> None:
    await start_site({**postgres_database, "pool_size": "2"}, "a")
    Crowd.all_there = asyncio.Barrier(20)
    async with working(max_running_tasks=20) as tasks:
        handles = [await tasks(meet) for _ in range(20)]
        for handle in handles:
            await handle.result(timeout=10)


async def stay_with_a_connection() -> None:
    await take_connection()
    Stage.reached.set()
    await Stage.go_on.wait()


async def write_when_others_stay() -> None:
    enter_stage()
    await create_item("item")
    get_transaction().add_before_commit_hook(note, "committing")
    note("returning")


@pytest.mark.parametrize("cancel", CANCELS)
async def test_cancelled_while_it_waits_for_a_connection(
    start_site: StartSite, postgres_database: Database, cancel: Cancel
) -> None:
    site = await start_site({**postgres_database, "pool_size": 2}, "a")
    async with working() as tasks:
        staying = await tasks(stay_with_a_connection)
        await Stage.reached.wait()
        handle = await tasks(write_when_others_stay)
        with anyio.fail_after(10):
            while not notes:
                await asyncio.sleep(0.001)
        await cancel_on_stage(handle, cancel)
        assert await handle.join(timeout=10) == status_after(cancel)
        Stage.go_on.set()
        await staying.result(timeout=10)
        assert connections_in_use(site) == 0
    assert notes == ["returning"]
    assert await titles(site) == {}


async def search_at_once() -> None:
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(search_in_a_transaction)


async def search_in_a_transaction() -> None:
    async with transaction():
        await take_connection()
        note("inside")
        await asyncio.sleep(0.01)
        note("outside")


async def test_a_task_takes_one_place_with_all_its_connections(
    start_site: StartSite, postgres_database: Database
) -> None:
    site = await start_site({**postgres_database, "pool_size": 5}, "a")
    async with working() as tasks:
        handles = [await tasks(search_at_once) for _ in range(4)]
        for handle in handles:
            await handle.result(timeout=10)
        assert connections_in_use(site) == 0
    assert len(notes) == 4 * 3 * 2


async def search_and_stay() -> None:
    await take_connection()
    Crowd.tries += 1
    await Stage.go_on.wait()


async def test_half_of_the_connections_are_for_requests(
    start_guillotina: StartGuillotina, postgres_database: Database
) -> None:
    amqp = {"embedded_worker": True, "serve": __name__, "max_running_tasks": 20}
    site = await start_guillotina(postgres_database, amqp=amqp)
    await site.make_container("a")
    Crowd.tries = 0
    task: Task[[], None] = Task(search_and_stay, get_service().app)
    handles = [await task.options(extra=message())() for _ in range(20)]
    with anyio.fail_after(30):
        while Crowd.tries < 6:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # there would be one more by now
        assert Crowd.tries == connections_in_use(site) == 6
        Stage.go_on.set()
        for handle in handles:
            await handle.result()


# ------------------------------------------------------------------ a database that goes away


async def query_once() -> int:
    number = current_attempt().number
    await create_item(f"item-{number}")
    connection = await get_transaction().get_connection()
    if number == 1:
        Stage.reached.set()
        await connection.fetch("SELECT pg_sleep(60)")
    return number


async def test_a_lost_connection(
    start_site: StartSite, postgres_server: PostgresServer, postgres_database: Database
) -> None:
    name = postgres_database["dsn"]["dbname"]
    site = await start_site(postgres_database, "a")
    async with working() as tasks:
        handle = await tasks(query_once, retries=1)
        await Stage.reached.wait()
        assert await anyio.to_thread.run_sync(postgres_server.terminate_connections, name)
        assert await handle.result(timeout=30) == 2
        assert connections_in_use(site) == 0
    assert set(await titles(site)) == {"item-2"}


async def lose_connection() -> int:
    number = current_attempt().number
    await create_item(f"item-{number}")
    if number == 1:
        get_transaction().add_before_commit_hook(wait_on_stage)
    await take_connection()
    return number


async def test_a_connection_that_is_lost_before_the_commit(
    start_site: StartSite, postgres_server: PostgresServer, postgres_database: Database
) -> None:
    name = postgres_database["dsn"]["dbname"]
    site = await start_site(postgres_database, "a")
    async with working() as tasks:
        handle = await tasks(lose_connection, retries=1)
        await Stage.reached.wait()
        await anyio.to_thread.run_sync(postgres_server.terminate_connections, name)
        Stage.go_on.set()
        number = await handle.result(timeout=30)
        assert connections_in_use(site) == 0
    assert set(await titles(site)) == {f"item-{number}"}


async def begin_to_write() -> None:
    await create_item("item")
    await take_connection()
    await get_transaction().storage.start_transaction(get_transaction())
    await wait_on_stage()


@pytest.mark.parametrize("task", [query, begin_to_write])
async def test_a_database_that_hangs(
    start_site: StartSite,
    postgres_server: PostgresServer,
    postgres_database: Database,
    task: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site = await start_site(postgres_database, "a")
    monkeypatch.setattr(bridge_transaction, "PATIENCE", 0.2)
    async with working() as tasks:
        handle = await tasks(task)
        await Stage.reached.wait()
        postgres_server.pause()
        try:
            await handle.cancel()
            assert await handle.join(timeout=30) == TaskStatus.CANCELED
            assert connections_in_use(site) == 0
        finally:
            postgres_server.resume()
    assert await titles(site) == {}


# ------------------------------------------------------------------ tasks that commit by themselves


async def in_two_steps(how: str) -> None:
    await create_item("first")
    await take_connection()
    if how == "forget":
        await get_tm().begin()
        await create_item("second")
        return
    await commit()
    if how == "search":
        await take_connection()
        return
    if how == "begin":
        await get_tm().begin()
        await create_item("second")
    if how == "nested":
        async with transaction():
            await create_item("second")
    if how == "abort":
        await get_tm().begin()
        await create_item("second")
        await abort()
    if how == "raise":
        await get_tm().begin()
        await create_item("second")
        raise RuntimeError("as it must")


@pytest.mark.parametrize(
    ("how", "stored"),
    [
        ("begin", {"first", "second"}),
        ("nested", {"first", "second"}),
        ("search", {"first"}),
        ("forget", {"second"}),
        ("abort", {"first"}),
        ("raise", {"first"}),
    ],
)
async def test_a_task_that_commits_by_itself(
    start_site: StartSite, database: Database, how: str, stored: set[str]
) -> None:
    site = await start_site(database, "a")
    async with working() as tasks:
        await (await tasks(in_two_steps, how)).join(timeout=30)
        assert connections_in_use(site) == 0
    assert set(await titles(site)) == stored
