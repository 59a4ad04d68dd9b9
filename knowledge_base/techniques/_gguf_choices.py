"""What an allocation may choose for one matrix of a GGUF file: the block type it is stored in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from knowledge_base.engines import _gguf_types
from knowledge_base.techniques._blocks import Moments, matrix_of
from knowledge_base.techniques.weight_gguf import BITS, stored_type

MEASURED = ("q2_k", "q4_k")


@dataclass(frozen=True, slots=True)
class BlockType:
    """One of llama.cpp's types, or the next wider one where the rows of a matrix do not divide into its blocks."""

    name: str
    removes: ClassVar[bool] = False

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class BlockWays:
    """Matrices and tables stored in block types, by llama.cpp's own rounding.

    Args:
        names: of the types that may be chosen, q2_k and q4_k among them.
        weighed: errors are weighted by what enters the columns of a layer's matrices, as an importance matrix does, though
            by the text that sensitivities are measured on alone.
    """

    names: tuple[str, ...]
    weighed: bool
    anchor: ClassVar[BlockType] = BlockType("q4_k")
    compensated: ClassVar[bool] = False
    tables: ClassVar[bool] = True
    kept: ClassVar[bool] = False

    @property
    def options(self) -> tuple[BlockType, ...]:
        """The types."""
        return tuple(map(BlockType, self.names))

    @property
    def told(self) -> tuple[BlockType, ...]:
        """All but two: between them losses are told within a tenth, above them by the square of the change."""
        return tuple(option for option in self.options if option.name not in MEASURED)

    @property
    def slow(self) -> tuple[BlockType, ...]:
        """The types whose blocks are fitted to a codebook or a curve."""
        return tuple(option for option in self.options if option.name.startswith("iq"))

    @property
    def identity(self) -> list[object]:
        """What tells these ways from others."""
        return ["gguf", list(self.names), self.weighed]

    @staticmethod
    def sizes(module: nn.Module, option: BlockType) -> dict[str, int]:
        """Return what the matrix then takes: {"bytes", "memory"}."""
        shape = matrix_of(module).shape
        stored = int(shape.numel() * BITS[stored_type(option.name, shape[1])] / 8)
        return {"bytes": stored, "memory": stored}

    def weights(self, module: nn.Module, option: BlockType, inputs: Moments | None) -> torch.Tensor:
        """Return what the weights (out, in) then are."""
        matrix = matrix_of(module)
        importance = _gguf_types.importance_of(inputs.squares, inputs.rows) if self.weighed and inputs else None
        return _gguf_types.rounded(matrix, stored_type(option.name, matrix.shape[1]), importance).to(matrix.device)

    @staticmethod
    def needs_products(option: BlockType) -> bool:
        """Return False: what enters is known by its squares."""
        return False
