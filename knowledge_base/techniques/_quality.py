"""How a loss of quality known at 7B parameters carries over to other sizes: small models lose more."""

from __future__ import annotations

import math
from dataclasses import replace

from knowledge_base.types import Demand

# ln(ln(perplexity ratio)) fell by 0.35 for each e-fold of parameters: least squares over the 23 OPT and BLOOM rows of
# GPTQ at 4 and 3 bits, 125M to 176B (arXiv:2210.17323, tables 2 to 4), one intercept for each number of bits; the
# 12 rows at 4 bits alone give 0.38, the 11 at 3 bits 0.35. Around the line a model scatters by a factor of 1.5.
SIZE_EXPONENT = 0.35
SMALLEST_PARAMS = 125e6  # the smallest of those models; below it the figure is held, not extrapolated,
SPREAD_BELOW = 2.0  # and its spread is doubled: what a small model loses hangs on how long it was trained


def size_factor(params: float) -> float:
    """Return how many times a model of that size loses what a 7B model loses, in log perplexity.

        (7e9 / max(params, 125e6)) ** 0.35

    Left out: the family (Llama-3 loses about twice what Llama-2 loses) and tokens seen for each parameter, which are
    not in any config: a model trained on few of them loses far less (arXiv:2411.04330).

    >>> round(size_factor(7e9), 2), round(size_factor(1e9), 2), round(size_factor(70e9), 2)
    (1.0, 1.98, 0.45)
    """
    return (7e9 / max(params, SMALLEST_PARAMS)) ** SIZE_EXPONENT


def loss_after(demand: Demand, log_ratio_7b: float, log_sd: float) -> Demand:
    """Return the demand with a step's expected loss of quality multiplied in.

    Args:
        log_ratio_7b: ln(perplexity after / before) of a 7B model.
        log_sd: standard deviation of that guess for a 7B model; scaled by size as the loss is.
    """
    params = demand.model.params_total
    factor = size_factor(params)
    spread = factor * (SPREAD_BELOW if params < SMALLEST_PARAMS else 1.0)
    return replace(
        demand,
        perplexity_ratio=demand.perplexity_ratio * math.exp(log_ratio_7b * factor),
        perplexity_log_sd=math.hypot(demand.perplexity_log_sd, log_sd * spread),
    )
