"""Imports go down only.

The order of the layers is `LAYERS`. Everything here reads source text; nothing is imported.
That each rule would be seen to be broken is proved by small trees that break it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "amqp_tasks"
BRIDGE = "guillotina_bridge"

LAYERS: Sequence[frozenset[str]] = (
    frozenset({"__main__", "cli"}),
    frozenset({"__init__"}),
    frozenset({"app"}),
    frozenset({"client"}),
    frozenset({"runtime", "drivers"}),  # neither imports the other
    frozenset({"registry"}),
    frozenset({"abc"}),
    frozenset({"settings"}),
    frozenset({"core"}),
    frozenset({"exceptions"}),
)
"""From the top down. A layer may import from those below it and from itself."""

ASIDE = {("__main__", "cli")}
"""Imports within one row of `LAYERS` that are meant."""

NOT_IN_CORE = frozenset(
    {
        *("asyncio", "anyio", "trio", "sniffio", "uvloop", "concurrent", "threading", "_thread"),
        *("multiprocessing", "subprocess", "signal", "select", "selectors", "socket", "ssl"),
        *("time", "random", "secrets", "uuid", "os", "io", "pathlib", "tempfile", "logging"),
        *("aiormq", "pamqp", "redis", "httpx", "sqlite3"),
    }
)
"""No async, no clock, no random, no I/O: what core must not import, even by a detour."""

THREAD_PRIMITIVES = frozenset(
    {
        *("call_soon_threadsafe", "run_coroutine_threadsafe"),
        *("TrioToken", "run_sync_soon", "current_trio_token"),
    }
)
ONE_THAT_MAY = f"{PACKAGE}.runtime.io_loop"


# ----------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Module:
    """A module, as its source text tells."""

    name: str
    is_package: bool
    tree: ast.Module

    @property
    def layer(self) -> str:
        """The part of the package that it belongs to."""
        _, _, rest = self.name.partition(".")
        return rest.partition(".")[0] or "__init__"


@dataclass(frozen=True)
class Import:
    """One import of one name: ``from base import name``, or ``import base``."""

    line: int
    base: str
    name: str | None


def read_modules(root: Path, package: str) -> dict[str, Module]:
    """Read every module of a package that lies in `root`."""
    modules: dict[str, Module] = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        modules[name] = Module(name, is_package, tree)
    return modules


def imports_of(module: Module) -> Iterator[Import]:
    """All imports of a module, wherever in it; also those for type checkers only."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, None)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node)
            for alias in node.names:
                yield Import(node.lineno, base, alias.name)


def absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    up = node.level - module.is_package
    base = parts[: len(parts) - up]
    return ".".join([*base, *([node.module] if node.module else [])])


def targets(modules: Mapping[str, Module], module: Module) -> Iterator[tuple[int, str]]:
    """The project's own modules that a module imports, with the line."""
    for each in imports_of(module):
        full = each.base if each.name is None else f"{each.base}.{each.name}"
        if full in modules:
            yield each.line, full
        elif each.base in modules:
            yield each.line, each.base
        elif each.base.partition(".")[0] == module.name.partition(".")[0]:
            yield each.line, each.base  # not there (yet); its name tells the layer


# ------------------------------------------------------------------------- rules


def upward_imports(modules: Mapping[str, Module]) -> list[str]:
    """Imports from a layer above, from beside, or of what has no layer."""
    rank = {name: number for number, row in enumerate(LAYERS) for name in row}
    found = [
        f"{module.name} has no place in the order of layers"
        for module in modules.values()
        if module.layer not in rank
    ]
    for module in modules.values():
        for line, target in targets(modules, module):
            above, below = module.layer, Module(target, False, module.tree).layer
            if above == below or above not in rank or below not in rank:
                continue
            if rank[above] >= rank[below] and (above, below) not in ASIDE:
                found.append(f"{module.name}:{line} imports {target}")
    return found


def cycles(modules: Mapping[str, Module]) -> list[str]:
    """Modules that import themselves in the end."""
    graph = {
        name: {target for _, target in targets(modules, module) if target != name}
        for name, module in modules.items()
    }
    found = []
    for start in sorted(graph):
        trail = path_to(graph, start, start)
        if trail and start == min(trail):
            found.append(" -> ".join(trail))
    return found


