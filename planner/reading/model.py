"""Reading a model: its facts from config.json and, where there are weights, their headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowledge_base.errors import BadInput
from knowledge_base.types import Model
from planner import quantised
from planner._safetensors_header import DTYPE_BITS, Stored
from planner.architectures import Family, count, is_buffer, part_of
from planner.config_facts import (
    Facts,
    asks_windows,
    check_bounds,
    check_nested,
    decoder_config,
    facts_of,
    read_config,
    require_sizes,
    text_config,
)
from planner.describing import Description
from planner.quantised import Quantised
from planner.reading.agreement import agree, check_tokenizer, describe_model, expected_shapes, family_of, is_tied
from planner.reading.files import content_digest, files_of, locate, tensors_of
from planner.reading.refusals import (
    refuse_foreign_code,
    refuse_shared_layers,
    refuse_unknown,
    refuse_unstartable,
    trusted,
)

MOST_PARAMS = 10**14  # fifty times the largest published model

_DTYPES = {
    "F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I8": "int8", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_FORMATS = {name: stored for stored, name in _DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadResult:
    """A model's facts, the local folder with its weights (None where there are none), and what is worth telling."""

    model: Model
    folder: Path | None
    notes: tuple[str, ...] = ()


def read_model(
    source: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    trust_remote_code: str | None = None,
    allow_pickle: bool = False,
    weights: str = "required",
    draft: str | None = None,
    draft_revision: str | None = None,
) -> ReadResult:
    """Return the facts of a language model: causal, and for predictions also encoders and encoder-decoders.

    Args:
        source: a folder, a config.json file (with weights="optional"), or a hub id "org/name".
        revision: branch, tag or commit of a hub model; 40 hex digits pin it.
        offline: use only what is on this machine.
        trust_remote_code: "org/name@<40 hex digits>": that one model may have code of its own. For a folder the digits
            are the first 40 of its content digest, which the refusal prints.
        allow_pickle: accept .bin weights where there are no safetensors; sizes then come from config.json.
        weights: "required", or "optional": config.json alone will do, for predictions.
        draft: a smaller model that guesses its tokens, as `source`; None: the one beside it, if there is one.
        draft_revision: as `revision`.

    Raises:
        BadInput: not a model, a damaged or hostile file, config and weights that disagree, code of its own, a draft that
            is none for this model.
        EnvironmentProblem: the hub cannot be reached or does not let us in.
    """
    from planner.drafts import with_draft

    read = _read(str(source), revision, offline, trust_remote_code, allow_pickle, weights)
    return with_draft(read, draft, lambda other: _read(other, draft_revision, offline, None, False, weights))


