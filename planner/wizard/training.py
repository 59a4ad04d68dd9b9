"""What training a model is predicted to take on a machine, for goals that cannot be run yet."""

from __future__ import annotations

from typing import Any

from knowledge_base import units
from knowledge_base.errors import LeanplanError
from knowledge_base.types import Value
from planner.forecast import Outlook

SEQUENCE_TOKENS = 512
TOKENS_PER_PARAMETER = 20  # of the training run that is best for its arithmetic (arXiv:2203.15556)
WHOLE = "all parameters, AdamW in mixed precision"
WAYS: dict[str, tuple[dict[str, Any], str]] = {  # way of training -> (settings, source)
    WHOLE: ({"master_weights": True, "state_dtype": "float32", "gradient_buckets": True}, "arXiv:1910.02054"),
    "LoRA on 16-bit weights": ({"method": "lora"}, "arXiv:2106.09685"),
    "LoRA on 4-bit weights": ({"method": "qlora", "base_format": "nf4_double"}, "arXiv:2305.14314"),
}


def needs(outlook: Outlook, goal: str) -> list[str]:
    """Return what fine-tuning or pre-training would take, as lines: memory and time with their 80 % intervals."""
    pretrain = goal == "pretrain"
    tokens = TOKENS_PER_PARAMETER * outlook.model.params_active if pretrain else 1e6
    length = min(SEQUENCE_TOKENS, outlook.model.max_context_tokens)
    lines = [
        f"{'Pre-training' if pretrain else 'Fine-tuning'} (cannot be run by this version; predicted for one sequence of "
        f"{length} tokens at a time, activations computed again):"
    ]
    for name in [WHOLE] if pretrain else WAYS:
        try:
            lines.append(f"  {name}: {_cost(outlook, name, length, tokens)}")
        except LeanplanError as error:
            lines.append(f"  {name}: {error.message}")
    if pretrain:
        return [
            *lines,
            f"  tokens that use the arithmetic best: {tokens / 1e9:,.2f} billion, {TOKENS_PER_PARAMETER} for each parameter "
            "[arXiv:2203.15556]",
        ]
    return [
        *lines,
        "Plan the fine-tuned model as you would this one: it has the same shapes, so the same costs. Other methods, lengths "
        "and several devices: leanplan estimate MODEL --finetune METHOD",
    ]


def _cost(outlook: Outlook, name: str, length: int, tokens: float) -> str:
    from cost_models.training import TrainingSetup, training_memory, training_time

    settings, source = WAYS[name]
    rates = outlook.hardware.device.flop_per_s
    dtype = next((d for d in ("bfloat16", "float16") if d in rates), "float32")
    setup = TrainingSetup(sequence_tokens=length, checkpointing=True, weight_dtype=dtype, **settings)
    memory = training_memory(outlook.model, setup).total
    time = training_time(outlook.model, setup, outlook.hardware, tokens=tokens).total
    fits = (
        "fits"
        if memory.high <= outlook.memory_bytes
        else "may fit"
        if memory.mid <= outlook.memory_bytes
        else "does not fit"
    )
    price = outlook.hardware.price_usd_per_h
    rent = "" if price is None else f", ${price * time.mid / 3600:,.2f} at ${price:g}/h"
    return (
        f"{_said(memory, 'bytes')}, {fits} {units.format(outlook.memory_bytes, 'bytes')}; "
        f"{_said(time, 'time')} for {tokens / 1e6:,.0f} million tokens{rent} [{source}]"
    )


def _said(value: Value, dimension: str) -> str:
    mid, low, high = (units.format(x, dimension, digits=2) for x in (value.mid, value.low, value.high))
    return f"{mid} [{low} – {high}]"
