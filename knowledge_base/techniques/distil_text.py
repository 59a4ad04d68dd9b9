"""Train the damaged model on text that the unchanged one writes: nothing of it but its sequences is used.

Sequence-level distillation (Kim and Rush, arXiv:1606.07947), with samples in place of the likeliest sequence, which for
open text goes round in circles. Calibration rows give the first eighth of each sequence. The loss is that of the next
token; LoRA carries the update and is merged; the state whose loss on calibration text kept out is lowest stays.
Where the unchanged model's distributions are at hand, recover_lora learns more from the same text.
"""

from __future__ import annotations

from knowledge_base.build_memory import FULLY_TRAINED
from knowledge_base.techniques._quality import trained_share, won_back
from knowledge_base.techniques.recover_lora import (
    CALIBRATION_TOKENS,
    LEARNING_RATE,
    RANK,
    TRAINING_SLOWDOWN,
    training_flop,
)
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="win back quality on text written by the unchanged model, with LoRA, merged into the weights",
    stage="finetune",
    family="distillation",
    implements=("sequence_distillation", "blackbox_distillation"),
    knobs={"steps": Choice(options=(20, 60), default=60)},
    saves=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats"),
    spends=("build_s",),
    needs_calibration=True,
    memory=FULLY_TRAINED,
    modules=("peft",),
    sources=("arXiv:1606.07947", "arXiv:2106.09685"),
)

EVIDENCE: tuple[Evidence, ...] = ()

# Share of the log perplexity ratio that comes back. 20 steps: measured on the shipped model after dropping two layers, on
# 2,000 tokens of calibration text (2026-11: 1.343 -> 1.280, recover_lora 1.261 on that text). 60 steps: expected.
_RECOVERED = {20: 0.15, 60: 0.2}


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.attention_layers < model.layers:
        return f"adapters would not be trained: {model.architecture} has layers that use their weights directly"
    return None


def rewrite(demand: Demand, *, steps: int) -> Demand:
    """Return the demand with part of the damage undone: ratio ** (1 - recovered), and the work of writing and training.

    Writing a token reads the model once for each batch of sequences; in arithmetic it is one more pass over the text.
    """
    recovered = trained_share(demand, _RECOVERED[steps])
    forward_flop = demand.linear_flop_per_token + demand.head_flop_per_token
    flop = training_flop(demand, steps, passes=2) + forward_flop * CALIBRATION_TOKENS
    return won_back(demand, recovered).but(
        build_flop=demand.build_flop + TRAINING_SLOWDOWN * flop,
        because=(
            *demand.because,
            f"{steps} LoRA steps on text of the unchanged model bring back about {recovered:.0%}",
        ),
    )


def execute(session: Session, *, steps: int) -> None:
    """Let the unchanged model write, train and merge. The model's structure is the one it had before.

    Raises:
        CandidateFailed: too little calibration text to hold some out, the unchanged model cannot be loaded again, or a
            loss that is not finite.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from knowledge_base.techniques import _training
    from knowledge_base.techniques._blocks import mean_loss

    model = session.model
    given, held_out = _training.split(session)
    rows = _training.of_unchanged(
        session, lambda teacher: _training.written(teacher, given[:held_out], len(given), session.seed)
    )

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        tokens = rows[chosen.to(rows.device)]
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    with _training.adapters(session, RANK) as parameters:
        before, after = _training.train(
            session, "distil_text", [{"params": parameters, "lr": LEARNING_RATE}], loss,
            lambda: mean_loss(model, given[held_out:]), torch.arange(len(rows)), steps=steps,
            batch=_training.rows_of_step(rows), row_bytes=4.0 * rows.shape[1] * model.config.get_text_config().vocab_size,
        )  # fmt: skip
    session.notes["distil_text.heldout_loss_nats"] = [before, after]
