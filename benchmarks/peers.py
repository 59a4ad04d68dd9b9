"""Other tools and published rules on the same measured rows, side by side with ours.

    python benchmarks/peers.py                    # committed rows: prints, writes peers.json and the tables of README.md
    python benchmarks/peers.py --all              # and the rows of ../shared that may not be committed
    python benchmarks/peers.py --install          # before that, makes the environment aiconfigurator needs (850 MB)
    python benchmarks/peers.py --peer llmfit --peers-only   # one of them, without our own fits: seconds, writes nothing

A peer is one file in peer_rules/. A row is asked of every peer; those it cannot answer are counted with its reason. Ours
are the laws fitted without the row's device, judged on exactly the rows the peer answered. Errors are of seconds and
bytes: a rate told twice too high is 50 % too short a time.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks import prediction_error as pe
from benchmarks.peer_rules import aiconfigurator
from benchmarks.peer_rules._asked import Answer, Asked, Peer
from benchmarks.public_rows import SHARED, committed, observed, records, usable_with_records
from benchmarks.readme_tables import figures, keep_figures, placed, plain
from cost_models.error_report import spearman
from cost_models.serving import law_of, predict, shipped
from cost_models.serving_fit import Observed

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "peers.json", HERE / "README.md"
FOLDER = HERE.parent / ".leanplan/peers"
CONCURRENT = "time per token under concurrency"
LOADS = (  # what a serving row tells of its load
    ("· clients in a closed loop", lambda r: r.metric == "tpot" and r.batch > 1 and r.concurrent),
    ("· mean batch of a busy server", lambda r: r.metric == "tpot" and r.batch > 1 and not r.concurrent),
)
QUANTITIES = tuple(  # no peer tells energy
    quantity
    for name, of, *_ in pe.TARGETS
    if name != "energy per token"
    for quantity in ((name, of), *(LOADS if name == CONCURRENT else ()))
)
NEAR = 0.25
TIMED_ROWS = 50
FEWEST = 5  # rows below which a rank is not told


def peers() -> dict[str, Peer]:
    """Return the peers by the name of their file."""
    names = sorted(path.stem for path in (HERE / "peer_rules").glob("[!_]*.py"))
    return {name: importlib.import_module(f"benchmarks.peer_rules.{name}").PEER for name in names}


def rows_of(published: Iterable[Mapping[str, str]]) -> tuple[list[Asked], Observed]:
    """Return the usable rows of the quantities that peers tell, as questions and as columns in the same order."""
    kept, _ = usable_with_records(map(dict, published))
    record_of = {id(row): record for row, record in kept}
    table, rows = observed([row for row, _ in kept], Counter())
    return [Asked(row, record_of[id(row)]) for row in rows], table


def ask(peer: Peer, asked: Sequence[Asked], folder: Path) -> tuple[list[Answer], float]:
    """Return a peer's answers and the median seconds of those that are numbers; nan where they come from a record."""
    answers: list[Answer] = []
    seconds = []
    started = time.perf_counter()
    for answer in peer.answers(asked, folder):
        answers.append(answer)
        now = time.perf_counter()
        if not isinstance(answer, str):
            seconds.append(now - started)
        started = now
    return answers, statistics.median(seconds) if seconds and not peer.recorded(folder) else math.nan


def fared(asked: Sequence[Asked], told: np.ndarray) -> dict[str, float | None]:
    """Return how predictions fared: quartiles of absolute errors, bias, share within NEAR, rank correlation."""
    measured = np.array([one.row.value for one in asked])
    ratio = told / measured
    low, mid, high = np.quantile(np.abs(ratio - 1), (0.25, 0.5, 0.75))
    ranked = len(asked) >= FEWEST and np.ptp(told) > 0 and np.ptp(measured) > 0
    figures = {
        "median": mid, "lower_quartile": low, "upper_quartile": high, "bias": np.median(ratio) - 1,
        "within": np.mean(np.abs(ratio - 1) <= NEAR), "rank": spearman(told, measured) if ranked else None,
    }  # fmt: skip
    return {name: None if value is None else round(float(value), 4) for name, value in figures.items()}


def compared(asked: Sequence[Asked], answers: Sequence[Answer], ours: np.ndarray | None) -> dict[str, Any]:
    """Return how one peer fared by quantity, ours on the same rows, and its reasons where it had no answer."""
    by_quantity = {}
    for name, of in QUANTITIES:
        here = [i for i, one in enumerate(asked) if of(one.row)]
        told = [i for i in here if not isinstance(answers[i], str)]
        if told:
            rows = [asked[i] for i in told]
            found = {
                "rows": len(here),
                "answered": len(told),
                "peer": fared(rows, np.array([answers[i] for i in told], dtype=float)),
            }
            if ours is not None:
                found["ours"] = fared(rows, ours[told])
            by_quantity[name] = found
    reasons = Counter((one.row.metric, answer) for one, answer in zip(asked, answers) if isinstance(answer, str))
    unanswered = [{"metric": metric, "why": why, "n": n} for (metric, why), n in reasons.most_common()]
    return {"quantities": by_quantity, "unanswered": unanswered}


def our_predictions(asked: Sequence[Asked], table: Observed) -> np.ndarray:
    """Return what our laws, fitted without each row's device, say of it."""
    errors, _ = pe.left_out(table, [one.row for one in asked], [one.row.device for one in asked])
    return errors.ratio * table.value


