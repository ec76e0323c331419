"""The names that code for guillotina_amqp imports are where it looks for them."""

from __future__ import annotations

from importlib import import_module

import pytest
from guillotina.interfaces import IRequest  # noqa: F401  guillotina, before its parts

NAMES = {
    "": ["add_object_task", "add_task", "app_settings", "includeme", "object_task", "task"],
    "api": ["cancel_task", "can_debug_amqp", "info_task", "list_tasks"],
    "commands.worker": ["WorkerCommand"],
    "decorators": ["ObjectTaskDefinition", "TaskDefinition", "object_task", "task"],
    "exceptions": [
        *("AMQPConfigurationNotFoundError", "ObjectNotFoundException", "TaskAccessUnauthorized"),
        *("TaskAlreadyAcquired", "TaskMaxRetriesReached", "TaskNotFinishedException"),
        "TaskNotFoundException",
    ],
    "interfaces": ["IStateManagerUtility", "ITaskDefinition", "MessageType"],
    "job": ["Job"],
    "state": [
        *("MemoryStateManager", "RedisStateManager", "TaskState", "TaskStatus"),
        "get_state_manager",
    ],
    "task_vars": ["amqp_job"],
    "utils": [
        *("_run_object_task", "_yield_object_task", "add_object_task", "add_task", "cancel_task"),
        *("generate_task_id", "get_task_id_prefix", "make_request", "serialize_request"),
    ],
}


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in NAMES.items() for name in names]
)
def test_a_name_is_there(module: str, name: str) -> None:
    assert hasattr(import_module(f"guillotina_bridge.{module}".rstrip(".")), name)


@pytest.mark.parametrize("status", ["SCHEDULED", "CANCELED", "RUNNING", "FINISHED", "ERRORED"])
def test_a_status_is_the_text_that_it_was(status: str) -> None:
    found = getattr(import_module("guillotina_bridge.state").TaskStatus, status)
    assert found == status.lower()
    assert f"{found}" == status.lower()


@pytest.mark.parametrize("kind", ["DEBUG", "RESULT"])
def test_a_message_type_is_the_text_that_it_was(kind: str) -> None:
    assert getattr(import_module("guillotina_bridge.interfaces").MessageType, kind) == kind.lower()
