"""Take small inputs of every matrix for zero while decoding, and leave the columns they would multiply unread.

TEAL (Liu et al., arXiv:2408.14690): each matrix has one threshold, a quantile of |x| on calibration text, each layer
calibrated on what the ones before it give. How much each matrix skips is chosen by the error it makes in its outputs,
so that a `sparsity` share of all columns is skipped. No bytes are saved: all columns are stored,
they are only not read. On a CPU the sum over the columns that are read is PyTorch's
embedding_bag; own runs on two cores, one row, half of the inputs: a 5632x2048 matrix in bfloat16 0.21 ms against 0.54,
in float32 0.37 against 2.1; 768x256 gains nothing. Prompts and batches gain nothing. A GPU would need a kernel of its own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from knowledge_base.techniques import _weights
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

if TYPE_CHECKING:
    import torch

TECHNIQUE = Technique(
    summary="leave the columns of small activations unread while decoding one sequence",
    stage="serve",
    family="activation_sparsity",
    implements=("activation_thresholding",),
    knobs={"sparsity": Choice(options=(0.25, 0.4), default=0.4)},
    saves=(
        "tpot_s", "latency_s", "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token",
        "cost_usd_per_token",
    ),
    spends=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "build_s", "ttft_s"),
    needs=frozenset({"thresholded"}),
    needs_calibration=True,
    sources=("arXiv:2408.14690", "arXiv:2404.08763"),
)  # fmt: skip

_TEAL = "https://www.together.ai/blog/teal-training-free-activation-sparsity-in-large-language-models"
EVIDENCE = (
    Evidence(model="Llama-2, Llama-3, Mistral, 7B to 70B", setting="40 %, one sequence, own GPU kernel, up to",
             quantity="decode speed-up", baseline=1.0, value=1.53, source=_TEAL),
    Evidence(model="Llama-2, Llama-3, Mistral, 7B to 70B", setting="50 %, one sequence, own GPU kernel, up to",
             quantity="decode speed-up", baseline=1.0, value=1.8, source=_TEAL),
)  # fmt: skip

# (log perplexity ratio, its standard deviation): own runs on the shipped model, whose 7 M parameters have little to
# spare: 1.006 and 1.045, where one share for all matrices gave 1.020 and 1.099; half of the inputs costs 1.165.
_LOSS = {0.25: (0.006, 0.01), 0.4: (0.044, 0.04)}
_SHARES = tuple(step / 10 for step in range(9, -1, -1))  # of a matrix's inputs that may be skipped
_KERNELS = 5  # comparing, choosing and gathering, beside each product


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if hardware.device.kind == "gpu":
        return "no kernel that skips columns exists here for GPUs, so it would save nothing"
    if model.experts:
        return f"the {model.experts} experts are stored as 3-D weights, whose columns are not skipped"
    return _weights.why_not_watched(model)


def rewrite(demand: Demand, *, sparsity: float) -> Demand:
    """Return the demand with fewer weights read for each output token, and the work of choosing them."""
    loss, sd = _LOSS[sparsity]
    matrices = 7 if demand.model.gated_ffn else 6
    return demand.but(
        output_share=demand.output_share * (1 - sparsity),
        kernels_per_step=demand.kernels_per_step + _KERNELS * matrices * demand.layers,
        build_flop=demand.build_flop + 8 * demand.linear_params * 16_384,  # four passes over about 16k tokens
        perplexity_ratio=demand.perplexity_ratio * math.exp(loss),
        perplexity_log_sd=math.hypot(demand.perplexity_log_sd, sd),
        because=(*demand.because, f"{sparsity:.0%} of the inputs taken for zero: their columns are not read"),
    )


def execute(session: Session, *, sparsity: float) -> None:
    """Replace the matrices inside the layers by ones that skip inputs below their threshold.

    Raises:
        CandidateFailed: no calibration text, or "unsupported", matrices that are packed or of experts.
    """

    from knowledge_base.errors import CandidateFailed
    from knowledge_base.techniques._allocation import allocate
    from knowledge_base.techniques._blocks import Matrix, each_layer
    from knowledge_base.techniques._threshold_module import ThresholdedLinear

    parts: dict[tuple[int, str], list[tuple[float, float]]] = {}
    read = 0.0

    def measure(index: int, layer: torch.nn.Module, matrices: list[Matrix]) -> None:
        nonlocal read
        for matrix in matrices:
            if matrix.expert is not None:
                raise CandidateFailed("unsupported", "columns of experts stored as 3-D weights are not skipped")
            read += (1 - sparsity) * matrix.weight.numel()
            x, weight = matrix.inputs.sample, matrix.weight.float()
            scale = (x @ weight.T).square().sum().sqrt().item() or 1.0  # as in low_rank
            parts[index, matrix.name] = [
                ((1 - share) * weight.numel(), (_small(x, share) @ weight.T).square().sum().item() / scale)
                for share in _SHARES
            ]

    def change(index: int, layer: torch.nn.Module, matrices: list[Matrix]) -> None:
        for matrix in matrices:
            threshold = _threshold(matrix.inputs.sample, _SHARES[chosen[index, matrix.name]])
            made = ThresholdedLinear.from_weight(matrix.weight, matrix.module.bias, threshold=threshold)
            layer.set_submodule(matrix.name, made)

    each_layer(session, measure, full=False, label="activation_threshold: errors")
    if not parts:
        raise CandidateFailed("unsupported", "the layers hold no plain matrices whose columns could be skipped")
    chosen = allocate(parts, read)
    each_layer(session, change, full=False, label="activation_threshold")
    session.notes["activation_threshold.skipped"] = {
        f"{index}.{name}": _SHARES[number] for (index, name), number in chosen.items()
    }


def _threshold(x: torch.Tensor, share: float) -> float:
    """Return what that share of |x| is at most; below zero, so that even zeros pass, for a share of 0."""
    import torch

    return torch.quantile(x.abs().flatten(), share).item() if share else -1.0


def _small(x: torch.Tensor, share: float) -> torch.Tensor:
    """Return x with all but the inputs a threshold for that share drops set to zero."""
    import torch

    return torch.where(x.abs() > _threshold(x, share), 0, x)
