"""Whole-process times of commands a person waits for: help, a 70B prediction, advice, what is known.

    python benchmarks/commands.py            # 9 interleaved rounds; writes benchmarks/commands.json

Rounds interleave the commands, so that a slow moment of the machine hits all of them; medians are quoted.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEANPLAN = Path(sys.executable).with_name("leanplan")
COMMANDS = {
    "help": [str(LEANPLAN), "--help"],
    "bare interpreter": [sys.executable, "-c", "pass"],
    "predict 70B": [str(LEANPLAN), "plan", "examples/llama-70b.yaml", "--predict", "--json", "-q"],
    "advise": [
        str(LEANPLAN), "advise", "--model", "examples/llama-70b-shape/config.json", "--hardware", "h100-sxm",
        "--budget", "peak_memory<=60 GiB", "-q",
    ],
    "explain gptq": [str(LEANPLAN), "explain", "gptq"],
    "matrix": [str(LEANPLAN), "matrix"],
}  # fmt: skip
TARGET_S = {"help": 0.15, "predict 70B": 2.0, "advise": 2.0}


def once(command: list[str]) -> float:
    """Return the wall seconds of one run.

    Raises:
        RuntimeError: the command failed with more than "a budget is not met".
    """
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{command} failed: {done.stderr[-500:]}")
    return took


def main(rounds: int = 9) -> dict[str, object]:
    samples: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        once(command)
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            samples[name].append(once(command))
    rows = {
        name: {
            "median_s": round(statistics.median(s), 4),
            "min_s": round(min(s), 4),
            "max_s": round(max(s), 4),
            "target_s": TARGET_S.get(name),
        }
        for name, s in samples.items()
    }
    result = {"rounds": rounds, "python": platform.python_version(), "machine": platform.machine(), "rows": rows}
    (Path(__file__).parent / "commands.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
