"""How wrong the laws of serving engines are on measurements they have not seen, next to the targets.

    python benchmarks/prediction_error.py            # committed rows: prints, writes prediction_error.json
    python benchmarks/prediction_error.py --all      # and the rows of ../shared that may not be committed
    python benchmarks/prediction_error.py --fit      # before that, fits knowledge_base/data/engine_laws.csv anew

Laws are fitted without whole devices, then without whole models, and judged on what was left out. `A few
rows`: up to four measurements of a device and engine (and of the model on it) shift the other predictions by their
shrunk mean error, as a calibration would.
Intervals are those errors' 90 % quantile on the other folds (conformal). Single thread: OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.public_rows import SHARED, Row, committed, observed, records, usable
from cost_models.error_report import spearman
from cost_models.serving import POOLED, QUANTITIES, Laws, law_of, predict
from cost_models.serving_fit import Observed, fit

HERE = Path(__file__).resolve().parent
LAWS = HERE.parent / "knowledge_base/data/engine_laws.csv"
FOLDS = 20  # groups of whole devices or models left out together
LEVEL = 0.9
CALIBRATION_ROWS = 4
FEWEST = 10  # errors of a family before it has an interval of its own
MEANING = {
    "tpot": "time per token", "ttft": "time to first token", "request": "whole request", "energy": "energy per token",
    "power": "power", "memory": "peak memory",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Judged:
    """Rows with the ratio predicted / measured, as (rows,) arrays."""

    rows: Sequence[Row]
    ratio: np.ndarray
    calibrated: np.ndarray  # after a few rows of the device and engine; nan for the rows that calibrated
    known_model: np.ndarray  # after a few rows of that model on it
    covered: np.ndarray  # 1 inside the interval, 0 outside


# Quantity of the issue, which rows are of it, the targets without and after calibration, the best known peer.
TARGETS = (
    ("decode, batch 1, dense", lambda r: r.metric == "tpot" and r.batch == 1 and not r.shape.experts, 0.15, 0.06, "27 % (bandwidth rule)"),
    ("decode, batch 1, mixture of experts", lambda r: r.metric == "tpot" and r.batch == 1 and r.shape.experts, 0.25, 0.10, "-"),
    ("prefill", lambda r: r.metric == "ttft" and not r.concurrent, 0.25, 0.10, "-"),
    ("time per token under concurrency", lambda r: r.metric == "tpot" and r.batch > 1, 0.15, 0.08, "19.8 % (aiconfigurator)"),
    ("time to first token under concurrency", lambda r: r.metric == "ttft" and r.concurrent, 0.30, 0.15, "50 % (aiconfigurator)"),
    ("peak memory", lambda r: r.metric == "memory", 0.05, 0.03, "100 MiB claimed, GiB errors reported"),
    ("energy per token", lambda r: r.metric == "energy", 0.20, 0.10, "up to 40 % (CodeCarbon)"),
)  # fmt: skip


def ratios(laws: Laws, table: Observed) -> np.ndarray:
    """Return predicted / measured of each row."""
    law = law_of(laws, table.family, table.tags)
    found = np.empty(len(table))
    for quantity in set(table.quantity):
        here = table.quantity == quantity
        of = {name: value[here] for name, value in law.items()}
        found[here] = predict(quantity, table.only(here).deployments, of) / table.value[here]
    return found


def left_out(table: Observed, rows: Sequence[Row], groups: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return (ratios of each row under laws fitted without its group, its fold)."""
    from sklearn.model_selection import GroupKFold

    found, fold = np.empty(len(rows)), np.empty(len(rows), dtype=int)
    for i, (train, test) in enumerate(GroupKFold(FOLDS).split(groups, groups=groups)):
        found[test] = ratios(fit(table.only(train)), table.only(test))
        fold[test] = i
    return found, fold


def judge(rows: Sequence[Row], ratio: np.ndarray, fold: np.ndarray) -> Judged:
    """Return the rows with their calibrated ratios and whether intervals held them."""
    error = np.abs(np.log(ratio))
    covered = np.empty(len(rows))
    for i, row in enumerate(rows):
        covered[i] = error[i] <= _width(rows, error, fold, row, int(fold[i]))
    device = [(r.device, r.family, r.metric, r.batch > 1) for r in rows]
    model = [(*key, r.shape.name) for key, r in zip(device, rows)]
    return Judged(rows, ratio, _calibrated(device, ratio), _calibrated(model, ratio), covered)


_WIDTHS: dict[tuple[int, str, str, int], float] = {}


def _width(rows: Sequence[Row], error: np.ndarray, fold: np.ndarray, row: Row, own: int) -> float:
    key = (id(error), row.metric, row.family, own)
    if key not in _WIDTHS:
        other = fold != own
        metric = np.array([r.metric == row.metric for r in rows]) & other
        family = np.array([r.family == row.family for r in rows]) & metric
        _WIDTHS[key] = _quantile(error[family if family.sum() >= FEWEST else metric])
    return _WIDTHS[key]


