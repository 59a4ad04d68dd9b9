"""What every engine file asks alike: what is installed, what it may store, which runtime keys it honours."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowledge_base.errors import CandidateFailed
from knowledge_base.types import Model

WEIGHT_DTYPES = ("float32", "bfloat16", "float16")  # that an engine starts from

# What the value of a runtime key must satisfy, and the words for it.
Rule = tuple[Callable[[Any], bool], str]
AT_LEAST_ONE: Rule = (lambda v: type(v) is int and v >= 1, "an integer of at least 1")
TRUE: Rule = (lambda v: v is True, "true, or no such key")
KV_BITS: Rule = (lambda v: v in (8, 4), "8 or 4")


def missing(modules: Iterable[str], extra: str | None = None) -> str | None:
    """Return which modules are not installed, with the command that installs them, or None. Imports nothing."""
    lacking = [name for name in modules if importlib.util.find_spec(name) is None]
    install = f'"leanplan[{extra}]"' if extra else " ".join(lacking)
    return f"{', '.join(lacking)} not installed; pip install {install}" if lacking else None


def versions(modules: Iterable[str]) -> dict[str, str]:
    """Return the versions of modules by distribution."""
    return {name: importlib.metadata.version(name) for name in modules}


def why_not_written(model: Model, architectures: Collection[str], form: str) -> str | None:
    """Return why an engine of our own writers ("GGUF writer", "ONNX graph") cannot take a model, or None."""
    if model.architecture not in architectures:
        return f"architecture `{model.architecture}` has no {form} here; {', '.join(architectures)} have"
    if model.experts:
        return f"mixtures of experts have no {form} here"
    return why_not_stored(model.weight_dtype)


def why_not_stored(weight_dtype: str) -> str | None:
    """Return why an engine does not start from weights stored so, or None."""
    if weight_dtype in WEIGHT_DTYPES:
        return None
    return f"weights are stored as {weight_dtype}; this engine starts from {', '.join(WEIGHT_DTYPES)}"


def require_storage(engine: str, storage: Mapping[str, Any], own: Collection[str] = ()) -> None:
    """Refuse storage choices that are another engine's.

    Raises:
        CandidateFailed: "unsupported".
    """
    if other := sorted(storage.keys() - set(own)):
        raise CandidateFailed(
            "unsupported", f"the {engine} engine has no storage choice {', '.join(f'`{key}`' for key in other)}",
            hint="plan this step with an engine that offers it",
        )  # fmt: skip


def require_runtime(engine: str, runtime: Mapping[str, Any], known: Mapping[str, Rule]) -> None:
    """Refuse a runtime key or value that an engine has no way to honour.

    Raises:
        CandidateFailed: "unsupported".
    """
    for key, value in runtime.items():
        if key not in known:
            raise CandidateFailed(
                "unsupported", f"unknown runtime key `{key}`", hint=f"the {engine} engine knows {', '.join(known)}"
            )
        valid, words = known[key]
        if not valid(value):
            raise CandidateFailed(
                "unsupported", f"runtime key `{key}` is {value!r}, expected {words}", hint="rebuild the artefact"
            )


@dataclass(frozen=True, slots=True)
class Together:
    """Which runtime keys go together.

    one_of: keys of which one is used at most, and why.
    needs: keys, each with another it means nothing without.
    clashes: keys, another, what the keys are, what stands against them in the other: none of the keys goes with it.
    """

    one_of: tuple[tuple[tuple[str, ...], str], ...] = ()
    needs: tuple[tuple[str, str], ...] = ()
    clashes: tuple[tuple[tuple[str, ...], str, str, str], ...] = ()


BATCHES = "batches"  # stands for a batch of more than one
ONE_WAY = "an answer is written in one way"
OTHER_LENGTHS = "batches: sequences would go on by different numbers of tokens"


def require_together(runtime: Mapping[str, Any], together: Together) -> None:
    """Refuse runtime keys that mean nothing together, or nothing alone.

    Raises:
        CandidateFailed: "unsupported".
    """
    for keys, why in together.one_of:
        if len(there := [key for key in keys if key in runtime]) > 1:
            raise _clash(f"`{there[0]}`", f"`{there[1]}`: {why}")
    for key, other in together.needs:
        if key in runtime and other not in runtime:
            raise CandidateFailed("unsupported", f"`{key}` is set without `{other}`", hint="rebuild the artefact")
    asked = {*runtime, BATCHES} if runtime.get("batch", 1) > 1 else runtime.keys()
    for keys, other, what, with_what in together.clashes:
        if other in asked and any(key in asked for key in keys):
            raise _clash(what, with_what)


def _clash(what: str, with_what: str) -> CandidateFailed:
    return CandidateFailed("unsupported", f"{what} does not go with {with_what}", hint="choose one of the two")


def require_files(folder: Path, names: Iterable[str]) -> None:
    """Refuse an artefact folder that lacks one of its files.

    Raises:
        CandidateFailed: "load_error".
    """
    for name in names:
        if not (folder / name).is_file():
            raise CandidateFailed("load_error", f"{folder.name} holds no {name}", hint="build the artefact again")
