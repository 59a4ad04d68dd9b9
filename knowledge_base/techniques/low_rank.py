"""Replace matrices by the product of two thin ones, chosen so that little is lost on real inputs.

SVD after whitening by the calibrated inputs (SVD-LLM, arXiv:2403.07378), each layer calibrated on the factorised
ones before it. `keep` sets how many parameters stay in all; which matrices give theirs up is chosen by the spectra of
the whitened matrices, measured in a pass of its own, and many keep their form. At equal size that took the shipped
model's perplexity ratio from 1.110 to 1.037 at keep=0.8 and from 1.249 to 1.175 at 0.6.
"""

from __future__ import annotations

from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="factorise matrices by activation-aware SVD",
    stage="compress",
    family="rank",
    implements=("svd_llm",),
    knobs={"keep": Choice(options=(0.6, 0.8), default=0.8)},
    saves=("weights_bytes", "artefact_bytes", "peak_memory_bytes", "network_bytes_per_start", "ttft_s"),
    # Two kernels in place of one: decoding gains only where matrices are large against the cost of a launch.
    spends=(
        "perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "build_s", "tpot_s", "latency_s",
        "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token", "cost_usd_per_token",
    ),
    needs=frozenset({"factorised"}),
    provides=frozenset({"factors"}),
    needs_calibration=True,
    sources=("arXiv:2403.07378", "arXiv:2503.12340"),
)  # fmt: skip

_PPL = "WikiText-2 perplexity"
_SVD_LLM = "https://arxiv.org/abs/2403.07378"
EVIDENCE = tuple(
    Evidence(model=model, setting=setting, quantity=quantity, baseline=baseline, value=value, source=source)
    for model, setting, quantity, baseline, value, source in (
        ("LLaMA-7B", "plain SVD, keep 0.8", _PPL, 5.68, 20061, _SVD_LLM),
        ("LLaMA-7B", "whitening, keep 0.8", _PPL, 5.68, 7.94, _SVD_LLM),
        ("LLaMA-7B", "whitening, keep 0.6", _PPL, 5.68, 13.73, _SVD_LLM),
        ("LLaMA-7B", "whitening, keep 0.4", _PPL, 5.68, 66.62, _SVD_LLM),
        ("LLaMA-7B", "keep 0.8, A100", "generation speed-up", 1.0, 1.29, "https://arxiv.org/abs/2503.12340"),
    )
)

# transformers stores these together; one matrix of more rows has another rank
_FUSED_QKV = {"gpt2", "gpt_neox", "phi3", "gpt_bigcode", "codegen", "persimmon"}
_FUSED_GATE_UP = {"phi3"}


def rank_for(out_features: int, in_features: int, keep: float) -> int:
    """Return the rank that keeps about `keep` of a matrix's parameters, or 0 where no such rank saves any.

        rank = keep * out * in / (out + in), to the nearest multiple of 32, which groups of 4-bit weights divide

    >>> rank_for(256, 256, 0.8), rank_for(768, 256, 0.8), rank_for(8, 8, 0.8)
    (96, 160, 0)
    """
    exact = keep * out_features * in_features / (out_features + in_features)
    rank = round(exact / 32) * 32
    return rank if 0 < rank * (out_features + in_features) < out_features * in_features else 0


def matrices(model: Model) -> tuple[tuple[int, int], ...]:
    """Return (out, in) of every matrix of one layer."""
    hidden, q, kv = model.hidden_size, model.heads * model.head_size, model.kv_heads * model.head_size
    attention = (
        ((q + 2 * kv, hidden), (hidden, q))
        if model.architecture in _FUSED_QKV
        else ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q))
    )
    ups = 2 if model.gated_ffn else 1
    up = (
        ((ups * model.ffn_size, hidden),) if model.architecture in _FUSED_GATE_UP else ((model.ffn_size, hidden),) * ups
    )
    return (*attention, *up, (hidden, model.ffn_size))


