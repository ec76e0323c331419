"""The public face: the names of the package, and what can be said of all of them."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import amqp_tasks
from amqp_tasks import exceptions

ERRORS = {
    "AmqpTasksError",
    "AppNotFound",
    "ArgumentsError",
    "BrokerError",
    "BrokerRefused",
    "BrokerUnavailable",
    "DecodeError",
    "DefinitionError",
    "DuplicateTask",
    "NoRetry",
    "NotConnected",
    "PublishFailed",
    "QueueMismatch",
    "RemoteTaskError",
    "ResultTimeout",
    "SettingsError",
    "StateStoreError",
    "StateCorrupt",
    "StateStoreRefused",
    "StateStoreUnavailable",
    "TaskCanceled",
    "TaskNotFound",
    "UnknownTask",
}
OTHERS = {
    "Attempt",
    "CancelReason",
    "ErrorLetter",
    "ErrorQueue",
    "LoopBlocked",
    "MessageType",
    "Middleware",
    "RemoteTaskGroup",
    "Replayed",
    "RetryPolicy",
    "Settings",
    "Task",
    "TaskApp",
    "TaskEvent",
    "TaskHandle",
    "TaskState",
    "TaskStatus",
    "Worker",
    "add_task",
    "current_attempt",
    "default_app",
    "task",
}


def test_the_public_names_are_these_and_in_order() -> None:
    assert set(amqp_tasks.__all__) == ERRORS | OTHERS
    assert list(amqp_tasks.__all__) == sorted(amqp_tasks.__all__)


@pytest.mark.parametrize("name", sorted(ERRORS | OTHERS))
def test_a_public_name_can_be_imported_and_says_what_it_is_for(name: str) -> None:
    found = getattr(amqp_tasks, name)
    assert inspect.getdoc(found)


def test_nothing_else_looks_public() -> None:
    extra = {
        name
        for name, value in vars(amqp_tasks).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert extra == ERRORS | OTHERS


def public_members(kind: type) -> list[tuple[str, object]]:
    """The methods and properties of a class that the package itself defines."""
    return [
        (name, member)
        for name, member in inspect.getmembers(kind)
        if not name.startswith("_")
        and (inspect.isfunction(member) or isinstance(member, property))
        and str(getattr(member, "__module__", kind.__module__)).startswith("amqp_tasks")
    ]


@pytest.mark.parametrize(
    "name", ["ErrorQueue", "TaskApp", "TaskHandle", "Task", "RemoteTaskGroup", "Worker"]
)
def test_what_people_call_is_documented(name: str) -> None:
    members = public_members(getattr(amqp_tasks, name))
    assert members
    assert [member for member, value in members if not inspect.getdoc(value)] == []


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_an_error_derives_from_the_one_base(name: str) -> None:
    assert issubclass(getattr(amqp_tasks, name), amqp_tasks.AmqpTasksError)


@pytest.mark.parametrize("name", exceptions.__all__)
def test_an_error_says_when_it_is_raised(name: str) -> None:
    text = inspect.getdoc(getattr(exceptions, name)) or ""
    assert text.startswith(("Raised when", "Raised in", "Base of"))


def test_what_stops_a_task_is_no_ordinary_error() -> None:
    assert not issubclass(amqp_tasks.LoopBlocked, Exception)


def test_an_error_that_the_standard_library_has_a_word_for_is_that_as_well() -> None:
    assert issubclass(amqp_tasks.ResultTimeout, TimeoutError)
    assert issubclass(amqp_tasks.ArgumentsError, TypeError)


def test_importing_the_package_reads_no_setting_and_opens_nothing() -> None:
    code = "import amqp_tasks, threading; print(threading.active_count())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"AMQP_TASKS_MAX_RUNNING_TASKS": "nonsense", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == ("1", "")


def test_trio_is_imported_by_those_who_use_it_only() -> None:
    code = "import sys, amqp_tasks; print(sorted(sys.modules.keys() & {'trio', 'uvloop', 'click'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
