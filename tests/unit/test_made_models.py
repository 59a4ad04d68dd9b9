"""The models made for benchmarks: one computes what the shipped one does, the other is a GPT-2 that has learned something."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_sessions import load, session_of, tiny_folder
from transformers import AutoTokenizer

from benchmarks import made_models
from benchmarks.made_models import LOUDNESS, SHIPPED, fold_outliers, made, make_gpt2, training_windows
from knowledge_base.techniques._folding import junctions

TOKENS = torch.randint(0, 512, (2, 48), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_outliers_leave_the_function_as_it_was(architecture):
    session = session_of(tiny_folder(architecture))
    before = session.model(TOKENS).logits
    counts = fold_outliers(session)
    assert min(counts) >= 2, "each layer has its loud channels"
    assert torch.allclose(session.model(TOKENS).logits, before, atol=1e-4 * before.abs().max().item())


def test_outliers_are_loud_in_what_matrices_read():
    session = session_of(tiny_folder())
    norms = [j.feeder.gain.clone() for layer in junctions(session) for j in layer if hasattr(j.feeder, "gain")]
    fold_outliers(session)
    after = [j.feeder.gain for layer in junctions(session) for j in layer if hasattr(j.feeder, "gain")]
    assert norms
    for old, new in zip(norms, after):
        ratios = set((new / old).unique().tolist())
        assert 1.0 in ratios
        assert ratios - {1.0} <= set(LOUDNESS)
        assert ratios - {1.0}


def test_the_shipped_model_with_outliers_gives_the_same_logits(tmp_path):
    folder = made("outliers", tmp_path)
    tokens = torch.tensor(
        [AutoTokenizer.from_pretrained(folder)("def read(path):\n    return path.open()\n")["input_ids"]]
    )
    before, after = load(SHIPPED)(tokens).logits, load(folder)(tokens).logits
    assert torch.allclose(before, after, atol=1e-3)
    written = (folder / "model.safetensors").read_bytes()
    assert written != (SHIPPED / "model.safetensors").read_bytes()
    assert made("outliers", tmp_path) == folder, "what is there is not made again"
    assert (folder / "model.safetensors").read_bytes() == written
    assert made("outliers", tmp_path / "again").joinpath("model.safetensors").read_bytes() == written


def test_a_gpt2_learns_from_few_tokens(tmp_path):
    make_gpt2(tmp_path / "small", tokens=16 * 1024, shape=dict(n_embd=32, n_layer=1, n_head=2))
    model = load(tmp_path / "small")
    assert model.config.model_type == "gpt2"
    assert len(model.transformer.wpe.weight) == 1024
    facts = json.loads((tmp_path / "small" / "made.json").read_text())
    assert facts["steps"] == 8
    assert facts["heldout_loss_nats_per_token"] < math.log(4096), "worse than guessing evenly"
    assert AutoTokenizer.from_pretrained(tmp_path / "small").eos_token_id == 0


def test_a_half_made_model_is_not_taken_for_whole(tmp_path, monkeypatch):
    def broken(out):
        out.mkdir()
        raise RuntimeError("power cut")

    monkeypatch.setitem(made_models.MAKERS, "gpt2", broken)
    with pytest.raises(RuntimeError):
        made("gpt2", tmp_path)
    assert not list(tmp_path.iterdir())


def test_training_text_is_the_same_each_time_and_not_the_held_out_one():
    windows = training_windows(4 * 1024)
    assert windows.shape == (4, 1024)
    assert torch.equal(windows, training_windows(4 * 1024))
    heldout = made_models.shipped.tokens_of(made_models.shipped.TEXTS / "heldout.txt", "tiny-lm")
    seen = {tuple(w.tolist()) for w in heldout.unfold(0, 32, 1)}
    assert not any(tuple(w.tolist()) in seen for row in windows for w in row.unfold(0, 32, 16))
