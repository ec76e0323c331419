"""`g serve` and `g amqp-worker` as they are run in earnest: processes, servers, HTTP."""

from __future__ import annotations

import hashlib
import json
import secrets
import signal
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ..servers.postgres import PostgresServer, postgres_server
from ..servers.process import free_port
from ..servers.rabbitmq import RabbitServer, rabbit_server
from ..servers.redis import RedisServer, redis_server
from . import by_hand
from .processes import Answer, Browser, GuillotinaProcess, eventually

__all__ = ["postgres_server", "rabbit_server", "redis_server"]

LOOPS = {"asyncio": "asyncio.DefaultEventLoopPolicy", "uvloop": "uvloop.EventLoopPolicy"}
SECRETS = {
    "Cookie": "session=c00kie-of-root",
    "Proxy-Authorization": "Basic cHJveHk6cHJveHk=",
}
NOT_FOUND = {"reason": "Task not found"}


@dataclass
class Site:
    """A web server with a container, and its workers."""

    folder: Path
    rabbit: RabbitServer
    redis: RedisServer
    name: str
    configuration: dict[str, Any]
    web: GuillotinaProcess
    browse: Browser
    processes: list[GuillotinaProcess] = field(default_factory=list)
    metrics_port: int = 0

    def start_worker(self, *flags: str) -> GuillotinaProcess:
        """Start ``g amqp-worker``, and return when it takes messages."""
        self.metrics_port = free_port()
        number = len(self.processes)
        worker = GuillotinaProcess(
            self.folder / f"worker-{number}",
            "amqp-worker",
            self.configuration,
            *("--metrics-server", "--host", "127.0.0.1", "--port", str(self.metrics_port)),
            *flags,
        )
        self.processes.append(worker)
        worker.wait_until(lambda: Browser(self.metrics_port).answers("/metrics"))
        return worker

    def worker(self) -> GuillotinaProcess:
        """One that runs, alone."""
        running = [process for process in self.processes if process.is_running]
        return running[0] if running else self.start_worker()

    def run(self, task: str, *arguments: Any, **how: Any) -> str:
        answer = self.browse("POST", f"/db/site/@run/{task}", list(arguments), **how)
        assert answer.status == 200, answer
        return str(answer.json["task_id"])

    def ask(self, method: str, path: str = "", **how: Any) -> Answer:
        """Ask for what is under ``@amqp-tasks`` of the container."""
        return self.browse(method, f"/db/site/@amqp-tasks{path}", **how)

    def state(self, task_id: str) -> dict[str, Any]:
        answer = self.ask("GET", f"/{task_id}")
        assert answer.status == 200, answer
        return dict(answer.json)

    def wait_for(self, task_id: str, *statuses: str, timeout: float = 20) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            state = self.state(task_id)
            return state if state["status"] in statuses else None

        return dict(eventually(look, timeout=timeout))


@pytest.fixture(scope="module", params=LOOPS)
def site(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    postgres_server: PostgresServer,
    rabbit_server: RabbitServer,
    redis_server: RedisServer,
) -> Iterator[Site]:
    name = f"site-{secrets.token_hex(4)}"
    by_hand.declare(rabbit_server.url, name)  # first, so that ours would clash if they differed
    folder, port = tmp_path_factory.mktemp("site"), free_port()
    configuration = {
        "applications": ["tests.bridge.shop"],
        "databases": {
            "db": {
                "storage": "postgresql",
                "dsn": postgres_server.dsn(postgres_server.create_database()),
            }
        },
        "root_user": {"password": "root"},
        "site_users": {
            "reader": {
                "password": f"sha512::{hashlib.sha512(b'reader').hexdigest()}",
                "roles": ["guillotina.Reader"],
                "groups": [],
            }
        },
        "host": "127.0.0.1",
        "port": port,
        "loop_policy": LOOPS[request.param],
        "redis": {"host": "127.0.0.1", "port": redis_server.port},
        "redis_prefix_key": f"{name}-",
        "amqp": {
            "host": "127.0.0.1",
            "port": rabbit_server.port,
            "exchange": name,
            "queue": name,
            "persistent_manager": "redis",
            "max_task_retries": 0,
            "presence_ttl": 2,
            "state_timeout": 1,
            "connect_timeout": 2,
        },
    }
    web = GuillotinaProcess(folder / "web", "serve", configuration)
    browse = Browser(port)
    site = Site(folder, rabbit_server, redis_server, name, configuration, web, browse)
    try:
        web.wait_until(browse.answers)
        container = {"@type": "Container", "id": "site"}
        assert browse("POST", "/db", container).status == 200
        assert browse("POST", "/db", {**container, "id": "site-2"}).status == 200
        yield site
        assert "Traceback" not in web.output()
        for process in [web, *site.processes]:
            assert process.trouble() == [], process.output()
    finally:
        for process in [web, *site.processes]:
            process.kill()


