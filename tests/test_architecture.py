"""The house: imports point down, heavy libraries are imported where used, the wheel holds exactly four packages."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEVEL = {"knowledge_base": 1, "cost_models": 2, "search": 3, "planner": 4}
TOP_LEVEL = {  # what a package may import at module top, beyond the standard library and the packages below it
    "knowledge_base": {"networkx"},
    "cost_models": {"numpy"},
    "search": {"numpy"},
    "planner": set(),
}
# Leaf modules that exist to use one library; importing them is the caller's choice.
LEAVES = {
    "knowledge_base/techniques/_": {"torch", "transformers", "numpy"},
    "knowledge_base/engines/_": {"torch", "transformers", "numpy", "gguf"},
    "planner/reports/": {"rich"},
    "planner/_live.py": {"rich"},
    "planner/statistics.py": {"numpy"},
    "planner/measuring.py": {"numpy"},
    "planner/isolation/worker.py": {"numpy"},
    "planner/serving/endpoint.py": {"starlette"},
}
FILES = sorted(p for package in LEVEL for p in (ROOT / package).rglob("*.py"))


def imports(tree: ast.AST, *, top_only: bool) -> list[tuple[str, int]]:
    """Return (root package, line) of every import; `top_only` leaves out those inside functions and TYPE_CHECKING."""
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append(((node.module or "").split(".")[0], node.lineno))
        elif (top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)) or (
            top_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for name, line in imports(ast.parse(path.read_text(encoding="utf-8")), top_only=False):
        assert LEVEL.get(name, 0) <= LEVEL[package], f"{path}:{line} imports {name}, which is above {package}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_heavy_libraries_are_imported_where_used(path: Path) -> None:
    import sys

    relative = path.relative_to(ROOT).as_posix()
    package = relative.split("/")[0]
    allowed = set(TOP_LEVEL[package]) | set(LEVEL)
    for prefix, names in LEAVES.items():
        if relative.startswith(prefix):
            allowed |= names
    for name, line in imports(ast.parse(path.read_text(encoding="utf-8")), top_only=True):
        assert name in sys.stdlib_module_names or name in allowed, f"{relative}:{line} imports {name} at module top"


def test_distribution_lists_exactly_our_packages() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(settings["tool"]["setuptools"]["packages"])
    there = {
        p.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for package in LEVEL
        for p in (ROOT / package).rglob("__init__.py")
    }
    assert listed == there


def test_an_upward_import_is_caught() -> None:
    found = imports(ast.parse("def f():\n    import planner.api\n"), top_only=False)
    assert found == [("planner", 2)]
