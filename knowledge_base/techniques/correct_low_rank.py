"""Keep beside each rounded matrix two thin factors that make up for what rounding lost on real inputs.

The error W - Q(W) of a packed matrix is whitened by calibrated inputs and cut to a low rank (LQER, arXiv:2402.02446;
EoRA, arXiv:2410.21271); the factors are stored in 16 bits. The unrounded weights are read again, a matrix at a time,
from where the model came from, so zeros of a pruning step are made up for too; steps that make other weights of them
(scaling, rotating, training, factorising) leave nothing to compare with. Worth its bytes at 2 and 3 bits and in wide
matrices: rank 32 adds 0.25 bits a weight to a 4096x4096 matrix, and 4 bits to one of 256x256.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_base.techniques import _weights
from knowledge_base.techniques._quality import won_back
from knowledge_base.techniques.low_rank import matrices
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

if TYPE_CHECKING:
    import torch

TECHNIQUE = Technique(
    summary="low-rank correction of what rounding the weights lost",
    stage="quantise",
    family="error_correction",
    implements=("low_rank_error_correction",),
    knobs={"rank": Choice(options=(8, 32), default=8)},
    saves=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats"),
    spends=(
        "weights_bytes", "artefact_bytes", "peak_memory_bytes", "network_bytes_per_start", "build_s", "ttft_s", "tpot_s",
        "latency_s", "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token", "cost_usd_per_token",
    ),
    needs=frozenset({"corrected"}),
    needs_calibration=True,
    sources=("arXiv:2402.02446", "arXiv:2410.21271", "arXiv:2303.08302"),
)  # fmt: skip

EVIDENCE: tuple[Evidence, ...] = ()

_STRANGE = 0.5  # share of the outputs' energy: an error above it is no rounding


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.experts:
        return f"the {model.experts} experts are stored together, so their unrounded weights are not found by name"
    return _weights.why_not_watched(model)


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this rank means nothing for that model, or None."""
    for out_features, in_features in matrices(model):
        if 2 * knobs["rank"] * (out_features + in_features) >= out_features * in_features:
            return f"factors of rank {knobs['rank']} are as large as half of a {out_features}x{in_features} matrix"
    return None


def recovered(model: Model, rank: int) -> float:
    """Return the share of the log perplexity ratio that comes back, by the rank's share of the width.

    Own runs on the shipped model, 256 wide: rank 8 brings back 0.49 of what 3 bits cost and 0.61 of what 4 do, rank 32
    0.77 and 0.80. Wider matrices have errors of higher rank, of which the same rank brings back less.

    >>> from types import SimpleNamespace
    >>> [round(recovered(SimpleNamespace(hidden_size=h), 32), 2) for h in (256, 4096)]
    [0.77, 0.32]
    """
    return 0.77 * min(1.0, 8 * rank / model.hidden_size) ** 0.32


def rewrite(demand: Demand, *, rank: int) -> Demand:
    """Return the demand with part of the damage undone, two more small matrices beside each, and their bytes."""
    model = demand.model
    params = demand.layers * rank * sum(sum(shape) for shape in matrices(model))
    kept = 1 - recovered(model, rank)
    inputs = sum(in_features**2 for _, in_features in matrices(model))
    return won_back(demand, 1 - kept).but(
        linear_bytes=demand.linear_bytes + 2 * params,
        linear_flop_per_token=demand.linear_flop_per_token + 2 * params,
        kernels_per_step=demand.kernels_per_step + 4 * len(matrices(model)) * demand.layers,
        build_flop=demand.build_flop + 16_384 * (4 * demand.linear_params + 2 * demand.layers * inputs),
        because=(*demand.because, f"corrections of rank {rank} bring back about {1 - kept:.0%} of the loss"),
    )


