"""Write each answer with the feed-forward neurons its prompt used most.

GRIFFIN (Dong et al., arXiv:2404.01365). The engine chooses while it reads the prompt and computes the prompt itself with
the whole model; all weights stay stored. Quality is judged as it is decoded: each half of a held-out window is scored
with the neurons the other half chose. Own runs on the shipped model: perplexity 1.010 times at three quarters of the neurons, 1.18 at half;
choosing experts for each token (experts_from_dense) does better at half, and needs calibration.
"""

from __future__ import annotations

import math

from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="decode with the feed-forward neurons the prompt used most",
    stage="serve",
    family="activation_sparsity",
    implements=("prompt_prompted_pruning",),
    knobs={"keep": Choice(options=(0.5, 0.75), default=0.75)},
    saves=(
        "tpot_s", "latency_s", "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token",
        "cost_usd_per_token",
    ),
    spends=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "ttft_s"),
    needs=frozenset({"prompt_neurons"}),
    sources=("arXiv:2404.01365", "https://github.com/hdong920/GRIFFIN"),
)  # fmt: skip

_PAPER = "https://arxiv.org/abs/2404.01365"
EVIDENCE = (
    Evidence(model="Gemma-7B", setting="half of the neurons, L40, up to", quantity="generation speed-up",
             baseline=1.0, value=1.29, source=_PAPER),
    Evidence(model="Llama-2-13B", setting="half of the neurons, L40, up to", quantity="generation speed-up",
             baseline=1.0, value=1.25, source=_PAPER),
    Evidence(model="Llama-2-13B", setting="half of the neurons", quantity="active parameters, 1e9",
             baseline=13.0, value=8.8, source=_PAPER),
)  # fmt: skip

# (log perplexity ratio, its standard deviation): own runs on the shipped model; larger models are told to lose less.
_LOSS = {0.5: (0.1, 0.1), 0.75: (0.01, 0.01)}


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.experts:
        return f"a router chooses among the {model.experts} experts for each token already"
    if model.attention_layers < model.layers or model.ffn_size <= 0:
        return f"{model.architecture} has no feed-forward part in every layer"
    if workload.output_tokens < 2:
        return f"{workload.output_tokens} output tokens leave nothing to decode with fewer neurons"
    return None


def ffn_params(model: Model) -> int:
    """Return the parameters of all feed-forward matrices of a dense model."""
    return model.layers * (3 if model.gated_ffn else 2) * model.hidden_size * model.ffn_size


def rewrite(demand: Demand, *, keep: float) -> Demand:
    """Return the demand with fewer weights read for each output token.

    Left out: exchanging neurons in memory, once for each prompt, at most one reading and writing of what is exchanged.
    """
    loss, sd = _LOSS[keep]
    share = min(1.0, ffn_params(demand.model) / demand.linear_params)
    return demand.but(
        output_share=demand.output_share * (1 - share * (1 - keep)),
        perplexity_ratio=demand.perplexity_ratio * math.exp(loss),
        perplexity_log_sd=math.hypot(demand.perplexity_log_sd, sd),
        because=(*demand.because, f"{keep:.0%} of the feed-forward neurons, chosen by each prompt"),
    )


def execute(session: Session, *, keep: float) -> None:
    """Ask the engine for it."""
    session.runtime["ffn_keep"] = keep
