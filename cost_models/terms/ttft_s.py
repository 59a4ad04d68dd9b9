"""Time to first token: the prefill of one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from cost_models.case import Case
from cost_models.roofline import prefill_parts
from cost_models.terms._prediction import Prediction, total

QUANTITY = "ttft_s"
USES: tuple[str, ...] = ()

SHAPES_LOG_SD = 0.3  # of the share of the peak rate: it is taken from large matrices, and a short prompt's are thin


def predict(case: Case, used: Mapping[str, Prediction]) -> Prediction:
    """Return seconds from a batch's start to its first output tokens. Waiting for an earlier batch is left out."""
    prefill = total(prefill_parts(case), {"engine overhead": case.rates.overhead_log_sd}, case.rates.weights_log_sd)
    return replace(prefill, log_sd=np.hypot(prefill.log_sd, SHAPES_LOG_SD))
