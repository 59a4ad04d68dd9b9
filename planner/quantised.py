"""Checkpoints that come quantised: how many bits their matrices take, and which of them were left as they were.

Read from `quantization_config` of config.json. Bits include what a group of weights shares: a scale, a zero point. What
a method stores beside (permutations, biases) is below 1 % and left out; where weight files are there, their headers tell
the bytes instead. Keys are those transformers 5 reads (src/transformers/utils/quantization_config.py) and the
compressed-tensors library writes.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowledge_base.errors import BadInput
from planner.architectures import Shape, is_expert, part_of

_IGNORED = ("modules_to_not_convert", "llm_int8_skip_modules", "ignore", "ignored_layers", "exclude_modules")
_NEVER = re.compile(r"\.(?:gate|router|shared_expert_gate)\.weight$|router")  # small, and no method converts them
MOST_PATTERNS, LONGEST_PATTERN = 4096, 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantised:
    """How the matrices of a checkpoint are stored."""

    method: str
    format: str  # a weight format of the cost models: "int4", "int8", "float8_e4m3fn", "mxfp4", ...
    bits: float  # of one weight, its share of scales and zero points included
    ignored: tuple[str, ...] = ()  # names or patterns of modules left as they were
    experts_only: bool = False

    def bytes_of(self, shapes: Mapping[str, Shape], *, experts: int, size: float) -> tuple[float, float]:
        """Return the bytes of the layers' matrices, and how many of their parameters were left at `size` bytes each."""
        small, left = 0, 0
        matches = [_matcher(pattern) for pattern in self.ignored]
        for name, shape in shapes.items():
            if part_of(name, shape) != "linear":
                continue
            keeps = _NEVER.search(name) or any(match(name) for match in matches)
            keeps = keeps or (self.experts_only and not is_expert(name, shape, experts))
            if keeps:
                left += math.prod(shape)
            else:
                small += math.prod(shape)
        return small * self.bits / 8 + left * size, left


def read(config: Mapping[str, Any], language: Mapping[str, Any], where: Path) -> Quantised | None:
    """Return how config.json says its weights are quantised, or None.

    Raises:
        BadInput: the method is not known here or its bits are not whole numbers of a sensible size.
    """
    found = config.get("quantization_config") or language.get("quantization_config")
    if not found:
        return None
    if not isinstance(found, dict):
        raise _bad(f"quantization_config must be an object, got {found!r:.60}", where)
    method = str(found.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in found else "not named"))[:40]
    known = _METHODS.get(method)
    if known is None:
        raise BadInput(
            f"config.json: the weights are quantised by `{method}`, and how many bytes that takes is not known here",
            hint=f"known: {', '.join(_METHODS)}; or give the model's unquantised config.json",
            where=f"{where}: quantization_config.quant_method",
        )
    format_, bits = known(found, where)
    patterns = next((found[key] for key in _IGNORED if found.get(key)), ())
    if not isinstance(patterns, list | tuple) or len(patterns) > MOST_PATTERNS or not all(
        isinstance(p, str) and 0 < len(p) <= LONGEST_PATTERN for p in patterns
    ):  # fmt: skip
        raise _bad("the modules left unquantised must be a list of names", where)
    dynamic = found.get("dynamic")  # GPTQModel: `-:` and an expression are modules left as they were
    if isinstance(dynamic, dict):
        patterns = [*patterns, *(f"re:{key[2:]}" for key in dynamic if key.startswith("-:"))]
    for pattern in patterns:
        try:
            _matcher(pattern)
        except re.error as error:
            raise _bad(f"`{pattern[:80]}` is no regular expression: {error}", where) from error
    return Quantised(
        method=method, format=format_, bits=bits, ignored=tuple(patterns), experts_only=method == "mxfp4"
    )  # fmt: skip


def _bad(message: str, where: Path) -> BadInput:
    return BadInput(f"config.json: {message}", hint="mend config.json", where=f"{where}: quantization_config")


