"""Time to first token: the prefill of one batch."""

from __future__ import annotations

from collections.abc import Mapping

from cost_models.case import Case
from cost_models.roofline import prefill_parts
from cost_models.terms._prediction import Prediction, total

QUANTITY = "ttft_s"
USES: tuple[str, ...] = ()


def predict(case: Case, used: Mapping[str, Prediction]) -> Prediction:
    """Return seconds from a batch's start to its first output tokens. Waiting for an earlier batch is left out."""
    return total(prefill_parts(case), {"engine overhead": case.rates.overhead_log_sd}, case.rates.weights_log_sd)
