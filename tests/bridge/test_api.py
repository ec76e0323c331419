"""The tasks of a container over REST."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from amqp_tasks import Task, TaskStatus
from guillotina_bridge.service import get_service

from ..conftest import REAL_CLOCKS
from . import shop
from .conftest import Site, StartGuillotina

pytestmark = pytest.mark.anyio

UNKNOWN = "task:db-a-00000000-0000-4000-8000-000000000000"
NOT_FOUND = {"reason": "Task not found"}


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """One event loop: views do not care, and over TCP the same is asked of both."""
    return REAL_CLOCKS["asyncio"]()


async def start(start_guillotina: StartGuillotina, **settings: Any) -> Site:
    """Start a site with a container and somebody who may only look at its content."""
    amqp = {"embedded_worker": True, "max_task_retries": 0, "shutdown_grace": 0}
    amqp |= settings.pop("amqp", {})
    applications = ["tests.bridge.shop", "guillotina.contrib.swagger"]
    site = await start_guillotina(amqp=amqp, applications=applications, **settings)
    await site.make_container("a")
    site.add_user("reader", roles=["guillotina.Reader"])
    return site


async def run(site: Site, name: str, *args: Any, container: str = "a", **query: str) -> str:
    """Schedule a task in a container, and return its id."""
    path = f"/db/{container}/@run/{name}"
    response = await site.request("POST", path, json=args, params=query)
    assert response.status_code == 200, response.text
    task_id: str = response.json()["task_id"]
    return task_id


async def ended(site: Site, name: str, *args: Any, **how: str) -> str:
    """Schedule a task in a container, wait until it has ended, and return its id."""
    task_id = await run(site, name, *args, **how)
    await get_service().app.handle(task_id).join(timeout=10)
    return task_id


async def ask(site: Site, method: str, rest: str = "", **options: Any) -> tuple[int, Any]:
    """Ask for what is under ``@amqp-tasks`` of container ``a``."""
    response = await site.request(method, f"/db/a/@amqp-tasks{rest}", **options)
    return response.status_code, response.json()


async def wait_for(site: Site, task_id: str, status: str) -> dict[str, Any]:
    with anyio.fail_after(10):
        while (state := (await ask(site, "GET", f"/{task_id}"))[1])["status"] != status:
            await anyio.sleep(0.01)
    return dict(state)


# ------------------------------------------------------------------------------ lists


async def test_a_list_has_the_containers_own_and_goes_page_by_page(
    start_guillotina: StartGuillotina,
) -> None:
    site = await start(start_guillotina)
    assert await ask(site, "GET") == (200, [])
    # What ids of `a` begin with, those of `a-b` begin with as well.
    await site.make_container("a-b")
    others = [await ended(site, "give", n, container="a-b") for n in range(3)]
    own = sorted([await ended(site, "give", n) for n in range(5)])
    assert all(task_id.startswith("task:db-a-") for task_id in own + others)
    assert await ask(site, "GET") == (200, own)
    assert (await site.request("GET", "/db/a/@amqp-info")).json() == own
    pages, after = [], "task:db-a-"
    while page := (await ask(site, "GET", f"?limit=2&after={after}"))[1]:
        pages.append(page)
        after = page[-1]
    assert pages == [own[0:2], own[2:4], own[4:]]
    response = await site.request("GET", "/db/a-b/@amqp-tasks")
    assert response.json() == sorted(others)


async def test_pages_are_full_though_others_tasks_are_between(
    start_guillotina: StartGuillotina, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guillotina_bridge.api.PAGE", 2)
    site = await start(start_guillotina)
    await site.make_container("a-b")
    own = [await ended(site, "give", n, id=f"task:db-a-{n}") for n in range(4)]
    for n in range(5):
        await ended(site, "give", n, id=f"task:db-a-1{n}", container="a-b")
    assert await ask(site, "GET") == (200, own)
    assert await ask(site, "GET", "?limit=3") == (200, own[:3])
    assert await ask(site, "GET", f"?limit=1&after={own[1]}") == (200, own[2:3])


async def test_a_list_of_one_status(start_guillotina: StartGuillotina, tmp_path: Path) -> None:
    site = await start(start_guillotina)
    finished = await ended(site, "give", 1)
    errored = await ended(site, "read", str(tmp_path / "missing"))
    running = await run(site, "nap", str(tmp_path / "nap"), [60])
    await wait_for(site, running, "running")
    right = {"finished": [finished], "errored": [errored], "running": [running]}
    for status in TaskStatus:
        assert await ask(site, "GET", f"?status={status}") == (200, right.get(status, []))


WRONG = {
    "status=done": (
        "status='done': must be one of scheduled, running, retrying, finished, errored, canceled"
    ),
    "limit=0": "limit='0': must be an integer from 1 to 10000",
    "limit=10001": "limit='10001': must be an integer from 1 to 10000",
    "limit=ten": "limit='ten': must be an integer from 1 to 10000",
    "limit=-1": "limit='-1': must be an integer from 1 to 10000",
    "limit=1_0": "limit='1_0': must be an integer from 1 to 10000",
    "limit=99999999999": "limit='99999999999': must be an integer from 1 to 10000",
    "limit=%D9%A3": "limit='٣': must be an integer from 1 to 10000",
    "limit=": "limit='': must be an integer from 1 to 10000",
    "after=foo": "after='foo': must be the id of a task of this container, task:db-a-...",
}


async def test_a_query_that_is_wrong_is_answered_with_what_would_be_right(
    start_guillotina: StartGuillotina,
) -> None:
    site = await start(start_guillotina)
    for query, reason in WRONG.items():
        assert await ask(site, "GET", f"?{query}") == (400, {"reason": reason})


# --------------------------------------------------------------------------- one task


async def test_a_task_is_shown_with_all_that_is_known(start_guillotina: StartGuillotina) -> None:
    site = await start(start_guillotina)
    task_id = await ended(site, "give", {"x": [1, None, 2**70]})
    status, state = await ask(site, "GET", f"/{task_id}")
    assert status == 200
    assert state["task_id"] == task_id
    assert state["status"] == "finished"
    assert state["result"] == {"x": [1, None, 2**70]}
    assert state["job_retries"] == 0
    assert state["eventlog"] == []
    assert state["job_data"]["func"] == "tests.bridge.shop.give"
    assert state["job_data"]["container_id"] == "a"
    assert (await site.request("GET", f"/db/a/@amqp-info/{task_id}")).json() == state


async def test_a_failure_is_shown_with_its_traceback(
    start_guillotina: StartGuillotina, tmp_path: Path
) -> None:
    site = await start(start_guillotina)
    task_id = await ended(site, "read", str(tmp_path / "missing"))
    _, state = await ask(site, "GET", f"/{task_id}")
    assert state["status"] == "errored"
    assert state["error"].startswith("Traceback (most recent call last)")
    assert "FileNotFoundError" in state["error"]


async def test_the_message_is_for_those_who_may_debug(start_guillotina: StartGuillotina) -> None:
    site = await start(start_guillotina)
    await allow(site, "guillotina.ManageAMQP")
    task_id = await ended(site, "give", 1)
    status, state = await ask(site, "GET", f"/{task_id}", user="reader")
    assert (status, state["result"]) == (200, 1)
    assert "job_data" not in state
    await allow(site, "guillotina.DebugAMQP")
    _, state = await ask(site, "GET", f"/{task_id}", user="reader")
    assert state["job_data"]["args"] == [1]


async def allow(site: Site, permission: str) -> None:
    """Let the reader do something in container `a`."""
    grant = {"principal": "reader", "permission": permission, "setting": "Allow"}
    response = await site.request("POST", "/db/a/@sharing", json={"prinperm": [grant]})
    assert response.status_code == 200


async def test_credentials_in_old_messages_are_not_shown(start_guillotina: StartGuillotina) -> None:
    """guillotina_amqp put the headers into the message, twice."""
    site = await start(start_guillotina)
    headers = {"Authorization": "Basic s3cret", "COOKIE": "s3cret", "Host": "a"}
    extra = {
        "db_id": "db",
        "container_id": "a",
        "req_data": {
            "url": "http://a/db/a",
            "method": "GET",
            "annotations": {},
            "headers": headers | {"Proxy-Authorization": "s3cret"},
            "user": {
                "id": "root",
                "roles": [],
                "groups": [],
                "data": {},
                "headers": headers,
                "Authorization": "s3cret",
            },
        },
    }
    give: Task[..., Any] = Task(shop.give.func, get_service().app)
    handle = await give.options(task_id="task:db-a-old", extra=extra)(1)
    await handle.join(timeout=10)
    response = await site.request("GET", "/db/a/@amqp-tasks/task:db-a-old")
    assert response.json()["job_data"]["req_data"]["headers"] == {"Host": "a"}
    assert "s3cret" not in response.text


# ----------------------------------------------------------------------- cancel, retry


async def test_a_running_task_is_canceled(
    start_guillotina: StartGuillotina, tmp_path: Path
) -> None:
    site = await start(start_guillotina)
    task_id = await run(site, "nap", str(tmp_path / "nap"), [60])
    await wait_for(site, task_id, "running")
    assert await ask(site, "DELETE", f"/{task_id}") == (200, True)
    state = await wait_for(site, task_id, "canceled")
    assert state["reason"] == "user"
    assert await ask(site, "DELETE", f"/{task_id}") == (200, True)
    response = await site.request("DELETE", f"/db/a/@amqp-cancel/{task_id}")
    assert (response.status_code, response.json()) == (200, True)
    assert (await site.request("GET", "/db/a/nap")).status_code == 404


async def test_what_has_ended_is_not_canceled(start_guillotina: StartGuillotina) -> None:
    site = await start(start_guillotina)
    task_id = await ended(site, "give", 1)
    assert await ask(site, "DELETE", f"/{task_id}") == (200, False)
    assert (await ask(site, "GET", f"/{task_id}"))[1]["status"] == "finished"


async def test_an_errored_task_is_retried(
    start_guillotina: StartGuillotina, tmp_path: Path
) -> None:
    site = await start(start_guillotina)
    needed = tmp_path / "needed"
    task_id = await ended(site, "read", str(needed))
    needed.write_text("here by now")
    assert await ask(site, "POST", f"/{task_id}/@retry") == (200, True)
    assert (await wait_for(site, task_id, "finished"))["result"] == "here by now"
    assert await ask(site, "POST", f"/{task_id}/@retry") == (200, False)


# ------------------------------------------------------------------------- who may what

WAYS = (
    ("GET", "@amqp-tasks/{}"),
    ("GET", "@amqp-info/{}"),
    ("DELETE", "@amqp-tasks/{}"),
    ("DELETE", "@amqp-cancel/{}"),
    ("POST", "@amqp-tasks/{}/@retry"),
)
LISTS = (("GET", "@amqp-tasks"), ("GET", "@amqp-info"))


async def test_what_is_not_the_containers_is_not_found(
    start_guillotina: StartGuillotina,
) -> None:
    site = await start(start_guillotina)
    await site.make_container("a-b")
    other = await ended(site, "give", 1, container="a-b")
    for method, path in WAYS:
        for task_id in (other, UNKNOWN, "foo", "task:db-a-", "x" * 300, "%00", "%FF"):
            response = await site.request(method, f"/db/a/{path.format(task_id)}")
            assert (response.status_code, response.json()) == (404, NOT_FOUND), task_id
    response = await site.request("POST", f"/db/a/@amqp-tasks/{other}/@something-else")
    assert response.status_code == 404


async def test_it_takes_a_permission(start_guillotina: StartGuillotina) -> None:
    site = await start(start_guillotina)
    task_id = await ended(site, "give", 1)
    for method, path in (*WAYS, *LISTS):
        for user in ("reader", None):
            response = await site.request(method, f"/db/a/{path.format(task_id)}", user=user)
            assert response.status_code == 401
    assert (await ask(site, "GET", f"/{task_id}"))[1]["status"] == "finished"


async def test_there_are_no_tasks_outside_of_containers(
    start_guillotina: StartGuillotina,
) -> None:
    site = await start(start_guillotina)
    await site.request("POST", "/db/a", json={"@type": "Folder", "id": "folder"})
    for path in ("", "/db", "/db/a/folder"):
        assert (await site.request("GET", f"{path}/@amqp-tasks")).status_code == 404


# ---------------------------------------------------------------------------- swagger


async def test_swagger_shows_them(start_guillotina: StartGuillotina) -> None:
    site = await start(start_guillotina)
    paths = (await site.request("GET", "/db/a/@swagger")).json()["paths"]
    shown = {
        (method, path.removeprefix("/db/a/")): described
        for path, methods in paths.items()
        for method, described in methods.items()
        if path.startswith("/db/a/@amqp-")
    }
    assert set(shown) == {
        (method.lower(), path.format("{task_id}")) for method, path in (*WAYS, *LISTS)
    }
    for (_, path), described in shown.items():
        assert described["summary"]
        names = [parameter["name"] for parameter in described["parameters"]]
        if "{task_id}" in path:
            assert names == ["task_id"]
            assert set(described["responses"]) == {"200", "401", "404", "503"}
        else:
            assert names == ["status", "limit", "after"]
            assert set(described["responses"]) == {"200", "400", "401", "503"}
    status = shown["get", "@amqp-tasks"]["parameters"][0]
    assert status["schema"]["enum"] == list(TaskStatus)
    # Who may not use them does not see them.
    paths = (await site.request("GET", "/db/a/@swagger", user="reader")).json()["paths"]
    assert not [path for path in paths if "@amqp-" in path]


# ------------------------------------------------------- other ways to keep states


async def test_states_that_an_application_keeps_itself(
    start_guillotina: StartGuillotina, tmp_path: Path
) -> None:
    site = await start(start_guillotina, amqp={"persistent_manager": "shelf"})
    shop.SHELF.clear()
    finished = await ended(site, "give", 1)
    errored = await ended(site, "read", str(tmp_path / "missing"))
    assert (await wait_for(site, finished, "finished"))["result"] == 1
    await wait_for(site, errored, "errored")
    assert set(shop.SHELF) == {finished, errored}
    shop.SHELF["task:db-a-b-1"] = {"status": "finished"}  # nobody's, as far as one can tell
    both = sorted([finished, errored])
    assert await ask(site, "GET") == (200, both)
    assert await ask(site, "GET", f"?after={both[0]}&limit=1") == (200, both[1:])
    assert await ask(site, "GET", "?status=errored") == (200, [errored])
    assert (await ask(site, "GET", "/task:db-a-b-1"))[0] == 404
    assert await ask(site, "DELETE", f"/{finished}") == (200, False)


async def test_servers_that_are_away(start_guillotina: StartGuillotina) -> None:
    """As if they had been since the start; that they go away is tested over TCP."""
    site = await start(start_guillotina)
    await get_service().stop()
    for method, path in (*WAYS, *LISTS):
        response = await site.request(method, f"/db/a/{path.format(UNKNOWN)}")
        assert response.status_code == 503
        assert response.json()["reason"].startswith("guillotina_bridge does not run")