def path_to(graph: Mapping[str, set[str]], start: str, goal: str) -> list[str]:
    """The shortest way from `start` to `goal`, of one step at least; empty if none."""
    trails = [[start, following] for following in sorted(graph.get(start, ()))]
    seen: set[str] = set()
    for trail in trails:
        if trail[-1] == goal:
            return trail
        if trail[-1] not in seen:
            seen.add(trail[-1])
            trails.extend([*trail, following] for following in sorted(graph.get(trail[-1], ())))
    return []


def impurities(modules: Mapping[str, Module]) -> list[str]:
    """What core, or anything of ours that it imports, must not import or contain."""
    package = next(iter(modules)).partition(".")[0]
    todo = [name for name, module in modules.items() if module.layer == "core"]
    seen = set(todo)
    found: list[str] = []
    for name in todo:
        found.extend(impure_lines(modules[name]))
        below = {target for _, target in targets(modules, modules[name])} & modules.keys()
        todo.extend(sorted(below - seen - {package}))
        seen |= below
    return found


def impure_lines(module: Module) -> Iterator[str]:
    for each in imports_of(module):
        if each.base.partition(".")[0] in NOT_IN_CORE:
            yield f"{module.name}:{each.line} imports {each.base}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.AsyncFunctionDef | ast.AsyncFor | ast.AsyncWith | ast.Await):
            yield f"{module.name}:{node.lineno} is asynchronous"


def thread_primitives(modules: Mapping[str, Module]) -> list[str]:
    """Uses of what only the hand-off between the loops may touch."""
    return [
        f"{module.name}:{getattr(node, 'lineno', 0)} names {name}"
        for module in modules.values()
        if module.name != ONE_THAT_MAY
        for node in ast.walk(module.tree)
        for name in names_in(node)
        if name in THREAD_PRIMITIVES
    ]


