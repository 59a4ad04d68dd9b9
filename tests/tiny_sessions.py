"""Tiny models opened as sessions, calibrated on random tokens: for tests of techniques that rewrite models."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from knowledge_base.types import Model, Session
from planner.tiny_models import make_tiny_model

_FOLDERS = TemporaryDirectory(prefix="tiny-models-")


@cache
def tiny_folder(architecture: str = "llama", **options: object) -> Path:
    """Return the folder of a tiny model, made once for all tests."""
    name = "-".join([architecture, *map(str, options.values())])
    return make_tiny_model(Path(_FOLDERS.name) / name, architecture, **options)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the model of a folder, ready to be read."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def calibration(rows: int = 8, tokens: int = 32, vocab_size: int = 512) -> torch.Tensor:
    """Return random tokens (rows, tokens), always the same."""
    return torch.randint(0, vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(1))


def session_of(folder: Path, dtype: torch.dtype = torch.float32, *, seed: int = 0, rows: int = 8) -> Session:
    """Return a session on the folder's model, with a workspace of its own."""
    model, workspace = load(folder, dtype), Path(mkdtemp(prefix="workspace-", dir=_FOLDERS.name))
    return Session(
        model=model, tokenizer=None, facts=facts_of(model), calibration=calibration(rows), seed=seed,
        workspace=workspace,
    )  # fmt: skip


def facts_of(model: PreTrainedModel) -> Model:
    """Return a loaded model's facts, counted on the module itself."""
    config = model.config
    layers = next(
        m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == config.num_hidden_layers
    )
    inside = sum(p.numel() for p in layers.parameters() if p.dim() > 1)
    total = sum(p.numel() for p in model.parameters())
    experts = getattr(config, "num_local_experts", 0)
    active = getattr(config, "num_experts_per_tok", 0)
    heads = getattr(config, "num_attention_heads", 0)
    ffn = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    gated = config.model_type not in ("gpt2", "mamba")
    idle = (experts - active) * 3 * ffn * config.hidden_size * config.num_hidden_layers if experts else 0
    size = next(model.parameters()).element_size()
    return Model(
        name="tiny", source="tiny", architecture=config.model_type, layers=config.num_hidden_layers,
        hidden_size=config.hidden_size, heads=heads, kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=config.hidden_size // heads if heads else 0, ffn_size=0 if config.model_type == "mamba" else ffn,
        vocab_size=config.vocab_size, max_context_tokens=256, params_total=total, params_active=total - idle,
        linear_params=inside, embedding_params=config.vocab_size * config.hidden_size,
        tied_embeddings=config.tie_word_embeddings, gated_ffn=gated, experts=experts, experts_active=active,
        attention_layers=config.num_hidden_layers if heads else 0,
        weight_dtype=str(model.dtype).removeprefix("torch."), weight_bytes=total * size,
    )  # fmt: skip


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the model's logits on two rows of fixed tokens."""
    with torch.no_grad():
        return model(calibration(2), use_cache=False).logits


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return the model saved to `folder` and loaded back: what config.json and the weights say without our help."""
    model.save_pretrained(folder)
    return load(folder, model.dtype)
