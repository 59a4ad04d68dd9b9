"""The stored form of a packed matrix with a low-rank correction beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear


class CorrectedLinear(nn.Module):
    """y = base(x) + expand (reduce x): any packed module, and two thin bfloat16 factors near what its rounding lost.

    `base` is a module of its own in structure.json, under this one's name.
    """

    kind = "corrected"
    base: Any
    reduce: torch.Tensor  # (rank, in)
    expand: torch.Tensor  # (out, rank)

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, *, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.base = nn.Linear(in_features, out_features, bias, dtype=dtype, device="meta")
        self.register_buffer("reduce", torch.empty(rank, in_features, dtype=torch.bfloat16, device="meta"))
        self.register_buffer("expand", torch.empty(out_features, rank, dtype=torch.bfloat16, device="meta"))

    @classmethod
    def from_spec(
        cls, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, *, rank: int
    ) -> CorrectedLinear:
        """Return an empty module of that shape; its base is a plain Linear until structure.json says otherwise."""
        return cls(in_features, out_features, bias, dtype, rank=rank)

    @classmethod
    def around(cls, base: Any, expand: torch.Tensor, reduce: torch.Tensor) -> CorrectedLinear:
        """Return the module for a packed one and its factors (out, rank) and (rank, in)."""
        module = cls(base.in_features, base.out_features, base.bias is not None, base.dtype, rank=len(reduce))
        module.base = base
        module.reduce, module.expand = reduce.to(torch.bfloat16), expand.to(torch.bfloat16)
        return module

    def spec(self) -> dict[str, Any]:
        """Return what `from_spec` needs beside the Linear's own shape."""
        return {"rank": self.rank}

    def dequantised(self) -> torch.Tensor:
        """Return the weights as (out, in) float32, correction included."""
        return self.base.dequantised() + self.expand.float() @ self.reduce.float()

    @property
    def weight(self) -> torch.Tensor:
        """The weights in the model's dtype, made anew."""
        return self.dequantised().to(self.base.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        return self.base(x) + linear(linear(x.to(torch.bfloat16), self.reduce), self.expand).to(x.dtype)