def names_in(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            yield name
        case ast.alias(name=name):
            yield name.rpartition(".")[2]
        case ast.Constant(value=str(text)):
            yield text  # as in getattr(loop, "...")


def private_uses(modules: Mapping[str, Module], public: frozenset[str]) -> list[str]:
    """What the bridge takes from the framework beside its public names."""
    found = []
    for module in modules.values():
        aliases = set()
        for each in imports_of(module):
            if each.base.partition(".")[0] != PACKAGE:
                continue
            if each.base != PACKAGE:
                found.append(f"{module.name}:{each.line} imports {each.base}")
            elif each.name is None:
                aliases |= import_aliases(module)
            elif each.name not in public:
                found.append(f"{module.name}:{each.line} imports {PACKAGE}.{each.name}")
        for node in ast.walk(module.tree):
            match node:
                case ast.Attribute(value=ast.Name(id=name), attr=attribute):
                    if name in aliases and attribute not in public:
                        found.append(f"{module.name}:{node.lineno} uses {PACKAGE}.{attribute}")
    return found


def import_aliases(module: Module) -> set[str]:
    """Names under which a module knows the package as a whole."""
    return {
        alias.asname or alias.name
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == PACKAGE
    }


def public_names(module: Module) -> frozenset[str]:
    """The literal ``__all__`` of a module."""
    for node in module.tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                return frozenset(ast.literal_eval(value))
            case ast.AnnAssign(target=ast.Name(id="__all__"), value=ast.expr() as value):
                return frozenset(ast.literal_eval(value))
    return frozenset()


def foreign_to(modules: Mapping[str, Module], package: str) -> list[str]:
    """Imports of a package that should not be known here at all."""
    return [
        f"{module.name}:{each.line} imports {each.base}"
        for module in modules.values()
        for each in imports_of(module)
        if each.base.partition(".")[0] == package
    ]


# --------------------------------------------------------------------- this project


@pytest.fixture(scope="module")
def ours() -> dict[str, Module]:
    return read_modules(ROOT, PACKAGE)


def test_there_is_something_to_look_at(ours: dict[str, Module]) -> None:
    assert f"{PACKAGE}.core.lifecycle" in ours


def test_imports_go_down_only(ours: dict[str, Module]) -> None:
    assert upward_imports(ours) == []


def test_there_are_no_import_cycles(ours: dict[str, Module]) -> None:
    assert cycles(ours) == []


def test_core_is_pure(ours: dict[str, Module]) -> None:
    assert impurities(ours) == []


def test_only_the_hand_off_names_thread_primitives(ours: dict[str, Module]) -> None:
    assert thread_primitives(ours) == []


def test_the_framework_knows_no_guillotina(ours: dict[str, Module]) -> None:
    assert foreign_to(ours, "guillotina") == []
    assert foreign_to(ours, BRIDGE) == []


def test_the_bridge_imports_only_public_names(ours: dict[str, Module]) -> None:
    bridge = read_modules(ROOT, BRIDGE)
    assert private_uses(bridge, public_names(ours[PACKAGE])) == []


def test_the_bridge_has_no_cycle() -> None:
    assert cycles(read_modules(ROOT, BRIDGE)) == []


# ---------------------------------------------------------------- trees that break it


def tree(root: Path, files: Mapping[str, str]) -> dict[str, Module]:
    """Write a small package and read it."""
    for name, text in {
        "__init__": "",
        "core/__init__": "",
        "runtime/__init__": "",
        **files,
    }.items():
        path = root / PACKAGE / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_modules(root, PACKAGE)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("core/retry", "from ..settings import Settings", "imports amqp_tasks.settings"),
        ("core/retry", "from amqp_tasks import TaskApp", "imports amqp_tasks"),
        ("core/retry", "from .. import settings", "imports amqp_tasks"),
        ("exceptions", "from .core import lifecycle", "imports amqp_tasks.core"),
        ("runtime/worker", "import amqp_tasks.drivers.redis", "imports amqp_tasks.drivers.redis"),
        ("drivers/redis", "from ..runtime import worker", "imports amqp_tasks.runtime"),
        ("abc", "def f():\n    from .registry import Task", "imports amqp_tasks.registry"),
        ("abc", "if TYPE_CHECKING:\n    from .app import TaskApp", "imports amqp_tasks.app"),
        ("client/handle", "from ..app import TaskApp", "imports amqp_tasks.app"),
        ("app", "from . import TaskApp", "imports amqp_tasks"),
        ("cli/worker", "from ..__main__ import main", "imports amqp_tasks.__main__"),
        ("extras", "", "has no place"),
    ],
)
def test_an_import_that_goes_up_or_aside_is_found(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    (found,) = upward_imports(tree(tmp_path, {name: text}))
    assert found.startswith(f"{PACKAGE}.{name.replace('/', '.')}")
    assert said in found


def test_imports_that_go_down_are_not_found(tmp_path: Path) -> None:
    modules = tree(
        tmp_path,
        {
            "__main__": "from .cli import main",
            "cli/__init__": "from .. import TaskApp\nfrom .worker import run",
            "cli/worker": "from ..app import TaskApp",
            "__init__": "from .app import TaskApp",
            "app": "from .client import h\nfrom .runtime import worker\nfrom .drivers import redis",
            "client": "from .runtime.worker import Worker",
            "runtime/worker": "from . import loop\nfrom ..abc import Broker\nimport asyncio",
            "runtime/loop": "from ..exceptions import AmqpTasksError",
            "drivers/redis": "import redis\nfrom ..core.operations import Claim",
            "abc": "from .core import record",
            "core/record": "from .lifecycle import TaskStatus",
            "core/lifecycle": "from ..exceptions import IllegalTransition",
            "exceptions": "from __future__ import annotations",
        },
    )
    assert upward_imports(modules) == []
    assert cycles(modules) == []
    assert impurities(modules) == []
    assert thread_primitives(modules) == []


def test_a_cycle_is_found_once(tmp_path: Path) -> None:
    modules = tree(
        tmp_path,
        {
            "core/a": "from . import b",
            "core/b": "def f():\n    from .c import g",
            "core/c": "from amqp_tasks.core.a import h",
            "core/d": "from . import a",
        },
    )
    assert cycles(modules) == [
        "amqp_tasks.core.a -> amqp_tasks.core.b -> amqp_tasks.core.c -> amqp_tasks.core.a"
    ]


def test_a_module_and_its_package_that_import_each_other_are_a_cycle(tmp_path: Path) -> None:
    modules = tree(tmp_path, {"core/__init__": "from .a import f", "core/a": "from . import f"})
    assert cycles(modules) == ["amqp_tasks.core -> amqp_tasks.core.a -> amqp_tasks.core"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"core/a": "import time"}, "amqp_tasks.core.a:1 imports time"),
        ({"core/a": "from os import path"}, "amqp_tasks.core.a:1 imports os"),
        ({"core/a": "import asyncio.events"}, "amqp_tasks.core.a:1 imports asyncio.events"),
        ({"core/a": "async def f(): ..."}, "amqp_tasks.core.a:1 is asynchronous"),
        (
            {"core/a": "from ..exceptions import E", "exceptions": "\nimport random"},
            "amqp_tasks.exceptions:2 imports random",
        ),
        (
            {
                "core/a": "from ..exceptions import E",
                "exceptions": "from .extras import h",
                "extras": "import socket",
            },
            "amqp_tasks.extras:1 imports socket",
        ),
    ],
)
def test_what_is_not_pure_in_core_is_found(
    tmp_path: Path, files: dict[str, str], said: str
) -> None:
    assert impurities(tree(tmp_path, files)) == [said]


