"""Remove whole channels of the feed-forward parts and let the remaining ones make up for them.

Every layer keeps the same number of channels, so config.json still describes the model and every engine runs it
as a smaller dense model. A channel's score is the output error its removal causes when the others compensate
(optimal brain surgeon on whole columns); the down matrix then gets the least-squares correction
(He et al., arXiv:1707.06168). Attention heads are left as they are: removing KV groups is another technique.
"""

from __future__ import annotations

from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="remove feed-forward channels: a smaller dense model",
    stage="compress",
    family="width",
    implements=("channel_pruning",),
    knobs={"keep": Choice(options=(0.5, 0.67, 0.75, 0.875), default=0.75)},
    saves=(
        "weights_bytes", "artefact_bytes", "peak_memory_bytes", "network_bytes_per_start", "ttft_s", "tpot_s",
        "latency_s", "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token", "cost_usd_per_token",
    ),
    spends=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "build_s"),
    needs_calibration=True,
    sources=("arXiv:1707.06168", "arXiv:2401.15024", "https://github.com/horseee/LLM-Pruner"),
)  # fmt: skip

ROUNDS = 64  # of all channels: those that go in one batch are judged at once

_PPL = "WikiText-2 perplexity"
_SLICEGPT = "https://arxiv.org/abs/2401.15024"
_COLLECTION = "https://github.com/Zephyr271828/llm-pruning-collection-fork"
EVIDENCE = tuple(
    Evidence(model=model, setting=setting, quantity=quantity, baseline=baseline, value=value, source=source)
    for model, setting, quantity, baseline, value, source in (
        ("Llama-3.1-8B", "FLAP 20%, seq 128", _PPL, 14.31, 19.32, _COLLECTION),
        ("Llama-3.1-8B", "FLAP 30%, seq 128", _PPL, 14.31, 24.5, _COLLECTION),
        ("Llama-3.1-8B", "FLAP 50%, seq 128", _PPL, 14.31, 42.86, _COLLECTION),
        ("Llama-2-7B", "SliceGPT 20%", _PPL, 5.47, 6.64, _SLICEGPT),
        ("Llama-2-7B", "SliceGPT 30%", _PPL, 5.47, 8.12, _SLICEGPT),
        ("OPT-6.7B", "SliceGPT 20%", _PPL, 10.85, 11.48, _SLICEGPT),
        ("OPT-6.7B", "SliceGPT 30%", _PPL, 10.85, 12.51, _SLICEGPT),
        ("LLaMA-7B", "LLM-Pruner 20%", "latency speed-up", 1.0, 1.18, "https://github.com/horseee/LLM-Pruner"),
    )
)


def kept_channels(ffn_size: int, keep: float) -> int:
    """Return how many channels stay: the nearest multiple of a grain that packed kernels like.

    The grain is the largest of 256, 128, 64 and 32 that is at most 1/32 of the channels (k-quants come in rows of
    256, int4 groups in 32 to 128), at least 32.

    >>> kept_channels(11008, 0.75), kept_channels(768, 0.67)
    (8192, 512)
    """
    grain = next((g for g in (256, 128, 64) if 32 * g <= ffn_size), 32)
    return max(round(keep * ffn_size / grain), 1) * grain


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.attention_layers < model.layers or model.ffn_size <= 0:
        return f"{model.architecture} has no feed-forward part in every layer"
    return None


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting means nothing for that model, or None."""
    if kept_channels(model.ffn_size, knobs["keep"]) >= model.ffn_size:
        return f"keep={knobs['keep']} of {model.ffn_size} channels rounds to all of them"
    return None


def rewrite(demand: Demand, *, keep: float) -> Demand:
    """Return the demand with fewer feed-forward parameters; the model in it has the new shape.

    removed = layers * experts * matrices * hidden_size * (channels before - channels kept)
    """
    model = demand.model
    kept = kept_channels(model.ffn_size, keep)
    per_expert = demand.layers * (3 if model.gated_ffn else 2) * model.hidden_size * (model.ffn_size - kept)
    removed = per_expert * max(model.experts, 1)
    removed_active = per_expert * max(model.experts_active, 1)
    share = 1 - removed / demand.linear_params
    activations = (3 * kept + 4 * model.hidden_size) / (3 * model.ffn_size + 4 * model.hidden_size)
    smaller = model.but(
        ffn_size=kept, linear_params=round(model.linear_params - removed),
        params_total=round(model.params_total - removed), params_active=round(model.params_active - removed_active),
    )  # fmt: skip
    demand = loss_after(demand, "slicegpt", sparsity=1 - share)
    return demand.but(
        model=smaller,
        linear_params=demand.linear_params - removed,
        linear_bytes=demand.linear_bytes * share,
        linear_flop_per_token=demand.linear_flop_per_token - 2 * removed_active,
        activation_bytes_per_token=demand.activation_bytes_per_token * activations,
        build_flop=demand.build_flop + 16_384 * (4 * demand.linear_params + 2 * demand.layers * model.ffn_size**2),
        because=(
            *demand.because,
            f"{kept} of {model.ffn_size} feed-forward channels: {1 - share:.0%} fewer weights in the layers",
        ),
    )


def execute(session: Session, *, keep: float) -> None:
    """Shrink every layer's feed-forward part to `kept_channels` and correct its down matrix.

    Channels go in ROUNDS batches, each judged on what the earlier ones left (`_structure.shrinking`).

    Raises:
        CandidateFailed: an unknown feed-forward shape, or layers of different widths.
    """
    import torch

    from knowledge_base.errors import CandidateFailed
    from knowledge_base.techniques._blocks import (
        Matrix,
        decoder_layers,
        each_layer,
        ffn_config_key,
        ffn_of,
        shrink_experts,
        shrink_ffn,
    )  # fmt: skip
    from knowledge_base.techniques._structure import Removal, shrinking

    parts = [ffn_of(layer) for layer in decoder_layers(session.model)]
    before = parts[0].size
    if any(part.size != before or (part.experts is None) != (parts[0].experts is None) for part in parts):
        raise CandidateFailed(
            "unsupported", "the layers' feed-forward parts differ, one config field cannot describe them"
        )
    key = ffn_config_key(session.model, parts[0])
    count = kept_channels(before, keep)
    if count >= before:
        raise CandidateFailed("unsupported", f"keep={keep} of {before} channels rounds to all of them")

    def choose(weight: torch.Tensor, products: torch.Tensor) -> Removal:
        return next(shrinking(weight, products, 1, [count], at_once=max(1, before // ROUNDS)))

    def change(index: int, layer: torch.nn.Module, matrices: list[Matrix]) -> None:
        ffn = ffn_of(layer)
        if ffn.experts is not None:
            chosen = [choose(m.weight, m.inputs.products) for m in matrices if m.part == "down"]
            shrink_experts(ffn, [cut.kept for cut in chosen], [cut.weight for cut in chosen])
        else:
            down = next(m for m in matrices if m.module is ffn.down)
            cut = choose(down.weight, down.inputs.products)
            shrink_ffn(ffn, cut.kept, cut.weight)

    each_layer(session, change, full=True, label="prune_width")
    setattr(session.model.config.get_text_config(), key, count)
    session.notes["prune_width.channels"] = [before, count]
