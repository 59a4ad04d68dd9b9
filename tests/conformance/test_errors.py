"""Every expected failure says what to do next: no error of ours is raised without a hint."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from knowledge_base.errors import FAILURE_KINDS, CandidateFailed

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    p for name in ("knowledge_base", "cost_models", "search", "planner") for p in (ROOT / name).rglob("*.py")
)
BASE = "LeanplanError"


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in FILES:
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def error_classes() -> set[str]:
    """Return the names of LeanplanError and of every class that says it is one, in any file."""
    classes = [node for _, tree in trees() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found, before = {BASE}, set[str]()
    while found != before:
        before = set(found)
        found |= {c.name for c in classes if {b.id for b in c.bases if isinstance(b, ast.Name)} & found}
    return found


def raised(names: set[str], tree: ast.Module) -> Iterator[ast.Call]:
    """Yield every call that makes an error of these classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            yield node


def test_every_error_has_a_hint() -> None:
    # CandidateFailed has one by default, the error of the operating system makes its own.
    names = error_classes() - {"CandidateFailed", "LeanplanOSError"}
    assert {"BadInput", "EnvironmentProblem", "NoFeasiblePlan"} <= names
    seen = 0
    for path, tree in trees():
        for call in raised(names, tree):
            where = f"{path.relative_to(ROOT)}:{call.lineno}"
            if any(keyword.arg is None for keyword in call.keywords):
                continue  # passed through by a function that has it as an argument
            hints = [keyword.value for keyword in call.keywords if keyword.arg == "hint"]
            assert hints, f"{where}: no hint"
            assert not (isinstance(hints[0], ast.Constant) and not hints[0].value), f"{where}: an empty hint"
            seen += 1
    assert seen > 100


def test_a_failure_of_a_candidate_is_of_a_known_kind() -> None:
    kinds = set()
    for path, tree in trees():
        for call in raised({"CandidateFailed"}, tree):
            kind = call.args[0]
            if isinstance(kind, ast.Constant):
                assert kind.value in FAILURE_KINDS, f"{path.relative_to(ROOT)}:{call.lineno}: `{kind.value}`"
                kinds.add(kind.value)
    assert len(kinds) > 5
    with pytest.raises(ValueError, match="unknown failure kind `made_up`"):
        CandidateFailed("made_up", "x")
    assert CandidateFailed("timeout", "x").hint