def test_what_is_not_in_core_may_do_as_it_likes(tmp_path: Path) -> None:
    assert impurities(tree(tmp_path, {"runtime/a": "import time\nasync def f(): ..."})) == []


@pytest.mark.parametrize(
    "text",
    [
        "loop.call_soon_threadsafe(f)",
        "import trio\ntoken = trio.lowlevel.current_trio_token()",
        "from trio.lowlevel import TrioToken",
        "from trio.lowlevel import current_trio_token as token",
        "getattr(token, 'run_sync_soon')(f)",
        "def f(token: TrioToken) -> None: ...",
    ],
)
def test_a_thread_primitive_is_found_anywhere_but_in_the_hand_off(
    tmp_path: Path, text: str
) -> None:
    elsewhere = tree(tmp_path / "elsewhere", {"runtime/watchdog": text})
    assert len(thread_primitives(elsewhere)) == 1
    assert thread_primitives(tree(tmp_path / "there", {"runtime/io_loop": text})) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("from amqp_tasks import _secret", ":1 imports amqp_tasks._secret"),
        ("from amqp_tasks.core import lifecycle", ":1 imports amqp_tasks.core"),
        ("import amqp_tasks.core.message", ":1 imports amqp_tasks.core.message"),
        ("import amqp_tasks as a\na.runtime", ":2 uses amqp_tasks.runtime"),
    ],
)
def test_a_bridge_that_takes_more_than_public_names_is_found(
    tmp_path: Path, text: str, said: str
) -> None:
    modules = tree(tmp_path, {"__init__": "__all__ = ['TaskApp']"})
    bridge = tmp_path / BRIDGE
    bridge.mkdir()
    (bridge / "__init__.py").write_text(text)
    (found,) = private_uses(read_modules(tmp_path, BRIDGE), public_names(modules[PACKAGE]))
    assert found == f"{BRIDGE}{said}"


def test_a_bridge_that_takes_public_names_is_well_behaved(tmp_path: Path) -> None:
    modules = tree(tmp_path, {"__init__": "__all__ = ['TaskApp']"})
    bridge = tmp_path / BRIDGE
    bridge.mkdir()
    (bridge / "__init__.py").write_text(
        "import amqp_tasks\nfrom amqp_tasks import TaskApp\nfrom . import x\namqp_tasks.TaskApp"
    )
    assert private_uses(read_modules(tmp_path, BRIDGE), public_names(modules[PACKAGE])) == []


def test_a_framework_that_knows_the_bridge_is_found(tmp_path: Path) -> None:
    modules = tree(tmp_path, {"app": "from guillotina_bridge import utility"})
    assert foreign_to(modules, BRIDGE) == ["amqp_tasks.app:1 imports guillotina_bridge"]
