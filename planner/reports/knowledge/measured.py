"""What techniques changed on this machine, as lines for people: beside the published figures of their card."""

from __future__ import annotations

from collections.abc import Sequence

from knowledge_base.metrics import METRICS
from planner.measured_effects import MeasuredEffect, MeasuredRatio
from planner.reports._text import literal

SHOWN = 12  # effects told; --json has them all


def as_lines(effects: Sequence[MeasuredEffect], techniques: Sequence[str]) -> list[str]:
    """Return what was measured here of the techniques that execute a method; how to measure them where nothing was."""
    if not techniques:
        return []
    if not effects:
        return [
            "measured on this machine: nothing yet",
            f"  to measure it: leanplan plan SPEC, with `techniques: {{only: [{', '.join(techniques)}]}}` in the spec",
        ]
    lines = ["measured on this machine, each figure over that of the same plan without it:"]
    lines += [f"  {line}" for effect in effects[:SHOWN] for line in _lines(effect)]
    return lines + ([f"  … {len(effects) - SHOWN} more: --json"] if len(effects) > SHOWN else [])


def _lines(effect: MeasuredEffect) -> list[str]:
    beside = f", beside {' + '.join(effect.beside)}" if effect.beside else ""
    where = f" on {effect.engine}" if effect.against.startswith(f"{effect.engine}:") else f", against {effect.against}"
    busy = "; other programs kept the machine busy" if effect.crowded else ""
    load = f"{effect.prompt_tokens} + {effect.output_tokens} tokens"
    figures = ", ".join(f"{METRICS[name].label} {_ratio(ratio)}" for name, ratio in effect.ratios.items())
    said = f"{effect.step}{beside}{where}, {effect.model} ({effect.params / 1e6:,.1f} M), {load}, {effect.taken_at[:10]}{busy}"
    return [literal(said), f"  {figures}"]


def _ratio(ratio: MeasuredRatio) -> str:
    if ratio.low == ratio.high:
        return f"×{ratio.value:.3g}"
    return f"×{ratio.value:.4g} [{ratio.low:.4g} – {ratio.high:.4g}] (n {ratio.n})"
