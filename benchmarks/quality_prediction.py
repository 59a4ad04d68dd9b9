"""How far predicted losses of quality were from published ones, for models and families left out of the fit.

    python benchmarks/quality_prediction.py        # about a minute; writes benchmarks/quality_prediction.json

Every figure is told by a fit that never saw its model (family and size: versions and chat models of one base are left out
together), then by one that never saw its family. Error: median of |predicted - published| in log perplexity. Coverage:
share of figures inside their 90 % interval, whose width is set by the figures of the others alone.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cost_models.quality_fit import Figure, Guess, held, leave_out, published
from knowledge_base.quality import GROUPS

ONE_SHOT = ("besa", "sparsegpt", "wanda")


def _four_bits(f: Figure) -> bool:
    return f.group == "weights" and f.knobs["bits"] == 4 and f.params >= 1e9


def _half_zero(f: Figure) -> bool:
    return f.group == "zeros" and f.knobs["sparsity"] == 0.5 and "pattern" not in f.knobs and f.params >= 1e9


# Cuts beside groups and methods. Aim of the first and the third: error at most 0.05, coverage 85 to 95 %.
CUTS: dict[str, Callable[[Figure], bool]] = {
    "4-bit weights, 1B and larger": _four_bits,
    "50 % zeros, 1B and larger": _half_zero,
    "50 % zeros, 1B and larger, " + ", ".join(ONE_SHOT): lambda f: _half_zero(f) and f.method in ONE_SHOT,
}


def _of(group: str, method: str | None = None) -> Callable[[Figure], bool]:
    return lambda f: f.group == group and method in (None, f.method)


def summary(guesses: Sequence[tuple[Guess, bool]]) -> dict[str, float]:
    """Return how many figures and models there are, how far they were missed, how many were inside."""
    return {
        "rows": len(guesses),
        "models": len({g.figure.model for g, _ in guesses}),
        "median_loss": round(statistics.median(g.figure.loss for g, _ in guesses), 4),
        "median_error": round(statistics.median(g.missed for g, _ in guesses), 4),
        "coverage": round(statistics.mean(inside for _, inside in guesses), 3),
    }


def main() -> dict[str, dict[str, dict[str, float]]]:
    data = published()
    told: dict[str, list[tuple[Guess, bool]]] = {"model": [], "family": []}
    for group in GROUPS:
        own = [f for f in data if f.group == group]
        by_model, by_family = leave_out(own, "model"), leave_out(own, "family")
        told["model"] += zip(by_model, held(by_model), strict=True)
        told["family"] += zip(by_family, held(by_family, by_model), strict=True)
    cuts = dict(CUTS)
    for group in GROUPS:
        cuts[group] = _of(group)
        cuts |= {
            f"{group}: {method}": _of(group, method) for method in sorted({f.method for f in data if f.group == group})
        }
    result = {
        what: {name: summary([(g, ok) for g, ok in guesses if chosen(g.figure)]) for name, chosen in cuts.items()}
        for what, guesses in told.items()
    }
    (Path(__file__).parent / "quality_prediction.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    found = main()
    print(f"{'':58} {'figures':>7} {'models':>6} {'loss':>7} | {'error':>7} {'inside':>6} | new family: error, inside")
    for name, by_model in found["model"].items():
        new = found["family"][name]
        print(
            f"{name:58} {by_model['rows']:7} {by_model['models']:6} {by_model['median_loss']:7.4f} | "
            f"{by_model['median_error']:7.4f} {by_model['coverage']:6.0%} | {new['median_error']:7.4f} {new['coverage']:6.0%}"
        )
