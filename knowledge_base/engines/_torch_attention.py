"""Which kernel computes a torch model's attention."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from knowledge_base.errors import CandidateFailed

PACKAGES = {"flash_attention_3": "flash_attn_interface"}  # without it transformers would fetch a kernel from a hub


def use(model: Any, kernel: str) -> None:
    """Have a loaded model compute its attention with that kernel.

    Raises:
        CandidateFailed: "engine_missing", its package is not installed; "unsupported", it does not run on this device, in
            this dtype or for this architecture.
    """
    hint = "plan without attention_kernel"
    if kernel in PACKAGES:
        if model.device.type != "cuda":
            raise CandidateFailed(
                "unsupported", f"{kernel} runs on CUDA GPUs, not on the {model.device.type}", hint=hint
            )
        if importlib.util.find_spec(PACKAGES[kernel]) is None:
            raise CandidateFailed(
                "engine_missing", f"{kernel} needs {PACKAGES[kernel]}, which is not installed", hint=hint
            )
        if model.dtype not in (torch.bfloat16, torch.float16):
            dtype = str(model.dtype).removeprefix("torch.")
            raise CandidateFailed("unsupported", f"{kernel} computes in 16 bits, the model in {dtype}", hint=hint)
    try:
        model.set_attn_implementation(kernel)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CandidateFailed("unsupported", f"{kernel} cannot be used: {reason}", hint=hint) from error
    if model.config._attn_implementation != kernel:  # for some architectures transformers only warns
        kind = model.config.model_type
        raise CandidateFailed(
            "unsupported", f"transformers keeps `{kind}` from computing its attention with {kernel}", hint=hint
        )
