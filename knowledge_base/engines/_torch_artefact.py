"""A torch model as an artefact folder and back: plain tensors in one safetensors file, nothing that runs code.

`structure.json` names every module that is not what the architecture would build (packed, factorised or of other
sizes), with its kind and parameters: `{"model.layers.0.mlp.up_proj": {"kind": "int8", ...}}`. A replaced module that stands
in two places, as a tied table does, is stored once; the second place names the first. Its entry `config` holds numbers of
heads that transformers has code for and refuses to read: Llama's, where they do not divide the hidden size.
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
from transformers.pytorch_utils import Conv1D

from knowledge_base.errors import CandidateFailed
from knowledge_base.serde import write_json

WEIGHTS = "model.safetensors"
STRUCTURE = "structure.json"
SHARED = "shared"  # kind of the second place of a module
CONFIG = "config"  # entry, and its kind, of what config.json must not say
SIZES = ("in_features", "out_features")
HEADS = ("num_attention_heads", "num_key_value_heads")


def best_device() -> torch.device:
    """Return the first CUDA device, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def structure_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return kind and parameters of every replaced or resized module, by module name, and what config.json must not say."""
    from knowledge_base.techniques._kinds import resized

    found: dict[str, dict[str, Any]] = {}
    if why_unreadable(config := model.config):
        names = [name for name in (*HEADS, "head_dim") if type(getattr(config, name, None)) is int]
        found[CONFIG] = {"kind": CONFIG, **{name: getattr(config, name) for name in names}}
    places: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(getattr(module, "kind", None), str) and hasattr(module, "spec"):
            first = places.setdefault(id(module), name)
            found[name] = _replaced(module) if first == name else {"kind": SHARED, "with": first}
        elif entry := resized(module):
            found[name] = entry
    return found


def why_unreadable(config: Any, **other: int) -> str | None:
    """Return why transformers would not read a configuration that it has code for, with `other` sizes in it, or None."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        type(config).from_dict({**json.loads(config.to_json_string(use_diff=True)), **other})
    except (ValueError, StrictDataclassError) as error:
        return str(error).strip().rpartition("\n")[2].strip()
    return None


