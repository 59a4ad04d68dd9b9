"""Set the weights that matter least to zero, wherever they stand: |weight| times the norm of what it multiplies.

Wanda (Sun et al., arXiv:2306.11695), row by row, layer by layer, each layer calibrated on the pruned ones before it.
The zeros are stored like any other number and dense kernels multiply by them, so this saves neither bytes nor
time here; it costs quality. It is kept as an honest reference and as a step before formats that do use zeros.
"""

from __future__ import annotations

from dataclasses import replace

from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="zero the least important weights (Wanda); saves nothing on dense kernels",
    stage="compress",
    family="sparsity",
    implements=("wanda",),
    knobs={"sparsity": Choice(options=(0.3, 0.5), default=0.5)},
    saves=(),
    spends=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "build_s"),
    provides=frozenset({"zeros"}),
    needs_calibration=True,
    sources=("arXiv:2306.11695", "https://github.com/locuslab/wanda", "https://arxiv.org/abs/2401.00625"),
)

_PPL = "WikiText-2 perplexity"
_BESA = "https://github.com/OpenGVLab/LLMPrune-BESA"
EVIDENCE = tuple(
    Evidence(model=model, setting=setting, quantity=quantity, baseline=baseline, value=value, source=source)
    for model, setting, quantity, baseline, value, source in (
        ("LLaMA-7B", "50%", _PPL, 5.68, 7.26, _BESA),
        ("LLaMA-13B", "50%", _PPL, 5.09, 6.15, _BESA),
        ("LLaMA-30B", "50%", _PPL, 4.10, 5.25, _BESA),
        ("Llama-2-70B", "50%", _PPL, 3.31, 4.22, _BESA),
        ("Llama-2-7B", "50%, context 4096", _PPL, 5.12, 6.42, "https://github.com/locuslab/wanda"),
        ("LLaMA-7B", "70%", _PPL, 5.68, 85.77, "https://github.com/luuyin/OWL"),
    )
)


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.attention_layers < model.layers:
        return f"layers of {model.architecture} without attention read their weights in a way calibration cannot watch"
    return None


def rewrite(demand: Demand, *, sparsity: float) -> Demand:
    """Return the demand: bytes and arithmetic unchanged, quality worse."""
    demand = loss_after(demand, "wanda", sparsity=sparsity)
    return replace(
        demand,
        build_flop=demand.build_flop + 4 * demand.linear_params * 16_384,  # two passes over about 16k tokens
        because=(*demand.because, f"{sparsity:.0%} zeros: same bytes and arithmetic, dense kernels skip nothing"),
    )


def execute(session: Session, *, sparsity: float) -> None:
    """Zero the `sparsity` share of lowest score in every row of every matrix inside the layers.

    score = |W_ij| * ||x_j||_2. Source: arXiv:2306.11695, equation 1.
    """
    import torch

    from knowledge_base.techniques._blocks import Matrix, each_layer

    zeros = total = 0

    def change(index: int, layer: torch.nn.Module, matrices: list[Matrix]) -> None:
        nonlocal zeros, total
        for matrix in matrices:
            weight = matrix.weight  # (out, in)
            score = weight.abs().float() * matrix.inputs.squares.sqrt()
            lowest = score.argsort(dim=1, stable=True)[:, : round(sparsity * weight.shape[1])]
            weight.scatter_(1, lowest, 0.0)
            zeros += int((weight == 0).sum())
            total += weight.numel()

    each_layer(session, change, full=False, label="prune_wanda")
    session.notes["prune_wanda.zeros_ratio"] = zeros / total
