"""Share of a measured run's wall time that searching and fitting cost models takes. Target: below 5 %.

    python benchmarks/search_overhead.py [RUN_FOLDER]    # without one, plans examples/tiny-lm.yaml first (about 5 minutes)

Writes benchmarks/search_overhead.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def measured_run() -> Path:
    """Plan the example afresh and return its run folder."""
    folder = Path(tempfile.mkdtemp(prefix="leanplan-benchmark-"))
    command = [str(Path(sys.executable).with_name("leanplan")), "plan", "examples/tiny-lm.yaml"]
    subprocess.run(
        [*command, "--run-dir", str(folder / "runs"), "--store", str(folder / "store")], cwd=ROOT, check=True
    )
    return next((folder / "runs").glob("*/result.json")).parent


def main() -> dict[str, object]:
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else measured_run()
    search = json.loads((run / "result.json").read_text(encoding="utf-8"))["search"]
    result = {
        "plans_measured": search["measured"],
        "plans_priced": search["priced"],
        "wall_s": search["wall_s"],
        "search_s": search["seconds"]["search"],
        "search_share": round(search["seconds"]["search"] / search["wall_s"], 4),
        "target_share": 0.05,
        "seconds": search["seconds"],
    }
    (Path(__file__).parent / "search_overhead.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
