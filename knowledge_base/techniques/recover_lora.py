"""Train the damaged model back towards the unchanged one with LoRA, then merge the adapters into its weights.

peft's LoRA of rank 16 on every matrix inside the layers; the loss is the KL divergence from the unchanged model's
next-token distribution to the damaged model's on the calibration text. (Next-token loss alone fits the few
calibration documents: on the shipped model it made held-out text worse.) AdamW, cosine schedule, seeded. The last
quarter of the text is kept out of training; the state nearest to the unchanged model there is kept, and if none beats
the model as it was, nothing is changed. Zeros left by pruning stay zero. The unchanged model is asked once, before
training, and then gone: memory holds one model, its adapters and what one step computes.
"""

from __future__ import annotations

from knowledge_base.techniques._quality import trained_share, won_back
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

RANK = 16
TRAINING_SLOWDOWN = 3.0
TOKENS_PER_STEP = 1024
LEARNING_RATE = 1e-3
# As the training loop has it (techniques/_training.py), on the calibration text the planner takes by default.
CHECKS, VIEWS_MAX = 4, 4
CALIBRATION_TOKENS = 16_384

TECHNIQUE = Technique(
    summary="win back quality by distilling from the unchanged model with LoRA, merged into the weights",
    stage="recover",
    family="distillation",
    implements=("recover_lora",),
    knobs={"steps": Choice(options=(20, 60, 200), default=60)},
    saves=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats"),
    spends=("build_s",),
    needs_calibration=True,
    modules=("peft",),
    sources=("arXiv:2106.09685", "https://github.com/horseee/LLM-Pruner", "https://github.com/NVlabs/Minitron"),
)

EVIDENCE: tuple[Evidence, ...] = ()

# Share of the log perplexity ratio that comes back, measured on the shipped model after low_rank and drop_layers.
# No published figure is comparable: data and steps differ by orders of magnitude.
_RECOVERED = {20: 0.25, 60: 0.4, 200: 0.5}


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.attention_layers < model.layers:
        return f"adapters would not be trained: {model.architecture} has layers that use their weights directly"
    return None


def training_flop(demand: Demand, steps: int, passes: float) -> float:
    """Return the arithmetic of distilling for that many steps, a token of each costing `passes` forward passes.

    Beside it the unchanged model reads the calibration text once, writes and reads more where that is short for so many
    steps, and a quarter of the text is scored.
    """
    forward_flop = demand.linear_flop_per_token + demand.head_flop_per_token
    trained, at_hand = TOKENS_PER_STEP * steps, 0.75 * CALIBRATION_TOKENS
    written = max(0.0, trained / VIEWS_MAX - at_hand)
    scored = (CHECKS + 1) * 0.25 * CALIBRATION_TOKENS
    return forward_flop * (passes * trained + CALIBRATION_TOKENS + 2 * written + scored)


def rewrite(demand: Demand, *, steps: int) -> Demand:
    """Return the demand with part of the damage undone: ratio ** (1 - recovered), and the work of training.

    A training token costs a forward pass and a backward pass to the adapters; small adapter products and the optimiser
    keep a processor at about a third of its rate for large ones (own runs, 2026-11).
    """
    recovered = trained_share(demand, _RECOVERED[steps])
    return won_back(demand, recovered).but(
        build_flop=demand.build_flop + TRAINING_SLOWDOWN * training_flop(demand, steps, passes=2),
        because=(*demand.because, f"{steps} LoRA steps bring back about {recovered:.0%} of the loss"),
    )


def execute(session: Session, *, steps: int) -> None:
    """Train and merge. The model's structure and number of parameters are those it had before.

    Raises:
        CandidateFailed: too little calibration text to hold some out, the unchanged model cannot be loaded again, or a
            loss that is not finite.
    """
    from knowledge_base.techniques import _training

    with (
        _training.answers(session, label="recover_lora", steps=steps) as told,
        _training.adapters(session, RANK) as parameters,
    ):
        groups = [{"params": parameters, "lr": LEARNING_RATE}]
        kl_nats = _training.distil(session, "recover_lora", groups, told, steps=steps)
    session.notes["recover_lora.heldout_kl_nats"] = kl_nats
