"""Which configs are refused: code of its own that nobody trusted, what cannot be started from, what nobody knows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knowledge_base.errors import BadInput
from planner._safetensors_header import Stored
from planner.architectures import FAMILIES
from planner.config_facts import LONGEST_CONFIG_BYTES, read_json, text_config

_TRUST = re.compile(r"(.+)@([0-9a-f]{40})")


def trusted(trust: str | None, source: str, name: str, commit: str | None, content: str) -> bool:
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


def refuse_foreign_code(
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


def refuse_unstartable(config: Mapping[str, Any], where: Path) -> None:
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


def refuse_shared_layers(config: Mapping[str, Any], where: Path) -> None:
    groups, layers = config.get("num_hidden_groups"), config.get("num_hidden_layers")
    if type(groups) is int and type(layers) is int and groups < layers:
        raise BadInput(
            f"config.json: {layers} layers share the matrices of {groups}",
            hint="what such a model reads and computes is not predicted; give one whose layers have their own",
            where=str(where),
        )


def refuse_unknown(kind: str, where: Path, tensors: Mapping[str, Stored] | None, *, causal: bool) -> None:
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
