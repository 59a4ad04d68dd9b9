"""Quality loss: perplexity over the unchanged model's, less one."""

from __future__ import annotations

from collections.abc import Mapping

from cost_models.case import Case
from cost_models.terms._prediction import Prediction

QUANTITY = "quality_loss_ratio"
USES: tuple[str, ...] = ()
SHIFT = 1.0  # intervals and corrections act on log(1 + loss): losses of steps multiply as perplexity ratios
NEVER_BELOW_NONE = True  # no correction makes of a loss a gain
LEARNS = "quality"  # what is learned belongs to the steps, not to machine or engine


def predict(case: Case, used: Mapping[str, Prediction]) -> Prediction:
    """Return the product of the steps' perplexity ratios, less one.

    Top-1 agreement and KL divergence are not predicted: nothing published maps a technique to them; they are measured.
    """
    doubt = case.demand.perplexity_log_sd
    return Prediction(mid=case.demand.perplexity_ratio - 1.0, log_sd=doubt, step_log_sd=doubt)
