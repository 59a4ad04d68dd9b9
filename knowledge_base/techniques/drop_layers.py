"""Remove whole decoder layers, the ones the model misses least: one after another, each chosen on what is left.

`by="influence"` takes the layer that changes its input least (block influence, ShortGPT, arXiv:2403.03853): one pass over
the text for each that goes. `by="loss"` tries each layer and takes the one whose removal hurts the calibration loss least
(SLEB, arXiv:2402.09025): as many passes as there are layers, and mostly the better choice.
"""

from __future__ import annotations

import math
from typing import Any

from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="remove the decoder layers the model misses least",
    stage="compress",
    family="depth",
    implements=("layer_drop",),
    knobs={
        "count": Choice(options=(1, 2, 3), default=1),
        "by": Choice(options=("influence", "loss"), default="loss"),
    },
    saves=(
        "weights_bytes", "kv_cache_bytes", "artefact_bytes", "peak_memory_bytes", "network_bytes_per_start", "ttft_s",
        "tpot_s", "latency_s", "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token", "cost_usd_per_token",
    ),
    spends=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "build_s"),
    needs_calibration=True,
    sources=("arXiv:2403.03853", "arXiv:2402.09025", "https://github.com/Zephyr271828/llm-pruning-collection-fork"),
)  # fmt: skip

_PPL = "WikiText-2 perplexity"
_COLLECTION = "https://github.com/Zephyr271828/llm-pruning-collection-fork"
EVIDENCE = tuple(
    Evidence(model=model, setting=setting, quantity=quantity, baseline=baseline, value=value, source=source)
    for model, setting, quantity, baseline, value, source in (
        ("Llama-2-7B", "SLEB, 2 of 32", _PPL, 5.47, 6.07, _COLLECTION),
        ("Llama-2-7B", "SLEB, 4 of 32", _PPL, 5.47, 6.95, _COLLECTION),
        ("Llama-2-7B", "SLEB, 8 of 32", _PPL, 5.47, 10.39, _COLLECTION),
        ("Llama-3.1-8B", "SLEB, 2 of 32", _PPL, 6.24, 7.35, _COLLECTION),
        ("Llama-3.1-8B", "SLEB, 4 of 32", _PPL, 6.24, 8.93, _COLLECTION),
        ("Llama-3.1-8B", "SLEB, 8 of 32", _PPL, 6.24, 16.61, _COLLECTION),
        ("Llama-2-13B", "SLEB, 8 of 40", _PPL, 4.88, 6.75, _COLLECTION),
    )
)


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.layers < 3:
        return f"{model.layers} layers are too few to drop one"
    return None


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting is refused for that model, or None."""
    if 3 * knobs["count"] > model.layers:
        return f"dropping {knobs['count']} of {model.layers} layers is more than a third of them"
    return None


def rewrite(demand: Demand, *, count: int, by: str) -> Demand:
    """Return the demand of a model with `count` layers fewer; the model in it has the new depth."""
    model = demand.model
    share = 1 - count / model.layers
    removed = demand.linear_params * (1 - share)
    active = demand.linear_flop_per_token / 2 * (1 - share)
    shallower = model.but(
        layers=model.layers - count,
        attention_layers=round(model.attention_layers * share),
        state_bytes=round(model.state_bytes * share),
        linear_params=round(model.linear_params - removed),
        params_total=round(model.params_total - removed),
        params_active=round(model.params_active - active),
    )
    demand = loss_after(demand, "sleb", sparsity=1 - share)
    return demand.but(
        model=shallower,
        linear_params=demand.linear_params - removed,
        linear_bytes=demand.linear_bytes * share,
        linear_flop_per_token=demand.linear_flop_per_token * share,
        attention_flop_per_token_pair=demand.attention_flop_per_token_pair * share,
        kv_bytes_per_token=demand.kv_bytes_per_token * share,
        kernels_per_step=demand.kernels_per_step * share,
        layers=demand.layers * share,
        build_flop=demand.build_flop + count * (model.layers if by == "loss" else 1) * 2 * demand.linear_params * 2_048,
        because=(*demand.because, f"{count} of {model.layers} layers dropped, with their weights and KV cache"),
    )


def execute(session: Session, *, count: int, by: str) -> None:
    """Remove `count` layers one after another and renumber what stays.

    Raises:
        CandidateFailed: more than a third of the layers would go, there is no calibration text, or the model's layers
            depend on their number.
    """
    from knowledge_base.errors import CandidateFailed
    from knowledge_base.techniques._blocks import calibration_rows, decoder_layers, mean_loss

    model, layers = session.model, decoder_layers(session.model)
    config = model.config.get_text_config()
    original = len(layers)
    if 3 * count > original:
        raise CandidateFailed("unsupported", f"dropping {count} of {original} layers is more than a third of them")
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) or getattr(config, "mlp_only_layers", None):
        raise CandidateFailed("unsupported", "this model's layers depend on their number, so none can be dropped")
    rows = calibration_rows(session, bytes_per_token=4.0 * config.vocab_size)[:8]
    per_layer = {k: v for k, v in vars(config).items() if "layer" in k and isinstance(v, list) and len(v) == original}
    kept = list(range(original))

    def hold(numbers: list[int]) -> None:
        """Make the model consist of these layers of the original."""
        config.num_hidden_layers = len(numbers)
        for key, values in per_layer.items():
            setattr(config, key, [values[n] for n in numbers])
        layers._modules = {str(i): everything[n] for i, n in enumerate(numbers)}
        for place, number in enumerate(numbers):
            for module in everything[number].modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = place

    everything: list[Any] = list(layers)
    for done in range(count):
        # The first layer turns embeddings into states; neither paper finds it redundant, so it stays.
        candidates = range(1, len(kept))
        if by == "influence":
            influence = _influence(model, layers, rows)
            best = min(candidates, key=lambda i: influence[i])
        else:
            losses = {}
            for candidate in candidates:
                hold([n for i, n in enumerate(kept) if i != candidate])
                losses[candidate] = mean_loss(model, rows)
                session.progress("drop_layers", (done + candidate / len(kept)) / count)
            best = min(candidates, key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
            if not math.isfinite(losses[best]):
                raise CandidateFailed("non_finite", "the loss is not finite whichever layer is dropped")
        del kept[best]
        hold(kept)
        session.progress("drop_layers", (done + 1) / count)
    session.notes["drop_layers.dropped"] = [n for n in range(original) if n not in kept]


def _influence(model, layers, rows) -> list[float]:
    """Return 1 - mean cosine similarity of each layer's input and output. Source: arXiv:2403.03853, equation 1."""
    import torch

    scores: list[float] = []

    def hook(layer: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        scores.append(1 - torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1).mean().item())

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    model.eval()
    try:
        with torch.no_grad():
            model.base_model(rows, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return scores
