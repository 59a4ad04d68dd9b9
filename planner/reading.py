"""A model's facts from its config.json and safetensors headers: nothing is loaded, torch is not imported.

What is read here was written by strangers: every size has bounds, every file is looked at before it is believed, and a
model that would bring code of its own is refused unless the user named it.
"""

from __future__ import annotations

import hashlib
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowledge_base.errors import BadInput
from knowledge_base.serde import digest
from knowledge_base.types import Model
from planner import hub, quantised
from planner._safetensors_header import DTYPE_BITS, Stored, non_finite, read_header
from planner.architectures import FAMILIES, Family, count, is_buffer, part_of
from planner.config_facts import (
    LONGEST_CONFIG_BYTES,
    Facts,
    asks_windows,
    check_bounds,
    check_nested,
    decoder_config,
    facts_of,
    read_config,
    read_json,
    require_sizes,
    text_config,
)
from planner.describing import Description
from planner.quantised import Quantised

LONGEST_TOKENIZER_BYTES = 256 * 2**20
WHOLE_DIGEST_BYTES = 256 * 2**20  # larger weight files are sampled

MOST_PARAMS = 10**14  # fifty times the largest published model

_TRUST = re.compile(r"(.+)@([0-9a-f]{40})")

# What a model is made of, besides its weights; everything here counts in the digest.
_SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
    "merges.txt", "vocab.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "model.safetensors.index.json",
)  # fmt: skip
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
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
    folder, config_file, name, commit = _locate(source, revision, offline, weights, allow_pickle, notes)
    config = read_config(config_file)
    files = _files(folder, config_file)
    content = _content_digest(files, config_file)
    _refuse_foreign_code(
        config, folder, files, _trusted(trust_remote_code, source, name, commit, content), name, content,
        notes if weights == "optional" else None,
    )  # fmt: skip
    if weights == "required":
        _refuse_unstartable(config, config_file)
    tensors = _tensors(folder)
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
    family = _family(config)
    if family is None:
        _refuse_unknown(str(config["model_type"]), config_file, tensors, causal=weights == "required")
    check_bounds(language, where=str(config_file))
    check_nested(config, where=str(config_file))
    _refuse_shared_layers(language, config_file)
    packed = quantised.read(config, language, config_file)
    described = None
    if family is not None:
        require_sizes(language, family, {}, where=str(config_file))
    if family is None or asks_windows(language, family):
        described = _describe(config_file, folder, weights=False)
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
            _agree(language, family, facts, {n: t.shape for n, t in tensors.items()}, config_file, folder)
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
    _check_tokenizer(folder, facts.sizes.vocab_size, counts["vocabulary_rows"], weights, notes)
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


def _family(config: Mapping[str, Any]) -> Family | None:
    """Return the family whose table tells this model's tensors: its language model is all there is, and has a head."""
    if text_config(config).get("model_type") != config["model_type"]:
        return None
    named = config.get("architectures")
    heads = ("ForCausalLM", "LMHeadModel")
    if isinstance(named, list) and named and not any(str(name).endswith(heads) for name in named):
        return None
    return FAMILIES.get(str(config["model_type"]))


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
    return _expected(family, facts, language, config_file), _tied(config, language, family, has_head=None)


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
    tied = _tied(config, language, family, has_head="head" in parts.values())
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
    found = found or "float32"
    name = str(found).removeprefix("torch.")
    if name not in _FORMATS:
        raise BadInput(
            f"config.json: unknown dtype `{name[:40]}`", hint=f"one of {', '.join(_FORMATS)}", where=str(where)
        )
    return name


def check_complete(folder: Path) -> None:
    """Refuse a folder whose weights are not those config.json describes: layers missing, left over, other shapes.

    Known families are compared by name and shape in milliseconds; for others transformers is asked, in its own process.

    Raises:
        BadInput: config and weights disagree.
    """
    folder = Path(folder)
    config_file = folder / "config.json"
    config = read_config(config_file)
    tensors = _tensors(folder)
    if tensors is None:
        return  # .bin weights: the candidate's loader compares them
    family = _family(config)
    check_bounds(text_config(config), where=str(config_file))
    if family is None or asks_windows(config, family):
        described = _describe(config_file, folder, weights=True)
        _refuse_disagreement(described.missing, described.unexpected, described.mismatched, folder)
    else:
        facts = facts_of(config, family, [], where=str(config_file))
        _agree(config, family, facts, {n: t.shape for n, t in tensors.items()}, config_file, folder)


