"""Starting costs nothing: help and predictions load none of the heavy libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "optuna", "sklearn", "scipy", "pandas", "networkx", "pulp", "numpy", "yaml", "rich")

PROBE = """
import sys
sys.argv = {argv!r}
from planner.cli import main
try:
    code = main()
except SystemExit as stop:
    code = stop.code
print("LOADED", sorted(set(sys.modules) & set({heavy!r})), code or 0, file=sys.stderr)
"""


def loaded(*argv: str) -> tuple[str, str]:
    """Run one command in a fresh interpreter; return its stdout and the line that lists heavy modules."""
    script = PROBE.format(argv=["leanplan", *argv], heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    line = next((line for line in done.stderr.splitlines() if line.startswith("LOADED")), done.stderr)
    return done.stdout, line


@pytest.mark.parametrize("argv", [("--help",), ("help", "exit-codes"), ("plan", "--help")], ids=" ".join)
def test_help_loads_nothing_heavy(argv: tuple[str, ...]) -> None:
    out, line = loaded(*argv)
    assert out.strip()
    assert line.startswith("LOADED [] 0"), line


def test_importing_the_api_loads_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, planner; print(sorted(set(sys.modules) & set({HEAVY!r})))"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
