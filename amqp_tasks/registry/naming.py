"""The name under which a worker finds a function."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FunctionType

from ..exceptions import DefinitionError

__all__ = ["check_function", "importable_name"]


def check_function(func: object, *, named: bool) -> FunctionType:
    """Return `func` if a worker in another process can have the same one.

    Args:
        named: it was given a name of its own, so that it need not be found by importing.

    Raises:
        DefinitionError: it is no function, or a lambda, a closure or a method.
    """
    if not isinstance(func, FunctionType):
        raise DefinitionError(
            f"{func!r} cannot be a task: must be a function, not {_article(type(func).__name__)}"
        )
    where = f"{func.__qualname__} in {func.__module__}"
    if func.__name__ == "<lambda>":
        raise DefinitionError(f"a lambda ({where}) cannot be a task: write it as a function")
    scope = func.__qualname__.rpartition(".")[0]
    if scope.endswith("<locals>") and func.__closure__ is not None:
        free = ", ".join(func.__code__.co_freevars)
        raise DefinitionError(
            f"{where} cannot be a task: it is a closure over {free}, which a worker in another "
            "process does not have. Make it a function of its module, and pass an argument"
        )
    if scope and not scope.endswith("<locals>"):
        raise DefinitionError(
            f"{where} cannot be a task: it is a method. Make it a function of its module"
        )
    if scope and not named:
        raise DefinitionError(
            f"{where} cannot be a task: it is defined inside a function, where a worker cannot "
            "import it. Make it a function of its module, or, if the worker runs the function "
            "around it as well, give it a name: @app.task(name='...')"
        )
    return func


def importable_name(func: FunctionType) -> str:
    """Return the dotted name by which another process can import `func`.

    A program run as a script calls its module ``__main__``, which is another module in
    every process; its functions are named as if the script's file was imported.

    Raises:
        DefinitionError: the script has no file, as in an interactive session.
    """
    module = func.__module__
    if module == "__main__":
        module = _main_module_name(func)
    return f"{module}.{func.__qualname__}"


def _main_module_name(func: FunctionType) -> str:
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name != "__main__":  # python -m package.module
        name: str = spec.name
        return name
    file = getattr(main, "__file__", None)
    if file is None or file.startswith("<"):  # "<stdin>": a program that came through a pipe
        raise DefinitionError(
            f"{func.__name__} is defined in an interactive session, from which no worker can "
            "import it: move it to a module, or give it a name: @app.task(name='...')"
        )
    return _module_name_of(Path(file).resolve())


def _module_name_of(file: Path) -> str:
    parts = [file.stem]
    for folder in file.parents:
        if not (folder / "__init__.py").exists():
            break
        parts.append(folder.name)
    return ".".join(reversed(parts))


def _article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"