def _quantile(errors: np.ndarray) -> float:
    """Return the quantile that covers LEVEL of the next error as well (conformal, finite sample)."""
    if not len(errors):
        return float("inf")
    return float(np.quantile(errors, min(1.0, LEVEL * (1 + 1 / len(errors))), method="higher"))


def _calibrated(keys: Sequence[Hashable], ratio: np.ndarray) -> np.ndarray:
    """Return the ratios after a few rows of each key shifted the others; nan for those few and where there are no others."""
    found = np.full(len(keys), np.nan)
    groups = defaultdict(list)
    for i, key in enumerate(keys):
        groups[key].append(i)
    for members in groups.values():
        n = min(CALIBRATION_ROWS, len(members) // 2)
        known = [members[j] for j in np.linspace(0, len(members) - 1, n).astype(int)]
        rest = [i for i in members if i not in known]
        if known:
            found[rest] = ratio[rest] / np.exp(np.log(ratio[known]).sum() / (n + 1))
    return found


def summary(judged: Judged, chosen: Iterable[int]) -> dict[str, Any]:
    """Return how some rows fared: absolute errors as shares, rank correlation within (model, device), coverage."""
    index = np.fromiter(chosen, dtype=int)
    errors = np.abs(judged.ratio[index] - 1)
    low, mid, high = np.quantile(errors, (0.25, 0.5, 0.75))
    row = {
        "n": len(index), "median": mid, "lower_quartile": low, "upper_quartile": high,
        "bias": float(np.median(judged.ratio[index])) - 1, "coverage": float(judged.covered[index].mean()),
        "rank": _rank(judged, index), "calibrated_median": _median_error(judged.calibrated[index]),
        "known_model_median": _median_error(judged.known_model[index]),
    }  # fmt: skip
    return {k: round(float(v), 4) if isinstance(v, float) else v for k, v in row.items()}


def _median_error(ratio: np.ndarray) -> float | None:
    known = ratio[~np.isnan(ratio)]
    return float(np.median(np.abs(known - 1))) if len(known) else None


def _rank(judged: Judged, index: np.ndarray) -> float | None:
    """Return the mean Spearman correlation within (model, device, quantity), over groups of five rows or more."""
    groups = defaultdict(list)
    for i in index:
        row = judged.rows[i]
        groups[row.shape.name, row.device, row.metric].append((row.value * judged.ratio[i], row.value))
    found = []
    for pairs in groups.values():
        predicted, measured = np.array(pairs).T
        if len(pairs) >= 5 and np.ptp(predicted) > 0 and np.ptp(measured) > 0:
            found.append(spearman(predicted, measured))
    return float(np.mean(found)) if found else None


def tables(judged: Judged) -> dict[str, Any]:
    """Return the errors by metric, engine family and kind of hardware, and by quantity of the targets."""
    groups = defaultdict(list)
    for i, row in enumerate(judged.rows):
        groups[row.metric, row.family, row.kind].append(i)
    by_group = [
        {"metric": metric, "family": family, "hardware": kind, **summary(judged, rows)}
        for (metric, family, kind), rows in sorted(groups.items())
    ]
    by_target = {}
    for name, of, *_ in TARGETS:
        rows = [i for i, row in enumerate(judged.rows) if of(row)]
        if rows:
            by_target[name] = summary(judged, rows)
    every = summary(judged, range(len(judged.rows)))
    timed = np.array([i for i, row in enumerate(judged.rows) if row.metric == "tpot"], dtype=int)
    low = [judged.ratio[i] for i, row in enumerate(judged.rows) if row.metric == "memory"]
    whole = {
        "rank": round(_rank(judged, timed) or 0.0, 3),
        "coverage": every["coverage"],
        "too_low": round(1 - min(low), 3),
    }
    return {"groups": by_group, "quantities": by_target, "whole": whole}


def report(records: Iterable[dict[str, str]]) -> tuple[dict[str, Any], Judged, Observed]:
    """Return all figures of some rows, and the rows judged by laws fitted without their device."""
    kept, left = usable(iter(records))
    table, rows = observed(kept, left)
    found: dict[str, Any] = {"rows": len(rows)}
    devices = judge(rows, *left_out(table, rows, [r.device for r in rows]))
    models = judge(rows, *left_out(table, rows, [r.shape.name for r in rows]))
    found["unseen devices"], found["unseen models"] = tables(devices), tables(models)
    found["left_out"] = [{"metric": m, "why": why, "n": n} for (m, why), n in sorted(left.items())]
    return found, devices, table


def write_laws(table: Observed, devices: Judged) -> None:
    """Write the laws fitted to all rows, with the factor that held 90 % of the errors on unseen devices."""
    laws = dict(fit(table))
    errors = np.abs(np.log(devices.ratio))
    for quantity in QUANTITIES:
        of = np.array([r.metric == quantity for r in devices.rows])
        laws[POOLED, f"spread {quantity}", ""] = float(np.exp(_quantile(errors[of])))
        for family in sorted({r.family for r in devices.rows}):
            own = of & np.array([r.family == family for r in devices.rows])
            if own.sum() >= FEWEST:
                laws[family, f"spread {quantity}", ""] = float(np.exp(_quantile(errors[own])))
    counts = Counter(table.family)
    with LAWS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("family", "coefficient", "where", "value", "source"))
        for (family, name, where), value in sorted(laws.items()):
            n = len(table) if family == POOLED else counts[family]
            source = f"fitted to {n} published measurements by benchmarks/prediction_error.py, {date.today():%Y-%m}"
            writer.writerow((family, name, where, f"{value:.4g}", source))


