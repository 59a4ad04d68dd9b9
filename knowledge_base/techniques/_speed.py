"""The time of a decode step as a budget over the parts of a model, each of which was timed at every option; no torch here.

What a step does besides the parts stays as long as it is, so of a step that is to take 1/s of its time the parts lose
all that goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TIMES = ("tpot_s", "latency_s", "throughput_tokens_per_s")  # metrics of which a faster step gives more


def of_step(
    unchanged: Mapping[str, str], parts: Mapping[str, Mapping[str, dict[str, float]]], step_s: float
) -> dict[str, Any]:
    """Return {"parts", "step_s", "unchanged_s": of all parts as they are}: what `seconds_for` asks for.

    Timed apart, parts may take longer than inside the step, where some are still in a cache: then their seconds are
    made shorter, all alike, until they are all of the step.

    Args:
        unchanged: the option of each part that leaves it as it is.
    """
    unchanged_s = sum(parts[name][option]["seconds"] for name, option in unchanged.items())
    share = min(1.0, step_s / unchanged_s)
    for choice in (choice for choices in parts.values() for choice in choices.values()):
        choice["seconds"] *= share
    return {"parts": parts, "step_s": step_s, "unchanged_s": share * unchanged_s}


def seconds_for(measured: Mapping[str, Any], speedup: float, how: str) -> float:
    """Return the seconds all parts together may take for a step to be `speedup` times as fast as it is.

    Args:
        how: the way in which parts get faster, for the message.

    Raises:
        NoFeasiblePlan: with every part at its fastest a step is slower than that; says how fast it can get.
    """
    from knowledge_base.errors import NoFeasiblePlan

    step_s, unchanged_s = measured["step_s"], measured["unchanged_s"]
    least_s = sum(min(choice["seconds"] for choice in choices.values()) for choices in measured["parts"].values())
    budget_s = unchanged_s - (1 - 1 / speedup) * step_s
    if budget_s < least_s:
        raise NoFeasiblePlan(
            f"a step of {1e3 * step_s:.3g} ms gets {step_s / (step_s - unchanged_s + least_s):.2f} times as fast at most by "
            f"{how}, {speedup:g} is asked for",
            hint="ask for less, or drop layers",
        )
    return float(budget_s)
