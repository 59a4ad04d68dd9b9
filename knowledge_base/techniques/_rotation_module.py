"""Rotations made of Hadamard matrices, and the two modules that turn a model's states where they begin and end.

    R = D K,  K = C_m x H_(2^k) for n = m 2^k,  D = random signs

with H the Hadamard and C the cosine (DCT-II) matrix, both orthonormal: two small products instead of one of n x n. Where
norms subtract the mean, R = K^T D K with the first sign +1 is taken instead: the first row of K is constant, so it leaves
the mean and what is left after subtracting it where they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def hadamard(size: int) -> torch.Tensor:
    """Return Sylvester's orthonormal Hadamard matrix; `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def cosines(size: int) -> torch.Tensor:
    """Return the orthonormal DCT-II matrix; its first row is constant."""
    k, j = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (j + 0.5) * k) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


class Rotation:
    """An orthogonal R that rows (..., n) are multiplied by: `turn` gives x R, `back` gives x R^T, both float32."""

    def __init__(self, signs: torch.Tensor, *, keeps_mean: bool) -> None:
        """Take the signs (n,), +1 or -1, of any dtype."""
        size = len(signs)
        power = size & -size  # the largest power of two that divides it
        right = 1 << (power.bit_length() // 2)
        left = torch.kron(cosines(size // power), hadamard(power // right))
        self.left, self.right = left.to(signs.device), hadamard(right).to(signs.device)
        self.signs, self.keeps_mean = signs.float(), keeps_mean
        if keeps_mean:
            self.signs[0] = 1.0

    @classmethod
    def drawn(cls, size: int, seed: int, device: torch.device, *, keeps_mean: bool) -> Rotation:
        """Return the rotation of that seed."""
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
        return cls(signs.to(device), keeps_mean=keeps_mean)

    def _mixed(self, x: torch.Tensor, *, back: bool) -> torch.Tensor:
        """Return x K, or x K^T."""
        left, right = (self.left.T, self.right.T) if back else (self.left, self.right)
        return (left.T @ x.unflatten(-1, (len(left), len(right))) @ right).flatten(-2)

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """Return x R."""
        x = x.float()
        return self._mixed((self._mixed(x, back=True) if self.keeps_mean else x) * self.signs, back=False)

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """Return x R^T."""
        return self.turn(x) if self.keeps_mean else self._mixed(x.float(), back=True) * self.signs


class _Turning(nn.Module):
    """A weight (tokens, hidden) that stays as it was, and the signs of the rotation between it and the layers."""

    signs: torch.Tensor  # int8 (hidden,)

    def __init__(self, weight: torch.Tensor, *, keeps_mean: bool) -> None:
        super().__init__()
        self.weight, self.keeps_mean = weight, keeps_mean
        self.register_buffer("signs", torch.empty(weight.shape[1], dtype=torch.int8, device="meta"))
        self._rotation: Rotation | None = None

    def rotation(self) -> Rotation:
        """Return the rotation, made on first use."""
        if self._rotation is None or self._rotation.signs.device != self.signs.device:
            self._rotation = Rotation(self.signs, keeps_mean=self.keeps_mean)
        return self._rotation

    def spec(self) -> dict[str, Any]:
        """Return what `in_place_of` needs beside the module that was there."""
        return {"keeps_mean": self.keeps_mean}


class RotatedTable(_Turning):
    """The rows of an embedding table, turned into the coordinates the layers compute in."""

    kind = "rotated_table"

    def __init__(self, weight: torch.Tensor, *, keeps_mean: bool, scale: float) -> None:
        super().__init__(weight, keeps_mean=keeps_mean)
        self.scale = scale  # what the model multiplies rows by (Gemma)

    @classmethod
    def in_place_of(cls, old: nn.Embedding, *, keeps_mean: bool, scale: float) -> RotatedTable:
        """Return the module for that embedding's weight; `signs` is to be filled."""
        return cls(old.weight, keeps_mean=keeps_mean, scale=scale)

    def spec(self) -> dict[str, Any]:
        """Return what `in_place_of` needs beside the module that was there."""
        return {**super().spec(), "scale": self.scale}

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the turned rows (..., hidden) of token numbers (...)."""
        rows = nn.functional.embedding(tokens, self.weight)
        return (self.rotation().turn(rows) * self.scale).to(rows.dtype)


class RotatedHead(_Turning):
    """Turns states back, multiplies each channel by the last norm's gain, adds its bias, and multiplies by the weight."""

    kind = "rotated_head"
    gain: torch.Tensor  # float32 (hidden,)
    shift: torch.Tensor  # float32 (hidden,)

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, keeps_mean: bool) -> None:
        super().__init__(weight, keeps_mean=keeps_mean)
        self.bias = bias
        for name in ("gain", "shift"):
            self.register_buffer(name, torch.empty(weight.shape[1], dtype=torch.float32, device="meta"))

    @classmethod
    def in_place_of(cls, old: nn.Linear, *, keeps_mean: bool) -> RotatedHead:
        """Return the module for that head's weight; `signs`, `gain` and `shift` are to be filled."""
        return cls(old.weight, old.bias, keeps_mean=keeps_mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of states (..., hidden)."""
        states = self.rotation().back(x) * self.gain + self.shift
        return nn.functional.linear(states.to(x.dtype), self.weight, self.bias)
