"""Imports go one way: between the three folders, between the packages of each, and none around in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
TOPS = ("runtime", "graphs", "export")
RUNTIME = [
    "bundle", "errors", "util", "kernels", "ort", "execution", "generation", "tools", "evaluation", "optimize",
    "server", "cli", "entry",
]  # fmt: skip
"""The packages of the runner from the bottom up: each imports only those before it."""
BOUNDARIES = {
    "runtime.execution.experimental": "satchel.runtime.execution.engine",
    "runtime.execution.ranks": "satchel.runtime.execution.engine",
    "runtime.ort.experimental": "satchel.runtime.ort.session",
}
"""The packages for devices and for several ranks, and the one module of the core that loads each, inside a function."""
MAX_ROOT_MODULES = 5


class Edge(NamedTuple):
    """An import of one module by another; `lazy` inside a function."""

    source: str
    target: str
    lazy: bool

    def __str__(self) -> str:
        return f"{self.source} imports {self.target}{' in a function' if self.lazy else ''}"


def modules(top: str) -> dict[str, Path]:
    """The modules of a folder by their names."""
    found = {}
    for path in sorted((ROOT / top).rglob("*.py")):
        parts = ("satchel", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = {name: path for top in TOPS for name, path in modules(top).items()}


def imports(node: ast.AST, lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """The modules that a tree imports when it runs, which leaves out those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            for alias in child.names:
                whole = f"{child.module}.{alias.name}"
                yield whole if whole in MODULES else str(child.module), lazy
        yield from imports(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def package(module: str) -> str:
    """The package of a module without "satchel.": "runtime.ort"; a module at a folder's root is one by itself."""
    parts = module.split(".")[1:]
    inner = ".".join(parts[:3])
    return inner if inner in BOUNDARIES else ".".join(parts[:2])


def edges() -> list[Edge]:
    """The imports between different packages."""
    found = set()
    for name, path in MODULES.items():
        for target, lazy in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if target in MODULES and package(target) != package(name):
                found.add(Edge(name, target, lazy))
    return sorted(found)


EDGES = edges()


def report(offending: Iterable[Edge]) -> str:
    return "\n".join(map(str, ["", *offending]))


def is_boundary(edge: Edge) -> bool:
    return edge.lazy and BOUNDARIES.get(package(edge.target)) == edge.source


def on_cycles(found: Iterable[Edge]) -> list[Edge]:
    """The imports between packages from which others lead back."""
    targets: dict[str, set[str]] = {}
    for edge in found:
        targets.setdefault(package(edge.source), set()).add(package(edge.target))

    def reached(start: str) -> set[str]:
        seen, front = set(), [start]
        while front:
            fresh = targets.get(front.pop(), set()) - seen
            seen |= fresh
            front += fresh
        return seen

    return [edge for edge in found if package(edge.source) in reached(package(edge.target))]


def test_no_packages_import_each_other_in_a_circle() -> None:
    offending = on_cycles([edge for edge in EDGES if not is_boundary(edge)])
    assert not offending, report(offending)


def test_a_circle_is_noticed() -> None:
    one, other = (
        Edge("satchel.runtime.ort.a", "satchel.runtime.util.b", False),
        ("satchel.runtime.util.c", "satchel.runtime.ort.d"),
    )
    assert on_cycles([one, Edge(*other, True)]) == [one, Edge(*other, True)]
    assert on_cycles([one]) == []


def rank(module: str) -> float:
    name, _, inner = package(module).removeprefix("runtime.").partition(".")
    return RUNTIME.index(name) + (0.5 if inner else 0)


def test_the_packages_of_the_runner_are_a_stack() -> None:
    inside = [edge for edge in EDGES if all(name.startswith("satchel.runtime.") for name in edge[:2])]
    offending = [edge for edge in inside if rank(edge.target) >= rank(edge.source) and not is_boundary(edge)]
    assert len(inside) > 100
    assert not offending, report(offending)


def test_what_is_for_devices_is_loaded_at_one_boundary() -> None:
    offending = [edge for edge in EDGES if package(edge.target) in BOUNDARIES and not is_boundary(edge)]
    assert not offending, report(offending)


def test_only_the_command_line_of_the_runner_loads_graphs_and_the_exporter() -> None:
    """And inside a function: the runner works without them."""
    offending = [
        edge
        for edge in EDGES
        if edge.source.startswith("satchel.runtime")
        and not edge.target.startswith("satchel.runtime")
        and not (edge.lazy and package(edge.source) == "runtime.cli")
    ]
    assert not offending, report(offending)


def test_graphs_know_nothing_but_the_format_of_bundles() -> None:
    offending = [
        edge
        for edge in EDGES
        if edge.source.startswith("satchel.graphs")
        and not edge.target.startswith("satchel.graphs")
        and package(edge.target) != "runtime.bundle"
    ]
    assert not offending, report(offending)


@pytest.mark.parametrize("top", TOPS)
def test_few_modules_lie_at_the_root_of_a_folder(top: str) -> None:
    limit = {"runtime": MAX_ROOT_MODULES, "graphs": MAX_ROOT_MODULES, "export": 11}[top]
    assert 0 < len(list((ROOT / top).glob("*.py"))) <= limit