def our_seconds(table: Observed) -> float:
    """Return the median seconds of one estimate with the shipped laws, asked for alone."""
    laws, taken = shipped(), []
    for i in np.linspace(0, len(table) - 1, TIMED_ROWS).astype(int):
        alone = table.only(np.array([i]))
        started = time.perf_counter()
        predict(str(alone.quantity[0]), alone.deployments, law_of(laws, alone.family, alone.tags))
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def report(
    published: Iterable[Mapping[str, str]], chosen: Mapping[str, Peer], folder: Path, *, with_ours: bool
) -> dict[str, Any]:
    """Return how the chosen peers fared on some rows."""
    asked, table = rows_of(published)
    ours = our_predictions(asked, table) if with_ours else None
    wanted = np.array([any(of(one.row) for _, of in QUANTITIES) for one in asked])
    asked = [one for one, is_wanted in zip(asked, wanted) if is_wanted]
    ours = ours[wanted] if ours is not None else None
    found: dict[str, Any] = {"rows": len(asked), "our_seconds": round(our_seconds(table), 6), "peers": {}}
    for peer in chosen.values():
        answers, seconds = ask(peer, asked, folder)
        told = {
            "how": peer.how + (", answers as recorded" if peer.recorded(folder) else ""),
            "source": peer.source,
            "seconds": None if math.isnan(seconds) else float(f"{seconds:.2g}"),
        }
        found["peers"][peer.name] = {**told, **compared(asked, answers, ours)}
    return found


def as_markdown(found: Mapping[str, Any]) -> str:
    """Return the comparison for people."""
    lines = ["| quantity | peer | rows | median error / ours | quartiles / ours | bias / ours | within 25 % / ours | rank / ours |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, _ in QUANTITIES:
        for peer, told in found["peers"].items():
            if row := told["quantities"].get(name):
                cells = " | ".join(
                    _pair(row["peer"], row.get("ours"), how) for how in (_median, _quartiles, _bias, _near, _rank)
                )
                lines.append(f"| {name} | {peer} | {row['answered']} of {row['rows']} | {cells} |")
    lines += [
        "",
        "| peer | how it was run | seconds for an estimate | rows without an answer, and why |",
        "|---|---|---|---|",
    ]
    for peer, told in found["peers"].items():
        reasons = Counter[str]()
        for row in told["unanswered"]:
            reasons[row["why"]] += row["n"]
        why = "; ".join(f"{n} {why}" for why, n in reasons.most_common())
        lines.append(
            f"| [{peer}]({told['source']}) | {told['how']} | {_seconds(told['seconds'])} | {plain(why) or '-'} |"
        )
    lines.append(f"| Leanplan | laws fitted without the device | {_seconds(found['our_seconds'])} | - |")
    return "\n".join(lines) + "\n"


def _pair(peer: Mapping[str, Any], ours: Mapping[str, Any] | None, how: Any) -> str:
    return how(peer) if ours is None else f"{how(peer)} / {how(ours)}"


def _median(row: Mapping[str, Any]) -> str:
    return f"{row['median']:.1%}"


def _quartiles(row: Mapping[str, Any]) -> str:
    return f"{row['lower_quartile']:.0%} to {row['upper_quartile']:.0%}"


def _bias(row: Mapping[str, Any]) -> str:
    return f"{row['bias']:+.0%}"


def _near(row: Mapping[str, Any]) -> str:
    return f"{row['within']:.0%}"


def _rank(row: Mapping[str, Any]) -> str:
    return "-" if row["rank"] is None else f"{row['rank']:.2f}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1g}"


def write(title: str, found: Mapping[str, Any]) -> None:
    """Write the figures, and the tables between the marks of README.md."""
    kept = figures(RESULTS)
    kept[title] = found
    keep_figures(RESULTS, kept)
    README.write_text(with_tables(README.read_text(encoding="utf-8"), kept), encoding="utf-8")


def with_tables(readme: str, kept: Mapping[str, Any]) -> str:
    """Return the text of README.md with the tables of the figures that are kept."""
    for title, found in kept.items():
        readme = placed(readme, f"peers, {title}", as_markdown(found))
    return readme


def main(arguments: Sequence[str] | None = None) -> None:
    known = peers()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="also the rows of ../shared")
    parser.add_argument(
        "--peer", action="append", choices=tuple(known), help="only this one; may be repeated; writes nothing"
    )
    parser.add_argument("--peers-only", action="store_true", help="without our own fits; writes nothing")
    parser.add_argument("--install", action="store_true", help="make the environment of aiconfigurator first")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where environments are (%(default)s)")
    given = parser.parse_args(arguments)
    if given.all and not SHARED.is_file():
        sys.exit("../shared/data/ground_truth.csv is not here")
    if given.install:
        aiconfigurator.install(given.folder)
    chosen = {name: peer for name, peer in known.items() if not given.peer or name in given.peer}
    found = report(records() if given.all else committed(), chosen, given.folder, with_ours=not given.peers_only)
    print(as_markdown(found))
    if not given.peer and not given.peers_only:
        write("all rows" if given.all else "committed rows", found)
        print(f"wrote {RESULTS.name} and the tables of README.md")


if __name__ == "__main__":
    main()
