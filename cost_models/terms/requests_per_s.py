"""Requests answered each second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cost_models.case import Case
from cost_models.terms._prediction import Prediction

QUANTITY = "requests_per_s"
USES: tuple[str, ...] = ("latency_s", "throughput_tokens_per_s")


def predict(case: Case, used: Mapping[str, Prediction]) -> Prediction:
    """Return throughput / output_tokens; of an encoder batch / latency."""
    if not case.decodes:
        latency = used["latency_s"]
        rate = case.demand.batch / latency.mid
        return Prediction(mid=rate, log_sd=latency.log_sd, inherited_log_sd=latency.log_sd)
    throughput = used["throughput_tokens_per_s"]
    return replace(throughput, mid=throughput.mid / case.workload.output_tokens, parts={})