def test_no_credentials_reach_rabbitmq_redis_or_the_state(site: Site) -> None:
    """The first test: as long as there is no worker, the message waits in the queue."""
    task_id = site.run("headers", headers={**SECRETS, "X-Trace": "t1"})
    [(body, headers)] = by_hand.look_into(site.rabbit.url, site.name)
    message = json.loads(body)
    assert message["task_id"] == task_id
    assert message["func"] == "tests.bridge.shop.headers"
    assert (message["db_id"], message["container_id"]) == ("db", "site")
    assert message["req_data"]["headers"]["x-trace"] == "t1"
    assert message["req_data"]["user"]["id"] == "root"
    with site.redis.client() as redis:
        keys = [key for key in redis.scan_iter(f"{site.name}-*") if task_id.encode() in key]
        stored = b"".join(dump for key in keys if (dump := everything(redis, key)))
    assert b"x-trace" in stored
    for place in (
        body,
        repr(headers).encode(),
        stored,
        site.ask("GET", f"/{task_id}").text.encode(),
    ):
        assert secrets_in(place) == []
    site.worker()
    assert site.wait_for(task_id, "finished")["result"]["x-trace"] == "t1"
    with site.redis.client() as redis:
        assert [secrets_in(everything(redis, key)) for key in keys] == [[]] * len(keys)


def everything(redis: Any, key: bytes) -> bytes:
    """Return all that a key of Redis holds."""
    read = {
        b"hash": lambda: redis.hgetall(key),
        b"list": lambda: redis.lrange(key, 0, -1),
        b"stream": lambda: redis.xrange(key),
        b"string": lambda: redis.get(key),
    }
    return repr(read[redis.type(key)]()).encode()


def secrets_in(text: bytes) -> list[str]:
    """Names of headers and values that are nobody's business; root:root is `cm9vdDpyb290`."""
    words = ["authorization", "cookie", "cm9vdDpyb290", "c00kie-of-root", "cHJveHk6cHJveHk="]
    return [word for word in words if word.lower() in text.decode().lower()]


def test_a_session(site: Site, tmp_path: Path) -> None:
    """Schedule, watch, cancel, list, retry; who may not, and what is not there."""
    site.worker()
    oracle = tmp_path / "cancelled-nap"
    task_id = site.run("nap", str(oracle), [60])
    assert task_id.startswith("task:db-site-")
    state = site.wait_for(task_id, "running")
    state = dict(eventually(lambda: (s := site.state(task_id))["eventlog"] and s))
    loop = "uvloop" if "uvloop" in site.configuration["loop_policy"] else "asyncio"
    [[_, message]] = state["eventlog"]
    assert message.startswith(f"asleep at {loop}")
    assert state["job_data"]["args"] == [str(oracle), [60]]
    assert site.ask("GET", "?status=running").json == [task_id]

    assert site.ask("DELETE", f"/{task_id}").json is True
    assert site.wait_for(task_id, "canceled")["reason"] == "user"
    assert site.ask("DELETE", f"/{task_id}").json is True
    assert oracle.read_text() == "start\n"
    assert site.browse("GET", f"/db/site/{oracle.name}").status == 404

    needed = tmp_path / "needed"
    failed = site.run("read", str(needed))
    state = site.wait_for(failed, "errored")
    assert "FileNotFoundError" in state["error"]
    assert "in read" in state["error"]
    assert site.ask("DELETE", f"/{failed}").json is False
    needed.write_text("here by now")
    assert site.ask("POST", f"/{failed}/@retry").json is True
    assert site.wait_for(failed, "finished")["result"] == "here by now"
    assert site.ask("POST", f"/{failed}/@retry").json is False

    listed = site.ask("GET").json
    assert listed == sorted(listed)
    assert {task_id, failed} <= set(listed)
    assert site.ask("GET", f"?limit=1&after={listed[0]}").json == listed[1:2]
    assert site.browse("GET", "/db/site-2/@amqp-tasks").json == []