def _read(
    source: str, revision: str | None, offline: bool, trust_remote_code: str | None, allow_pickle: bool, weights: str
) -> ReadResult:
    """Return the facts of a model, its draft left out; see `read_model`."""
    notes: list[str] = []
    folder, config_file, name, commit = locate(source, revision, offline, weights, allow_pickle, notes)
    config = read_config(config_file)
    files = files_of(folder, config_file)
    content = content_digest(files, config_file)
    refuse_foreign_code(
        config, folder, files, trusted(trust_remote_code, source, name, commit, content), name, content,
        notes if weights == "optional" else None,
    )  # fmt: skip
    if weights == "required":
        refuse_unstartable(config, config_file)
    tensors = tensors_of(folder)
    pickled = sorted(p for p in folder.glob("*.bin") if p.name.startswith(("pytorch_model", "model")))
    if tensors is None and pickled and not allow_pickle:
        raise BadInput(
            f"no safetensors, only {pickled[0].name}, which can run code when it is loaded",
            hint="convert it once: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) in a place "
            "without secrets, or give --allow-pickle",
            where=str(folder),
        )
    if tensors is None and not pickled and weights == "required":
        raise BadInput(
            "no model.safetensors"
            + (": a GGUF file is not a model Leanplan can start from" if any(folder.glob("*.gguf")) else ""),
            hint="a model folder has config.json, *.safetensors, tokenizer.json; for predictions only, add --predict",
            where=str(folder),
        )
    language = text_config(config)
    family = family_of(config)
    if family is None:
        refuse_unknown(str(config["model_type"]), config_file, tensors, causal=weights == "required")
    check_bounds(language, where=str(config_file))
    check_nested(config, where=str(config_file))
    refuse_shared_layers(language, config_file)
    packed = quantised.read(config, language, config_file)
    described = None
    if family is not None:
        require_sizes(language, family, {}, where=str(config_file))
    if family is None or asks_windows(language, family):
        described = describe_model(config_file, folder, weights=False)
        if language.get("model_type") == config["model_type"]:
            require_sizes(language, None, described.config, where=str(config_file))
        language = text_config(described.config)
        if described.kind == "encoder_decoder":
            language = decoder_config(described.config, described.layers)
        notes.append("what config.json leaves open was asked of transformers, which built the model without weights")
    facts = facts_of(language, family, notes, where=str(config_file), description=described)
    shapes, tied = _shapes(described, config, language, family, facts, config_file)
    if tensors is not None and packed is None:
        if family is not None:
            agree(language, family, facts, {n: t.shape for n, t in tensors.items()}, config_file, folder)
        tied, counts, weight_dtype, weight_bytes = _from_tensors(tensors, config, language, family, facts, described)
    else:
        counts = count(shapes, facts.sizes, tied=tied, **_names(described))
        weight_dtype = _configured_dtype(config, language, config_file, packed, notes)
        weight_bytes = counts["params_total"] * DTYPE_BITS[_FORMATS[weight_dtype]] // 8
    if counts["params_total"] > MOST_PARAMS:
        raise BadInput(
            f"config.json: its sizes make {counts['params_total']:.3g} parameters, more than {MOST_PARAMS:.3g}",
            hint="mend config.json: one of its sizes is wrong", where=str(config_file),
        )  # fmt: skip
    if not counts["linear_params"]:
        raise BadInput(
            f"config.json: `{config['model_type']}` has {counts['params_total']} parameters, but none in repeated layers",
            hint="what a layer reads and computes cannot be told, so neither can its speed", where=str(config_file),
        )  # fmt: skip
    quantised_bytes = 0
    if packed is not None:
        size = DTYPE_BITS[_FORMATS[weight_dtype]] / 8
        quantised_bytes, weight_bytes = _packed_bytes(packed, shapes, counts, facts, size, tensors, notes)
    check_tokenizer(folder, facts.sizes.vocab_size, counts["vocabulary_rows"], weights, notes)
    sizes = facts.sizes
    model = Model(
        name=name,
        source=source,
        revision=commit or revision,
        digest=content,
        architecture=str(config["model_type"]),
        layers=sizes.layers,
        hidden_size=sizes.hidden_size,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_size=sizes.head_size,
        ffn_size=sizes.ffn_size,
        vocab_size=sizes.vocab_size,
        max_context_tokens=sizes.context_tokens,
        params_total=counts["params_total"],
        params_active=counts["params_active"],
        linear_params=counts["linear_params"],
        embedding_params=counts["embedding_params"],
        tied_embeddings=tied,
        gated_ffn=facts.gated,
        experts=sizes.experts,
        experts_active=sizes.experts_active,
        sliding_window_tokens=facts.window,
        window_share=facts.window_share,
        attention_layers=facts.attention_layers,
        kv_values_per_layer=facts.kv_values_per_layer,
        latent_rank=facts.latent_rank,
        state_bytes=_state_bytes(described, facts, weight_dtype),
        weight_dtype=weight_dtype,
        weight_bytes=weight_bytes,
        kind=described.kind if described else "decoder",
        encoder_layers=described.encoder_layers if described else 0,
        encoder_params=counts["encoder_params"],
        quantised_format=packed.format if packed else "",
        quantised_bytes=quantised_bytes,
    )
    return ReadResult(model=model, folder=folder if tensors is not None or pickled else None, notes=tuple(notes))


