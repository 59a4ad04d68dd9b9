"""Output tokens for each second, over the batch; of an encoder those it reads."""

from __future__ import annotations

from collections.abc import Mapping

from cost_models.case import Case
from cost_models.terms._prediction import Prediction

QUANTITY = "throughput_tokens_per_s"
USES: tuple[str, ...] = ("latency_s",)


def predict(case: Case, used: Mapping[str, Prediction]) -> Prediction:
    """Return batch x counted_tokens / latency: batches follow one another without a gap."""
    latency = used["latency_s"]
    rate = case.demand.batch * case.counted_tokens / latency.mid
    return Prediction(mid=rate, log_sd=latency.log_sd, inherited_log_sd=latency.log_sd)
