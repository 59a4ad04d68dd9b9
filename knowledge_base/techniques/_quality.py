"""The loss of quality a technique's step is expected to bring, by the method it executes (knowledge_base/quality.py)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from knowledge_base.quality import expected_loss, family_of, lose_more_together
from knowledge_base.types import Demand

SHARE_SD = 0.2  # of the share of a loss that training or correcting wins back
# In the logarithm of perplexity. 20 steps won back 0.27 and 0.38 of TRAINED_ON after two layers of the shipped model were
# dropped, nothing of 0.04 after half of its channels were, and made 0.02 of 0.01 where a third were (own runs, 2026-11).
TRAINED_ON, TOO_SMALL = 0.3, 0.3
MOST_WON_BACK = 0.9


def loss_after(demand: Demand, method: str, **knobs: Any) -> Demand:
    """Return the demand with the expected loss of a method at that strength multiplied in, less what a step before eased.

    Raises:
        LookupError: nothing published prices the method: a technique names one that is priced, or brings its own figure.
    """
    loss = expected_loss(method, knobs, demand.model.params_total, family_of(demand.model.name))
    if loss is None:
        raise LookupError(f"no published loss of quality for {method} with {knobs}")
    if (left := math.prod(share for what, share in demand.eased if what.partition(":")[0] == loss.group)) < 1:
        loss = replace(loss, mid=left * loss.mid, low=left * loss.low, high=left * loss.high, sd=left * loss.sd)
    shared = 0.0
    for before in demand.losses:
        if lose_more_together(before, loss):
            shared += 2 * loss.sd * before.sd
    return demand.but(
        perplexity_ratio=demand.perplexity_ratio * math.exp(loss.mid),
        perplexity_log_sd=math.sqrt(demand.perplexity_log_sd**2 + loss.sd**2 + shared),
        losses=(*demand.losses, loss),
    )


def won_back(demand: Demand, share: float) -> Demand:
    """Return the demand with a share of the loss so far undone, and as much of the doubt about it; the share is doubtful itself.

    log ratio' = (1 - share) log ratio,  sd'^2 = ((1 - share) sd)^2 + (SHARE_SD log ratio)^2
    """
    loss = math.log(demand.perplexity_ratio)
    return demand.but(
        perplexity_ratio=math.exp((1 - share) * loss),
        perplexity_log_sd=math.hypot((1 - share) * demand.perplexity_log_sd, SHARE_SD * loss),
    )


def trained_share(demand: Demand, share: float) -> float:
    """Return which share of the loss so far training wins back: less of a small one, since it does harm of its own.

    share' = share (loss / (loss + TOO_SMALL)) / (TRAINED_ON / (TRAINED_ON + TOO_SMALL)),  at most MOST_WON_BACK

    Args:
        share: what is won back of a loss of TRAINED_ON.
    """
    loss = max(0.0, math.log(demand.perplexity_ratio))
    return min(MOST_WON_BACK, share * loss / (loss + TOO_SMALL) * (TRAINED_ON + TOO_SMALL) / TRAINED_ON)


def eased(demand: Demand, **left: float) -> Demand:
    """Return the demand with less to lose for later steps: the share of a loss that stays, by group of quality.GROUPS.

    Two steps that ease the same are as good as the better one. A name after a colon, `weights:columns`, tells apart what
    eases the losses of one group by different means: those multiply.
    """
    before = dict(demand.eased)
    return demand.but(eased=tuple(sorted((before | {g: min(s, before.get(g, 1.0)) for g, s in left.items()}).items())))
