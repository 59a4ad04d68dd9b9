"""Requests answered each second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cost_models.case import Case
from cost_models.terms._prediction import Prediction

QUANTITY = "requests_per_s"
USES: tuple[str, ...] = ("throughput_tokens_per_s",)


def predict(case: Case, used: Mapping[str, Prediction]) -> Prediction:
    """Return throughput / counted_tokens."""
    throughput = used["throughput_tokens_per_s"]
    return replace(throughput, mid=throughput.mid / case.counted_tokens, parts={})
