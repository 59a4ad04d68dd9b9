"""Linear modules whose weights are 4-bit places in a table of sixteen values, with a scale for each block (NF4, FP4)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn.functional import embedding

from knowledge_base.techniques._packed import GROUP_SIZES, _Packed, pack_bits

# Sixteen values in -1..1. NF4: quantiles of a normal distribution, zero among them (QLoRA, arXiv:2305.14314, appendix E).
# FP4: one sign, two exponent and one mantissa bit (0, 0.5, 1, 1.5, 2, 3, 4, 6) over the largest.
_E2M1 = (0.0, 1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0)
CODEBOOKS = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (*(-v for v in reversed(_E2M1)), *_E2M1),
}  # fmt: skip
_SCALES_TOGETHER = 256  # scales that share a range when they are quantised too


class CodebookLinear(_Packed):
    """y = x (levels[q] s)^T + b: 4-bit places in a codebook, a scale for each block of weights.

    Stored: `packed` uint8 (out, in / 2) as `pack_bits` makes it, and `scales` bfloat16 (out, in / group_size). Doubly
    quantised, `scales` are uint8 and `ranges` float32 (blocks of 256 scales, 2) holds their least value and step.
    """

    kind = "codebook"
    grouped = True
    packed: torch.Tensor
    scales: torch.Tensor
    ranges: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype,
        *,
        group_size: int,
        levels: str,
        double_quant: bool,
    ) -> None:
        super().__init__(in_features, out_features, bias, dtype)
        if group_size not in GROUP_SIZES or in_features % group_size:
            raise ValueError(f"group_size is {group_size}, expected a divisor of {in_features} among {GROUP_SIZES}")
        if levels not in CODEBOOKS:
            raise ValueError(f"levels are `{levels}`, expected {' or '.join(CODEBOOKS)}")
        self.group_size, self.levels, self.double_quant = group_size, levels, double_quant
        groups = in_features // group_size
        self.register_buffer("packed", torch.empty(out_features, in_features // 2, dtype=torch.uint8, device="meta"))
        held = torch.uint8 if double_quant else torch.bfloat16
        self.register_buffer("scales", torch.empty(out_features, groups, dtype=held, device="meta"))
        blocks = -(-out_features * groups // _SCALES_TOGETHER)
        self.register_buffer("ranges", torch.empty(blocks, 2, device="meta") if double_quant else None)

    @classmethod
    def from_weight(
        cls, weight: torch.Tensor, bias: torch.Tensor | None, *, group_size: int, levels: str, double_quant: bool
    ) -> CodebookLinear:
        """Return the module for float weights (out, in): every weight at the level nearest to it."""
        outputs, inputs = weight.shape
        spec = {"group_size": group_size, "levels": levels, "double_quant": double_quant}
        module = cls(inputs, outputs, bias is not None, weight.dtype, **spec)  # type: ignore[arg-type]
        grouped = weight.detach().float().unflatten(1, (-1, group_size))
        largest = grouped.abs().amax(dim=2)  # (out, groups)
        tensors = quantise_scales(largest) if double_quant else {"scales": largest.to(torch.bfloat16)}
        scales = _scales(tensors["scales"], tensors.get("ranges")).clamp_min(1e-12)
        table = torch.tensor(CODEBOOKS[levels], device=weight.device)
        places = torch.bucketize((grouped / scales[..., None]).contiguous(), (table[1:] + table[:-1]) / 2)
        module._fill({"packed": pack_bits(places.to(torch.uint8).flatten(1), 4), **tensors}, bias)
        return module

    def spec(self) -> dict[str, Any]:
        """Return the parameters `from_spec` needs beyond the shape."""
        return {"group_size": self.group_size, "levels": self.levels, "double_quant": self.double_quant}

    def rows(self, which: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return some rows of the weights (out, in), unpacked."""
        scales = _scales(self.scales, self.ranges)[which].to(dtype)
        pairs = embedding(self.packed[which].int(), _pairs(self.levels, dtype, self.packed.device))
        return (pairs.flatten(1).unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)


def quantise_scales(scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return `scales` uint8 of the same shape and their `ranges` float32: 8 bits between the least and largest of 256."""
    flat = scales.flatten().float()
    spare = -flat.numel() % _SCALES_TOGETHER
    blocks = torch.cat([flat, flat[-1:].expand(spare)]).unflatten(0, (-1, _SCALES_TOGETHER))
    low = blocks.amin(1, keepdim=True)
    step = ((blocks.amax(1, keepdim=True) - low) / 255).clamp_min(1e-30)
    places = ((blocks - low) / step).round().to(torch.uint8).flatten()[: flat.numel()]
    return {"scales": places.view(scales.shape), "ranges": torch.cat([low, step], dim=1)}


def _scales(scales: torch.Tensor, ranges: torch.Tensor | None) -> torch.Tensor:
    if ranges is None:
        return scales.float()
    block = torch.arange(scales.numel(), device=scales.device) // _SCALES_TOGETHER
    return (scales.flatten().float() * ranges[block, 1] + ranges[block, 0]).view(scales.shape)


@cache
def _pairs(levels: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return (256, 2): the two levels a byte stands for, so that one look-up unpacks two weights."""
    table, byte = torch.tensor(CODEBOOKS[levels], dtype=dtype, device=device), torch.arange(256, device=device)
    return torch.stack([table[byte & 15], table[byte >> 4]], dim=1)