def shipped_errors() -> dict[str, float]:
    """Return the median error of the shipped laws on the committed rows, by `metric family`: what the ratchet holds."""
    from cost_models.serving import shipped

    kept, left = usable(committed())
    table, rows = observed(kept, left)
    errors = np.abs(ratios(shipped(), table) - 1)
    names = np.array([f"{r.metric} {r.family}" for r in rows])
    return {
        name: round(float(np.median(errors[names == name])), 4)
        for name in sorted(set(names))
        if (names == name).sum() >= FEWEST
    }


def as_markdown(found: dict[str, Any]) -> str:
    """Return the report for people."""
    parts = []
    for title in ("unseen devices", "unseen models"):
        known = found[title]["quantities"]
        lines = ["| quantity | n | median error | target | a few rows of the device | and of the model | target | intervals hold | rank | best known peer |",
                 "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for name, _, target, later, peer in TARGETS:
            if row := known.get(name):
                cells = (
                    _against(row["median"], target),
                    f"≤ {target:.0%}",
                    _against(row["calibrated_median"], later),
                    _against(row["known_model_median"], later),
                    f"≤ {later:.0%}",
                )
                lines.append(
                    f"| {name} | {row['n']} | {' | '.join(cells)} | {row['coverage']:.0%} | {_or_dash(row['rank'])} | {peer} |"
                )
        whole = found[title]["whole"]
        lines.append(
            f"\nTime per token of configurations of one model on one device: mean rank correlation {whole['rank']:.2f} "
            f"{_mark(whole['rank'] >= 0.9)} (target ≥ 0.9). 90 % intervals hold {whole['coverage']:.0%} of all rows "
            f"{_mark(0.85 <= whole['coverage'] <= 0.95)} (target 85 to 95 %). Peak memory is told too low by at most "
            f"{whole['too_low']:.0%} {_mark(whole['too_low'] <= 0.03)} (target 3 %)."
        )
        parts.append(f"### {title.capitalize()}\n\n" + "\n".join(lines))
    lines = ["| metric | engine | hardware | n | median | quartiles | bias | intervals hold | rank | a few rows | unseen models |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    other = {(r["metric"], r["family"], r["hardware"]): r["median"] for r in found["unseen models"]["groups"]}
    for r in found["unseen devices"]["groups"]:
        key = (r["metric"], r["family"], r["hardware"])
        lines.append(
            f"| {MEANING[r['metric']]} | {r['family']} | {r['hardware']} | {r['n']} | {r['median']:.1%} | {r['lower_quartile']:.0%} to {r['upper_quartile']:.0%} "
            f"| {r['bias']:+.0%} | {r['coverage']:.0%} | {_or_dash(r['rank'])} | {_or_dash(r['calibrated_median'], '.1%')} | {other[key]:.1%} |"
        )
    parts.append("### By engine and hardware, unseen devices\n\n" + "\n".join(lines))
    lines = ["| metric of the row | why it is left out | n |", "|---|---|---|"]
    lines += [f"| {r['metric']} | {r['why']} | {r['n']} |" for r in found["left_out"]]
    parts.append("### Left out\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _against(value: float | None, target: float) -> str:
    return "-" if value is None else f"{value:.1%} {_mark(value <= target)}"


def _mark(met: bool) -> str:
    return "✓" if met else "✗"


def _or_dash(value: float | None, how: str = ".2f") -> str:
    return "-" if value is None else format(value, how)


def main() -> None:
    every = "--all" in sys.argv[1:]
    if every and not SHARED.is_file():
        sys.exit("../shared/data/ground_truth.csv is not here")
    found, devices, table = report(records() if every else committed())
    if "--fit" in sys.argv[1:]:
        write_laws(table, devices)
    text = as_markdown(found)
    print(text)
    path = HERE / "prediction_error.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kept["all rows" if every else "committed rows"] = found
    kept["shipped laws on committed rows"] = shipped_errors()
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
