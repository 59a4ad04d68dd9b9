"""How wrong the laws of serving engines are on measurements they have not seen, next to the targets.

    python benchmarks/prediction_error.py              # committed rows: prints, writes prediction_error.json
    python benchmarks/prediction_error.py --all        # and the rows of ../shared that may not be committed
    python benchmarks/prediction_error.py --fit        # before that, fits knowledge_base/data/engine_laws.csv anew
    python benchmarks/prediction_error.py --rows FILE  # the shipped laws on any rows in the columns of ../shared
    python benchmarks/prediction_error.py --check      # fails where an error on committed rows is worse than written

Laws are fitted without whole devices, then without whole models, and judged on what was left out. `A few rows`: eight
measurements of a device and engine (or of one model on it) tell the others of the same quantity
(cost_models/serving_calibration.py). Which eight is chosen from the configurations alone, before anything is measured:
those that leave least unknown. With fewer than sixteen rows half of them tell the other half.
Intervals are those errors' 90 % quantile on the other folds (conformal). Single thread: OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.public_rows import SHARED, Row, committed, observed, read, records, usable
from benchmarks.readme_tables import figures, keep_figures
from cost_models.error_report import spearman
from cost_models.serving import POOLED, QUANTITIES, Laws, law_of, memory_slack, predict, shipped, spread
from cost_models.serving_calibration import calibrated, most_telling, widening
from cost_models.serving_fit import Observed, fit

HERE = Path(__file__).resolve().parent
WRITTEN = HERE / "prediction_error.json"
LAWS = HERE.parent / "knowledge_base/data/engine_laws.csv"
FOLDS = 20  # groups of whole devices or models left out together
LEVEL = 0.9
GUARD = 0.98  # of memory errors that the guarded figure covers
CALIBRATION_ROWS = 8
FEWEST = 10  # errors of a family before it has an interval of its own
WORSE = 0.01  # of a median error that --check lets pass: other versions of numpy and scipy stop fits elsewhere
TOO_LOW = 0.03  # of peak memory
COLUMNS = ("source_url", "licence", "model", "hardware", "engine", "weight_dtype", "batch", "prompt_tokens", "output_tokens", "metric", "value", "notes")  # fmt: skip
MEANING = {
    "tpot": "time per token", "ttft": "time to first token", "request": "whole request", "energy": "energy per token",
    "power": "power", "memory": "peak memory",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Errors:
    """Ratios predicted / measured, as (rows,) arrays; after a few rows, nan for the rows that told the others."""

    ratio: np.ndarray
    few: np.ndarray  # after a few rows of the device and engine
    few_sd: np.ndarray  # and the standard deviation of its logarithm that was promised
    model: np.ndarray  # after a few rows of that model on it
    model_sd: np.ndarray


@dataclass(frozen=True, slots=True)
class Judged:
    """Rows with their errors, and how many times as wide as its interval each is, as (rows,) arrays."""

    rows: Sequence[Row]
    errors: Errors
    beyond: np.ndarray  # log error over the interval's: inside up to 1, negative where predicted too low
    few_beyond: np.ndarray
    model_beyond: np.ndarray
    guarded: np.ndarray  # guarded / measured of memory, nan for other rows


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


def errors(laws: Laws, table: Observed, rows: Sequence[Row]) -> Errors:
    """Return the errors of some laws, and what is left of them after a few rows."""
    ratio = ratios(laws, table)
    few, few_sd = _after(laws, table, ratio, [_of_device(r) for r in rows])
    model, model_sd = _after(laws, table, ratio, [(*_of_device(r), r.shape.name) for r in rows])
    return Errors(ratio, few, few_sd, model, model_sd)


def _of_device(row: Row) -> tuple[Hashable, ...]:
    return row.device, row.family, row.metric, row.batch > 1


def _after(laws: Laws, table: Observed, ratio: np.ndarray, keys: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Return (ratios, promised standard deviations of their logarithms) after a few rows of each key told the others."""
    found, sd = np.full(len(keys), np.nan), np.full(len(keys), np.nan)
    groups = defaultdict(list)
    for i, key in enumerate(keys):
        groups[key].append(i)
    for members in map(np.array, groups.values()):
        n = min(CALIBRATION_ROWS, len(members) // 2)
        if n:
            telling = most_telling(laws, table.only(members), n)
            known, others = members[telling], np.delete(members, telling)
            told = calibrated(laws, table.only(known), table.only(others))
            found[others], sd[others] = ratio[others] * told.factor, told.log_sd
    return found, sd


def left_out(table: Observed, rows: Sequence[Row], groups: Sequence[str]) -> tuple[Errors, np.ndarray]:
    """Return (errors on each row of laws fitted without its group, its fold)."""
    from sklearn.model_selection import GroupKFold

    found = Errors(*(np.empty(len(rows)) for _ in fields(Errors)))
    fold = np.empty(len(rows), dtype=int)
    for i, (train, test) in enumerate(GroupKFold(FOLDS).split(groups, groups=groups)):
        part = errors(fit(table.only(train)), table.only(test), [rows[j] for j in test])
        for field in fields(Errors):
            getattr(found, field.name)[test] = getattr(part, field.name)
        fold[test] = i
    return found, fold


def judge(rows: Sequence[Row], found: Errors, fold: np.ndarray) -> Judged:
    """Return the rows with intervals from the errors of the other folds."""
    off = [np.log(found.ratio), np.log(found.few) / found.few_sd, np.log(found.model) / found.model_sd]
    beyond = (each / _widths(rows, np.abs(each), fold) for each in off)
    slack, short = _memory_errors(rows, found)
    return Judged(rows, found, *beyond, found.ratio + slack * np.maximum(_widths(rows, short, fold, GUARD), 0.0))


def _memory_errors(rows: Sequence[Row], found: Errors) -> tuple[np.ndarray, np.ndarray]:
    """Return (slack / measured, how many times that was too low) of memory, nan for other rows."""
    measured = np.array([r.value if r.metric == "memory" else np.nan for r in rows])
    slack = memory_slack(found.ratio * measured, np.array([r.devices for r in rows])) / measured
    return slack, (1 - found.ratio) / slack


def judge_shipped(rows: Sequence[Row], found: Errors) -> Judged:
    """Return the rows with the intervals that are shipped with the laws."""
    laws = shipped()
    width = np.log([spread(laws, r.metric, r.family) for r in rows])
    times = np.array([widening(laws, r.metric, r.family) for r in rows])
    few, model = np.log(found.few) / found.few_sd, np.log(found.model) / found.model_sd
    slack, _ = _memory_errors(rows, found)
    guarded = [laws.get((r.family, "guard memory", "")) or laws[POOLED, "guard memory", ""] for r in rows]
    return Judged(rows, found, np.log(found.ratio) / width, few / times, model / times, found.ratio + slack * guarded)


def _widths(rows: Sequence[Row], scores: np.ndarray, fold: np.ndarray, level: float = LEVEL) -> np.ndarray:
    """Return for each row what held a level of its family's scores on the other folds, or of all families' if too few."""
    metric, family = np.array([r.metric for r in rows]), np.array([r.family for r in rows])
    known, widths = ~np.isnan(scores), np.empty(len(rows))
    for q, name, own in {(r.metric, r.family, int(i)) for r, i in zip(rows, fold)}:
        other = known & (fold != own) & (metric == q)
        same = other & (family == name)
        here = (metric == q) & (family == name) & (fold == own)
        widths[here] = _quantile(scores[same if same.sum() >= FEWEST else other], level)
    return widths


def _quantile(scores: np.ndarray, level: float = LEVEL) -> float:
    """Return the quantile that covers a level of the next score as well (conformal, finite sample)."""
    if not len(scores):
        return float("inf")
    return float(np.quantile(scores, min(1.0, level * (1 + 1 / len(scores))), method="higher"))


def summary(judged: Judged, chosen: Iterable[int]) -> dict[str, Any]:
    """Return how some rows fared: absolute errors as shares, rank correlation within (model, device), coverage."""
    index, found = np.fromiter(chosen, dtype=int), judged.errors
    off = np.abs(found.ratio[index] - 1)
    low, mid, high = np.quantile(off, (0.25, 0.5, 0.75))
    row = {
        "n": len(index), "median": mid, "lower_quartile": low, "upper_quartile": high,
        "bias": float(np.median(found.ratio[index])) - 1, "coverage": _inside(judged.beyond[index]),
        "rank": rank(judged.rows, found.ratio, index), "calibrated_median": _median_error(found.few[index]),
        "calibrated_coverage": _inside(judged.few_beyond[index]), "calibrated_rank": rank(judged.rows, found.few, index),
        "known_model_median": _median_error(found.model[index]), "known_model_coverage": _inside(judged.model_beyond[index]),
        "known_model_rank": rank(judged.rows, found.model, index),
    }  # fmt: skip
    return {k: round(float(v), 4) if isinstance(v, float) else v for k, v in row.items()}


def _median_error(ratio: np.ndarray) -> float | None:
    known = ratio[~np.isnan(ratio)]
    return float(np.median(np.abs(known - 1))) if len(known) else None


def _inside(beyond: np.ndarray) -> float | None:
    known = beyond[~np.isnan(beyond)]
    return float(np.mean(np.abs(known) <= 1)) if len(known) else None


def rank(rows: Sequence[Row], ratio: np.ndarray, index: np.ndarray) -> float | None:
    """Return the mean Spearman correlation within (model, device, quantity), over groups of five rows or more."""
    groups = defaultdict(list)
    for i in index:
        if not np.isnan(ratio[i]):
            groups[rows[i].shape.name, rows[i].device, rows[i].metric].append((rows[i].value * ratio[i], rows[i].value))
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
    timed = [i for i, row in enumerate(judged.rows) if row.metric == "tpot"]
    every = summary(judged, range(len(judged.rows)))
    whole = {name: every[name] for name in every if name.endswith("coverage")}
    if timed:
        whole |= {name: value for name, value in summary(judged, timed).items() if name.endswith("rank")}
    memory = [i for i, row in enumerate(judged.rows) if row.metric == "memory"]
    if memory:
        low = judged.errors.ratio[memory] < 1 - TOO_LOW
        whole["too_low"] = round(float(1 - judged.errors.ratio[memory].min()), 4)
        whole["share_too_low"] = round(float(low.mean()), 4)
        whole["share_above_guard"] = round(float((judged.guarded[memory] < 1 - TOO_LOW).mean()), 4)
        whole["guard"] = round(float(np.median(judged.guarded[memory] / judged.errors.ratio[memory])), 4)
    return {"groups": by_group, "quantities": by_target, "whole": whole}


def report(records: Iterable[dict[str, str]]) -> tuple[dict[str, Any], Errors, Observed, list[Row]]:
    """Return all figures of some rows, the errors of laws fitted without their device, and the rows that could be used."""
    kept, left = usable(records)
    table, rows = observed(kept, left)
    devices, device_folds = left_out(table, rows, [r.device for r in rows])
    models, model_folds = left_out(table, rows, [r.shape.name for r in rows])
    found = {
        "rows": len(rows), "unseen devices": tables(judge(rows, devices, device_folds)),
        "unseen models": tables(judge(rows, models, model_folds)), "left_out": _reasons(left),
    }  # fmt: skip
    return found, devices, table, rows


def report_shipped(records: Iterable[dict[str, str]]) -> dict[str, Any]:
    """Return all figures of the shipped laws on some rows.

    Raises:
        SystemExit: none of the rows can be predicted.
    """
    kept, left = usable(records)
    if kept:
        table, rows = observed(kept, left)
    if not kept or not rows:
        reasons = [f"  {n} {metric}: {why}" for (metric, why), n in sorted(left.items())]
        sys.exit("\n".join(["none of the rows can be predicted:", *reasons]))
    return {
        "rows": len(rows), "shipped laws": tables(judge_shipped(rows, errors(shipped(), table, rows))),
        "left_out": _reasons(left),
    }  # fmt: skip


def _reasons(left: Counter[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"metric": m, "why": why, "n": n} for (m, why), n in sorted(left.items())]


def write_laws(table: Observed, rows: Sequence[Row], devices: Errors) -> None:
    """Write the laws fitted to all rows, with what held 90 % of the errors on unseen devices, before and after a few rows."""
    laws = dict(fit(table))
    scores = {"spread": np.abs(np.log(devices.ratio)), "calibrated": np.abs(np.log(devices.few) / devices.few_sd)}
    for name, score in scores.items():
        known = ~np.isnan(score)
        for quantity in QUANTITIES:
            for family in sorted({POOLED, *table.family}):
                of = known & (table.quantity == quantity) & ((table.family == family) | (family == POOLED))
                if of.sum() >= FEWEST:
                    width = _quantile(score[of])
                    laws[family, f"{name} {quantity}", ""] = float(np.exp(width)) if name == "spread" else width
    _, short = _memory_errors(rows, devices)
    for family in sorted({POOLED, *table.family}):
        of = (table.quantity == "memory") & ((table.family == family) | (family == POOLED))
        if of.sum() >= FEWEST:
            laws[family, "guard memory", ""] = max(_quantile(short[of], GUARD), 0.01)
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
    kept, left = usable(committed())
    table, rows = observed(kept, left)
    off = np.abs(ratios(shipped(), table) - 1)
    names = np.array([f"{r.metric} {r.family}" for r in rows])
    return {
        name: round(float(np.median(off[names == name])), 4)
        for name in sorted(set(names))
        if (names == name).sum() >= FEWEST
    }


def worse(found: dict[str, Any], held: dict[str, Any]) -> list[str]:
    """Return one line for each error that is worse than the one written: the ratchet."""
    lines = []
    for title in ("unseen devices", "unseen models"):
        for name, row in held[title]["quantities"].items():
            for figure in ("median", "calibrated_median", "known_model_median"):
                now, then = found[title]["quantities"][name][figure], row[figure]
                if then is not None and now > then + WORSE:
                    lines.append(f"{title}, {name}, {figure}: {now:.1%}, was {then:.1%}")
    return lines


def as_markdown(found: dict[str, Any]) -> str:
    """Return the report for people."""
    titles = [title for title in ("unseen devices", "unseen models", "shipped laws") if title in found]
    parts = [f"### {title.capitalize()}\n\n{_targets(found[title])}" for title in titles]
    title = titles[0]
    other = {_group(r): r["median"] for r in found.get("unseen models", {"groups": ()})["groups"]}
    lines = _table("metric", "engine", "hardware", "n", "median", "quartiles", "bias", "intervals hold", "rank", "a few rows",
                   "and of the model", *(["unseen models"] if other else []))  # fmt: skip
    for r in found[title]["groups"]:
        cells = [
            MEANING[r["metric"]], "any" if r["family"] == POOLED else r["family"], r["hardware"], str(r["n"]), f"{r['median']:.1%}",
            f"{r['lower_quartile']:.0%} to {r['upper_quartile']:.0%}", f"{r['bias']:+.0%}", f"{r['coverage']:.0%}", _or_dash(r["rank"]),
            _or_dash(r["calibrated_median"], ".1%"), _or_dash(r["known_model_median"], ".1%"),
            *([f"{other[_group(r)]:.1%}"] if other else []),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    parts.append(f"### By engine and hardware, {title}\n\n" + "\n".join(lines))
    lines = _table("metric of the row", "why it is left out", "n")
    lines += [f"| {r['metric']} | {r['why']} | {r['n']} |" for r in found["left_out"]]
    parts.append("### Left out\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _group(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["metric"], row["family"], row["hardware"]


def _table(*heads: str) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]


def _targets(of: dict[str, Any]) -> str:
    lines = _table("quantity", "n", "median error", "target", "a few rows of the device", "and of the model", "target",
                   "intervals hold", "after a few rows", "rank", "best known peer")  # fmt: skip
    for name, _, target, later, peer in TARGETS:
        if row := of["quantities"].get(name):
            cells = [
                name, str(row["n"]), _against(row["median"], target), f"≤ {target:.0%}", _against(row["calibrated_median"], later),
                _against(row["known_model_median"], later), f"≤ {later:.0%}", f"{row['coverage']:.0%}",
                _or_dash(row["calibrated_coverage"], ".0%"), _or_dash(row["rank"]), peer,
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    whole = of["whole"]
    told = [f"90 % intervals hold {_within(whole['coverage'], 0.85, 0.95)} of all rows (target 85 to 95 %), after a few rows "
            f"{_within(whole['calibrated_coverage'], 0.88, 0.92)}, with rows of the model {_within(whole['known_model_coverage'], 0.88, 0.92)} "
            "(target 88 to 92 %)."]  # fmt: skip
    if "rank" in whole:
        told.append(
            f"Time per token of configurations of one model on one device: mean rank correlation {_at_least(whole['rank'], 0.9)} (target ≥ 0.9), "
            f"after a few rows {_at_least(whole['calibrated_rank'], 0.95)}, with rows of the model {_at_least(whole['known_model_rank'], 0.95)} (target ≥ 0.95)."
        )
    if "too_low" in whole:
        told.append(
            f"Peak memory is told more than {TOO_LOW:.0%} too low in {whole['share_too_low']:.0%} of rows, by at most {_against(whole['too_low'], TOO_LOW)}; "
            f"the guarded figure, which is to decide what fits, is so in {whole['share_above_guard']:.1%} and {whole['guard'] - 1:.0%} higher in the middle."
        )
    return "\n".join(lines) + "\n\n" + "\n".join(told)


def _within(value: float | None, low: float, high: float) -> str:
    return "-" if value is None else f"{value:.0%} {_mark(low <= value <= high)}"


def _at_least(value: float | None, least: float) -> str:
    return "-" if value is None else f"{value:.2f} {_mark(value >= least)}"


def _against(value: float | None, target: float) -> str:
    return "-" if value is None else f"{value:.1%} {_mark(value <= target)}"


def _mark(met: bool) -> str:
    return "✓" if met else "✗"


def _or_dash(value: float | None, how: str = ".2f") -> str:
    return "-" if value is None else format(value, how)


def _rows_of(path: Path) -> list[dict[str, str]]:
    try:
        rows = list(read(path))
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        sys.exit(f"cannot read {path}: {problem}")
    missing = [column for column in COLUMNS if rows and rows[0].get(column) is None]
    if missing or not rows:
        sys.exit(
            f"{path}: {'no column ' + ', '.join(missing) if missing else 'no rows'}; needed are {', '.join(COLUMNS)}"
        )
    return [{column: row.get(column) or "" for column in COLUMNS} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="and the rows of ../shared that may not be committed")
    parser.add_argument("--fit", action="store_true", help="before that, fit knowledge_base/data/engine_laws.csv anew")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="judge the shipped laws on these rows; write nothing")
    parser.add_argument("--check", action="store_true", help="fail where an error is worse than written; write nothing")
    options = parser.parse_args()
    if options.rows:
        print(as_markdown(report_shipped(_rows_of(options.rows))))
        return
    if options.all and not SHARED.is_file():
        sys.exit("../shared/data/ground_truth.csv is not here")
    found, devices, table, rows = report(records() if options.all else committed())
    title = "all rows" if options.all else "committed rows"
    if options.check:
        lines = worse(found, figures(WRITTEN)[title])
        sys.exit("\n".join(["worse than written:", *lines]) if lines else None)
    if options.fit:
        write_laws(table, rows, devices)
        shipped.cache_clear()
    print(as_markdown(found))
    written = figures(WRITTEN) | {title: found, "shipped laws on committed rows": shipped_errors()}
    keep_figures(WRITTEN, written)
    print(f"wrote {WRITTEN.name}")


if __name__ == "__main__":
    main()
