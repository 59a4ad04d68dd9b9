"""The model as it came without its weights: the Session of steps that look at none, for a model larger than memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from knowledge_base.errors import CandidateFailed
from knowledge_base.types import Model, Session


def shapes_session(model_folder: Path, facts: Model, *, calibration: Any, seed: int, workspace: Path) -> Session | None:
    """Return a Session whose model has shapes and no weights; the engine's export copies those from the checkpoint.

    None where only loading tells what the checkpoint's tensors become: they have other names or shapes than the model's,
    or some are kept in another type than the rest, or they are not safetensors. Whoever loads it tells what is wrong.
    """
    import torch
    from transformers import AutoConfig, GenerationConfig

    from knowledge_base.engines import _safetensors_copy, _torch_artefact
    from knowledge_base.techniques._loading import tokenizer_of

    wanted = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(facts.weight_dtype)
    try:
        stored = _safetensors_copy.tensors_of(model_folder)
        config = AutoConfig.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)
        if wanted is None or not stored or getattr(config, "quantization_config", None):
            return None
        config.dtype = wanted
        model = _torch_artefact.skeleton(config, {})
    except (CandidateFailed, OSError, ValueError, KeyError, AttributeError):
        return None
    state, ties = model.state_dict(), getattr(model, "all_tied_weights_keys", None) or {}
    own = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in ties}
    kept_apart = any(getattr(model, f"_keep_in_fp32_modules{how}", None) for how in ("", "_strict"))
    if (
        kept_apart
        or stored.keys() - state.keys()
        or any(name not in stored or stored[name].stored.shape != shape for name, shape in own.items())
    ):
        return None
    if (model_folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(model_folder, local_files_only=True)
    return Session(
        model=model.eval().requires_grad_(False), tokenizer=tokenizer_of(model_folder), facts=facts,
        calibration=calibration, seed=seed, workspace=workspace,
    )  # fmt: skip