def _whole(
    facts: Mapping[str, Any], names: tuple[str, ...], default: int | None, where: Path, *, most: int, least: int = 1
) -> int:
    key = next((name for name in names if facts.get(name) is not None), None)
    value = default if key is None else facts[key]
    if value is None:
        raise _bad(f"no {names[0]}", where)
    if type(value) is not int or not least <= value <= most or value == 0:
        raise _bad(f"{key} must be a whole number up to {most}, got {value!r:.40}", where)
    return value


def _format(bits: int) -> str:
    return "int8" if bits == 8 else f"int{bits}"


def _grouped(facts: Mapping[str, Any], where: Path) -> tuple[str, float]:
    """GPTQ, AWQ and their like: a 16-bit scale and a zero point of the weights' bits for each group."""
    bits = _whole(facts, ("bits", "w_bit", "nbits"), None, where, most=8)
    group = _whole(facts, ("group_size", "q_group_size"), 128, where, most=65536, least=-1)
    return _format(bits), bits + ((16 + bits) / group if group > 0 else 0.0)


def _bitsandbytes(facts: Mapping[str, Any], where: Path) -> tuple[str, float]:
    """A 32-bit scale for each 64 weights, itself kept in 8 bits with a scale for each 256 where it is quantised too."""
    if facts.get("load_in_8bit") or facts.get("_load_in_8bit"):
        return "int8", 8.0
    if not (facts.get("load_in_4bit") or facts.get("_load_in_4bit")):
        raise _bad("bitsandbytes, but neither load_in_8bit nor load_in_4bit", where)
    twice = facts.get("bnb_4bit_use_double_quant")
    return "int4", 4 + (8 / 64 + 32 / (64 * 256) if twice else 32 / 64)


def _float8(facts: Mapping[str, Any], where: Path) -> tuple[str, float]:
    block = facts.get("weight_block_size")
    if block is None:
        return "float8_e4m3fn", 8.0
    if not isinstance(block, list) or len(block) != 2 or not all(type(b) is int and b > 0 for b in block):
        raise _bad(f"weight_block_size must be two whole numbers, got {block!r:.40}", where)
    return "float8_e4m3fn", 8 + 32 / (block[0] * block[1])


def _compressed(facts: Mapping[str, Any], where: Path) -> tuple[str, float]:
    """compressed-tensors: the first group of modules decides, as nearly all such checkpoints have one."""
    groups = facts.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = first.get("weights") if isinstance(first, dict) else None
    if not isinstance(weights, dict):
        raise _bad("no config_groups with weights", where)
    bits = _whole(weights, ("num_bits",), None, where, most=16)
    group = _whole(weights, ("group_size",), -1, where, most=65536, least=-1)
    zero = 0 if weights.get("symmetric", True) else bits
    floats = weights.get("type") == "float"
    format_ = {8: "float8_e4m3fn", 4: "float4"}.get(bits, f"float{bits}") if floats else _format(bits)
    return format_, bits + ((8 if floats and bits == 4 else 16) + zero) / group if group > 0 else float(bits)


_METHODS = {
    "gptq": _grouped, "awq": _grouped, "auto-round": _grouped, "bitsandbytes": _bitsandbytes, "fp8": _float8,
    "fbgemm_fp8": lambda facts, where: ("float8_e4m3fn", 8.0), "compressed-tensors": _compressed,
    "mxfp4": lambda facts, where: ("mxfp4", 4 + 8 / 32), "bitnet": lambda facts, where: ("int2", 2.0),
    "eetq": lambda facts, where: ("int8", 8.0),
}  # fmt: skip


def _matcher(pattern: str) -> Any:
    """Return whether a tensor's name is meant: `re:` and an expression, a name with `*`, or a part of the dotted name."""
    if pattern.startswith("re:"):
        return re.compile(pattern[3:].removesuffix("$") + r"(?:\.|$)").match
    if "*" in pattern:
        glob = re.compile(fnmatch.translate(pattern.rstrip("*.") + "*"))
        return lambda name: glob.match(name) or glob.match(name.removeprefix("model."))
    return re.compile(rf"(?:^|\.){re.escape(pattern)}(?:\.|$)").search
