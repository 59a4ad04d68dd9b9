"""Linear modules stored without their zeros: one bit for each weight says whether it is there, then those that are.

Only the artefact is small. An engine that loads one calls `unpacked()` and computes with the module it returns, at the
speed and in the memory of that one: no processor here multiplies by scattered zeros faster than by numbers. Until
then, inside the process that builds, `forward` unpacks anew each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from knowledge_base.techniques._packed import (
    GROUP_SIZES,
    Int4Linear,
    _Packed,
    dequantise_groups,
    pack_bits,
    unpack_bits,
)  # fmt: skip


def _packed_flat(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Return values (n,) packed into n x bits / 8 bytes, filled up with zeros to a multiple of 8 values."""
    return pack_bits(nn.functional.pad(values.to(torch.uint8), (0, -len(values) % 8))[None], bits)[0]


class SparseLinear(_Packed):
    """y = x W^T + b: the weights of W that are not zero, row by row in the model's dtype, and a bit for each weight."""

    kind = "sparse"
    present: torch.Tensor  # uint8 (out * in / 8,): bits
    values: torch.Tensor  # (nonzeros,)

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, *, nonzeros: int) -> None:
        super().__init__(in_features, out_features, bias, dtype)
        if not 0 <= nonzeros <= in_features * out_features:
            raise ValueError(f"nonzeros is {nonzeros}, expected 0 to {in_features * out_features}")
        self.nonzeros = nonzeros
        size = -(-in_features * out_features // 8)
        self.register_buffer("present", torch.empty(size, dtype=torch.uint8, device="meta"))
        self._add_values()

    def _add_values(self) -> None:
        self.register_buffer("values", torch.empty(self.nonzeros, dtype=self.dtype, device="meta"))

    @classmethod
    def from_weight(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> SparseLinear:
        """Return the module for float weights (out, in)."""
        there = weight != 0
        values = weight[there]
        module = cls(weight.shape[1], weight.shape[0], bias is not None, weight.dtype, nonzeros=len(values))
        module._fill({"present": _packed_flat(there.flatten(), 1), "values": values}, bias)
        return module

    def spec(self) -> dict[str, Any]:
        """Return the parameters `from_spec` needs beyond the shape."""
        return {"nonzeros": self.nonzeros}

    def _spread(self, values: torch.Tensor, elsewhere: float) -> torch.Tensor:
        """Return (out, in) with the values where weights are, and `elsewhere` where none is."""
        shape = (self.out_features, self.in_features)
        full = torch.full(shape, elsewhere, dtype=values.dtype, device=values.device)
        there = unpack_bits(self.present[None], 1)[0, : full.numel()].reshape(shape)
        return full.masked_scatter_(there.bool(), values)

    def rows(self, which: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return some rows of the weights (out, in), unpacked."""
        return self._spread(self.values, 0)[which].to(dtype)

    def unpacked(self) -> nn.Module:
        """Return the module to compute with: an ordinary Linear."""
        module = nn.Linear(self.in_features, self.out_features, device="meta", dtype=self.dtype)
        module.weight = nn.Parameter(self.rows(slice(None), self.dtype), requires_grad=False)
        module.bias = self.bias  # type: ignore[assignment]  # None where there is none, as in Linear itself
        return module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply (..., in) by the weights, unpacked for this once."""
        return self.unpacked()(x)


class SparseInt4Linear(SparseLinear):
    """y = x (q s)^T + b: of the weights that are there 4 bits each, and one bfloat16 scale for each group of a row."""

    kind = "sparse_int4"
    codes: torch.Tensor  # uint8 (nonzeros / 2,): q + 8
    scales: torch.Tensor  # bfloat16 (out, in / group_size), of either sign

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, *, nonzeros: int, group_size: int
    ) -> None:
        if group_size not in GROUP_SIZES or in_features % group_size:
            raise ValueError(f"group_size is {group_size}, expected a divisor of {in_features} among {GROUP_SIZES}")
        self.group_size = group_size
        super().__init__(in_features, out_features, bias, dtype, nonzeros=nonzeros)

    def _add_values(self) -> None:
        self.register_buffer("codes", torch.empty(-(-self.nonzeros // 8) * 4, dtype=torch.uint8, device="meta"))
        groups = self.in_features // self.group_size
        self.register_buffer("scales", torch.empty(self.out_features, groups, dtype=torch.bfloat16, device="meta"))

    @classmethod
    def from_quantised(
        cls,
        quantised: torch.Tensor,
        scales: torch.Tensor,
        there: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> SparseInt4Linear:
        """Return the module for weights in -8..7 (out, in), their scales (out, groups), and where weights are."""
        outputs, inputs = quantised.shape
        codes = (quantised[there] + 8).to(torch.uint8)
        size = inputs // scales.shape[1]
        module = cls(inputs, outputs, bias is not None, dtype, nonzeros=len(codes), group_size=size)
        present = _packed_flat(there.flatten(), 1)
        module._fill({"present": present, "codes": _packed_flat(codes, 4), "scales": scales.bfloat16()}, bias)
        return module

    def spec(self) -> dict[str, Any]:
        """Return the parameters `from_spec` needs beyond the shape."""
        return {"nonzeros": self.nonzeros, "group_size": self.group_size}

    def _quantised(self) -> torch.Tensor:
        """Return q + 8, uint8 (out, in), 8 where no weight is."""
        return self._spread(unpack_bits(self.codes[None], 4)[0, : self.nonzeros], 8)

    def rows(self, which: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return some rows of the weights (out, in), unpacked."""
        scales = self.scales[which].to(dtype)
        return dequantise_groups(self._quantised()[which], scales, torch.zeros_like(scales), 4)

    def unpacked(self) -> nn.Module:
        """Return the module to compute with: int4, whose kernel reads the zeros as the level in the middle."""
        scales = self.scales.float()
        return Int4Linear.from_quantised(self._quantised(), scales, torch.zeros_like(scales), self.bias, self.dtype)