def _replaced(module: Any) -> dict[str, Any]:
    """Return a replaced module's entry; a layer may be of other sizes than config.json gives, so they are told."""
    sizes = {} if hasattr(module, "in_place_of") else {name: getattr(module, name) for name in SIZES}
    return {"kind": module.kind, **sizes, **module.spec()}


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model's files into `folder`. Tied weights are stored once; equal models give equal files.

    Raises:
        CandidateFailed: "unsupported", config.json and structure.json do not describe the tensors.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for module in model.modules():
        if isinstance(module, Conv1D):  # as it lies in a file, one by one: else all would be copied at once
            module.weight.data = module.weight.data.contiguous()
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
    again = tuple(f"{name}." for name, entry in structure.items() if entry["kind"] == SHARED)
    tensors = {n: t.detach() for n, t in sorted(state.items()) if n not in tied and not n.startswith(again)}

    expected = {name: t.shape for name, t in skeleton(config, structure).state_dict().items()}
    found = {name: t.shape for name, t in state.items()}
    if wrong := sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)):
        name = wrong[0]
        raise CandidateFailed(
            "unsupported",
            f"{len(wrong)} tensors do not fit the model's configuration, first `{name}`: "
            f"found {_shape(found.get(name))}, config.json gives {_shape(expected.get(name))}",
            hint="the step that changed the shapes must keep `model.config` true",
        )

    described = json.loads(config.to_json_string(use_diff=True))
    if CONFIG in structure:  # one head is always readable, and no tensor fits it: who reads no structure.json will see
        described |= (readable := {name: 1 for name in HEADS if name in structure[CONFIG]})
        if why := why_unreadable(config, **readable):
            raise CandidateFailed(
                "unsupported",
                f"transformers reads no configuration of these sizes: {why}",
                hint="give the step that changed the shapes another setting, or plan it with another engine",
            )
    if any(tensor.is_meta for tensor in tensors.values()):  # never loaded: copied from where the model came from
        from knowledge_base.engines._safetensors_copy import copy as copy_tensors
        from knowledge_base.engines._safetensors_copy import tensors_of

        stored = tensors_of(Path(model.name_or_path))
        copy_tensors({name: stored[name] for name in tensors}, config.dtype, folder / WEIGHTS)
    else:
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / "config.json", described)
    if getattr(model, "generation_config", None) is not None:
        write_json(folder / "generation_config.json", json.loads(model.generation_config.to_json_string(use_diff=True)))
    if structure:
        write_json(folder / STRUCTURE, structure)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load(folder: Path, device: torch.device, *, unpack: bool = True, waiting: Mapping[str, str] | None = None) -> Any:
    """Return the model of an artefact folder on `device`, in evaluation mode, every tensor from the file.

    Holds each tensor once while loading. Modules stored in a smaller form than they compute in are unpacked if `unpack`.

    Args:
        waiting: modules whose tensors are brought in when they run (_torch_offload.py): until then they are on the "cpu",
            or on "disk" and here without memory.

    Raises:
        CandidateFailed: "load_error", a file is missing, damaged or does not fit the others.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        structure_file = folder / STRUCTURE
        structure = json.loads(structure_file.read_text(encoding="utf-8")) if structure_file.is_file() else {}
        model = skeleton(config, structure)
        # Read, not mapped: pages of a mapped file would count beside the tensors copied from them.
        with safe_open(folder / WEIGHTS, framework="pt", backend="pread") as file:
            places = {name: _place(name, waiting or {}) or device for name in file.keys()}  # noqa: SIM118 - no mapping
            tensors = {name: file.get_tensor(name).to(place) for name, place in places.items() if place != "disk"}
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise _not_loadable(folder, error) from error
    try:
        result = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:  # shapes; kept apart so that running out of memory above is not mistaken for it
        raise _not_loadable(folder, error) from error
    model.tie_weights()
    state = (*model.named_parameters(), *model.named_buffers())
    unfilled = [n for n, t in state if t.is_meta and places.get(n) != "disk"]
    if unfilled or result.unexpected_keys:
        what, names = ("missing", unfilled) if unfilled else ("unexpected", result.unexpected_keys)
        raise CandidateFailed(
            "load_error",
            f"{folder.name}/{WEIGHTS}: {len(names)} {what} tensors, first `{sorted(names)[0]}`",
            hint="build the artefact again",
        )
    del tensors  # what is unpacked lets go of its packed form at once
    for name in [name for name, module in model.named_modules() if unpack and hasattr(module, "unpacked")]:
        model.set_submodule(name, model.get_submodule(name).unpacked())
    if not waiting:
        model.to(device)
    return lay_out(model.eval().requires_grad_(False))


def lay_out(model: Any) -> Any:
    """Return the model with every Conv1D's float16 matrix in memory by output, as a Linear's is; values and shapes stay.

    Torch multiplies by a float16 matrix that lies by input ten times slower on a CPU.
    """
    for module in model.modules():
        if isinstance(module, Conv1D) and module.weight.dtype == torch.float16 and module.weight.device.type == "cpu":
            module.weight.data = module.weight.data.T.contiguous().T
    return model


def _place(tensor: str, waiting: Mapping[str, str]) -> str | None:
    return next((place for part, place in waiting.items() if tensor.startswith(f"{part}.")), None)


def _not_loadable(folder: Path, error: Exception) -> CandidateFailed:
    return CandidateFailed("load_error", f"{folder.name}: cannot be loaded: {error}", hint="build the artefact again")


def skeleton(config: Any, structure: Mapping[str, Mapping[str, Any]]) -> Any:
    """Build the model without weights: parameters on the meta device, buffers outside the checkpoint real.

    Buffers such as rotary frequencies are not in the file, so they must come from the constructor; a model built
    wholly on meta would lose them.
    """
    from transformers import AutoModelForCausalLM

    for name, value in structure.get(CONFIG, {}).items():
        if name in (*HEADS, "head_dim") and type(value) is int and value > 0:
            setattr(config, name, value)
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        if structure:
            from knowledge_base.techniques._kinds import RESIZED, module_class, resize

            for name, entry in structure.items():
                if name == CONFIG:
                    continue
                settings = dict(entry)
                kind, old = settings.pop("kind"), model.get_submodule(name)
                if kind == RESIZED:
                    resize(old, **settings)
                elif kind == SHARED:
                    model.set_submodule(name, model.get_submodule(settings["with"]))
                elif hasattr(made := module_class(kind), "in_place_of"):
                    model.set_submodule(name, made.in_place_of(old, **settings))
                else:
                    inputs, outputs = (settings.pop(size) for size in SIZES)
                    if not all(type(size) is int and size >= 0 for size in (inputs, outputs)):
                        raise ValueError(f"{STRUCTURE}: sizes of `{name}` that are no whole numbers")
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


def _shape(shape: torch.Size | None) -> str:
    return "nothing" if shape is None else "x".join(map(str, shape)) or "a scalar"
