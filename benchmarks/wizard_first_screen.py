"""Seconds from starting `leanplan` on a terminal to its first whole screen, in a real pseudo-terminal.

    python benchmarks/wizard_first_screen.py            # 9 starts; writes benchmarks/wizard_first_screen.json

The clock starts before the process and stops when the last line of the first screen has arrived. Each start is in a
folder of its own, so nothing is taken up from the one before.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pexpect

LEANPLAN = Path(sys.executable).with_name("leanplan")
MODELS = Path(__file__).resolve().parent.parent / "models"
TARGET_S = 0.3
LAST_WORDS = "keeps your answers"


def once(columns: int, rows: int) -> float:
    """Return the seconds of one start, on a terminal of that size."""
    with tempfile.TemporaryDirectory(prefix="leanplan-") as folder:
        (Path(folder) / "models").symlink_to(MODELS)
        began = time.perf_counter()
        child = pexpect.spawn(str(LEANPLAN), cwd=folder, dimensions=(rows, columns), timeout=30)
        child.expect(LAST_WORDS)
        took = time.perf_counter() - began
        child.close(force=True)
    return took


def main(starts: int = 9) -> dict[str, object]:
    sizes = {"120 x 40": (120, 40), "80 x 24": (80, 24)}
    samples: dict[str, list[float]] = {name: [] for name in sizes}
    once(80, 24)
    for _ in range(starts):
        for name, size in sizes.items():
            samples[name].append(once(*size))
    rows = {
        name: {
            "median_s": round(statistics.median(s), 4), "min_s": round(min(s), 4), "max_s": round(max(s), 4),
            "target_s": TARGET_S,
        }
        for name, s in samples.items()
    }  # fmt: skip
    result = {"starts": starts, "python": platform.python_version(), "machine": platform.machine(), "rows": rows}
    (Path(__file__).parent / "wizard_first_screen.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
