"""Finding the task that a message names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amqp_tasks import DuplicateTask, TaskApp, UnknownTask
from amqp_tasks.registry import TaskDefinition, TaskRegistry

from . import shop


def served(*modules: str) -> TaskRegistry:
    registry = TaskRegistry()
    registry.served = modules
    return registry


def test_a_registered_task_is_found_by_its_name() -> None:
    registry = TaskRegistry()
    task, other = TaskDefinition(shop.add), TaskDefinition(shop.narrate, name="told")
    registry.add(task)
    registry.add(other)
    assert registry.find("tests.registry.shop.add") is task
    assert registry.find("told") is other
    assert list(registry) == [task, other]
    assert len(registry) == 2


@pytest.mark.parametrize("name", ["", "x", "os.system", "tests.registry.shop.add", "..", "a" * 999])
def test_what_is_neither_registered_nor_served_is_unknown(name: str) -> None:
    with pytest.raises(UnknownTask, match="is not a task of this app") as caught:
        TaskRegistry().find(name)
    assert len(str(caught.value)) < 500


def test_a_second_task_of_the_same_name_is_refused_and_both_places_are_named() -> None:
    app = TaskApp()
    first = app.task(name="taken")(shop.add)
    with pytest.raises(DuplicateTask, match="taken") as caught:
        app.task(name="taken")(shop.narrate)
    for function in (shop.add, shop.narrate):
        code = function.__code__
        assert f"{function.__qualname__} ({code.co_filename}:{code.co_firstlineno})" in str(
            caught.value
        )
    assert app.tasks.find("taken") is first


def test_adding_the_same_task_again_changes_nothing() -> None:
    registry, task = TaskRegistry(), TaskDefinition(shop.add)
    registry.add(task)
    registry.add(task)
    assert list(registry) == [task]


# ------------------------------------------------------------------------- serve


@pytest.mark.parametrize("module", ["tests", "tests.registry", "tests.registry.shop"])
def test_a_function_of_a_served_module_is_found_by_its_dotted_name(module: str) -> None:
    registry = served(module)
    found = registry.find("tests.registry.shop.add")
    assert found.func is shop.add
    assert registry.find("tests.registry.shop.add") is found


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tests.registry.shop.none_such", "none_such"),
        ("tests.registry.none_such.add", "none_such"),
        ("tests.registry.shop.Shop", "must be a function, not a type"),
        ("tests.registry.shop.nameless", "lambda"),
        ("tests.registry.shop.__name__", "must be a function"),
        ("tests.registry.shop.dumps", "another name of 'json.dumps', which is not served"),
        ("tests.registry.shop.functools.partial", "functools"),
    ],
)
def test_what_is_no_function_of_a_served_module_is_unknown(name: str, says: str) -> None:
    with pytest.raises(UnknownTask, match=says):
        served("tests.registry").find(name)


@pytest.mark.parametrize("name", ["tests.registryx.add", "tests.core.x", "os.system", "tests"])
def test_serving_a_module_serves_no_other(name: str) -> None:
    with pytest.raises(UnknownTask, match="is not a task of this app"):
        served("tests.registry").find(name)


def test_a_decorated_function_of_a_served_module_is_the_task_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "served_goods.py").write_text(
        "from amqp_tasks import TaskApp\n"
        "app = TaskApp()\n"
        "@app.task(timeout=7)\n"
        "async def add(): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert served("served_goods").find("served_goods.add").timeout == 7


def test_a_served_module_that_cannot_be_imported_makes_its_tasks_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_goods.py").write_text("import there_is_no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnknownTask, match="there_is_no_such_module"):
        served("broken_goods").find("broken_goods.add")


@pytest.mark.parametrize(
    ("code", "says"),
    [("1 / 0", "ZeroDivisionError: division by zero"), ("raise SystemExit(3)", "SystemExit: 3")],
)
def test_a_served_module_that_raises_when_it_is_imported_makes_its_tasks_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, says: str
) -> None:
    (tmp_path / "raising_goods.py").write_text(f"{code}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnknownTask, match=says):
        served("raising_goods").find("raising_goods.add")


# -------------------------------------------------------------------------- find


def test_what_is_not_registered_is_looked_for_once() -> None:
    asked: list[str] = []

    def find(name: str) -> Callable[..., Any] | None:
        asked.append(name)
        return shop.add if name == "old.name.of.add" else None

    registry = TaskRegistry(find)
    found = registry.find("old.name.of.add")
    assert (found.name, found.func) == ("old.name.of.add", shop.add)
    assert registry.find("old.name.of.add") is found
    registry.add(TaskDefinition(shop.narrate, name="told"))
    assert registry.find("told").func is shop.narrate
    assert asked == ["old.name.of.add"]
    with pytest.raises(UnknownTask, match="is not a task of this app"):
        registry.find("os.system")


def test_a_task_that_was_found_is_taken_as_it_is() -> None:
    task = TaskDefinition(shop.add, name="mine")
    assert TaskRegistry(lambda name: task).find("theirs") is task  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("error", [ImportError("no such thing"), SystemExit(3), KeyError("x")])
def test_a_search_that_fails_finds_nothing(error: BaseException) -> None:
    def find(name: str) -> None:
        raise error

    with pytest.raises(UnknownTask, match=f"'a.b'.*{type(error).__name__}"):
        TaskRegistry(find).find("a.b")


def test_what_was_found_and_is_no_function_is_refused() -> None:
    with pytest.raises(UnknownTask, match="cannot be a task"):
        TaskRegistry(lambda name: print).find("a.b")


def test_a_search_can_say_itself_why_a_name_is_refused() -> None:
    def find(name: str) -> None:
        raise UnknownTask(f"{name} is not served here")

    with pytest.raises(UnknownTask, match=r"^a\.b is not served here$"):
        TaskRegistry(find).find("a.b")
