"""Decode several waiting requests together, so that each read of the weights serves them all."""

from __future__ import annotations

from collections.abc import Mapping

from knowledge_base.build_memory import SHAPES
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="static batching: `count` requests decoded together",
    stage="serve",
    family="batch",
    implements=("static_batching",),
    # No 1: a plan without this step decodes one request at a time.
    knobs={"count": Choice(options=(2, 4, 8, 16, 32), default=4)},
    saves=("throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token", "cost_usd_per_token"),
    spends=("ttft_s", "tpot_s", "latency_s", "kv_cache_bytes", "peak_memory_bytes"),
    needs=frozenset({"batch"}),
    provides=frozenset({"batched"}),
    lossless=True,
    memory=SHAPES,
    sources=("https://huggingface.co/blog/bloom-inference-pytorch-scripts",),
)

_BLOOM = "https://huggingface.co/blog/bloom-inference-pytorch-scripts"
_ML_ENERGY = "https://github.com/ml-energy/leaderboard/blob/master/public/data/tasks/lm-arena-chat.json"
EVIDENCE = (
    Evidence(model="BLOOM-176B", setting="DeepSpeed fp16, batch 1 -> 128, 8x A100-80GB", quantity="ms for each token, all sequences",
             baseline=44.02, value=0.69, source=_BLOOM),
    Evidence(model="Llama-3.1-8B-Instruct", setting="max_num_seqs 8 -> 32, bfloat16, 1x H100", quantity="J/token",
             baseline=0.4548, value=0.1651, source=_ML_ENERGY),
    Evidence(model="Llama-3.1-8B-Instruct", setting="max_num_seqs 8 -> 512, bfloat16, 1x H100", quantity="decode tokens/s",
             baseline=1070, value=9806, source=_ML_ENERGY),
)  # fmt: skip


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot help that workload, or None."""
    if workload.concurrency == 1 and not arriving(workload):
        return "the workload has one request at a time, so there is nothing to batch (workload.concurrency)"
    return None


def arriving(workload: Workload) -> bool:
    """Return whether requests come when they come: then any number of them may be there at once."""
    return workload.requests_per_s is not None or workload.trace is not None


def legal(knobs: Mapping[str, int], model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting is refused for that workload, or None."""
    if knobs["count"] > workload.concurrency and not arriving(workload):
        return f"a batch of {knobs['count']} is never full with {workload.concurrency} requests at a time"
    return None


def rewrite(demand: Demand, *, count: int) -> Demand:
    """Return the demand with `count` sequences in each step."""
    return demand.but(batch=count, because=(*demand.because, f"{count} requests share each read of the weights"))


def execute(session: Session, *, count: int) -> None:
    """Ask for `count` requests to be decoded together."""
    session.runtime["batch"] = count
