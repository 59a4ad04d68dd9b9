"""What a .safetensors file holds, from its header alone, and whether file and header agree.

Format: 8 bytes little-endian header length, JSON header, then the tensors' bytes without gap or overlap.
Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from knowledge_base.errors import BadInput

LONGEST_HEADER_BYTES = 32 * 2**20
MOST_TENSORS = 65_536  # in one file; a header of 100 000 entries is a known way to keep a parser busy
MOST_DIMENSIONS = 8
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E3M2": 6, "F6_E2M3": 6, "F4": 4, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64,
}  # fmt: skip
_AGAIN = "download or copy the file again"


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file: dtype as the format names it, shape, and its place in the file in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.stop - self.start


def read_header(path: Path) -> dict[str, Stored]:
    """Return the tensors of a file by name; only the header is read.

    Raises:
        BadInput: not such a file (an LFS pointer or a web page are named as such), damaged, or a header no honest
            writer makes: too long, too many entries, shapes and offsets that disagree, gaps, overlaps.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        _refuse_other_formats(path, start, file_bytes)
        (header_bytes,) = struct.unpack("<Q", start[:8])
        if header_bytes > min(file_bytes - 8, LONGEST_HEADER_BYTES) or header_bytes < 2:
            _damaged(path, f"its header claims {header_bytes} bytes, the file has {file_bytes}")
        file.seek(8)
        header = file.read(header_bytes)
    if (objects := header.count(b"{")) > MOST_TENSORS + 2:  # every tensor is one; counted before it is parsed
        _damaged(path, f"about {objects} tensors in one file, more than {MOST_TENSORS}")
    entries = _parse(path, header)
    entries.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, 8 + header_bytes) for name, entry in entries.items()}
    _check_coverage(path, tensors, 8 + header_bytes, file_bytes)
    return tensors


def _refuse_other_formats(path: Path, start: bytes, file_bytes: int) -> None:
    if start.startswith(b"version https://git-lfs"):
        raise BadInput(
            "a Git LFS pointer, not the weights themselves", hint="fetch the weights: git lfs pull", where=str(path)
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise BadInput("a web page, not weights", hint=_AGAIN, where=str(path))
    if start.startswith((b"\x80\x02", b"\x80\x04", b"PK\x03\x04")):
        raise BadInput("a pickle or zip file, not safetensors", hint="convert it to safetensors", where=str(path))
    if file_bytes < 10:
        _damaged(path, f"the file has only {file_bytes} bytes")


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            _damaged(path, "its header names an entry twice")
        return found

    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        _damaged(path, "its header is not JSON")
    if not isinstance(entries, dict):
        _damaged(path, "its header is not a JSON object")
    return entries


def _stored(path: Path, name: str, entry: Any, data_start: int) -> Stored:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        _damaged(path, f"tensor `{name[:80]}` lacks dtype, shape or data_offsets")
    numbers = (*shape, begin, end)
    if (
        not isinstance(dtype, str)
        or dtype not in DTYPE_BITS
        or any(type(n) is not int or n < 0 for n in numbers)
        or len(shape) > MOST_DIMENSIONS
    ):
        _damaged(path, f"tensor `{name[:80]}` has an unknown dtype or impossible numbers")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        _damaged(path, f"tensor `{name[:80]}` of shape {list(shape)} and {dtype} does not take {end - begin} bytes")
    return Stored(dtype, shape, data_start + begin, data_start + end)


def _check_coverage(path: Path, tensors: dict[str, Stored], data_start: int, file_bytes: int) -> None:
    position = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != position:
            what = "overlaps another" if tensor.start < position else "leaves a gap before it"
            _damaged(path, f"tensor `{name[:80]}` {what}")
        position = tensor.stop
    if position > file_bytes:
        _damaged(path, f"file shorter than its header says by {position - file_bytes} bytes")
    if position < file_bytes:
        _damaged(path, f"file longer than its header says by {file_bytes - position} bytes")


def _damaged(path: Path, what: str) -> NoReturn:
    raise BadInput(f"damaged ({what})", hint=_AGAIN, where=str(path))


def non_finite(path: Path, *, block_bytes: int = 16 * 2**20) -> Iterator[tuple[str, int]]:
    """Yield (tensor, how many of its values are NaN or infinite) where there are any; holds one block in memory.

    Raises:
        BadInput: as `read_header`.
    """
    import numpy as np

    memory = bytearray(block_bytes)
    buffer = np.frombuffer(memory, dtype=np.uint8)
    tensors = sorted(read_header(path).items(), key=lambda item: item[1].start)
    with path.open("rb", buffering=0) as file:
        for name, tensor in tensors:
            count, position = 0, tensor.start
            while position < tensor.stop:
                file.seek(position)
                got = file.readinto(memoryview(memory)[: min(block_bytes, tensor.stop - position)])
                if not got:
                    _damaged(path, "it became shorter while it was read")
                got -= got % 8 if tensor.stop - position > got else 0
                count += _count_non_finite(buffer[:got], tensor.dtype)
                position += got
            if count:
                yield name, count


# Bits of the exponent (all ones: NaN or infinite), by dtype. E4M3 has no infinity and one NaN, seven ones.
_EXPONENTS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F8_E5M2": ("<u1", 0x7C), "F8_E4M3": ("<u1", 0x7F)}


def _count_non_finite(block: Any, dtype: str) -> int:
    import numpy as np

    if dtype in ("F32", "F64"):
        values = block.view("<f4" if dtype == "F32" else "<f8")
        return int(values.size - np.count_nonzero(np.isfinite(values)))
    if dtype in _EXPONENTS:
        kind, exponent = _EXPONENTS[dtype]
        return int(np.count_nonzero((block.view(kind) & np.array(exponent, kind)) == exponent))
    return 0
