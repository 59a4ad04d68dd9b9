"""What training a model would take on a machine: bounds that follow from counting, for goals that cannot be run yet."""

from __future__ import annotations

from knowledge_base import units
from planner.forecast import Outlook

ADAPTER_SHARE = 0.01  # of the parameters, that a LoRA adapter of ordinary rank adds
TRAINED_BYTES = (
    16  # for each trained parameter: weights, gradients and AdamW states in mixed precision (arXiv:1910.02054)
)
FROZEN_BYTES = {  # way of training -> (bytes of a frozen parameter, source)
    "LoRA on 16-bit weights": (2.0, "arXiv:2106.09685"),
    "LoRA on 4-bit weights": (4.127 / 8, "arXiv:2305.14314"),
}
FLOP_PER_TOKEN = {
    "full": 6,
    "LoRA": 4,
}  # for each parameter: forward 2, backward 2, gradients of weights 2 (arXiv:2001.08361)
TOKENS_PER_PARAMETER = 20  # of the training run that is best for its arithmetic (arXiv:2203.15556)


def needs(outlook: Outlook, goal: str) -> list[str]:
    """Return what fine-tuning or pre-training would take, as lines. Memory is without activations, time a lower bound."""
    model, device = outlook.model, outlook.hardware.device
    size, active = model.params_total, model.params_active
    rate = max(device.flop_per_s[dtype] for dtype in ("bfloat16", "float16", "float32") if dtype in device.flop_per_s)

    def memory(name: str, needed: float, source: str) -> str:
        there = "fits" if needed <= outlook.memory_bytes else "does not fit"
        return (
            f"  {name}: {units.format(needed, 'bytes', digits=2)} and activations; "
            f"{there} {units.format(outlook.memory_bytes, 'bytes')} [{source}]"
        )

    whole = memory("all parameters, AdamW in mixed precision", size * TRAINED_BYTES, "arXiv:1910.02054")
    if goal == "pretrain":
        tokens = TOKENS_PER_PARAMETER * active
        seconds = FLOP_PER_TOKEN["full"] * active * tokens / rate
        price = outlook.hardware.price_usd_per_h
        rent = "" if price is None else f", ${price * seconds / 3600:,.0f} or more at ${price:g}/h"
        return [
            "Pre-training (cannot be run by this version):",
            whole,
            f"  tokens that use the arithmetic best: {tokens / 1e9:,.2f} billion, {TOKENS_PER_PARAMETER} for each parameter "
            "[arXiv:2203.15556]",
            f"  time: {_days(seconds)} at the very least, at the full {rate / 1e12:,.2f} Tflop/s of this machine{rent} "
            "[arXiv:2001.08361]",
        ]
    lines = ["Fine-tuning (cannot be run by this version):", whole]
    for name, (frozen, source) in FROZEN_BYTES.items():
        lines.append(memory(name, size * (frozen + ADAPTER_SHARE * TRAINED_BYTES), source))
    for name, flop in FLOP_PER_TOKEN.items():
        seconds = flop * active * 1e6 / rate
        lines.append(f"  time, {name}: {_days(seconds)} at the very least for each million tokens [arXiv:2001.08361]")
    return [*lines, "Plan the fine-tuned model as you would this one: it has the same shapes, so the same costs."]


def _days(seconds: float) -> str:
    return f"{seconds / 86400:,.1f} days" if seconds >= 2 * 86400 else units.format(seconds, "time", digits=2)
