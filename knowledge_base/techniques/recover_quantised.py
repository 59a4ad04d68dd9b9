"""Train the scales and zeros of weights that are already rounded towards the unchanged model; the levels stay.

The second phase of EfficientQAT (Chen et al., arXiv:2407.11062), on what any quantiser in groups left: rounding to
nearest, GPTQ, HQQ, mixed bits. Loss, text and the choice of the best state are those of recover_lora. The artefact keeps
its bytes. Products are computed from the levels in either direction, so while it trains no dense matrix is in memory but
the one in use.
"""

from __future__ import annotations

from knowledge_base.build_memory import TRAINED
from knowledge_base.techniques._quality import trained_share, won_back
from knowledge_base.techniques.recover_lora import training_flop
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

SCALE_RATE = 0.005  # learning rate of a matrix's scales and zeros, in units of the mean distance between its levels
TRAINING_SLOWDOWN = 3.0

TECHNIQUE = Technique(
    summary="win back quality by training the scales of rounded weights towards the unchanged model",
    stage="quantise",
    family="scales",
    implements=("recover_quantised",),
    knobs={"steps": Choice(options=(20, 60, 200), default=60)},
    saves=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats"),
    spends=("build_s",),
    needs=frozenset({"packed:int4"}),
    needs_calibration=True,
    memory=TRAINED,
    modules=("torchao",),
    sources=("arXiv:2407.11062", "https://github.com/OpenGVLab/EfficientQAT"),
)

EVIDENCE = (
    Evidence(model="Llama-2-7B", setting="2 bits, groups of 64, with training layer by layer before",
             quantity="WikiText-2 perplexity", baseline=5.47, value=6.86, source="https://github.com/OpenGVLab/EfficientQAT"),
    Evidence(model="Llama-2-7B", setting="3 bits, groups of 128, with training layer by layer before",
             quantity="WikiText-2 perplexity", baseline=5.47, value=5.81, source="https://github.com/OpenGVLab/EfficientQAT"),
)  # fmt: skip

# Share of the log perplexity ratio that comes back. 20 steps: measured on the shipped model after GPTQ at 2 bits in groups
# of 64 (2026-11: 1.342 -> 1.267); training latent weights from rounding to nearest came from 2.330 to 1.473 in as many.
# More steps are expected to gain as recover_lora's do. From 3 bits up GPTQ leaves little, 1.0328 -> 1.0315: `trained_share`.
_RECOVERED = {20: 0.2, 60: 0.3, 200: 0.35}


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.attention_layers < model.layers:
        return f"layers of {model.architecture} without attention read their weights where no scale can be trained"
    return None


def rewrite(demand: Demand, *, steps: int) -> Demand:
    """Return the demand with part of the damage undone: ratio ** (1 - recovered), and the work of training.

    A training token costs a forward pass and a backward pass of twice its work; unpacking levels and summing
    gradients over groups keep a processor at about a third of its rate for large products.
    """
    recovered = trained_share(demand, _RECOVERED[steps])
    return won_back(demand, recovered).but(
        build_flop=demand.build_flop + TRAINING_SLOWDOWN * training_flop(demand, steps, passes=3),
        because=(*demand.because, f"{steps} steps on the scales bring back about {recovered:.0%} of the loss"),
    )


def execute(session: Session, *, steps: int) -> None:
    """Train and pack again. Kinds, shapes and bytes are those it had before.

    Raises:
        CandidateFailed: "unsupported", no weights are held in groups; too little calibration text, the unchanged model
            cannot be loaded again, or a loss that is not finite.
    """
    from knowledge_base.errors import CandidateFailed
    from knowledge_base.techniques import _training
    from knowledge_base.techniques._packed import GroupedLinear
    from knowledge_base.techniques._scales_module import TrainedScales
    from knowledge_base.techniques._table_module import Int4Table

    model = session.model
    packed = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GroupedLinear)
        and not isinstance(module, Int4Table)  # rows of a table are read, not multiplied
    }
    if not packed:
        raise CandidateFailed("unsupported", "no matrix is held in groups of few bits, so there are no scales to train")
    stored = model.dtype
    with (
        _training.answers(session, label="recover_quantised", steps=steps) as told,
        _training.widened(model, _training.HALF),
    ):
        trained = {name: TrainedScales(module) for name, module in packed.items()}
        for name, module in trained.items():
            model.set_submodule(name, module)
        groups = [
            {"params": [module.scales, module.zeros], "lr": SCALE_RATE * module.scales.abs().mean().item()}
            for module in trained.values()
        ]
        kl_nats = _training.distil(session, "recover_quantised", groups, told, steps=steps)
        for name, module in trained.items():
            model.set_submodule(name, module.packed(stored))
    session.notes["recover_quantised.heldout_kl_nats"] = kl_nats
