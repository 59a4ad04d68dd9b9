"""The stored form of a matrix whose small inputs are taken for zero: its columns lie one after the other in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class ThresholdedLinear(nn.Module):
    """y = sum over the inputs j with |x_j| > threshold of x_j w_j, plus the bias; w_j is column j of W.

    One vector on a CPU reads only the columns of those inputs: PyTorch's embedding_bag is that weighed sum, without a
    copy of the rows it takes. More vectors at once, and other devices, multiply by the whole matrix with the small
    inputs set to zero, which gives the same and saves nothing.
    """

    kind = "thresholded"

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, *, threshold: float
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.threshold = in_features, out_features, threshold
        self.columns = nn.Parameter(torch.empty(in_features, out_features, dtype=dtype, device="meta"), False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device="meta"), False) if bias else None

    @classmethod
    def from_spec(
        cls, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, *, threshold: float
    ) -> ThresholdedLinear:
        """Return an empty module of that shape, to be filled from a state dict."""
        return cls(in_features, out_features, bias, dtype, threshold=threshold)

    @classmethod
    def from_weight(cls, weight: torch.Tensor, bias: torch.Tensor | None, *, threshold: float) -> ThresholdedLinear:
        """Return the module for float weights (out, in)."""
        module = cls(weight.shape[1], weight.shape[0], bias is not None, weight.dtype, threshold=threshold)
        module.columns = nn.Parameter(weight.detach().T.contiguous(), requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return module

    def spec(self) -> dict[str, Any]:
        """Return what `from_spec` needs beside the Linear's own shape."""
        return {"threshold": self.threshold}

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        if x.numel() != self.in_features or x.device.type != "cpu":
            return functional.linear(torch.where(x.abs() > self.threshold, x, 0), self.columns.T, self.bias)
        vector = x.reshape(-1)
        chosen = (vector.abs() > self.threshold).nonzero()[:, 0]
        values = vector[chosen]
        # One bag is one thread's work, so the outputs are cut into as many pieces as there are threads.
        pieces = torch.get_num_threads()
        if pieces > 1 and self.out_features % pieces == 0:
            chosen = (chosen * pieces + torch.arange(pieces)[:, None]).reshape(-1)
            offsets = torch.arange(pieces) * len(values)
            table, values = self.columns.view(-1, self.out_features // pieces), values.repeat(pieces)
        else:
            offsets, table = torch.zeros(1, dtype=torch.long), self.columns
        y = functional.embedding_bag(chosen, table, offsets, mode="sum", per_sample_weights=values)
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias
