"""The tasks of a container over REST: list, see, cancel, retry.

A task is a container's own if its message says so. Its id alone does not tell: what ids of
container ``a`` begin with, those of ``a-b`` begin with as well.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from guillotina import configure, task_vars
from guillotina.interfaces import IContainer
from guillotina.request import Request
from guillotina.response import (
    HTTPBadRequest,
    HTTPNotFound,
    HTTPServiceUnavailable,
    Response,
)
from guillotina.utils import get_security_policy
from pydantic_core import to_json

from amqp_tasks import (
    ArgumentsError,
    BrokerError,
    NotConnected,
    StateStoreError,
    TaskNotFound,
    TaskStatus,
)

from .context import public_extra
from .exceptions import TaskNotFoundException
from .managers import is_custom
from .service import get_service
from .state import TaskState, get_state_manager
from .utils import get_task_id_prefix

__all__ = ["can_debug_amqp", "cancel_task", "info_task", "list_tasks", "retry_task"]

LIMIT: Final = 1_000
MAX_LIMIT: Final = 10_000
PAGE: Final = 200
"""States that are read in one go: with them come their messages and results."""

UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_PERMISSION: Final = "guillotina.ManageAMQP"


def can_debug_amqp(context: IContainer) -> bool:
    """Tell whether the user of this request may see the messages of tasks."""
    return bool(get_security_policy().check_permission("guillotina.DebugAMQP", context))


# ------------------------------------------------------------------ what swagger shows


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


_REASON = {"type": "object", "properties": {"reason": {"type": "string"}}}
_STATE = {
    "type": "object",
    "properties": {
        "task_id": {"type": "string"},
        "status": {"type": "string", "enum": list(TaskStatus)},
        "updated": {"type": "number", "description": "Seconds since the epoch"},
        "job_data": {"type": "object", "description": "The message; with guillotina.DebugAMQP"},
        "job_retries": {"type": "integer"},
        "eventlog": {
            "type": "array",
            "items": {"type": "array", "items": {}},
            "description": "Pairs of a time and a message",
        },
        "result": {},
        "error": {"type": "string", "description": "The traceback of the latest failure"},
        "reason": {"type": "string"},
    },
}
_TASK_ID: dict[str, Any] = {
    "in": "path",
    "name": "task_id",
    "required": True,
    "schema": {"type": "string"},
    "description": "Id of a task of this container",
}
_QUERY: tuple[dict[str, Any], ...] = (
    {
        "in": "query",
        "name": "status",
        "schema": {"type": "string", "enum": list(TaskStatus)},
        "description": "Only tasks in that status",
    },
    {
        "in": "query",
        "name": "limit",
        "schema": {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": LIMIT},
        "description": "How many at most",
    },
    {
        "in": "query",
        "name": "after",
        "schema": {"type": "string"},
        "description": "Only ids behind this one: the last of a page gives the next",
    },
)


def _service(method: str, name: str, summary: str, answer: dict[str, Any]) -> Any:
    """Register a service of containers, and describe it."""
    responses = {"200": answer, "503": _json("RabbitMQ or Redis cannot be used", _REASON)}
    if "{task_id}" in name:
        parameters = [_TASK_ID]
        responses["404"] = _json("This container has no such task", _REASON)
    else:
        parameters = list(_QUERY)
        responses["400"] = _json("A parameter is wrong", _REASON)
    return configure.service(
        method=method,
        name=name,
        context=IContainer,
        permission=_PERMISSION,
        summary=summary,
        parameters=parameters,
        responses=responses,
    )


# -------------------------------------------------------------------------- services

_IDS = _json("Ids, in their order", {"type": "array", "items": {"type": "string"}})


@_service("GET", "@amqp-tasks", "Returns the ids of the container's tasks", _IDS)
@_service("GET", "@amqp-info", "Deprecated: see @amqp-tasks", _IDS)
async def list_tasks(context: IContainer, request: Request) -> list[str]:
    query = _Query.of(request)
    with _errors_as_responses():
        return await (_own_ids_of_custom_manager(query) if is_custom() else _own_ids(query))


_INFO = _json("All that is known about the task", _STATE)


@_service("GET", "@amqp-tasks/{task_id}", "Shows a task", _INFO)
@_service("GET", "@amqp-info/{task_id}", "Deprecated: see @amqp-tasks", _INFO)
async def info_task(context: IContainer, request: Request) -> Response:
    with _errors_as_responses():
        state = await _own_state(request.matchdict["task_id"])
    job_data = state.pop("job_data", None)
    if job_data is not None and can_debug_amqp(context):
        # Clean, if it came here by a worker; but there are other ways, and other managers.
        state["job_data"] = public_extra(job_data)
    # Not by guillotina's renderer: a result may be, say, an integer of more than 64 bits.
    body = to_json(state, inf_nan_mode="null", fallback=repr)
    return Response(body=body, content_type="application/json")


_CANCELED = _json(
    "Whether it was canceled, now or earlier; false if it has ended otherwise", {"type": "boolean"}
)


@_service("DELETE", "@amqp-tasks/{task_id}", "Cancels a task", _CANCELED)
@_service("DELETE", "@amqp-cancel/{task_id}", "Deprecated: see @amqp-tasks", _CANCELED)
async def cancel_task(context: IContainer, request: Request) -> bool:
    task_id = request.matchdict["task_id"]
    with _errors_as_responses():
        await _own_state(task_id)
        return await TaskState(task_id).cancel()


_RETRIED = _json(
    "Whether it starts anew; false if it is not errored, and stays as it is", {"type": "boolean"}
)


@_service("POST", "@amqp-tasks/{task_id}/@retry", "Starts an errored task anew", _RETRIED)
async def retry_task(context: IContainer, request: Request) -> bool:
    task_id = request.matchdict["task_id"]
    with _errors_as_responses():
        await _own_state(task_id)
        return await TaskState(task_id).retry()


# --------------------------------------------------------------------------- helpers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Query:
    """What a list was asked for."""

    prefix: str
    status: TaskStatus | None
    limit: int
    after: str | None

    @classmethod
    def of(cls, request: Request) -> _Query:
        """Read a request's query.

        Raises:
            HTTPBadRequest: something in it is wrong; says what would be right.
        """
        query, prefix = request.query, get_task_id_prefix()
        status, limit, after = query.get("status"), query.get("limit"), query.get("after")
        if status is not None and status not in list(TaskStatus):
            raise _wrong("status", status, f"one of {', '.join(TaskStatus)}")
        if limit is not None and not (_is_number(limit) and 1 <= int(limit) <= MAX_LIMIT):
            raise _wrong("limit", limit, f"an integer from 1 to {MAX_LIMIT}")
        if after is not None and not after.startswith(prefix):
            raise _wrong("after", after, f"the id of a task of this container, {prefix}...")
        return cls(
            prefix=prefix,
            status=None if status is None else TaskStatus(status),
            limit=LIMIT if limit is None else int(limit),
            after=after,
        )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _wrong(name: str, value: str, right: str) -> HTTPBadRequest:
    return HTTPBadRequest(content={"reason": f"{name}={value!r}: must be {right}"})


@contextmanager
def _errors_as_responses() -> Generator[None, None, None]:
    try:
        yield
    except (TaskNotFound, ArgumentsError):  # the latter: that can be no id
        raise HTTPNotFound(content={"reason": "Task not found"}) from None
    except (BrokerError, StateStoreError, NotConnected) as error:
        raise HTTPServiceUnavailable(content={"reason": str(error)}) from error


async def _own_state(task_id: str) -> dict[str, Any]:
    """Return the state of a task of this container.

    Raises:
        TaskNotFoundException: there is none, or it is another container's.
    """
    state = dict(await TaskState(task_id).get_state())
    if not _is_own(task_id, state.get("job_data")):
        raise TaskNotFoundException(task_id)
    return state


def _is_own(task_id: str, job: Mapping[str, Any] | None) -> bool:
    if not job:
        # A custom state manager's, say: an id that was made for this container and no other.
        prefix = get_task_id_prefix()
        return task_id.startswith(prefix) and bool(UUID.fullmatch(task_id.removeprefix(prefix)))
    own = (task_vars.db.get().id, task_vars.container.get().id)
    return (job.get("db_id"), job.get("container_id")) == own


async def _own_ids(query: _Query) -> list[str]:
    app, after = get_service().app, query.after
    own: list[str] = []
    while True:
        page = await app.list_tasks(
            prefix=query.prefix, status=query.status, after=after, limit=PAGE
        )
        own += [state.task_id for state in page if _is_own(state.task_id, state.job)]
        if len(page) < PAGE or len(own) >= query.limit:
            return own[: query.limit]
        after = page[-1].task_id


async def _own_ids_of_custom_manager(query: _Query) -> list[str]:
    own: list[str] = []
    for task_id in sorted(await _all_ids_of_custom_manager(query)):
        with suppress(TaskNotFoundException):  # it has expired meanwhile
            state = await _own_state(task_id)
            if query.status in (None, state.get("status")):
                own.append(task_id)
        if len(own) == query.limit:
            break
    return own


async def _all_ids_of_custom_manager(query: _Query) -> list[str]:
    try:
        ids = [task_id async for task_id in get_state_manager().list()]
    except Exception as error:  # it is an application's own, and can raise anything
        raise StateStoreError(f"the state manager has failed: {error!r}") from error
    after = query.after or ""
    return [task_id for task_id in ids if task_id.startswith(query.prefix) and task_id > after]
