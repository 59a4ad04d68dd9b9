"""The stored form of a factorised matrix: two Linear modules in place of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def whitening(products: torch.Tensor) -> torch.Tensor:
    """Return S, lower triangular in float64, with S S^T = the damped products (in, in) of inputs."""
    gram = products.double()
    # Calibration may not reach every direction; damping keeps S invertible and those directions alive.
    damping = 1e-3 * gram.diagonal().mean().clamp_min(1e-12)
    return torch.linalg.cholesky(gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def whitened_energies(weight: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Return (min(out, in) + 1,) float64: what rank r = 0, 1, ... loses of the outputs' summed squares.

    Eigenvalues of the smaller of A A^T and A^T A with A = W S: the squared singular values of A.
    """
    wide = weight.double() @ whitening(products)
    square = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    energies = torch.linalg.eigvalsh(square).clamp_min(0)  # rising
    return torch.cat([energies.new_zeros(1), energies.cumsum(0)]).flip(0)


def best_factors(weight: torch.Tensor, products: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, rank) and (rank, in), float64, whose product loses least on inputs with these second moments.

    With S S^T = sum of x x^T and A = W S = U diag(s) V^T, the best matrix of rank r is U_r U_r^T W = A V_r V_r^T S^-1; the
    lost energy is the sum of the squared s left out. Eigenvectors of the smaller of A A^T and A^T A give U or V.
    Source: SVD-LLM, arXiv:2403.07378, section 3.1.

    Args:
        weight: (out, in).
        products: (in, in), sum of x x^T over the calibration inputs.
    """
    weight, root = weight.double(), whitening(products)
    wide = weight @ root
    if wide.shape[0] <= wide.shape[1]:
        u = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:].flip(1)
        return u, u.T @ weight
    v = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, -rank:].flip(1)
    expand = wide @ v
    scale = expand.norm(dim=0).clamp_min(1e-30)  # as of U: columns of one length share the groups of 4-bit weights well
    return expand / scale, scale[:, None] * torch.linalg.solve_triangular(root, v.T, upper=False, left=False)


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
        """Return the rank-`rank` module that loses least of weight (out, in) on inputs with these products (in, in)."""
        out_features, in_features = weight.shape
        expand, reduce = best_factors(weight, products, rank)
        module = cls(in_features, out_features, bias is not None, weight.dtype, rank=rank).to(weight.device)
        with torch.no_grad():
            module.expand.weight.copy_(expand)
            module.reduce.weight.copy_(reduce)
            if bias is not None:
                module.expand.bias.copy_(bias)
        return module

    def spec(self) -> dict[str, Any]:
        """Return what `from_spec` needs beside the Linear's own shape."""
        return {"rank": self.rank}

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        return self.expand(self.reduce(x))
