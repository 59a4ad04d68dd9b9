"""GGUF's tensor types by the names of techniques/weight_gguf.py: what a matrix takes in one, and what is left of its values.

Rows are rounded by llama.cpp's own code, each independently of the others and of the thread count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy
import torch

from knowledge_base.engines import _llama_abi as abi

NUMBERS = {
    "f32": abi.F32, "f16": abi.F16, "bf16": abi.BF16, "q8_0": abi.Q8_0, "q6_k": abi.Q6_K, "q5_k": abi.Q5_K,
    "q5_1": abi.Q5_1, "q5_0": abi.Q5_0, "q4_k": abi.Q4_K, "q4_0": abi.Q4_0, "q3_k": abi.Q3_K, "q2_k": abi.Q2_K,
    "iq4_nl": abi.IQ4_NL, "iq4_xs": abi.IQ4_XS, "iq3_s": abi.IQ3_S,
}  # fmt: skip

LEAST_IMPORTANCE = 1e-6  # of the largest: a block of columns that calibration never used still has scales
_VALUES_AT_ONCE = 2**18  # that one thread rounds


def bytes_shape(shape: Sequence[int], type: str) -> tuple[int, ...]:
    """Return the shape of a tensor's bytes in that type: (..., bytes of each row)."""
    return (*shape[:-1], abi.library().ggml_row_size(NUMBERS[type], shape[-1]))


def importance_of(squares: torch.Tensor, rows: int) -> numpy.ndarray | None:
    """Return float32 (columns,), by which a matrix's rounding errors are weighted; None: all columns alike.

    Args:
        squares: (columns,), the sum of the squares of what enters each column, over `rows` vectors.
    """
    means = (squares / max(rows, 1)).float().cpu()
    largest = float(means.max())
    return means.clamp(min=LEAST_IMPORTANCE * largest).numpy() if largest > 0 else None


def encoded(
    values: numpy.ndarray, type: str, importance: numpy.ndarray | None = None, *, pool: Executor
) -> numpy.ndarray:
    """Return the bytes (rows, bytes of each row) of float32 values (rows, columns) in a type other than f32.

    Args:
        importance: float32 (columns,), by which errors are weighted; None for all alike.
    """
    library, columns = abi.library(), values.shape[1]
    out = numpy.empty(bytes_shape(values.shape, type), numpy.uint8)
    weights = None if importance is None else importance.ctypes.data

    def quantise(part: range) -> None:
        # The addresses are those of this part's first row; the call writes its rows only.
        library.ggml_quantize_chunk(
            NUMBERS[type],
            values[part.start :].ctypes.data,
            out[part.start :].ctypes.data,
            0,
            len(part),
            columns,
            weights,
        )

    list(pool.map(quantise, _parts(len(values), max(1, _VALUES_AT_ONCE // columns))))
    return out


def rounded(matrix: torch.Tensor, type: str, importance: numpy.ndarray | None = None) -> torch.Tensor:
    """Return a matrix (out, in) as a file in that type, of those that round, gives it back, float32 on the CPU.

    Args:
        importance: as in `encoded`.
    """
    if type == "f16":
        return matrix.detach().to("cpu", torch.float16).float()
    values = matrix.detach().to("cpu", torch.float32).contiguous().numpy()
    with ThreadPoolExecutor(abi.cores()) as pool:
        stored = encoded(values, type, importance, pool=pool)
    out = numpy.empty_like(values)
    abi.library().dequantise(type, stored.ctypes.data, out.ctypes.data, out.size)
    return torch.from_numpy(out)


def _parts(rows: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, rows)) for start in range(0, rows, size))
