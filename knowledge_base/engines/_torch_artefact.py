"""A torch model as an artefact folder and back: plain tensors in one safetensors file, nothing that runs code.

`structure.json` names every module that is not what the architecture would build (packed or factorised), with
its kind and parameters: `{"model.layers.0.mlp.up_proj": {"kind": "int8", ...}}`.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from knowledge_base.errors import CandidateFailed
from knowledge_base.serde import write_json

WEIGHTS = "model.safetensors"
STRUCTURE = "structure.json"


def best_device() -> torch.device:
    """Return the first CUDA device, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def structure_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return kind and parameters of every replaced module (one with a `kind` and a `spec()`), by module name."""
    return {
        name: {"kind": module.kind, **module.spec()}  # type: ignore[operator]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "kind", None), str) and hasattr(module, "spec")
    }


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model's files into `folder`. Tied weights are stored once; equal models give equal files.

    Raises:
        CandidateFailed: "unsupported", config.json and structure.json do not describe the tensors.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    tied = {
        name
        for name, source in ties.items()
        if name in state and source in state and state[name].data_ptr() == state[source].data_ptr()
    }
    config = copy.deepcopy(model.config)
    if ties and tied != set(ties):  # a step gave the head weights of its own
        config.tie_word_embeddings = False
        tied = set()
    config.architectures = [type(model).__name__]
    config.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    structure = structure_of(model)
    tensors = {name: tensor.detach() for name, tensor in sorted(state.items()) if name not in tied}

    expected = {name: t.shape for name, t in _skeleton(config, structure).state_dict().items()}
    found = {name: t.shape for name, t in state.items()}
    if wrong := sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)):
        name = wrong[0]
        raise CandidateFailed(
            "unsupported",
            f"{len(wrong)} tensors do not fit the model's configuration, first `{name}`: "
            f"found {_shape(found.get(name))}, config.json gives {_shape(expected.get(name))}",
            hint="the step that changed the shapes must keep `model.config` true",
        )

    save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / "config.json", json.loads(config.to_json_string(use_diff=True)))
    if getattr(model, "generation_config", None) is not None:
        write_json(folder / "generation_config.json", json.loads(model.generation_config.to_json_string(use_diff=True)))
    if structure:
        write_json(folder / STRUCTURE, structure)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load(folder: Path, device: torch.device) -> Any:
    """Return the model of an artefact folder on `device`, in evaluation mode, every tensor from the file.

    Holds at most one tensor twice while loading.

    Raises:
        CandidateFailed: "load_error", a file is missing, damaged or does not fit the others.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        structure_file = folder / STRUCTURE
        structure = json.loads(structure_file.read_text(encoding="utf-8")) if structure_file.is_file() else {}
        model = _skeleton(config, structure)
        tensors = {}
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                # A copy of its own is aligned for vector loads and lets go of the file's pages.
                tensors[name] = file.get_tensor(name).clone().to(device)
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise _not_loadable(folder, error) from error
    try:
        result = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:  # shapes; kept apart so that running out of memory above is not mistaken for it
        raise _not_loadable(folder, error) from error
    model.tie_weights()
    unfilled = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if unfilled or result.unexpected_keys:
        what, names = ("missing", unfilled) if unfilled else ("unexpected", result.unexpected_keys)
        raise CandidateFailed(
            "load_error",
            f"{folder.name}/{WEIGHTS}: {len(names)} {what} tensors, first `{sorted(names)[0]}`",
            hint="build the artefact again",
        )
    return model.to(device).eval().requires_grad_(False)


def _not_loadable(folder: Path, error: Exception) -> CandidateFailed:
    return CandidateFailed("load_error", f"{folder.name}: cannot be loaded: {error}", hint="build the artefact again")


def _skeleton(config: Any, structure: Mapping[str, Mapping[str, Any]]) -> Any:
    """Build the model without weights: parameters on the meta device, buffers outside the checkpoint real.

    Buffers such as rotary frequencies are not in the file, so they must come from the constructor; a model built
    wholly on meta would lose them.
    """
    from transformers import AutoModelForCausalLM

    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        if structure:
            from knowledge_base.techniques._packed import module_class

            for name, entry in structure.items():
                settings = dict(entry)
                made = module_class(settings.pop("kind"))
                old = model.get_submodule(name)
                inputs, outputs = _features(old)
                bias = getattr(old, "bias", None) is not None
                model.set_submodule(name, made.from_spec(inputs, outputs, bias, old.weight.dtype, **settings))
    model.tie_weights()
    return model


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within the block every parameter a module registers loses its memory and becomes a meta tensor."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _features(module: Any) -> tuple[int, int]:
    """Return (inputs, outputs) of a linear layer; GPT-2's Conv1D stores its weight the other way round."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    inputs, outputs = module.weight.shape
    return inputs, outputs


def _shape(shape: torch.Size | None) -> str:
    return "nothing" if shape is None else "x".join(map(str, shape)) or "a scalar"
