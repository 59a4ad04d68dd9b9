"""The loss of quality from taking weights away, as opposed to rounding them (_quality.py)."""

from __future__ import annotations

import math
from dataclasses import replace

from knowledge_base.types import Demand


def loss_after_removal(demand: Demand, log_ratio: float, log_sd: float) -> Demand:
    """Return the demand with a removal's expected loss of quality multiplied in: the same at every model size.

    Sizes do not agree on a trend: SliceGPT at 30 % costs OPT-1.3B 0.27 and OPT-66B 0.05 in log perplexity, but
    Llama-2-7B 0.40 and Llama-2-70B 0.42 (arXiv:2401.15024, table 1). So `log_sd` should be wide; calibration narrows it.

    Args:
        log_ratio: ln(perplexity after / before).
        log_sd: standard deviation of that guess.
    """
    return replace(
        demand,
        perplexity_ratio=demand.perplexity_ratio * math.exp(log_ratio),
        perplexity_log_sd=math.hypot(demand.perplexity_log_sd, log_sd),
    )
