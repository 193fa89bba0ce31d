"""The rooms of the package: what may import what."""

from __future__ import annotations

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "qos_jax"
ROOMS = (
    "errors",
    "io",
    "sim",
    "workload",
    "fleet",
    "impact",
    "encoder",
    "routers",
    "predictor",
    "worlds",
    "evaluation",
    "agent",
    "gym",
    "training",
    "report",
    "gateway",
    "api",
    "programs",
)
"""A room imports only from rooms before it."""
MAX_LOOSE_MODULES = 5


def module_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(name: str) -> set[str]:
    """The modules of the package that a module imports, also within functions, but not for type checkers alone."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(MODULES[name].read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        todo += [child for child in ast.iter_child_nodes(node) if not is_type_checking(child)]
    return {each for each in found if each in MODULES} - {"qos_jax", name}


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_every_module_is_in_a_known_room() -> None:
    assert {room_of(name) for name in MODULES if name != "qos_jax"} == set(ROOMS)


def test_few_modules_are_loose() -> None:
    assert len([path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]) <= MAX_LOOSE_MODULES


def test_imports_run_one_way() -> None:
    wrong = [
        f"{name} imports {other}"
        for name in MODULES
        if name != "qos_jax"
        for other in imports_of(name)
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(name))
    ]
    assert not wrong


def test_no_imports_go_in_circles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for other in imports_of(name):
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        if name != "qos_jax":
            visit(name, ())
