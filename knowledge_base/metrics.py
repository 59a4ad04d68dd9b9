"""Every quantity a plan can be measured, predicted or limited by: its unit, direction and meaning.

A metric has one name, with its unit in it, used in code and JSON (`ttft_s`), and one label for people and
spec files (`ttft`). A spec may ask for a statistic of a metric that is sampled: `ttft_p95`.
"""

from __future__ import annotations

from dataclasses import dataclass

from knowledge_base.errors import BadInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One quantity. `dimension` names the units it may be written in (see units.py)."""

    name: str  # with its unit: "ttft_s"
    label: str  # without: "ttft"
    dimension: (
        str  # "time" | "bytes" | "rate" | "requests" | "energy" | "money" | "carbon" | "ratio" | "number" | "network"
    )
    better: str  # "lower" | "higher"
    resource: str  # "computation" | "memory" | "energy" | "money" | "network" | "quality"
    summary: str
    sampled: bool = False  # has p50/p95/mean over requests


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric(name="ttft_s", label="ttft", dimension="time", better="lower", resource="computation", sampled=True,
               summary="time to first token: from the request to its first output token"),
        Metric(name="tpot_s", label="tpot", dimension="time", better="lower", resource="computation", sampled=True,
               summary="time per output token after the first: (end - first token) / (output tokens - 1)"),
        Metric(name="latency_s", label="latency", dimension="time", better="lower", resource="computation", sampled=True,
               summary="end-to-end time of one request: ttft + tpot x (output tokens - 1)"),
        Metric(name="itl_s", label="itl", dimension="time", better="lower", resource="computation", sampled=True,
               summary="time between two output tokens that follow each other in one answer; only under a load"),
        Metric(name="throughput_tokens_per_s", label="throughput", dimension="rate", better="higher", resource="computation",
               sampled=True, summary="output tokens for each second, over all concurrent requests"),
        Metric(name="requests_per_s", label="requests", dimension="requests", better="higher", resource="computation",
               summary="requests answered each second: throughput / output tokens"),
        Metric(name="goodput_requests_per_s", label="goodput", dimension="requests", better="higher",
               resource="computation",
               summary="requests answered within every latency limit, each second; only under a load"),
        Metric(name="peak_memory_bytes", label="peak_memory", dimension="bytes", better="lower", resource="memory",
               summary="highest resident memory of the serving process: framework + weights + KV cache + activations"),
        Metric(name="weights_bytes", label="weights_memory", dimension="bytes", better="lower", resource="memory",
               summary="bytes the loaded weights occupy in memory"),
        Metric(name="kv_cache_bytes", label="kv_memory", dimension="bytes", better="lower", resource="memory",
               summary="bytes of the KV cache at full prompt and output length, all concurrent requests"),
        Metric(name="artefact_bytes", label="artefact_size", dimension="bytes", better="lower", resource="memory",
               summary="bytes of the model's files on disk"),
        Metric(name="energy_j_per_token", label="energy", dimension="energy", better="lower", resource="energy",
               summary="joules for each output token"),
        Metric(name="carbon_gco2e_per_token", label="carbon", dimension="carbon", better="lower", resource="energy",
               summary="grams of CO2 equivalent for each output token: energy x PUE x grid intensity"),
        Metric(name="cost_usd_per_token", label="cost", dimension="money", better="lower", resource="money",
               summary="US dollars for each output token: hourly price and electricity over throughput"),
        Metric(name="network_bytes_per_start", label="network", dimension="network", better="lower", resource="network",
               summary="bytes a machine downloads to start serving: the artefact's files"),
        Metric(name="perplexity", label="perplexity", dimension="number", better="lower", resource="quality",
               summary="exp of the mean loss on held-out text, same tokenizer and window as the baseline"),
        Metric(name="quality_loss_ratio", label="quality_loss", dimension="ratio", better="lower", resource="quality",
               summary="perplexity / the unchanged model's perplexity - 1, on held-out text"),
        Metric(name="agreement_ratio", label="agreement", dimension="ratio", better="higher", resource="quality",
               summary="share of held-out positions where the plan's most likely next token is the unchanged model's"),
        Metric(name="kl_divergence_nats", label="kl_divergence", dimension="number", better="lower", resource="quality",
               summary="mean KL(unchanged || plan) of the next-token distribution on held-out text, in nats"),
        Metric(name="retrieval_ratio", label="retrieval", dimension="ratio", better="higher", resource="quality",
               summary="share of facts in a prompt of the workload's length that are recalled afterwards, chance is 25 %; "
               "only of plans that keep a part of prompt or cache"),
        Metric(name="build_s", label="build_time", dimension="time", better="lower", resource="computation",
               summary="seconds to make the artefact from the unchanged model"),
    )
}  # fmt: skip

LABELS = {m.label: m.name for m in METRICS.values()}
STATISTICS = ("p50", "p95", "p99", "mean")


def find_metric(text: str) -> tuple[Metric, str]:
    """Return the metric and statistic a label names: `ttft_p95` -> (ttft_s, "p95"); the default is "p50".

    Raises:
        BadInput: the label is unknown, or a statistic was asked of a metric that is not sampled.
    """
    import difflib

    label, statistic = text, None
    for suffix in STATISTICS:
        if text.endswith("_" + suffix):
            label, statistic = text[: -len(suffix) - 1], suffix
    name = LABELS.get(label, label)
    if name not in METRICS:
        near = difflib.get_close_matches(label, LABELS, n=2)
        guess = f"; did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else ""
        raise BadInput(f"unknown metric `{text}`{guess}", hint=f"metrics: {', '.join(LABELS)} (leanplan ls metrics)")
    metric = METRICS[name]
    if statistic and not metric.sampled:
        raise BadInput(
            f"`{metric.label}` is one number, it has no `{statistic}`",
            hint=f"write `{metric.label}` without a statistic",
        )
    return metric, statistic or ("p50" if metric.sampled else "mean")
