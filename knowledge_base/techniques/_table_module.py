"""The table of token embeddings in 8 or 4 bits: rows of it are read, and where it is tied the head multiplies by it."""

from __future__ import annotations

from typing import Any

import torch

from knowledge_base.techniques._packed import GroupedLinear, Int8Linear, _Packed


class _Table(_Packed):
    """A packed matrix (tokens, hidden) that is also an embedding: whole numbers read rows, floats are multiplied.

    `scale` is what the model multiplies the rows it reads by (Gemma); the head does without.
    """

    def __init__(self, *args: Any, scale: float = 1.0, **params: Any) -> None:
        super().__init__(*args, **params)
        self.scale = scale

    def spec(self) -> dict[str, Any]:
        """Return the parameters `from_spec` needs beyond the shape."""
        return {**super().spec(), **({"scale": self.scale} if self.scale != 1 else {})}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows (..., hidden) of token numbers (...), or the product (..., tokens) of states (..., hidden)."""
        if x.is_floating_point():
            return super().forward(x)
        found = self.rows(x.flatten(), torch.float32) * self.scale
        return found.to(self.dtype).view(*x.shape, self.in_features)


class Int8Table(_Table, Int8Linear):
    """8 bits, a scale for each token."""

    kind = "int8_table"


class Int4Table(_Table, GroupedLinear):
    """4 bits in groups. Without the kernel's layout, since no single row can be read from that."""

    kind = "int4_table"
    bits = 4
