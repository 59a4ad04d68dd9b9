"""Sessions on tiny random models whose rows fit GGUF's blocks of 256: for tests of writer and llama.cpp engine."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_sessions import facts_of
from transformers import AutoConfig, AutoModelForCausalLM

from knowledge_base.types import Session


def make_session(
    architecture: str = "llama",
    *,
    dtype: str = "float32",
    tokenizer: object = None,
    type: str | None = None,
    **changes: object,
) -> Session:
    """Return a session with a tiny random model; weights are larger than usual so that outputs differ clearly."""
    if architecture == "gpt2":
        settings = {"n_embd": 256, "n_layer": 2, "n_head": 8, "n_positions": 256}
    else:
        settings = {
            "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 256,
        }  # fmt: skip
    settings |= {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.1, **changes}
    config = AutoConfig.for_model(architecture, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases that do nothing would hide a wrong name
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model = model.to(getattr(torch, dtype))
    return Session(
        model=model, tokenizer=tokenizer, facts=facts_of(model), calibration=None, seed=0, workspace=Path(),
        storage={"gguf_type": type} if type else {},
    )  # fmt: skip
