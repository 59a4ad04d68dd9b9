"""Time to first token: the prefill of one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from cost_models import offloading
from cost_models.case import Case
from cost_models.roofline import prefill_parts
from cost_models.terms._prediction import Prediction, total

QUANTITY = "ttft_s"
USES: tuple[str, ...] = ()


def predict(case: Case, used: Mapping[str, Prediction]) -> Prediction:
    """Return seconds from a batch's start to its first output tokens. Waiting for an earlier batch is left out."""
    doubts = {"engine overhead": case.rates.overhead_log_sd, offloading.PART: 0.0}
    prefill = total(prefill_parts(case), doubts, case.rates.weights_log_sd)
    log_sd = np.hypot(prefill.log_sd, offloading.log_sd(case, prefill.mid))
    return replace(prefill, log_sd=np.hypot(log_sd, case.rates.shapes_log_sd), note=offloading.note(case))
