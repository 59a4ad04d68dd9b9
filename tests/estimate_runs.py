"""`leanplan estimate` of the shape of Llama 3 8B, as tests of the command run it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from planner.cli import main

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["estimate", *argv])
    out, talk = capsys.readouterr()
    return code, out, talk


def data(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    code, out, talk = run(capsys, *argv, "--json")
    assert code == 0, talk
    return json.loads(out)
