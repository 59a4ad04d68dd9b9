"""The stored form of a matrix taken apart: two thin factors and a rest of which most weights are zero, and left out."""

from __future__ import annotations

from typing import Any

import torch

from knowledge_base.techniques._sparse_module import SparseLinear


class LowRankSparseLinear(SparseLinear):
    """y = (S + expand reduce) x: a sparse S and dense factors of low rank, all in the model's dtype.

    Only the artefact is small: once loaded the parts are added up, and the module is an ordinary Linear.
    """

    kind = "low_rank_sparse"
    reduce: torch.Tensor  # (rank, in)
    expand: torch.Tensor  # (out, rank)

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, *, nonzeros: int, rank: int
    ) -> None:
        super().__init__(in_features, out_features, bias, dtype, nonzeros=nonzeros)
        if not 0 < rank <= min(in_features, out_features):
            raise ValueError(f"rank is {rank}, expected 1 to {min(in_features, out_features)}")
        self.rank = rank
        self.register_buffer("reduce", torch.empty(rank, in_features, dtype=dtype, device="meta"))
        self.register_buffer("expand", torch.empty(out_features, rank, dtype=dtype, device="meta"))

    @classmethod
    def from_parts(
        cls, rest: torch.Tensor, expand: torch.Tensor, reduce: torch.Tensor, bias: torch.Tensor | None
    ) -> LowRankSparseLinear:
        """Return the module for a rest (out, in) with zeros, in the model's dtype, and factors (out, rank), (rank, in)."""
        outputs, inputs = rest.shape
        made = cls(inputs, outputs, bias is not None, rest.dtype, nonzeros=int((rest != 0).sum()), rank=len(reduce))
        thin = {"reduce": reduce.to(rest.dtype), "expand": expand.to(rest.dtype)}
        made._fill({**SparseLinear.from_weight(rest, None).state_dict(), **thin}, bias)
        return made

    def spec(self) -> dict[str, Any]:
        """Return the parameters `from_spec` needs beyond the shape."""
        return {**super().spec(), "rank": self.rank}

    def rows(self, which: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return some rows of the weights (out, in), the parts added up in float32."""
        return (super().rows(which, torch.float32) + self.expand[which].float() @ self.reduce.float()).to(dtype)
