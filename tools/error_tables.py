"""What the page "Errors of predictions" says beside the tables of errors: each target that is missed, by how much, and
which term is to blame. Figures come from what the benchmarks wrote; a target missed without a word here stops the build.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import prediction_error

FIGURES = {  # column of prediction_error.json -> what was known of the device
    "median": "nothing of it", "calibrated_median": "a few rows of the device", "known_model_median": "a few rows of the model on it",
}  # fmt: skip
METRICS = {  # quantity of the targets -> metric of the groups it is made of
    "decode, batch 1, dense": "tpot", "decode, batch 1, mixture of experts": "tpot", "prefill": "ttft",
    "time per token under concurrency": "tpot", "time to first token under concurrency": "ttft", "peak memory": "memory",
    "energy per token": "energy",
}  # fmt: skip
# Quantity -> term of its law that is wrong, and why; "quantity, few" where it is another after a few rows.
# Each is told at length in benchmarks/README.md.
BLAME = {
    "time per token under concurrency": "weights: the share of a bandwidth that vLLM and SGLang reach, told from few kinds of card; then the prompts of other requests, whose lengths one data set does not state",
    "time per token under concurrency, few": "weights and host: models differ on one engine in ways that rows of others do not show",
    "time to first token under concurrency": "queue: clients that stay in step wait longer than others, and TensorRT-LLM at many clients for something that grows with the answer",
    "peak memory": "engine and activations: what else ran on the card, and versions of one engine that keep different activations",
    "energy per token, few": "activity: what a model draws beside the idle power, which rows of other models do not show",
    "prefill": "prompt: the share of arithmetic that MLC and TensorRT-LLM reach on GeForce cards, told from other engines and cards at half of what was measured",
    "rank correlation": "host: small models take the same time whatever else; exchange: one latency for all kinds of links",
    "memory too low": "engine: what a deployment takes besides is not in its configuration; the guarded figure decides what fits",
    "intervals": "the width of the errors, told from other devices' and models'",
    "decode on this machine": "weights: the machine read 15 % faster while it was calibrated than when it was judged; models of 20 million parameters lie in the caches",
    "prefill on this machine": "arithmetic: large products tell the rate, prompts of small models are thin",
    "memory on this machine": "engine: what it takes beside weights and cache",
    "memory of fine-tuning": "activations: what a framework keeps for the backward pass",
}  # fmt: skip
WHOLE = (("coverage", 0.85, 0.95), ("calibrated_coverage", 0.88, 0.92), ("known_model_coverage", 0.88, 0.92))
RANKS = (("rank", 0.9), ("calibrated_rank", 0.95), ("known_model_rank", 0.95))
ON_THIS_MACHINE = (("decode", "tpot_s", 0.06), ("prefill", "ttft_s", 0.10), ("memory", "peak_memory_bytes", 0.03))
MACHINE_KNOWS = {"tables": "nothing of it", "calibrated": "a calibration of 60 s", "and other models": "that, and measurements of other models"}  # fmt: skip
FINETUNING_TARGET = 0.08


@dataclass(frozen=True, slots=True)
class Miss:
    """A target that is missed. `by` in points of a share, or of a correlation; `furthest`: the groups that are furthest off."""

    left_out: str
    quantity: str
    known: str
    figure: str
    target: str
    by: str
    furthest: str
    blame: str

    @property
    def cells(self) -> tuple[str, ...]:
        """A row of HEADS."""
        return self.left_out, self.quantity, self.known, self.figure, self.target, self.by, self.furthest, self.blame


HEADS = ("never seen", "quantity", "known", "error", "target", "missed by", "furthest off of that metric, any batch", "term to blame")  # fmt: skip


def missed(known: Mapping[str, Any]) -> Iterator[Miss]:
    """Yield the targets that one section of prediction_error.json misses.

    Raises:
        KeyError: a target is missed and nothing here says which term is to blame.
    """
    for left_out in ("unseen devices", "unseen models"):
        of, what = known[left_out], left_out.removeprefix("unseen ")
        for quantity, _, target, later, _ in prediction_error.TARGETS:
            row = of["quantities"].get(quantity, {})
            for figure, about in FIGURES.items():
                most = target if figure == "median" else later
                if (error := row.get(figure)) is not None and error > most:
                    yield Miss(
                        what, quantity, about, f"{error:.1%}", f"≤ {most:.0%}", _points(error - most),
                        _furthest(of["groups"], METRICS[quantity], figure, most), _blame(quantity, figure),
                    )  # fmt: skip
        yield from _of_all(what, of["whole"])


def _of_all(left_out: str, whole: Mapping[str, float]) -> Iterator[Miss]:
    """Yield what intervals, ranks and memory told too low miss, over all rows."""
    for name, low, high in WHOLE:
        about = FIGURES[name.replace("coverage", "median")]
        if (held := whole.get(name)) is not None and not low <= held <= high:
            by = _points(max(low - held, held - high))
            yield Miss(left_out, "90 % intervals", about, f"{held:.1%}", f"{low:.0%} to {high:.0%}", by, "", BLAME["intervals"])  # fmt: skip
    for name, least in RANKS:
        about = FIGURES[name.replace("rank", "median") if name != "rank" else "median"]
        if (rank := whole.get(name)) is not None and rank < least:
            yield Miss(left_out, "rank correlation", about, f"{rank:.3f}", f"≥ {least:g}", f"{least - rank:.3f}", "", BLAME["rank correlation"])  # fmt: skip
    if (low := whole.get("too_low", 0.0)) > (most := prediction_error.TOO_LOW):
        share = f"{whole['share_too_low']:.0%} of rows; of the guarded figure {whole['share_above_guard']:.1%}"
        yield Miss(
            left_out, "memory told too low", FIGURES["median"], f"up to {low:.1%}", f"never more than {most:.0%}",
            _points(low - most), share, BLAME["memory too low"],
        )  # fmt: skip


def _blame(quantity: str, figure: str) -> str:
    return (figure != "median" and BLAME.get(f"{quantity}, few")) or BLAME[quantity]


def _points(by: float) -> str:
    return f"{100 * by:.1f} points"


def _furthest(groups: Iterable[Mapping[str, Any]], metric: str, figure: str, target: float) -> str:
    """Return the two groups of a metric whose rows are beyond its target by most, all rows taken together."""
    beyond = [(g["n"] * (g[figure] - target), g) for g in groups if g["metric"] == metric and (g[figure] or 0) > target]
    worst = sorted(beyond, key=lambda pair: -pair[0])[:2]
    return "; ".join(f"{g['family']} on {g['hardware']}, {g[figure]:.0%} of {g['n']} rows" for _, g in worst)


def on_this_machine(errors: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return what calibration_error.json says: quantity, n, error by what was known, target, missed by, term to blame."""
    rows: list[tuple[str, ...]] = []
    for quantity, metric, target in ON_THIS_MACHINE:
        medians = [errors[known][metric]["median_abs_ratio"] for known in MACHINE_KNOWS]
        over = medians[1] - target  # the target is of a calibration
        told = (_points(over), BLAME[f"{quantity} on this machine"]) if over > 0 else ("", "")
        rows.append((quantity, f"{errors['calibrated'][metric]['n']}", *(f"{m:.1%}" for m in medians), f"≤ {target:.0%}", *told))  # fmt: skip
    return rows


def of_finetuning() -> list[tuple[str, ...]]:
    """Return how far predicted memory and speed of published fine-tuning runs are off, as compared now."""
    from benchmarks.training_error import compare, runs, summary

    found = [compare(run) for run in runs()[0]]
    rows: list[tuple[str, ...]] = []
    for what, speeds, target in (("memory", False, FINETUNING_TARGET), ("speed", True, None)):
        of = summary([miss for miss in found if (miss.run.counts == "tokens_per_s") == speeds])
        over = 0.0 if target is None else of["median"] - target
        told = (_points(over), BLAME["memory of fine-tuning"]) if over > 0 else ("", "")
        aim = "none" if target is None else f"≤ {target:.0%}"
        rows.append((what, f"{of['n']}", f"{of['median']:.1%}", f"{of['q1']:.1%} to {of['q3']:.1%}", f"{of['inside']:.0%}", aim, *told))  # fmt: skip
    return rows
