"""What can be a task, what cannot and what is said about it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from amqp_tasks import ArgumentsError, DefinitionError, RetryPolicy, TaskApp
from amqp_tasks.registry import FunctionKind, TaskDefinition

from . import shop


@pytest.mark.parametrize(
    ("func", "kind"),
    [
        (shop.add, FunctionKind.COROUTINE),
        (shop.narrate, FunctionKind.GENERATOR),
        (shop.add_in_thread, FunctionKind.SYNC),
    ],
)
def test_the_kind_of_a_function_says_how_it_is_run(func: Any, kind: FunctionKind) -> None:
    assert TaskDefinition(func).kind is kind


def test_a_synchronous_function_can_have_a_process() -> None:
    definition = TaskDefinition(shop.add_in_thread, process=True)
    assert definition.kind is FunctionKind.PROCESS
    assert definition.location == ("tests.registry.shop", "add_in_thread")


@pytest.mark.parametrize(
    ("func", "says"),
    [
        (shop.nameless, "a lambda .*write it as a function"),
        (shop.make_closure(1), "closure over number.*pass an argument"),
        (shop.make_local(), r"defined inside a function.*@app\.task\(name='...'\)"),
        (shop.Shop.method, "it is a method. Make it a function of its module"),
        (shop.Shop().method, "must be a function, not a method"),
        (shop.Shop.static, "it is a method. Make it a function of its module"),
        (shop.Shop.of_class, "must be a function, not a method"),
        (shop.Shop(), "must be a function, not a Shop"),
        (shop.Shop, "must be a function, not a type"),
        (shop.partial, "must be a function, not a partial"),
        (print, "must be a function, not a builtin_function_or_method"),
        (shop.generate, "generate is a generator.*make it an async generator, or return a list"),
        (None, "None cannot be a task"),
    ],
    ids=lambda value: getattr(value, "__name__", None) if callable(value) else "",
)
def test_what_a_worker_could_not_find_or_run_is_refused_with_what_would_be_right(
    func: Any, says: str
) -> None:
    with pytest.raises(DefinitionError, match=says):
        TaskDefinition(func)


@pytest.mark.parametrize("func", [shop.nameless, shop.make_closure(1), shop.Shop.method])
def test_a_name_does_not_help_what_another_process_cannot_have(func: Any) -> None:
    with pytest.raises(DefinitionError):
        TaskDefinition(func, name="shop.named")


def test_a_function_within_a_function_can_have_a_name() -> None:
    assert TaskDefinition(shop.make_local(), name="shop.local").name == "shop.local"


@pytest.mark.parametrize("func", [shop.add, shop.narrate])
def test_an_asynchronous_function_can_have_no_process(func: Any) -> None:
    with pytest.raises(DefinitionError, match="asynchronous and cannot have process=True"):
        TaskDefinition(func, process=True)


def test_a_function_that_cannot_be_imported_can_have_no_process() -> None:
    def local() -> None: ...

    with pytest.raises(DefinitionError, match="another process cannot import it"):
        TaskDefinition(local, name="local", process=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": ""}, "name=''"),
        ({"name": "a\nb"}, "must be a printable text"),
        ({"name": 5}, "name=5"),
        ({"retry": 3}, "retry=3: must be a RetryPolicy"),
        ({"timeout": 0}, "timeout=0: must be a finite number of seconds, above 0"),
        ({"timeout": "5"}, "timeout='5': must be a number of seconds"),
    ],
)
def test_a_wrong_option_is_refused_and_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(DefinitionError, match=says):
        TaskDefinition(shop.add, **options)


def test_a_task_is_still_the_function_and_keeps_its_documentation() -> None:
    policy = RetryPolicy(max_retries=1)
    task = TaskApp().task(retry=policy, timeout=5)(shop.add)
    assert task.func is shop.add
    assert task.__doc__ == "Add two numbers."
    assert (task.name, task.retry, task.timeout) == ("tests.registry.shop.add", policy, 5)


# ------------------------------------------------------------------- annotations


def test_an_annotation_may_name_what_is_defined_further_down() -> None:
    signature = TaskDefinition(shop.later).signature
    assert signature.encode_arguments([shop.Later(1)], {}) == ([{"x": 1}], {})


def test_an_annotation_that_is_defined_nowhere_is_named_when_it_is_needed() -> None:
    signature = TaskDefinition(shop.unknown_annotation).signature
    with pytest.raises(DefinitionError, match=r"unknown_annotation.*NowhereDefined"):
        signature.encode_arguments([1], {})


def test_a_type_that_cannot_be_json_is_named_when_it_is_needed() -> None:
    signature = TaskDefinition(shop.socket_like).signature
    with pytest.raises(DefinitionError, match=r"socket_like.*cannot travel as JSON.*Connection"):
        signature.encode_arguments([shop.Connection()], {})


def test_wrong_arguments_are_named_with_the_task() -> None:
    signature = TaskDefinition(shop.add).signature
    with pytest.raises(ArgumentsError, match=r"tests\.registry\.shop\.add.*a='x'"):
        signature.encode_arguments(["x"], {})


# ------------------------------------------------------------------------- names


def test_the_usual_name_is_the_one_it_can_be_imported_by() -> None:
    assert TaskDefinition(shop.add).name == "tests.registry.shop.add"


SCRIPT = """
from amqp_tasks import TaskApp
app = TaskApp()
@app.task
async def add(a: int) -> int:
    return a
if __name__ == "__main__":
    print(add.name, *add.location)
"""


def run(*arguments: str, folder: Path, given: str | None = None) -> str:
    """Run Python in a process of its own and return what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        input=given,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.stdout.strip() or done.stderr.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "goods" / "inner"
    folder.mkdir(parents=True)
    for place in (folder, folder.parent):
        (place / "__init__.py").touch()
    (folder / "script.py").write_text(SCRIPT)
    (tmp_path / "alone.py").write_text(SCRIPT)
    return tmp_path


def test_a_script_s_functions_are_named_as_if_it_was_imported(package: Path) -> None:
    assert run("alone.py", folder=package) == "alone.add alone add"


def test_a_script_in_a_package_is_named_with_the_package(package: Path) -> None:
    expected = "goods.inner.script.add goods.inner.script add"
    assert run("goods/inner/script.py", folder=package) == expected
    assert run("script.py", folder=package / "goods" / "inner") == expected


def test_a_module_that_is_run_is_named_as_it_was_called(package: Path) -> None:
    expected = "goods.inner.script.add goods.inner.script add"
    assert run("-m", "goods.inner.script", folder=package) == expected


def test_a_function_of_an_interactive_session_is_refused(package: Path) -> None:
    said = run("-", folder=package, given=SCRIPT)
    assert "DefinitionError: add is defined in an interactive session" in said