def test_what_is_not_there_and_who_may_not(site: Site) -> None:
    own = site.run("headers")
    unknown = "task:db-site-00000000-0000-4000-8000-000000000000"
    ways = [("GET", ""), ("DELETE", ""), ("POST", "/@retry")]
    for method, rest in ways:
        answer = site.ask(method, f"/{unknown}{rest}")
        assert (answer.status, answer.json) == (404, NOT_FOUND)
        answer = site.browse(method, f"/db/site-2/@amqp-tasks/{own}{rest}")
        assert (answer.status, answer.json) == (404, NOT_FOUND)
        for user in ("reader:reader", None):
            assert site.ask(method, f"/{own}{rest}", user=user).status == 401
    assert site.ask("GET", user="reader:reader").status == 401


@pytest.mark.parametrize(
    ("runner", "function", "result"),
    [
        ("_run_object_task", "set_old_title", "done: new"),
        ("_yield_object_task", "set_old_titles", ["new"]),
    ],
)
def test_a_message_of_guillotina_amqp_runs(
    site: Site, runner: str, function: str, result: Any
) -> None:
    site.worker()
    item = {"@type": "Item", "id": function, "title": "as it was"}
    assert site.browse("POST", "/db/site", item).status == 201
    task_id = f"task:db-site-{uuid.uuid4()}"
    message = old_message(task_id, runner, f"tests.bridge.shop.{function}", f"/{function}", "new")
    by_hand.publish(site.rabbit.url, site.name, message)
    eventually(lambda: site.ask("GET", f"/{task_id}").status == 200)
    state = site.wait_for(task_id, "finished")
    assert state["result"] == result
    assert site.browse("GET", f"/db/site/{function}").json["title"] == "new"
    assert secrets_in(json.dumps(state).encode()) == []
    with site.redis.client() as redis:
        keys = [key for key in redis.scan_iter(f"{site.name}-*") if task_id.encode() in key]
        assert keys
        assert [secrets_in(everything(redis, key)) for key in keys] == [[]] * len(keys)


def old_message(task_id: str, runner: str, *args: Any) -> dict[str, Any]:
    """A message as guillotina_amqp 5 writes it."""
    headers = {"Host": "localhost", "Authorization": "Basic cm9vdDpyb290"}
    return {
        "func": f"guillotina_amqp.utils.{runner}",
        "args": list(args),
        "kwargs": {},
        "db_id": "db",
        "container_id": "site",
        "req_data": {
            "url": "http://localhost/db/site/@old",
            "headers": headers,
            "method": "POST",
            "annotations": {},
            "user": {
                "id": "root",
                "roles": [],
                "groups": ["Managers"],
                "headers": headers,
                "data": {},
            },
            "container_url": "http://localhost/db/site",
        },
        "task_id": task_id,
    }


@pytest.mark.parametrize("direct", [True, False], ids=["as the task", "within an object task"])
def test_what_nobody_serves_goes_to_the_error_queue(
    site: Site, tmp_path: Path, direct: bool
) -> None:
    site.worker()
    touched = tmp_path / "touched"
    task_id = f"task:db-site-{secrets.token_hex(8)}"
    message = old_message(task_id, "_run_object_task", "os.system", "/", f"touch {touched}")
    if direct:
        message |= {"func": "os.system", "args": [f"touch {touched}"]}
    by_hand.publish(site.rabbit.url, site.name, message)

    def letters() -> list[tuple[bytes, dict[str, Any]]]:
        found = by_hand.look_into(site.rabbit.url, f"{site.name}-error")
        return [(body, headers) for body, headers in found if task_id.encode() in body]

    [(body, headers)] = eventually(letters)
    assert secrets_in(body) == []
    assert "os.system" in headers["error-message"]
    assert site.state(task_id)["status"] == "errored"
    assert not touched.exists()


