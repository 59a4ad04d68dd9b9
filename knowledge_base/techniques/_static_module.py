"""The stored form of a matrix that multiplies in 8-bit integers by scales fixed beforehand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from knowledge_base.techniques._packed import Int8Linear, quantise_channels

_SHARES = tuple(share / 20 for share in range(6, 21))  # of the largest activation, tried as the end of the range


class Int8StaticLinear(Int8Linear):
    """y = (round(x / t) q^T) t s + b: int8 weights, and activations by one scale t that calibration fixed.

    Beyond +-127 t activations are cut off.
    """

    kind = "int8_static"
    scale_dtype = torch.float32
    input_scale: torch.Tensor  # (1,) float32

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, bias, dtype)
        self.register_buffer("input_scale", torch.empty(1, dtype=torch.float32, device="meta"))

    @classmethod
    def calibrated(cls, weight: torch.Tensor, bias: torch.Tensor | None, input_scale: float) -> Int8StaticLinear:
        """Return the module for float weights (out, in) and the step of the activations."""
        module = cls(weight.shape[1], weight.shape[0], bias is not None, weight.dtype)
        quantised, scales = quantise_channels(weight, cls.scale_dtype)
        step = torch.tensor([input_scale], dtype=torch.float32, device=weight.device)
        module._fill({"quantised": quantised, "scales": scales, "input_scale": step}, bias)
        return module

    @classmethod
    def from_weight(cls, weight: torch.Tensor, bias: torch.Tensor | None, **params: Any) -> Int8StaticLinear:
        """Refused: the range of the activations is no matter of the weights; see `calibrated`."""
        raise TypeError("a static range needs calibration")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply (..., in) by the weights; the result has the dtype of `x`."""
        rows = (x.reshape(-1, self.in_features) / self.input_scale).round_().clamp_(-127, 127).to(torch.int8)
        count = rows.shape[0]
        if rows.device.type == "cuda" and count < 32:  # cuBLAS needs more than 16 rows
            rows = nn.functional.pad(rows, (0, 0, 0, 32 - count))
        y = torch._int_mm(rows, self.quantised.T)[:count] * (self.scales * self.input_scale)
        y = y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def best_step(weight: torch.Tensor, sample: torch.Tensor, peak: float) -> float:
    """Return the step of 8-bit activations that changes the outputs least: between cutting off and rounding coarsely.

    Args:
        weight: (out, in).
        sample: (rows, in), some of what calibration saw.
        peak: the largest of all it saw.
    """
    columns = weight.float().square().sum(0)  # what an error in each channel weighs in the outputs
    best, chosen = float("inf"), peak / 127
    for share in _SHARES:
        step = max(share * peak, 1e-12) / 127
        change = (sample / step).round().clamp(-127, 127) * step - sample
        if (now := (change.square() @ columns).sum().item()) < best:
            best, chosen = now, step
    return chosen
