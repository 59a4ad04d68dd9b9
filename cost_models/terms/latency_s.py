"""End-to-end time of one request."""

from __future__ import annotations

from collections.abc import Mapping

from cost_models.case import Case
from cost_models.terms._prediction import Prediction, total

QUANTITY = "latency_s"
USES: tuple[str, ...] = ("ttft_s", "tpot_s")


def predict(case: Case, used: Mapping[str, Prediction]) -> Prediction:
    """Return ttft + tpot (output_tokens - 1); of an encoder its one pass."""
    if not case.decodes:
        return used["ttft_s"]
    ttft, tpot = used["ttft_s"], used["tpot_s"]
    parts = {"prefill": ttft.mid, "decode": tpot.mid * (case.workload.output_tokens - 1)}
    return total(parts, {"prefill": ttft.log_sd, "decode": tpot.log_sd}, 0.0, inherited=parts)