def test_the_queues_are_those_of_guillotina_amqp(site: Site) -> None:
    """They were declared by hand before the worker came; a difference would be an error."""
    site.worker()
    by_hand.declare(site.rabbit.url, site.name)


def test_metrics(site: Site) -> None:
    site.worker()
    site.wait_for(site.run("headers"), "finished")
    function = "tests.bridge.shop.headers"
    labels = f'container_id="site",dotted_name="{function}",final_status="finished"'

    def count() -> bool:
        text = Browser(site.metrics_port)("GET", "/metrics").text
        return f"amqp_job_duration_count{{{labels}}}" in text and "amqp_running_jobs 0.0" in text

    eventually(count)


def test_servers_that_are_away_are_503_with_a_reason(site: Site) -> None:
    own = site.run("headers")
    site.redis.pause()
    try:
        with ThreadPoolExecutor() as threads:
            ways = [("GET", ""), ("GET", f"/{own}"), ("DELETE", f"/{own}")]
            answers = list(threads.map(lambda way: site.ask(*way), ways))
    finally:
        site.redis.resume()
    for answer in answers:
        assert answer.status == 503
        assert str(site.redis.port) in answer.json["reason"]
    eventually(lambda: site.ask("GET").status == 200)


def test_a_worker_that_is_told_to_stop_lets_tasks_finish(site: Site, tmp_path: Path) -> None:
    worker = site.worker()
    oracle = tmp_path / "drained-nap"
    task_id = site.run("nap", str(oracle), [1.0])
    eventually(lambda: oracle.exists())
    assert worker.terminate() == 0
    assert oracle.read_text() == "start\nend\n"
    assert site.state(task_id)["result"] == [1]
    assert site.browse("GET", f"/db/site/{oracle.name}").status == 200
    assert worker.trouble() == []


@pytest.mark.parametrize("site", ["uvloop"], indirect=True)
def test_another_worker_goes_on_when_one_is_killed(site: Site, tmp_path: Path) -> None:
    worker = site.worker()
    oracle = tmp_path / "killed-nap"
    task_id = site.run("nap", str(oracle), [60, 0])
    eventually(lambda: oracle.exists())
    site.start_worker()
    worker.signal(signal.SIGKILL)
    state = site.wait_for(task_id, "finished")
    assert state["result"] == [2]
    assert state["job_retries"] == 0
    assert site.browse("GET", f"/db/site/{oracle.name}").status == 200


def test_a_worker_without_a_broker_says_so_and_ends(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    nobody = free_port()
    configuration = {
        "applications": ["tests.bridge.shop"],
        "databases": {"db": {"storage": "DUMMY"}},
        "redis": {"host": "127.0.0.1", "port": redis_server.port},
        "amqp": {"host": "127.0.0.1", "port": nobody, "persistent_manager": "redis"},
    }
    worker = GuillotinaProcess(tmp_path / "worker", "amqp-worker", configuration)
    assert worker.wait() == 1
    lines = worker.output().splitlines()
    assert [line for line in lines if "ERROR" in line or "Error" in line] == lines[-1:]
    assert lines[-1].startswith("Error: ")
    assert f":{nobody}" in lines[-1]
    assert "Traceback" not in worker.output()


def test_the_web_server_ends_in_good_order(site: Site) -> None:
    """The last test: nothing is left of what it had open."""
    workers = [process for process in site.processes if process.is_running]
    assert [worker.terminate() for worker in workers] == [0] * len(workers)
    site.web.signal(signal.SIGTERM)
    # uvicorn has drained when it sends the signal to itself once more.
    assert site.web.wait() in (0, -signal.SIGTERM)
    assert "Finished server process" in site.web.output()