def check_finite(folder: Path) -> None:
    """Refuse weights with NaN or infinite values. Files are streamed; memory stays flat.

    Raises:
        BadInput: names the first such tensors and counts their values.
    """
    bad = [entry for path in _weight_files(Path(folder)) for entry in non_finite(path)]
    if bad:
        shown = ", ".join(
            f"tensor `{name}` has {count} non-finite value{'s' if count > 1 else ''}" for name, count in bad[:3]
        )
        more = f", and {len(bad) - 3} more tensors" if len(bad) > 3 else ""
        raise BadInput(
            shown + more, hint="the checkpoint is damaged or training diverged; use another one", where=str(folder)
        )


# ---------------------------------------------------------------- where the model is


def _local(source: str) -> Path | None:
    """Return the file or folder of that name, or None; any text may be asked."""
    try:
        path = Path(source).expanduser()
        return path if source and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, no such user's home
        return None


def _locate(
    source: str, revision: str | None, offline: bool, weights: str, allow_pickle: bool, notes: list[str]
) -> tuple[Path, Path, str, str | None]:
    """Return (folder, config file, name, commit)."""
    path = _local(source)
    if path is not None and path.is_file() and path.suffix == ".json" and weights == "optional":
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        return path.parent, path, name, None
    if path is not None and path.is_dir():
        config_file = path / "config.json"
        if not config_file.exists():
            adapter = (path / "adapter_config.json").exists()
            raise BadInput(
                "an adapter, not a whole model" if adapter else f"no config.json in {path}",
                hint="merge the adapter into its base model first" if adapter
                else "a model folder has config.json, *.safetensors and tokenizer.json",
                where=str(path),
            )  # fmt: skip
        if hub.is_id(source) and "/" in source:
            notes.append(f"`{source}` is a local folder; a hub model of that name is not looked for")
        return path, config_file, path.resolve().name, None
    if not hub.is_id(source):
        raise BadInput(
            f"`{source[:200]}` is not a model folder or a model id",
            hint="give a folder that exists, or a hub id such as org/name",
            where="model",
        )
    folder = hub.fetch(
        source,
        revision=revision,
        offline=offline,
        weights=weights == "required",
        allow_pickle=allow_pickle,
        small_files=_SMALL_FILES,
    )
    return folder, folder / "config.json", source.split("/")[-1], folder.name


def _files(folder: Path, config_file: Path) -> list[Path]:
    """Return the files that make the model, each regular and inside the folder."""
    names = [folder / name for name in _SMALL_FILES if name != "config.json"]
    found = [config_file, *names, *folder.glob("*.py"), *_weight_files(folder), *folder.glob("pytorch_model*.bin")]
    # The hub's cache keeps contents in blobs/ beside snapshots/; links inside one model's cache are its own.
    inside = folder.resolve()
    if inside.parent.name == "snapshots" and (inside.parent.parent / "blobs").is_dir():
        inside = inside.parent.parent
    files = []
    for path in dict.fromkeys(found):
        if not path.exists() and not path.is_symlink():
            continue
        target = path.resolve()
        if not target.is_relative_to(inside):
            raise BadInput(
                f"refusing to follow a link out of {folder}", hint="copy the file into the folder", where=str(path)
            )
        if not target.exists() or not stat.S_ISREG(target.stat().st_mode):
            raise BadInput("not a regular file", hint="download or copy the file again", where=str(path))
        files.append(path)
    return files


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files transformers would load: model.safetensors, else the shards of the index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or single.is_symlink() or not index.exists():
        return [single] if single.exists() or single.is_symlink() else []
    return [folder / name for name in sorted(set(_weight_map(index).values()))]


