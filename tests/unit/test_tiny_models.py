"""Tiny models are real checkpoints: transformers loads them whole, equal arguments give equal files."""

from __future__ import annotations

from pathlib import Path

import pytest

from knowledge_base.errors import BadInput
from planner.tiny_models import ARCHITECTURES, make_tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_loads_and_runs_it(tmp_path: Path, architecture: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_tiny_model(tmp_path / "model", architecture)
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())
    tokens = AutoTokenizer.from_pretrained(folder)("Measure, then believe: é\n", return_tensors="pt")
    logits = model(tokens["input_ids"]).logits.detach()
    assert logits.shape[-1] == 512
    assert bool(torch.isfinite(logits).all())
    assert float(logits.std()) > 0.3, "logits as flat as these would hide every change of a weight"
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "proj" in name and "mixer" not in name]
    assert all(side % 32 == 0 for p in matrices for side in p.shape)


def test_equal_arguments_give_equal_files(tmp_path: Path) -> None:
    one, two, other = (make_tiny_model(tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name
    assert (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_the_tokenizer_gives_any_text_back(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(make_tiny_model(tmp_path) / "tokenizer.json"))
    text = "tabs\tand 漢字, \U0001f600 and trailing blanks  \n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() == 512


def test_width_256_suits_k_quants_and_dtype_is_kept(tmp_path: Path) -> None:
    from planner._safetensors_header import read_header

    tensors = read_header(make_tiny_model(tmp_path, hidden_size=256, dtype="bfloat16") / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {"BF16"}
    assert all(t.shape[1] % 256 == 0 for t in tensors.values() if len(t.shape) == 2)


def test_making_one_leaves_the_random_state_alone(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    make_tiny_model(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_unknown_architecture(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="unknown tiny architecture `zzz`"):
        make_tiny_model(tmp_path, "zzz")
