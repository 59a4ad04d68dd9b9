"""A measurement in a process of its own: its threads, its libraries and its memory are gone afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TIME_LIMIT_S = 180  # some seconds on a quiet machine


def measure_apart(probe: str, **environment: str) -> dict[str, Any]:
    """Return what `measure()` of a probe's file returns, run in a child process; {"problem": why} if it failed."""
    from planner.isolation.environment import clean_environment

    root = Path(__file__).resolve().parent.parent.parent
    code = (
        f"import json; from planner.probes import {probe}; facts = json.dumps({probe}.measure(), allow_nan=False); "
        "open('facts.json', 'w', encoding='utf-8').write(facts)"
    )
    with tempfile.TemporaryDirectory(prefix="leanplan-") as name:
        home = Path(name)
        variables = {**clean_environment(home), "PYTHONPATH": str(root), **environment}
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", code], cwd=home, env=variables, stdin=subprocess.DEVNULL,
                capture_output=True, timeout=TIME_LIMIT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"problem": f"took over {TIME_LIMIT_S} s"}
        answer = home / "facts.json"
        if done.returncode or not answer.is_file():
            lines = done.stderr.decode("utf-8", errors="replace").strip().splitlines()
            return {"problem": lines[-1][:300] if lines else f"ended with {done.returncode}"}
        facts: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return facts