def kept_share(model: Model, keep: float) -> float:
    """Return the share of the layers' matrix parameters that stays: what one rank for all of a shape would keep."""
    before = after = 0
    for out_features, in_features in matrices(model):
        rank = rank_for(out_features, in_features, keep)
        before += out_features * in_features
        after += rank * (out_features + in_features) if rank else out_features * in_features
    return after / before


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.experts:
        return "experts are stored as 3-D weights, which this does not factorise"
    if model.attention_layers < model.layers:
        return (
            f"layers of {model.architecture} without attention use their weights directly; a module cannot replace them"
        )
    return None


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting means nothing for that model, or None."""
    if kept_share(model, knobs["keep"]) >= 1:
        return f"no matrix of {model.name} gets smaller at keep={knobs['keep']}"
    return None


def rewrite(demand: Demand, *, keep: float) -> Demand:
    """Return the demand with fewer parameters, bytes and operations, and one more kernel for each matrix.

    Matrices that keep their form need none; how many do is known once the spectra are.
    """
    model = demand.model
    share = kept_share(model, keep)
    factorised = sum(1 for shape in matrices(model) if rank_for(*shape, keep))
    demand = loss_after(demand, "svd_llm", compression=1 - share)
    inputs = sum(in_features**2 for _, in_features in matrices(model))
    return demand.but(
        linear_params=demand.linear_params * share,
        linear_bytes=demand.linear_bytes * share,
        linear_flop_per_token=demand.linear_flop_per_token * share,
        kernels_per_step=demand.kernels_per_step + demand.layers * factorised,
        build_flop=demand.build_flop + 16_384 * (8 * demand.linear_params + 4 * demand.layers * inputs),
        because=(*demand.because, f"matrices factorised: {1 - share:.0%} fewer weights in the layers"),
    )


def execute(session: Session, *, keep: float) -> None:
    """Replace matrices by their whitened low-rank factors until `keep` of the parameters is left.

    Raises:
        CandidateFailed: no calibration text, or "unsupported", experts or matrices that do not get smaller.
    """
    import torch

    from knowledge_base.errors import CandidateFailed
    from knowledge_base.techniques._allocation import allocate
    from knowledge_base.techniques._blocks import Matrix, each_layer
    from knowledge_base.techniques._low_rank_module import LowRankLinear, whitened_energies

    parts: dict[tuple[int, str], list[tuple[float, float]]] = {}
    ranks: dict[tuple[int, str], list[int]] = {}  # of each part's settings; 0 keeps the matrix as it is
    before = budget = 0

    def measure(index: int, layer: torch.nn.Module, found: list[Matrix]) -> None:
        nonlocal before, budget
        for matrix in found:
            if matrix.expert is not None:
                raise CandidateFailed("unsupported", "experts stored as 3-D weights are not factorised")
            out_features, in_features = matrix.weight.shape
            rank, size = rank_for(out_features, in_features, keep), matrix.weight.numel()
            before += size
            budget += rank * (out_features + in_features) if rank else size
            lost = whitened_energies(matrix.weight, matrix.inputs.products)
            key = index, matrix.name
            ranks[key] = [r for r in range(32, min(matrix.weight.shape), 32) if r * (out_features + in_features) < size]
            # Errors of large outputs matter more and are forgiven more: energy lost over the root of all of it.
            scale = max(float(lost[0]), 1e-30) ** 0.5
            parts[key] = [(r * (out_features + in_features), float(lost[r]) / scale) for r in ranks[key]]
            ranks[key].append(0)
            parts[key].append((size, 0.0))

    def change(index: int, layer: torch.nn.Module, found: list[Matrix]) -> None:
        for matrix in found:
            if rank := chosen[index, matrix.name]:
                thin = LowRankLinear.factorise(matrix.weight, matrix.module.bias, matrix.inputs.products, rank=rank)
                layer.set_submodule(matrix.name, thin)

    each_layer(session, measure, full=True, label="low_rank: spectra")
    settings = allocate(parts, budget)
    chosen = {key: ranks[key][number] for key, number in settings.items()}
    after = sum(parts[key][number][0] for key, number in settings.items())
    if after == before:
        raise CandidateFailed("unsupported", f"no matrix of this model gets smaller at keep={keep}")
    each_layer(session, change, full=True, label="low_rank")
    session.notes["low_rank.kept_ratio"] = after / before
    session.notes["low_rank.ranks"] = {f"{index}.{name}": rank for (index, name), rank in chosen.items()}
