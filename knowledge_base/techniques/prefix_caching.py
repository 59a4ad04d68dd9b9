"""Keep the keys and values of prompts between requests, and compute only what is new of the next one.

A request that begins as an earlier one does finds that beginning where the earlier one left it: what all prompts share
(a system prompt, instructions, examples), and in a conversation all that was said before. The first request of each
slot finds nothing. What is kept stays in the slots, whose memory is set aside anyway, so none is taken beside it; but a
slot that another conversation was given has forgotten (cost_models/load.py tells how often).
"""

from __future__ import annotations

from knowledge_base.build_memory import SHAPES
from knowledge_base.types import Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="prompts' caches kept between requests, shared beginnings computed once",
    stage="serve",
    family="prefix",
    implements=("prefix_caching",),
    saves=("ttft_s", "latency_s", "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token",
           "cost_usd_per_token"),
    needs=frozenset({"prefix_cache"}),
    lossless=True,
    memory=SHAPES,
    sources=("arXiv:2309.06180", "arXiv:2311.04934", "https://github.com/ggml-org/llama.cpp/tree/master/tools/server"),
)  # fmt: skip

_PAGED = "https://arxiv.org/abs/2309.06180"
_SLOTS = "https://github.com/v-code01/prefillcache"
EVIDENCE = (
    Evidence(model="LLaMA-13B", setting="vLLM, WMT16 En-De, one example shared, A100-40GB", quantity="throughput, relative",
             baseline=1.0, value=1.67, source=_PAGED),
    Evidence(model="LLaMA-13B", setting="vLLM, WMT16 En-De, five examples shared, A100-40GB", quantity="throughput, relative",
             baseline=1.0, value=3.58, source=_PAGED),
    Evidence(model="Qwen2.5-1.5B-Instruct Q4_K_M", setting="llama.cpp slot, 114 tokens shared", quantity="prefill, ms",
             baseline=67, value=8.1, source=_SLOTS),
    Evidence(model="Qwen2.5-1.5B-Instruct Q4_K_M", setting="llama.cpp slot, 1841 tokens shared", quantity="prefill, ms",
             baseline=864, value=10.6, source=_SLOTS),
)  # fmt: skip


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot help that workload, or cannot be done to that model, or None."""
    if model.kind != "decoder" or model.attention_layers < model.layers:
        return f"`{model.architecture}` keeps no keys and values that could be cut back to a shared beginning"
    if not workload.loaded:
        return "one batch after the other leaves nothing to keep (workload.arrival_rate, workload.turns)"
    if sum(reused(workload)) == 0:
        return "the prompts share no beginning (workload.shared_prefix, workload.turns)"
    if (window := model.sliding_window_tokens) and window < workload.longest_tokens:
        return f"layers that see {window} tokens have let go of the beginning of requests of {workload.longest_tokens}"
    return None


def reused(workload: Workload) -> tuple[float, float]:
    """Return the tokens of a prompt that were computed before: the same in all, and of later turns what was said before.

    The latter is the mean over a conversation. A turn finds the prompt of the turn before it. The answer to that is not
    counted: it comes back as text, whose tokens need not be those that were drawn.

    >>> reused(Workload(prompt_tokens=100, output_tokens=20, shared_prefix_tokens=60, turns=3))
    (60.0, 46.666666666666664)
    """
    shared, turns = workload.shared_prefix_tokens, workload.turns
    own = workload.prompt_tokens - shared
    earlier = sum(own + turn * (own + workload.output_tokens) for turn in range(turns - 1))
    return float(shared), earlier / turns


def rewrite(demand: Demand) -> Demand:
    """Return the demand with what each prompt finds already computed."""
    shared, said = reused(demand.workload)
    found = " and ".join(
        words
        for words, some in ((f"the {shared:g} tokens all begin with", shared), ("what was said before", said))
        if some
    )
    return demand.but(
        reused_prefix_tokens=shared,
        reused_turn_tokens=said,
        because=(
            *demand.because,
            f"caches kept between requests: {found or 'nothing'} of each prompt is there already",
        ),
    )


def execute(session: Session) -> None:
    """Ask the engine's server to keep them."""
    session.runtime["prefix_cache"] = True