def _weight_map(index: Path) -> dict[str, str]:
    facts = read_json(index, LONGEST_CONFIG_BYTES * 32)
    mapping = facts.get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise BadInput("no weight_map in it", hint="download the file again", where=str(index))
    for file in set(mapping.values()):
        if not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors", file):
            raise BadInput(
                f"`{str(file)[:80]}` is not the name of a weight file", hint="download the file again", where=str(index)
            )
    return mapping


def _tensors(folder: Path) -> dict[str, Stored] | None:
    """Return every tensor of the folder's safetensors by name, or None where there are none."""
    files = _weight_files(folder)
    if not files:
        return None
    tensors: dict[str, Stored] = {}
    for path in files:
        if not path.exists():
            raise BadInput(
                "named by model.safetensors.index.json, but missing", hint="download the model again", where=str(path)
            )
        found = read_header(path)
        if twice := found.keys() & tensors.keys():
            raise BadInput(f"tensor `{min(twice)}` is in two files", hint="download the model again", where=str(path))
        tensors |= found
    if len(files) > 1 or files[0].name != "model.safetensors":
        listed = _weight_map(folder / "model.safetensors.index.json")
        if missing := sorted(listed.keys() - tensors.keys()):
            raise BadInput(
                _listing(missing, "missing from the shards"), hint="download the model again", where=str(folder)
            )
    if not tensors:
        raise BadInput("no tensors in it", hint="download the model again", where=str(files[0]))
    return tensors


