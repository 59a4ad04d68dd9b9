"""How far off predictions for this machine are: without calibration, after `leanplan calibrate`, after other models.

    python benchmarks/calibration_error.py [--seconds 60] [--engine NAME] [--store FOLDER] [--json PATH]

Makes models of 20, 60 and 150 million random parameters, measures each in several formats on every engine installed
(with lengths calibration does not use), and predicts each measurement three times: by the tables of the package; by
the laws of a calibration of --seconds; by those refined with the measurements of the *other* models, as runs leave
them. The model judged is never learned from. Under five minutes on a quiet machine of two cores; on a busy one the
figures tell of the neighbours. With --store, what was measured is kept, and the same command only judges again.

Aimed at after calibration: decode 6 %, prefill 10 %, memory 3 % median error, rank correlation of plans 0.95, and
intervals that hold 80 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cost_models
from cost_models.error_report import error_report
from cost_models.laws import fit_laws
from knowledge_base.serde import write_json
from knowledge_base.types import Estimate, Hardware, Measurement, Workload
from planner.calibrating import keeping
from planner.calibrating.taking import Programme, take
from planner.machine import profile
from planner.measuring import Protocol
from planner.progress import Progress
from planner.store import Record

METRICS = ("tpot_s", "ttft_s", "latency_s", "peak_memory_bytes")
JUDGED = Programme(
    sizes={
        "20M": {"hidden_size": 512, "layers": 8, "context_tokens": 512, "vocab_size": 544},
        "60M": {"hidden_size": 768, "layers": 11, "context_tokens": 512, "vocab_size": 544},
        "150M": {"hidden_size": 1280, "layers": 10, "context_tokens": 512, "vocab_size": 544},
    },
    workload=Workload(prompt_tokens=200, output_tokens=33),
    protocol=Protocol(requests=5, least_s=0.3, most_s=2.0),
    formats=frozenset({"float32", "bfloat16", "int8", "int4", "f16", "q8_0", "q4_k", "q5_k"}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the calibration (default 60)")
    parser.add_argument("--store", type=Path, help="keep measurements there (default: a temporary folder)")
    parser.add_argument("--engine", action="append", default=[], help="only this engine; may be repeated")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        store = options.store or Path(home)
        progress = Progress()
        bare = profile(store, tell=progress.line).hardware
        bare = replace(bare, devices=tuple(replace(d, reached=()) for d in bare.devices))
        began = time.monotonic()
        calibrated = take(
            bare, store / "calibrated", stop_at=began + options.seconds, progress=progress, engine_names=options.engine
        ).records
        progress.line(f"calibrated in {time.monotonic() - began:.0f} s, {len(calibrated)} measurements")
        judged = take(
            bare,
            store / "judged",
            stop_at=float("inf"),
            progress=progress,
            engine_names=options.engine,
            programme=JUDGED,
        ).records
    rows = report(calibrated, judged, bare)
    if options.json:
        write_json(options.json, rows)


def report(calibrated: Sequence[Record], judged: Sequence[Record], bare: Hardware) -> dict[str, dict]:
    """Print and return the errors of each way to predict."""
    ways: dict[str, list[tuple[Estimate, Measurement]]] = {"tables": [], "calibrated": [], "and other models": []}
    for model in dict.fromkeys(r.model for r in judged):
        others = [r for r in judged if r.model != model]
        machines = {
            "tables": bare,
            "calibrated": with_laws(calibrated, bare),
            "and other models": with_laws([*calibrated, *others], bare),
        }
        for way, machine in machines.items():
            for record in judged:
                if record.model == model:
                    m = record.measurement
                    ways[way].append((cost_models.estimate(m.plan, model, record.workload, machine), m))
    crowded = statistics.fmean(r.measurement.protocol["other_cores"] for r in (*calibrated, *judged))
    print(f"{len(judged)} plans of {len({r.model for r in judged})} models; other programs used {crowded:.1f} cores")
    print(f"{'':20} {'metric':20} {'median error':>12} {'worst':>8} {'covered':>8} {'rank':>6}")
    rows = {way: error_report(pairs) for way, pairs in ways.items()}
    for way, found in rows.items():
        for metric in METRICS:
            row = found[metric]
            row["rank_within_model"] = rank_within_model(ways[way], metric)
            print(
                f"{way:20} {metric:20} {row['median_abs_ratio']:12.1%} {row['worst_abs_ratio']:8.1%} "
                f"{row['coverage']:8.0%} {row['rank_within_model']:6.2f}"
            )
    return rows


def with_laws(records: Sequence[Record], bare: Hardware) -> Hardware:
    """Return the machine with the laws of some measurements."""
    laws = fit_laws(keeping.grouped(records), bare)
    device = bare.device
    return replace(
        bare, devices=tuple(replace(d, reached=laws.reached) if d is device else d for d in bare.devices)
    )  # fmt: skip


def rank_within_model(pairs: Sequence[tuple[Estimate, Measurement]], metric: str) -> float:
    """Return Spearman's rank correlation of the plans of each model, the median over models."""
    groups: dict[str, list[tuple[Estimate, Measurement]]] = {}
    for pair in pairs:
        groups.setdefault(pair[1].plan.model_digest, []).append(pair)
    found: list[Mapping[str, float]] = [error_report(group)[metric] for group in groups.values()]
    return statistics.median(row["rank_correlation"] for row in found if "rank_correlation" in row)


if __name__ == "__main__":
    main()