def execute(session: Session, *, rank: int) -> None:
    """Put every packed matrix into a module that adds its correction, layer by layer.

    Raises:
        CandidateFailed: no calibration text, or "unsupported": nothing is packed, the unrounded weights are not found, or
            the packed ones are not those weights rounded.
    """

    from knowledge_base.errors import CandidateFailed
    from knowledge_base.techniques._blocks import Matrix, Moments, decoder_layers, each_layer
    from knowledge_base.techniques._corrected_module import CorrectedLinear
    from knowledge_base.techniques._low_rank_module import best_factors

    layers = {id(layer): name for name, layer in session.model.named_modules()}
    packed: list[dict[str, Any]] = [
        {f"{layers[id(layer)]}.{name}": m for name, m in layer.named_modules() if hasattr(m, "dequantised")}
        for layer in decoder_layers(session.model)
    ]
    if not any(packed):
        raise CandidateFailed("unsupported", "no matrix is packed, so there is no rounding to correct")
    unrounded = _Unrounded(Path(session.model.name_or_path))
    seen: dict[str, Moments] = {}
    lost = left = 0.0

    def watch(name: str) -> Callable:
        def hook(module: torch.nn.Module, args: tuple) -> None:
            seen[name] = Moments.of(args[0], full=True)

        return hook

    handles = {n: m.register_forward_pre_hook(watch(n)) for group in packed for n, m in group.items()}

    def change(index: int, layer: torch.nn.Module, found: list[Matrix]) -> None:
        nonlocal lost, left
        for name, module in packed[index].items():
            handles[name].remove()
            products = seen.pop(name).products
            rounded = module.dequantised()
            weight = unrounded.weight(name, rounded)
            error = weight - rounded
            size, before = _energy(weight, products), _energy(error, products)
            if before > _STRANGE * size:
                raise CandidateFailed(
                    "unsupported", f"`{name}` is not its weight in the model's files rounded: an earlier step changed it",
                    hint="correct rounding right after it, without steps that scale, turn or train the weights",
                )  # fmt: skip
            expand, reduce = best_factors(error, products, rank)
            made = CorrectedLinear.around(module, expand, reduce)
            session.model.set_submodule(name, made)
            lost, left = lost + before / size, left + _energy(weight - made.dequantised(), products) / size

    try:
        each_layer(session, change, full=False, label="correct_low_rank", whole=True)
    finally:
        for handle in handles.values():
            handle.remove()
    session.notes["correct_low_rank.output_error_ratio"] = left / lost if lost else 1.0


def _energy(weight: torch.Tensor, products: torch.Tensor) -> float:
    """Return the summed squares of the outputs on inputs with these products."""
    return ((weight @ products) * weight).sum().item()


class _Unrounded:
    """The weights in a model folder's safetensors files, read one at a time."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        from knowledge_base.errors import CandidateFailed

        self.files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self.files |= dict.fromkeys(file.keys(), path)
        if not self.files:
            raise CandidateFailed("unsupported", f"{folder.name}: no safetensors files to read unrounded weights from")

    def weight(self, name: str, rounded: torch.Tensor) -> torch.Tensor:
        """Return the matrix (out, in) that was rounded to `rounded`, in float32.

        Raises:
            CandidateFailed: "unsupported", the files hold none of that name and shape.
        """
        from safetensors import safe_open

        from knowledge_base.errors import CandidateFailed

        # A file of the bare model lacks the first part of the name.
        key = next((k for k in (f"{name}.weight", f"{name}.weight".partition(".")[2]) if k in self.files), None)
        if key is not None:
            with safe_open(self.files[key], framework="pt") as file:  # pages of one that stays open count as memory
                found = file.get_tensor(key).to(rounded.device).float()
            # GPT-2 stores (in, out), which shapes of square matrices do not tell.
            fitting = [m for m in (found, found.T) if m.shape == rounded.shape]
            if fitting:
                return min(fitting, key=lambda m: (m - rounded).square().sum().item())
        raise CandidateFailed(
            "unsupported", f"the model's files hold no matrix of the name and shape of `{name}`",
            hint="plan without steps that remove or split matrices",
        )  # fmt: skip
