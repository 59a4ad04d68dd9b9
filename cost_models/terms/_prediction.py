"""What a cost term returns."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Predicted values of one metric for many plans: arrays of shape (plans,).

    `log_sd`: standard deviation of the error of log(mid), or of log(1 + mid) for a ratio that may be 0.
    `step_log_sd`: the part of it that the plan's steps bring with them, whatever the machine.
    `inherited_log_sd`: the part of it that comes from other terms' predictions. Those are corrected by measurements
    themselves, so it is kept as it is when this term is.
    `parts`: what the value is made of; where there are any, they add up to `mid`.
    `note`: a clause on what was assumed, the same for all plans.
    `p95`: 95th percentile over requests, where waiting makes them differ; None where all are alike.
    """

    mid: Any
    log_sd: Any
    step_log_sd: Any = 0.0
    inherited_log_sd: Any = 0.0
    parts: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    p95: Any = None


def total(
    parts: Mapping[str, Any],
    log_sds: Mapping[str, Any],
    default_log_sd: Any,
    note: str = "",
    inherited: Collection[str] = (),
) -> Prediction:
    """Return the sum of parts whose errors are independent: variances add, weighted by each part's share.

    `inherited`: the parts that are other terms' predictions.
    """
    mid = sum(parts.values())
    variances = {name: (part / mid * log_sds.get(name, default_log_sd)) ** 2 for name, part in parts.items()}
    return Prediction(
        mid=mid,
        log_sd=np.sqrt(sum(variances.values())),
        inherited_log_sd=np.sqrt(sum(variances[name] for name in inherited)),
        parts=parts,
        note=note,
    )
