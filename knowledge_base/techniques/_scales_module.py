"""Weights in few bits whose scales and zeros are being trained: what stands in a packed module's place meanwhile."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from knowledge_base.techniques._packed import GroupedLinear, dequantise_groups, unpack_bits


class TrainedScales(nn.Module):
    """y = x ((q - 2^(bits-1)) s + z)^T + b, with scales s and zeros z (out, groups) in float32 to be trained.

    The forward pass rounds them to bfloat16, as they will be stored; gradients pass that by.
    """

    def __init__(self, packed: GroupedLinear) -> None:
        super().__init__()
        state = packed.state_dict()  # the stored layout, also where a kernel holds another
        scales, zeros = state["scales_and_zeros"].float().unbind(-1)
        self.bits, self.made, self.bias = packed.bits, type(packed), packed.bias
        self.levels = unpack_bits(state["packed"], packed.bits)  # uint8 (out, in)
        self.scales = nn.Parameter(scales.T.contiguous())
        self.zeros = nn.Parameter(zeros.T.contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply (..., in) by the weights, in float32; the result has the dtype of `x`."""
        y = _Product.apply(x.reshape(-1, x.shape[-1]).float(), self.levels, self.scales, self.zeros, self.bits)
        y = y.to(x.dtype).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def packed(self, dtype: torch.dtype) -> GroupedLinear:
        """Return the packed module of the same kind with the scales as they are now."""
        return self.made.from_quantised(self.levels, self.scales, self.zeros, self.bias, dtype)


class _Product(torch.autograd.Function):
    """x (n, in) times the weights; they are made anew in the backward pass rather than kept."""

    @staticmethod
    def forward(ctx: Any, x, levels, scales, zeros, bits) -> torch.Tensor:
        ctx.save_for_backward(x, levels, scales, zeros)
        ctx.bits = bits
        return x @ _weights(levels, scales, zeros, bits).T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:  # type: ignore[override]
        x, levels, scales, zeros = ctx.saved_tensors
        of_x = gradient @ _weights(levels, scales, zeros, ctx.bits)
        of_weights = (gradient.T @ x).unflatten(1, (scales.shape[1], -1))  # (out, groups, group size)
        of_zeros = of_weights.sum(-1)
        grouped = levels.unflatten(1, (scales.shape[1], -1)).float()
        of_scales = (of_weights * grouped).sum(-1) - 2 ** (ctx.bits - 1) * of_zeros
        return of_x, None, of_scales, of_zeros, None


def _weights(levels: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    return dequantise_groups(levels, scales.bfloat16().float(), zeros.bfloat16().float(), bits)
