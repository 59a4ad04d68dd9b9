"""A matrix that was removed: nothing is stored and nothing multiplied, its outputs are zero (and its bias, if it had one)."""

from __future__ import annotations

import torch

from knowledge_base.techniques._packed import _Packed


class ZeroLinear(_Packed):
    """y = 0 + b."""

    kind = "zero"

    @classmethod
    def from_weight(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> ZeroLinear:
        """Return the module in place of float weights (out, in)."""
        module = cls(weight.shape[1], weight.shape[0], bias is not None, weight.dtype)
        module._fill({}, bias)
        return module

    def rows(self, which: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return some rows of the weights (out, in): zeros."""
        return torch.zeros(self.out_features, self.in_features, dtype=dtype)[which]

    def product(self, states: torch.Tensor) -> torch.Tensor:
        """Return zeros (n, out)."""
        return states.new_zeros(states.shape[0], self.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return zeros (..., out), and the bias where there is one; nothing is read of `x` but its shape and dtype."""
        zeros = x.new_zeros(*x.shape[:-1], self.out_features)
        return zeros if self.bias is None else zeros + self.bias
