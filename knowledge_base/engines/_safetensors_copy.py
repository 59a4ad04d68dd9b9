"""A checkpoint's tensors copied into one safetensors file piece by piece: no tensor is ever whole in memory.

The file is, byte for byte, the one that `safetensors.torch.save_file` writes of the same tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from knowledge_base.engines._disk_reading import read_into
from knowledge_base.engines._torch_offload import DTYPES, Stored, stored_in
from knowledge_base.errors import CandidateFailed

PIECE_NUMBERS = 1 << 20
ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"  # of a checkpoint, the first before the second
# The format's own order of types, in which the largest come first in a file: https://github.com/huggingface/safetensors
_ORDER = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of a checkpoint, and the file it is in."""

    file: Path
    stored: Stored


def tensors_of(folder: Path) -> dict[str, Source]:
    """Return a checkpoint's tensors by name, of one file or of several; {} where it has no safetensors.

    Raises:
        CandidateFailed: "load_error", a file is missing or damaged.
    """
    files = [folder / ONE_FILE] if (folder / ONE_FILE).is_file() else []
    if not files and (index := folder / INDEX).is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = [folder / Path(name).name for name in sorted(names)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CandidateFailed("load_error", f"{INDEX}: cannot be read: {error}") from error
    return {name: Source(file, stored) for file in files for name, stored in stored_in(file).items()}


def copy(sources: Mapping[str, Source], dtype: torch.dtype, target: Path) -> None:
    """Write the tensors under these names into one file, those of floating point as `dtype`.

    Raises:
        CandidateFailed: "non_finite", a tensor has such values; "load_error", a file ends too early.
    """
    kinds = {
        name: dtype if source.stored.dtype.is_floating_point else source.stored.dtype
        for name, source in sources.items()
    }
    order = sorted(sources, key=lambda name: (-_ORDER.index(_NAMES[kinds[name]]), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        shape = sources[name].stored.shape
        start, end = end, end + math.prod(shape) * kinds[name].itemsize
        header[name] = {"dtype": _NAMES[kinds[name]], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            with sources[name].file.open("rb") as file:
                for piece in _pieces(file, sources[name].stored):
                    if piece.is_floating_point() and (bad := int((~torch.isfinite(piece)).sum())):
                        raise CandidateFailed("non_finite", f"{name} has {bad} values that are not finite")
                    out.write(piece.to(kinds[name]).view(torch.uint8).numpy().data)


def _pieces(file: BinaryIO, stored: Stored) -> Iterator[torch.Tensor]:
    left, at = math.prod(stored.shape), stored.start
    while left:
        place = bytearray(min(left, PIECE_NUMBERS) * stored.dtype.itemsize)
        try:
            read_into(file.fileno(), memoryview(place), at)
        except OSError as error:
            raise CandidateFailed("load_error", f"{file.name}: weights cannot be read: {error}") from error
        yield torch.frombuffer(place, dtype=stored.dtype)
        left -= min(left, PIECE_NUMBERS)
        at += len(place)
