"""What `leanplan estimate --finetune` prints: figures with intervals and reasons, then where memory and time go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from knowledge_base import units
from knowledge_base.types import Value
from planner.estimating.drawing import bar
from planner.estimating.finetuning import KINDS, FineTuned, devices

BAR = 30  # characters of the widest bar
SAID_ABOVE = ("throughput", "whole run")  # their reason is the step's


def as_text(facts: FineTuned, *, ascii_only: bool) -> str:
    """Return the figures as lines for people, then where memory and time go."""
    setup = facts["setup"]
    lines = [
        f"predicted for fine-tuning {facts['model']} on {facts['hardware']}  ({facts['words']})",
        f"{setup.batch} x {setup.sequence_tokens} tokens at once, {setup.gradient_accumulation} for each step; "
        f"{facts['tokens']:,.0f} tokens in all; {_laid_out(facts)}; intervals hold 80 %",
        "",
    ]  # fmt: skip
    for label, value, dimension in figures(facts):
        why = "" if label in SAID_ABOVE else value.because
        lines.append(f"  {label:15} {interval(value, dimension):34} {why}".rstrip())
    lines.append(f"  {'trained':15} {facts['trained_params']:,.0f} parameters")
    if each := facts["for_each_parameter"]:
        lines.append(
            f"  {'each parameter':15} {each['energy_j']:.2g} J, {each['carbon_gco2e']:.2g} gCO2e, ${each['cost_usd']:.2g} of the whole run"
        )
    if facts["not_billed"]:
        lines.append(f"  {'energy, money':15} not predicted: {facts['not_billed']}")
    for stage in facts["stages"]:
        size, limit = (units.format(v, "bytes") for v in (stage["peak_memory_bytes"].mid, stage["memory_limit_bytes"]))
        layers = "1 layer" if stage["layers"] == 1 else f"{stage['layers']} layers"
        lines.append(f"  stage on {stage['hardware']}: {layers}, {size} of {limit}")
    lines += ["", *_bars(facts, ascii_only=ascii_only)]
    if facts["sent"]:
        told = [
            f"{s['kind']} {units.format(s['sent_bytes'], 'bytes')} in {units.format(s['time_s'], 'time')}"
            for s in facts["sent"]
        ]
        lines += ["", f"each device sends {units.format(facts['sent_bytes'], 'bytes')} in a step: {', '.join(told)}"]
    lines += ["", *facts["notes"]] if facts["notes"] else []
    if not facts["fits"]:
        lines += ["", f"{does_not_fit(facts)}; the times above hold only where it does"]
    elif facts["peak_memory_bytes"].high > facts["memory_limit_bytes"]:
        lines += ["", "may not fit: its interval reaches beyond the memory there is"]
    return "\n".join(lines)


def figures(facts: FineTuned) -> Iterator[tuple[str, Value, str]]:
    """Yield (label, value, dimension) of what is known."""
    yield "peak memory", facts["peak_memory_bytes"], "bytes"
    yield "step", facts["step_s"], "time"
    yield "throughput", facts["tokens_per_s"], "tokens_per_s"
    yield "whole run", facts["total_s"], "time"
    if facts["energy_j"] is not None and facts["carbon_gco2e"] is not None and facts["cost_usd"] is not None:
        yield "energy", facts["energy_j"], "kwh"
        yield "carbon", facts["carbon_gco2e"], "gco2e"
        yield "money", facts["cost_usd"], "usd"


def interval(value: Value, dimension: str) -> str:
    """Return a value with its interval, the unit only once where all three have the same: `86.2 [52.6 – 141] ms`."""
    texts = [_said(number, dimension) for number in (value.mid, value.low, value.high)]
    unit = texts[0].rpartition(" ")[2]
    if all(text.endswith(f" {unit}") for text in texts):
        return "{} [{} – {}]".format(*(text.removesuffix(f" {unit}") for text in texts)) + f" {unit}"
    return "{} [{} – {}]".format(*texts)


def _said(number: float, dimension: str) -> str:
    if dimension == "tokens_per_s":
        return f"{_short(number)} tokens/s"
    if dimension == "kwh":
        return f"{_short(number / 3.6e6)} kWh"
    if dimension == "gco2e":
        return f"{_short(number)} gCO2e" if number < 1000 else f"{_short(number / 1000)} kgCO2e"
    if dimension == "usd":
        return f"${number:,.2f}" if number >= 0.1 else f"${number:.2g}"
    return units.format(number, dimension)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _laid_out(facts: FineTuned) -> str:
    layout = facts["layout"]
    ways = {kind: getattr(layout, "zero_stage" if kind == "zero" else kind) for kind in KINDS}
    used = [f"{kind}={n}" for kind, n in ways.items() if n > (0 if kind == "zero" else 1)]
    return devices(facts["devices"]) + (f" ({', '.join(used)})" if used else "")


def _bars(facts: FineTuned, *, ascii_only: bool) -> list[str]:
    limit = f"{units.format(facts['peak_memory_bytes'].mid, 'bytes')} of {units.format(facts['memory_limit_bytes'], 'bytes')}"
    sizes = [
        (p["name"], p["share"], units.format(p["memory_bytes"].mid, "bytes"), p["memory_bytes"].because)
        for p in facts["memory"]
    ]
    times = [(p["name"], p["share"], units.format(p["time_s"], "time"), "") for p in facts["step"]]
    where = " of the rank that needs most" if facts["devices"] > 1 else ""
    where = " of the stage nearest its limit" if len(facts["stages"]) > 1 else where
    return [
        *_falling(f"memory at its peak{where}: {limit}", sizes, ascii_only=ascii_only), "",
        *_falling(f"one step: {units.format(facts['step_s'].mid, 'time')}", times, ascii_only=ascii_only),
    ]  # fmt: skip


def _falling(title: str, rows: Sequence[tuple[str, float, str, str]], *, ascii_only: bool) -> list[str]:
    lines, before = [title], 0.0
    for name, share, figure, why in rows:
        drawn = bar(before, before + share, BAR, ascii_only=ascii_only)
        told = "<1%" if share < 0.005 else f"{share:.0%}"
        lines.append(f"  {name:17} {drawn} {told:>4} {figure:>9}  {why}".rstrip())
        before += share
    return lines


def does_not_fit(facts: FineTuned) -> str:
    """Return a sentence on what does not fit and what would."""
    needed, limit = (units.format(v, "bytes") for v in (facts["peak_memory_bytes"].mid, facts["memory_limit_bytes"]))
    options = [
        f"{remedy['change']} ({units.format(remedy['peak_memory_bytes'].mid, 'bytes')})" for remedy in facts["remedies"]
    ]
    fits = (
        f"fits with {', or '.join(options)}"
        if options
        else "no change known here makes it fit: take a larger device, or more"
    )
    return f"does not fit: needs {needed} of {limit} on each device; {fits}"
