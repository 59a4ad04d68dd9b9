"""Read prompts in pieces between the tokens of running answers, so that no answer stands still for a whole prompt.

An engine that answers several requests side by side computes the new tokens of a prompt and one token of each running
answer in one step; `tokens` bounds the step. Smaller pieces make the longest gap between two tokens of an answer
shorter, and running answers get more of their tokens along with prompts. They read the weights more often, and a
prompt's own first token comes later. The mean gap hardly moves: the same work is done (Agrawal et al., SARATHI). The
budget that this is for is one on `itl_p95`, which only measuring tells.
"""

from __future__ import annotations

from collections.abc import Mapping

from knowledge_base.build_memory import SHAPES
from knowledge_base.techniques.batch_size import arriving
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="prompts read in pieces between the tokens of running answers",
    stage="serve",
    family="prefill_schedule",
    implements=("chunked_prefill",),
    knobs={"tokens": Choice(options=(128, 512), default=512)},
    saves=("itl_s",),
    spends=("ttft_s", "tpot_s", "latency_s", "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token",
            "cost_usd_per_token"),
    needs=frozenset({"prefill_chunk"}),
    lossless=True,
    memory=SHAPES,
    sources=("arXiv:2308.16369", "https://github.com/deepspeedai/DeepSpeed/blob/master/blogs/deepspeed-fastgen/README.md"),
)  # fmt: skip

EVIDENCE = (
    Evidence(model="Llama-2-70B", setting="DeepSpeed-FastGen against vLLM of 2023, A100, up to", quantity="throughput, relative",
             baseline=1.0, value=2.3, source=TECHNIQUE.sources[1]),
)  # fmt: skip


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot help that workload, or None."""
    if model.kind != "decoder":
        return f"an {model.kind} reads its text in one pass and has no running answers"
    if not workload.loaded:
        return (
            "one batch after the other has no running answers beside a prompt (workload.arrival_rate, workload.turns)"
        )
    if workload.concurrency == 1 and not arriving(workload):
        return "the workload has one request at a time, so no other answer waits (workload.concurrency)"
    return None


def legal(knobs: Mapping[str, int], model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting is refused for that workload, or None."""
    longest = workload.longest_tokens - (workload.output_tokens_p95 or workload.output_tokens)
    if knobs["tokens"] >= longest:
        return f"prompts of up to {longest} tokens are read in one piece of {knobs['tokens']}"
    return None


def rewrite(demand: Demand, *, tokens: int) -> Demand:
    """Return the demand with prompts read in pieces."""
    return demand.but(
        prefill_step_tokens=float(tokens), because=(*demand.because, f"prompts read {tokens} tokens at a time")
    )


def execute(session: Session, *, tokens: int) -> None:
    """Ask the engine's server for it."""
    session.runtime["prefill_chunk"] = tokens
