"""What transformers itself says of a model folder, asked in a process of its own: nothing is loaded, no tensor is read.

For families planner/architectures.py does not know, and to settle a disagreement. The process sees no credentials, no
network and no code of the model's own; the weights live on torch's "meta" device, which holds shapes only. One pass
over ten tokens there shows what the model would keep in its cache.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowledge_base.errors import BadInput, EnvironmentProblem
from knowledge_base.serde import restore, write_json

TIME_LIMIT_S = 180
MEMORY_LIMIT_BYTES = 8 * 2**30
SEEN_TOKENS = 10  # of the pass that fills a cache
_CROSS = re.compile(r"(?:EncDecAttention|encoder_attn|crossattention|cross_attn)\..*\b[kv](?:_proj)?\.")
LEFT_OUT = ("quantization_config", "auto_map", "model_file")  # how weights are stored and code of its own: no shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """What a decoder keeps for each sequence: values of every layer's cache for one token, and bytes of state."""

    layers: int  # that cache something for every token
    values_per_token: int  # of all layers
    window_values_per_token: int  # of those, in layers with a sliding window
    window_tokens: int | None
    state_bytes: int
    all_heads: bool  # keys of every head are kept, though groups of heads may share them


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What transformers makes of a folder. `missing` and the like compare its weights; empty without weights."""

    config: dict[str, Any]  # config.json with every default filled in
    parameters: dict[str, list[int]]  # name -> shape; tied weights once
    tied: bool
    kind: str = "decoder"  # as Model.kind
    embedding: str = ""  # the parameter that is the input table
    head: str = ""  # the parameter that is the output matrix; the table's where they are tied
    encoder: tuple[str, ...] = ()  # of an encoder-decoder, the parameters only prompts go through
    encoder_layers: int = 0
    layers: int = 0  # of the decoder of an encoder-decoder
    cache: Cache | None = None  # None: there is none, or this model does not run on shapes alone
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()


def describe(folder: Path, *, weights: bool) -> Description:
    """Return transformers' description of a folder's config.json, compared with its weights if asked.

    Raises:
        BadInput: transformers cannot build the model; EnvironmentProblem: it is not installed or took too long.
    """
    if weights:
        return _ask(folder, folder)
    return _described((folder / "config.json").read_text(encoding="utf-8-sig"), str(folder))


@functools.lru_cache(maxsize=64)
def _described(config: str, where: str) -> Description:
    facts = json.loads(config)
    with tempfile.TemporaryDirectory(prefix="leanplan-") as name:
        plain = {key: value for key, value in facts.items() if key not in LEFT_OUT}
        (Path(name) / "config.json").write_text(json.dumps(plain), encoding="utf-8")
        return _ask(Path(name), Path(where))


def _ask(folder: Path, where: Path) -> Description:
    from planner.isolation.environment import clean_environment

    with tempfile.TemporaryDirectory(prefix="leanplan-") as name:
        home = Path(name)
        root = Path(__file__).resolve().parent.parent
        environment = {**clean_environment(home), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        weights = folder == where
        command = [
            sys.executable,
            "-P",
            "-m",
            "planner.describing",
            str(folder.resolve()),
            str(int(weights)),
            "answer.json",
        ]
        try:
            done = subprocess.run(
                command, cwd=home, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIME_LIMIT_S
            )
        except subprocess.TimeoutExpired as error:
            raise EnvironmentProblem(
                f"transformers took over {TIME_LIMIT_S} s to describe the model",
                hint="try again when the machine is less busy",
                where=str(where),
            ) from error  # fmt: skip
        answer = home / "answer.json"
        if not answer.is_file():
            last = done.stderr.decode("utf-8", errors="replace").strip().splitlines()[-1:] or ["it gave no reason"]
            raise EnvironmentProblem(
                f"transformers could not be asked: {last[0]}", hint="leanplan doctor", where=str(where)
            )
        facts = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in facts:
        raise BadInput(
            f"transformers cannot build this model: {facts['error']}",
            hint="check config.json, or use a model that this release of transformers knows", where=str(where),
        )  # fmt: skip
    return restore(Description, facts)


def _answer(folder: Path, weights: bool) -> dict[str, Any]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    compared: dict[str, Any] = {}
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:  # neither looks at values, which shapes do not have
            part._attn_implementation, part._experts_implementation = "eager", "batched_mm"
    if weights:
        # transformers' own loader knows how names of older files map to its modules, so it decides what is missing.
        model, compared = transformers.AutoModelForCausalLM.from_pretrained(
            folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True,
            trust_remote_code=False, local_files_only=True,
        )  # type: ignore[misc]  # fmt: skip
    else:
        chosen = _class_of(config)
        inner = config if isinstance(config, chosen.config_class) else config.get_text_config()
        with torch.device("meta"):
            model = chosen(inner).to(config.dtype or torch.float32)
    names = {id(p): name for name, p in model.named_parameters()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    head_weight = getattr(head, "weight", None)
    facts = {
        "config": json.loads(config.to_json_string(use_diff=False)),
        "parameters": {name: list(p.shape) for name, p in model.named_parameters()},
        "tied": head_weight is not None and head_weight is getattr(table, "weight", None),
        "embedding": names.get(id(getattr(table, "weight", None)), ""),
        "head": names.get(id(head_weight), ""),
        **_structure(model),
        "missing": sorted(compared.get("missing_keys", ())),
        "unexpected": sorted(compared.get("unexpected_keys", ())),
        "mismatched": sorted(_mismatch(m) for m in compared.get("mismatched_keys", ())),
    }
    if not weights and facts["kind"] != "encoder":  # an encoder keeps nothing
        facts["cache"] = _cache(model.eval(), facts["kind"] == "encoder_decoder")
    return facts


def _class_of(config: Any) -> Any:
    """Return the class config.json names where transformers has it, else the one for its kind of language model."""
    import transformers

    for name in config.architectures or ():
        named = getattr(transformers, str(name), None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return named
    wanted = ["ForMaskedLM", "ForCausalLM", "ForSeq2SeqLM", "ForImageTextToText", "ForTextEncoding"]
    if config.is_encoder_decoder:
        wanted.insert(0, "ForSeq2SeqLM")
    for ending in wanted:
        known = getattr(transformers, f"AutoModel{ending}")._model_mapping
        if type(config) in known:
            found = known[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ValueError(f"{config.model_type} has no language model in this release")


def _structure(model: Any) -> dict[str, Any]:
    """Return kind, and of an encoder-decoder its layers and what only prompts go through."""
    if not model.can_generate():
        return {"kind": "encoder"}
    if not model.config.is_encoder_decoder:
        return {"kind": "decoder"}
    encoder, decoder = model.get_encoder(), model.get_decoder()
    shared = {id(p) for p in decoder.parameters()}
    inside = {id(p) for p in encoder.parameters()} - shared
    prompts = [name for name, p in model.named_parameters() if id(p) in inside or _CROSS.search(name)]
    return {"kind": "encoder_decoder", "encoder": prompts, "encoder_layers": _depth(encoder), "layers": _depth(decoder)}


def _depth(stack: Any) -> int:
    import torch

    return next((len(m) for m in stack.modules() if isinstance(m, torch.nn.ModuleList)), 0)


def _cache(model: Any, encodes: bool) -> dict[str, Any] | None:
    """Return what a pass over some tokens leaves in the model's cache, as the fields of `Cache`."""
    import torch

    prompt = torch.zeros(1, SEEN_TOKENS, dtype=torch.long, device="meta")
    try:
        with torch.device("meta"), torch.no_grad():
            extra = {"decoder_input_ids": prompt} if encodes else {}
            output = model(input_ids=prompt, use_cache=True, **extra)
        heads = getattr(model.config.get_text_config(decoder=True), "num_attention_heads", 0)
    except Exception:  # some models look at values, which are not there; config.json must do then
        return None
    cache: Any = next((c for name in ("past_key_values", "cache_params") if (c := output.get(name)) is not None), None)
    cache = getattr(cache, "self_attention_cache", cache)  # cross-attention keeps as much for each prompt token
    if not hasattr(cache, "layers"):
        return None
    found = [(layer, _values(layer)) for layer in cache.layers]
    kept = [(layer, values) for layer, values in found if values]
    windows = [(getattr(layer, "sliding_window", None), values) for layer, values in kept]
    return {
        "layers": len(kept),
        "values_per_token": sum(values for _, values in kept),
        "window_values_per_token": sum(values for window, values in windows if window),
        "window_tokens": max((int(window) for window, _ in windows if window), default=None),
        "state_bytes": sum(t.numel() * t.element_size() for layer, _ in found for t in _states(layer)),
        "all_heads": bool(kept) and all(layer.keys.shape[1] == heads for layer, _ in kept),
    }


def _values(layer: Any) -> int:
    tensors = [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
    return sum(t.numel() // max(t.shape[-2], 1) for t in tensors)  # a short window keeps fewer than it has seen


def _states(layer: Any) -> Iterator[Any]:
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name, None)
        for state in states.values() if isinstance(states, dict) else [states]:
            if state is not None:
                yield state


def _mismatch(entry: Any) -> str:
    if isinstance(entry, tuple) and len(entry) == 3:
        return f"{entry[0]} is {tuple(entry[1])}, config.json says {tuple(entry[2])}"
    return str(entry)


if __name__ == "__main__":
    import resource

    # A config.json can ask for more modules than fit into memory even without weights.
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    try:
        facts = _answer(Path(sys.argv[1]), sys.argv[2] == "1")
    except Exception as error:  # whatever transformers raises is the answer: the folder cannot be built
        facts = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    write_json(Path(sys.argv[3]), facts)