def _content_digest(files: Iterable[Path], config_file: Path) -> str:
    """Return a SHA-256 over the names and contents of a model's files; folder and dates do not count.

    Files up to 256 MiB are read whole. Of a larger one, its size, its first MiB (where a safetensors header begins) and
    64 blocks of 64 KiB spread over it are read: a copy cut short, converted or of another model is noticed, a change of
    single weights between the blocks is not.
    """
    contents = {}
    for path in files:
        size = path.stat().st_size
        name = "config.json" if path == config_file else path.name
        with path.open("rb") as file:
            if size <= WHOLE_DIGEST_BYTES:
                contents[name] = hashlib.file_digest(file, "sha256").hexdigest()
                continue
            sample = hashlib.sha256(str(size).encode())
            sample.update(file.read(2**20))
            for block in range(64):
                file.seek(block * (size - 65536) // 63)
                sample.update(file.read(65536))
            contents[name] = f"sampled:{sample.hexdigest()}"
    return digest(contents)


# ---------------------------------------------------------------- config.json


def _trusted(trust: str | None, source: str, name: str, commit: str | None, content: str) -> bool:
    if trust is None:
        return False
    found = _TRUST.fullmatch(trust)
    if not found:
        raise BadInput(
            f"`{trust[:120]}` does not name one version of one model",
            hint="--trust-remote-code org/name@<40 hex digits>",
            where="--trust-remote-code",
        )  # fmt: skip
    return found[1] in (source, name) and found[2] == (commit or content[:40])


def _refuse_foreign_code(
    config: Mapping[str, Any],
    folder: Path,
    files: list[Path],
    trusted: bool,
    name: str,
    content: str,
    notes: list[str] | None,
) -> None:
    """Refuse a model with code of its own; with `notes`, only where nothing but that code knows the model.

    A prediction runs no code, so where transformers knows the architecture itself it is enough to say so.
    """
    if trusted:
        return
    keys = [key for key in ("auto_map", "model_file") if config.get(key) or text_config(config).get(key)]
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer in files and read_json(tokenizer, LONGEST_CONFIG_BYTES * 16).get("auto_map"):
        keys.append("auto_map of tokenizer_config.json")
    if not keys:
        return
    version = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else content[:40]
    kind = str(config.get("model_type"))
    known = kind in FAMILIES or kind in _known_architectures()
    if known and notes is not None:
        notes.append(
            f"the model brings code of its own ({', '.join(keys)}): not run; shapes are transformers' own `{kind}`"
        )
        return
    if notes is not None:
        return  # refused as an unknown architecture, which tells more
    instead = (
        f"transformers knows `{kind}` itself: take {', '.join(keys)} out of a copy of the folder. Or " if known else ""
    )
    raise BadInput(
        f"the model runs its own code ({', '.join(keys)})",
        hint=f"{instead}review that code, then --trust-remote-code {name}@{version}",
        where=str(folder / "config.json"),
    )


def _refuse_unstartable(config: Mapping[str, Any], where: Path) -> None:
    quantised = config.get("quantization_config") or text_config(config).get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise BadInput(
            f"the weights are already quantised ({str(method or 'method not named')[:40]})",
            hint="start from the model's unquantised weights: Leanplan chooses and measures the quantisation",
            where=str(where),
        )
    if config.get("is_encoder_decoder"):
        raise BadInput(
            "an encoder-decoder, not a causal language model", hint="give a decoder-only model", where=str(where)
        )


def _known_architectures() -> frozenset[str]:
    from knowledge_base.engines.transformers import architectures

    return frozenset(architectures())


def _refuse_shared_layers(config: Mapping[str, Any], where: Path) -> None:
    groups, layers = config.get("num_hidden_groups"), config.get("num_hidden_layers")
    if type(groups) is int and type(layers) is int and groups < layers:
        raise BadInput(
            f"config.json: {layers} layers share the matrices of {groups}",
            hint="what such a model reads and computes is not predicted; give one whose layers have their own",
            where=str(where),
        )


def _refuse_unknown(kind: str, where: Path, tensors: Mapping[str, Stored] | None, *, causal: bool) -> None:
    """Refuse an architecture that transformers has no class for, with what can be said of it all the same."""
    import difflib
    from importlib.metadata import version

    from knowledge_base.engines.transformers import architectures, causal_architectures

    known = causal_architectures() if causal else frozenset(architectures())
    if not known or kind in known:
        return
    near = difflib.get_close_matches(kind, known, n=3)
    what = "a causal language model" if causal else "a language model"
    if tensors is None:
        left = "nothing is predicted from config.json alone; weight files beside it would tell its size"
    else:
        size = sum(t.bytes for t in tensors.values())
        left = (
            f"its weight files tell {size / 1e9:.4g} GB, so it needs more memory than that and writes no token sooner than "
            f"they are read ({size / 1e9:.4g} ms at 1 TB/s, mixtures of experts aside); cache and arithmetic are not predicted"
        )
    raise BadInput(
        f"architecture `{kind}` is not {what} transformers {version('transformers')} knows: {left}",
        hint=(f"did you mean {' or '.join(f'`{n}`' for n in near)}? " if near else "")
        + "check model_type, or install a release of transformers that has it",
        where=f"{where}: model_type",
    )


# ---------------------------------------------------------------- agreement


def _tied(
    config: Mapping[str, Any], language: Mapping[str, Any], family: Family | None, *, has_head: bool | None
) -> bool:
    """Return whether input and output share one table; where config.json does not say, the weights or the family do."""
    if has_head is False:
        return True
    for source in (language, config):
        if isinstance(source.get("tie_word_embeddings"), bool):
            return bool(source["tie_word_embeddings"])
    return family.tied if family else not has_head


def _agree(
    config: Mapping[str, Any],
    family: Family,
    facts: Facts,
    stored: Mapping[str, tuple[int, ...]],
    config_file: Path,
    folder: Path,
) -> None:
    """Refuse weights that are not those the family's config describes.

    Missing weights and other shapes are certain. Names the family does not have may be older spellings or extras that
    transformers knows, so it is asked.
    """

    def plain(name: str) -> str:  # without the prefix of the inner model, which some files leave out
        first, _, rest = name.partition(".")
        return rest if first in ("model", "transformer", "backbone", "gpt_neox") else name

    expected = _expected(family, facts, config, config_file)
    names = {plain(n): n for n in (*stored, *expected)}
    wanted = {plain(n): s for n, s in expected.items()}
    found = {plain(n): s for n, s in stored.items() if not is_buffer(n)}
    heads = {"lm_head.weight", "embed_out.weight"}
    if _tied(config, config, family, has_head=bool(heads & found.keys())):
        wanted, found = ({n: s for n, s in side.items() if n not in heads} for side in (wanted, found))
    if found.keys() - wanted.keys():
        described = _describe(config_file, folder, weights=True)
        _refuse_disagreement(described.missing, described.unexpected, described.mismatched, folder)
    else:
        missing = [names[n] for n in wanted if n not in found]
        other = [f"{names[n]} is {s}, config.json says {wanted[n]}" for n, s in found.items() if s != wanted[n]]
        _refuse_disagreement(missing, (), other, folder)


def _expected(family: Family, facts: Facts, config: Mapping[str, Any], config_file: Path) -> dict[str, tuple[int, ...]]:
    try:
        shapes = family.shapes(family, facts.sizes, config)
        if bad := next((name for name, shape in shapes.items() if min(shape) < 1), None):
            raise ValueError(f"`{bad}` would be {shapes[bad]}")
        return shapes
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise BadInput(
            f"config.json: sizes that make no model ({type(error).__name__}: {error})",
            hint="mend config.json",
            where=str(config_file),
        ) from error


def _describe(config_file: Path, folder: Path, *, weights: bool) -> Any:
    import shutil
    import tempfile

    from planner.describing import describe

    if config_file == folder / "config.json":
        return describe(folder, weights=weights)
    with tempfile.TemporaryDirectory(prefix="leanplan-") as name:
        shutil.copyfile(config_file, Path(name) / "config.json")
        return describe(Path(name), weights=False)


def _refuse_disagreement(
    missing: Sequence[str], unexpected: Sequence[str], mismatched: Sequence[str], folder: Path
) -> None:
    problems = [_listing(missing, "missing")] if missing else []
    if unexpected:
        problems.append(_listing(unexpected, "left over"))
    if mismatched:
        problems.append(mismatched[0] + (f", and {len(mismatched) - 1} more" if mismatched[1:] else ""))
    if problems:
        raise BadInput(
            f"{'; '.join(problems)}: config and weights disagree",
            hint="config.json and the weight files must be of the same model; download it again",
            where=str(folder),
        )


def _listing(names: Sequence[str], what: str) -> str:
    shown = ", ".join(name[:120] for name in names[:2]) + (", …" if names[2:] else "")
    return f"{len(names)} weight{'s' if len(names) > 1 else ''} {what} ({shown})"


def _check_tokenizer(folder: Path, vocab_size: int, rows: int, weights: str, notes: list[str]) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings, and a model without one."""
    present = [name for name in _TOKENIZERS if (folder / name).exists()]
    if not present:
        if weights == "required":
            raise BadInput(
                "no tokenizer",
                hint="put the model's tokenizer.json into the folder; quality is measured on text",
                where=str(folder),
            )
        return
    if present[0] == "tokenizer.json":
        facts = read_json(folder / "tokenizer.json", LONGEST_TOKENIZER_BYTES)
        model, added = facts.get("model"), facts.get("added_tokens") or []
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(vocabulary, dict | list) or not isinstance(added, list):
            raise BadInput(
                "no vocabulary in it", hint="download the tokenizer again", where=str(folder / "tokenizer.json")
            )
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
        ids += [token.get("id") for token in added if isinstance(token, dict)]
    elif present[0] == "vocab.json":
        ids = list(read_json(folder / "vocab.json", LONGEST_TOKENIZER_BYTES).values())
    else:
        notes.append(f"the vocabulary of {present[0]} is compared with the embeddings only when it is loaded")
        return
    if not ids or any(type(i) is not int or i < 0 for i in ids):
        raise BadInput(
            "token ids are not whole numbers", hint="download the tokenizer again", where=str(folder / present[0])
        )
    tokens = max(ids) + 1
    if tokens > rows:
        raise BadInput(
            f"the tokenizer has {tokens} tokens, embeddings {rows}",
            hint="use the tokenizer the model was trained with",
            where=str(folder / present[0]),
        )
    if 2 * tokens < vocab_size:
        notes.append(f"the tokenizer uses {tokens} of {vocab_size} embeddings: is it this model's?")
