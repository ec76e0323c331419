"""Workers are replaced under load, and taken down by what they run."""

from __future__ import annotations

import secrets
from collections import Counter
from pathlib import Path

import anyio

from amqp_tasks import TaskApp, TaskState, TaskStatus

from ..e2e.amqp import Amqp
from . import shop
from .campaign import WORKER_ENV, Campaign, explain
from .fleet import Fleet, Servers
from .oracle import Oracle, tally

REPLACEMENTS = 20
CRASHES = 3


def test_workers_replaced_one_after_another_lose_and_fail_nothing(
    servers: Servers, tmp_path: Path, seed: int, minutes: float
) -> None:
    """A long form of what `tests.e2e.test_shutdown` has in short, with a producer besides."""
    begun = Campaign.begun(servers, tmp_path, workers=2, rate=60, failing=0, longest=3, seed=seed)
    with begun as campaign:
        for number in range(REPLACEMENTS):
            post = campaign.fleet.posts[number % 2]
            assert post.terminate() == 0
            post.start()
            post.wait_ready()
        counted = campaign.settle()
    print(counted)
    assert {state.attempt for state in campaign.states.values()} == {1}, "a stop was counted"
    assert not [line for line in campaign.oracle.lines() if line.word == "fail"]
    assert [line for line in campaign.oracle.lines() if line.word == "stop"], "no grace was over"


def test_a_task_that_kills_its_workers_is_given_up_and_its_neighbours_are_not(
    servers: Servers, tmp_path: Path
) -> None:
    oracle = Oracle(tmp_path / "oracle")
    env = {
        **WORKER_ENV,
        "AMQP_TASKS_PRESENCE_TTL": "1",
        "AMQP_TASKS_MAX_CRASHES": f"{CRASHES}",
        "AMQP_TASKS_MAX_RUNNING_TASKS": "8",
    }
    run = secrets.token_hex(2)
    poison = f"poison-{run}"
    neighbours = [f"neighbour-{run}-{number}" for number in range(16)]

    async def queue_them_and_wait() -> dict[str, TaskState]:
        app = TaskApp(**servers.settings())
        path = str(oracle.path)
        async with app.connect():
            for number, task_id in enumerate(neighbours):
                if number == 4:
                    await app.add_task(shop.kills_its_worker, path, task_id=poison)
                await app.add_task(shop.work, path, 1.0, task_id=task_id)
            with anyio.fail_after(90):
                while True:
                    states = await app.list_tasks(limit=100)
                    if all(state.status.ended for state in states):
                        return {state.task_id: state for state in states}
                    await anyio.sleep(0.1)

    with Fleet.started(servers, tmp_path, CRASHES + 1, env) as fleet:
        states = anyio.run(queue_them_and_wait)
        dead = [post for post in fleet.posts if post.has_ended()]
        assert len(dead) == CRASHES
    starts = Counter(line.task_id for line in oracle.lines() if line.word == "start")
    print(starts, crashes_of(servers, neighbours), sep="\n")
    assert starts[poison] == CRASHES
    assert states[poison].status is TaskStatus.ERRORED
    assert states[poison].reason == "crashed_worker"
    assert {states[task].status for task in neighbours} == {TaskStatus.FINISHED}
    counted = tally(oracle.lines(), (), {})
    assert not counted.wrong(), explain(counted.wrong(), oracle)
    (letter,) = Amqp(servers.rabbit).drain(f"{servers.queue}-error", 1)
    assert letter.headers["error-reason"] == "crashed_worker"
    for task, crashes in crashes_of(servers, neighbours).items():
        # Those that were claimed along with the poison, and started or about to, are counted a
        # crash; but they are run apart from it before they have as many as it.
        assert crashes < CRASHES, f"{task} is blamed for all that the poison did"


def crashes_of(servers: Servers, task_ids: list[str]) -> dict[str, int]:
    """Return how often each task is said to have taken its worker down."""
    with servers.redis.client() as client:
        return {
            task: int(client.hget(f"{servers.queue}:{{{task}}}:state", "crashes") or 0)
            for task in task_ids
        }
