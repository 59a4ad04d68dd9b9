"""The stored form of a factorised matrix: two Linear modules in place of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class LowRankLinear(nn.Module):
    """y = expand(reduce(x)): W (out, in) held as expand (out, rank) times reduce (rank, in).

    The factors are ordinary Linear modules, so later steps can train or quantise them. Same contract as the packed
    modules: `kind`, `from_spec`, `spec`, and a state dict of plain tensors.
    """

    kind = "low_rank"

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, *, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.reduce = nn.Linear(in_features, rank, bias=False, dtype=dtype)
        self.expand = nn.Linear(rank, out_features, bias=bias, dtype=dtype)

    @classmethod
    def from_spec(
        cls, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, *, rank: int
    ) -> LowRankLinear:
        """Return an empty module of that shape, to be filled from a state dict."""
        return cls(in_features, out_features, bias, dtype, rank=rank)

    @classmethod
    def factorise(
        cls, weight: torch.Tensor, bias: torch.Tensor | None, products: torch.Tensor, *, rank: int
    ) -> LowRankLinear:
        """Return the rank-`rank` module that loses least on inputs with these second moments.

        With S S^T = sum of x x^T (Cholesky) and W S = U diag(s) V^T, the best factors of rank r are
        U_r sqrt(s_r) and sqrt(s_r) V_r^T S^-1; the lost energy is the sum of the squared s left out.
        Source: SVD-LLM, arXiv:2403.07378, section 3.1.

        Args:
            weight: (out, in).
            products: (in, in), sum of x x^T over the calibration inputs.
        """
        out_features, in_features = weight.shape
        gram = products.double()
        # Calibration may not reach every direction; damping keeps S invertible and those directions alive.
        damping = 1e-3 * gram.diagonal().mean().clamp_min(1e-12)
        gram = gram + damping * torch.eye(in_features, dtype=gram.dtype, device=gram.device)
        root = torch.linalg.cholesky(gram)
        u, s, vh = torch.linalg.svd(weight.double() @ root, full_matrices=False)
        scale = s[:rank].sqrt()
        module = cls(in_features, out_features, bias is not None, weight.dtype, rank=rank).to(weight.device)
        with torch.no_grad():
            module.expand.weight.copy_(u[:, :rank] * scale)
            module.reduce.weight.copy_(
                torch.linalg.solve_triangular(root, scale[:, None] * vh[:rank], upper=False, left=False)
            )
            if bias is not None:
                module.expand.bias.copy_(bias)
        return module

    def spec(self) -> dict[str, Any]:
        """Return what `from_spec` needs beside the Linear's own shape."""
        return {"rank": self.rank}

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        return self.expand(self.reduce(x))
