"""Train every weight of the damaged model back towards the unchanged one. For models small enough to be trained whole.

The loss, the text and the choice of the best state are those of recover_lora; what differs is that nothing confines the
update to a low rank. Layers near the output learn fastest, each earlier one a tenth slower (Howard and Ruder,
arXiv:1801.06146, tune them apart too), embedding and head slowest. Rates are in units of a layer's own weights, so that
one setting suits models of any width. Zeros left by pruning stay zero. Memory holds weights, gradients and two moments of
each, in 32 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from knowledge_base.build_memory import FULLY_TRAINED
from knowledge_base.techniques._quality import trained_share, won_back
from knowledge_base.techniques.recover_lora import training_flop
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

if TYPE_CHECKING:
    import torch

STEP_SHARE = 0.004  # of a layer's typical weight, what a step moves one at most
SLOWER_BELOW = 0.9  # the learning rate of a layer, over that of the layer above
BYTES_PER_PARAM = 16  # weight, gradient and two moments
TRAINING_SLOWDOWN = 2.0

TECHNIQUE = Technique(
    summary="win back quality by distilling from the unchanged model into every weight",
    stage="recover",
    family="distillation",
    implements=("whitebox_distillation",),
    knobs={"steps": Choice(options=(20, 60, 200), default=60)},
    saves=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats"),
    spends=("build_s",),
    needs_calibration=True,
    memory=FULLY_TRAINED,
    sources=("arXiv:2408.11796", "arXiv:1801.06146", "https://github.com/NVlabs/Minitron"),
)

EVIDENCE: tuple[Evidence, ...] = ()

# Share of the log perplexity ratio that comes back. 20 steps: measured on the shipped model after dropping two layers
# (2026-11: 1.343 -> 1.201, recover_lora 1.240 in as many steps). The others keep their distance to recover_lora's.
_RECOVERED = {20: 0.35, 60: 0.5, 200: 0.6}


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model on that machine, or None."""
    wanted = BYTES_PER_PARAM * model.params_total
    if wanted > hardware.memory_limit_bytes:
        return (
            f"training all {model.params_total / 1e9:.3g} billion weights takes {wanted / 2**30:.0f} GiB, "
            f"the machine has {hardware.memory_limit_bytes / 2**30:.0f} GiB; recover_lora takes far less"
        )
    return None


def rewrite(demand: Demand, *, steps: int) -> Demand:
    """Return the demand with part of the damage undone: ratio ** (1 - recovered), and the work of training.

    A training token costs a forward pass and a backward pass of twice its work; the unchanged model reads the
    calibration text once.
    """
    recovered = trained_share(demand, _RECOVERED[steps])
    flop = TRAINING_SLOWDOWN * training_flop(demand, steps, passes=3)
    return won_back(demand, recovered).but(
        build_flop=demand.build_flop + flop,
        because=(*demand.because, f"{steps} steps on all weights bring back about {recovered:.0%} of the loss"),
    )


def execute(session: Session, *, steps: int) -> None:
    """Train. The model's structure and number of parameters are those it had before.

    Raises:
        CandidateFailed: too little calibration text to hold some out, the unchanged model cannot be loaded again, or a
            loss that is not finite.
    """
    import torch

    from knowledge_base.techniques import _training
    from knowledge_base.techniques._blocks import decoder_layers

    model = session.model
    with (
        _training.answers(session, label="recover_full", steps=steps) as told,
        _training.widened(model, (torch.float16, torch.bfloat16)),
    ):
        model.requires_grad_(True)
        layers = decoder_layers(model)
        inside = {id(p) for p in layers.parameters()}
        parts = [list(layer.parameters()) for layer in reversed(layers)]
        parts.append([p for p in model.parameters() if id(p) not in inside])
        groups = [
            {"params": part, "lr": STEP_SHARE * _typical(part) * SLOWER_BELOW**above}
            for above, part in enumerate(parts)
        ]
        weights = {name: p for name, p in model.named_parameters() if id(p) in inside and p.dim() > 1}
        zeros = _training.pruned(weights)
        hooks = [weights[n].register_hook(lambda gradient, gone=gone: gradient * ~gone) for n, gone in zeros.items()]
        kl_nats = _training.distil(session, "recover_full", groups, told, steps=steps)
        for hook in hooks:
            hook.remove()
    session.notes["recover_full.heldout_kl_nats"] = kl_nats


def _typical(parameters: Sequence[torch.Tensor]) -> float:
    """Return the mean over matrices of the root mean square of their weights; those pruned to nothing have none."""
    sizes = [p.detach().square().mean().sqrt().item() for p in parameters if p.dim() > 1 and p.numel()]
    return sum(sizes) / len(sizes)