def _shapes(
    described: Description | None,
    config: Mapping[str, Any],
    language: Mapping[str, Any],
    family: Family | None,
    facts: Facts,
    config_file: Path,
) -> tuple[dict[str, tuple[int, ...]], bool]:
    """Return the shapes config.json makes and whether head and table are one."""
    if described is not None:
        return {name: tuple(shape) for name, shape in described.parameters.items()}, described.tied
    assert family is not None
    return expected_shapes(family, facts, language, config_file), is_tied(config, language, family, has_head=None)


def _names(described: Description | None) -> dict[str, Any]:
    if described is None:
        return {}
    return {"embedding": described.embedding, "head": described.head, "encoder": described.encoder}


def _state_bytes(described: Description | None, facts: Facts, weight_dtype: str) -> int:
    if described is not None and described.cache is not None:
        return described.cache.state_bytes
    narrow = facts.state_values - facts.wide_state_values
    return narrow * {"float32": 4, "float64": 8}.get(weight_dtype, 2) + 4 * facts.wide_state_values


def _packed_bytes(
    packed: Quantised,
    shapes: Mapping[str, tuple[int, ...]],
    counts: Mapping[str, int],
    facts: Facts,
    size: float,
    tensors: Mapping[str, Stored] | None,
    notes: list[str],
) -> tuple[int, int]:
    """Return the bytes of the layers' matrices and of all weights of a checkpoint that comes quantised."""
    layers, left = packed.bytes_of(shapes, experts=facts.sizes.experts, size=size)
    others = (counts["params_total"] - counts["linear_params"]) * size
    told = f"{packed.bits:.4g} bits a weight"
    if tensors is not None:
        whole = sum(t.bytes for name, t in tensors.items() if not is_buffer(name))
        layers, told = whole - others, "their bytes are those of the weight files"
        if layers <= 0:
            raise BadInput(
                f"config.json: {counts['params_total'] - counts['linear_params']} parameters are not quantised, but the "
                f"weight files hold {whole} bytes in all", hint="config.json and weights must be of the same model",
                where="quantization_config",
            )  # fmt: skip
    kept = f", {left / counts['linear_params']:.1%} of them left as they were" if left else ""
    notes.append(f"the layers' matrices come quantised ({packed.method}, {packed.format}): {told}{kept}")
    return round(layers), round(layers + others)


def _from_tensors(
    tensors: Mapping[str, Stored],
    config: Mapping[str, Any],
    language: Mapping[str, Any],
    family: Family | None,
    facts: Facts,
    described: Description | None,
) -> tuple[bool, dict[str, int], str, int]:
    """Return (tied, counts, most common dtype, bytes) of stored weights; buffers and a tied head's copy left out."""
    shapes = {name: tensor.shape for name, tensor in tensors.items() if not is_buffer(name)}
    parts = {name: part_of(name, shape) for name, shape in shapes.items()}
    tied = is_tied(config, language, family, has_head="head" in parts.values())
    kept = [tensors[name] for name, part in parts.items() if not (tied and part == "head")]
    dtypes = Counter[str]()
    for tensor in kept:
        dtypes[tensor.dtype] += tensor.size
    common = dtypes.most_common(1)[0][0]
    encoder = described.encoder if described else ()
    counts = count(shapes, facts.sizes, tied=tied, encoder=encoder)
    return tied, counts, _DTYPES.get(common, common.lower()), sum(t.bytes for t in kept)


def _configured_dtype(
    config: Mapping[str, Any], language: Mapping[str, Any], where: Path, packed: Quantised | None, notes: list[str]
) -> str:
    found = next((c[key] for c in (language, config) for key in ("dtype", "torch_dtype") if c.get(key)), None)
    if found is None and packed is not None:  # what else quantised checkpoints keep; the others' default is float32
        notes.append("config.json states no dtype; bfloat16 is taken for what is not quantised")
        found = "bfloat16"
    if found is None:
        notes.append("config.json states no dtype; float32 is taken, as transformers does")
        found = "float32"
    name = str(found).removeprefix("torch.")
    if name not in _FORMATS:
        raise BadInput(
            f"config.json: unknown dtype `{name[:40]}`", hint=f"one of {', '.join(_FORMATS)}", where=str(where)
        )
    return name
