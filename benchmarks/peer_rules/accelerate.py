"""`accelerate estimate-memory` (huggingface/accelerate, Apache-2.0): the real library, on configs made from our shapes.

The command fetches a config from the hub; here its two steps are called as it calls them: the model without its head is
built on the meta device in 32 bits, `calculate_maximum_sizes` adds it up, and the sum is divided for narrower types.
Neither cache nor activations are in it: it is what loading takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.peer_rules._asked import ONE_DEVICE, Answer, Asked, Peer, rule

DIVISORS = {32: 1, 16: 2, 8: 4, 4: 8}  # of the 32-bit size, for each type it offers


def estimate(asked: Asked) -> Answer:
    """Return the bytes that accelerate says loading the model takes."""
    row = asked.row
    if row.metric != "memory":
        return "a rule of memory only"
    if row.devices > 1:
        return ONE_DEVICE
    bits = _nominal_bits(row.bits)
    if bits is None:
        return "offers 32, 16, 8 and 4 bits only"
    config = _config(asked.sizes)
    if config is None:
        return "no config of this architecture can be made from the sizes alone"

    from accelerate import init_empty_weights
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoModel

    with init_empty_weights():
        model = AutoModel.from_config(config)
    total, _ = calculate_maximum_sizes(model)
    return float(total) / DIVISORS[bits]


def _nominal_bits(bits: float) -> int | None:
    """Return the type's name in bits: formats of 4.15 to 4.85 bits with their scales are called 4-bit."""
    return next((name for name in DIVISORS if name <= bits < name * 1.25), None)


def _config(n: Mapping[str, float]) -> Any:
    """Return a transformers config with these sizes, or None if they do not tell all."""
    import torch
    from transformers import LlamaConfig, Qwen3MoeConfig

    if not n["gated"] or n["attention_layers"] != n["layers"] or n["params_b"]:
        return None
    common = {
        "hidden_size": int(n["hidden_size"]), "num_hidden_layers": int(n["layers"]), "num_attention_heads": int(n["heads"]),
        "num_key_value_heads": int(n["kv_heads"]), "head_dim": int(n["head_size"]), "vocab_size": int(n["vocab_size"]),
        "tie_word_embeddings": bool(n["tied"]), "dtype": torch.float32,
    }  # fmt: skip
    if not n["experts"]:
        return LlamaConfig(intermediate_size=int(n["ffn_size"]), **common)
    if n["moe_layers"] != n["layers"] or n["shared_ffn_size"]:
        return None
    return Qwen3MoeConfig(
        num_experts=int(n["experts"]), num_experts_per_tok=int(n["experts_active"]), moe_intermediate_size=int(n["expert_ffn_size"]), **common
    )  # fmt: skip


PEER = Peer(
    name="accelerate", how="the installed library", source="https://github.com/huggingface/accelerate", answers=rule(estimate)
)  # fmt: skip
