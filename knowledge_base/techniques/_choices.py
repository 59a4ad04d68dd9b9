"""What an allocation may choose for one matrix: fewer bits, half of the weights, two thin factors, or nothing at all.

An option is written as text in an allocation: "4", "4 zeros 0.5", "8 keep 0.5", "16" (as it is), "removed".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from knowledge_base.techniques import _packed, _sparsity
from knowledge_base.techniques._blocks import Moments, matrix_of
from knowledge_base.techniques._low_rank_module import LowRankLinear
from knowledge_base.techniques._sparse_module import SparseInt4Linear
from knowledge_base.techniques._zero_module import ZeroLinear
from knowledge_base.techniques.low_rank import rank_for
from knowledge_base.techniques.weight_gptq import compensated_or_nearest, inverse_factor
from knowledge_base.techniques.weight_int4_sparse import round_what_is_there

AS_IT_IS, REMOVED = "16", "removed"
_TEXT = re.compile(r"(2|3|4|8|16)(?: zeros (0\.\d+))?(?: keep (0\.\d+))?")


@dataclass(frozen=True, slots=True)
class Option:
    """One setting of a matrix."""

    bits: int  # 16: in the model's own dtype; 0: removed
    zeros: float = 0.0  # share of weights that are left out of the artefact
    keep: float = 1.0  # share of parameters, as two factors

    @property
    def removes(self) -> bool:
        """Whether the matrix is gone, with all others of its part of the layer."""
        return self.bits == 0

    def __str__(self) -> str:
        zeros, keep = (
            (f" zeros {self.zeros:g}" if self.zeros else ""),
            (f" keep {self.keep:g}" if self.keep < 1 else ""),
        )
        return f"{self.bits}{zeros}{keep}" if self.bits else REMOVED


def parse(text: object) -> Option | None:
    """Return the option of a text in an allocation; None where it is none."""
    if text == REMOVED:
        return Option(0)
    found = _TEXT.fullmatch(str(text))
    if not found or (found[2] and (found[1] != "4" or found[3])):
        return None
    return Option(int(found[1]), float(found[2] or 0), float(found[3] or 1))


# Of bits alone the artefact and memory hold the same. Of EVERYTHING the program takes half of the weights in 4 bits too
# (better still at 3 bits for each weight, but 4.5 in memory), parts removed only below 3 bits for each weight, two factors
# never (benchmarks/allocation.py, on the shipped model).
BITS = tuple(Option(bits) for bits in (2, 3, 4, 8))
EVERYTHING = (*BITS, Option(4, zeros=0.5), Option(8, keep=0.6), Option(8, keep=0.4), Option(0))


@dataclass(frozen=True, slots=True)
class PackedWays:
    """Matrices stored by our own modules; errors of rounding made up for, as a build does it.

    On the shipped model at 3.5 bits for each weight an allocation from figures of matrices whose errors are made up for
    loses 2.4 % of perplexity, one of matrices rounded to nearest 3.6 %, and all matrices at 3 bits 3.8 %.
    """

    options: tuple[Option, ...] = BITS
    group_size: int = 64
    compensated: bool = False
    anchor: ClassVar[Option] = Option(4)
    told: ClassVar[tuple[Option, ...]] = ()
    tables: ClassVar[bool] = False
    kept: ClassVar[bool] = True

    @property
    def slow(self) -> tuple[Option, ...]:
        """Factors, which take the singular values of each matrix."""
        return tuple(filter(self.needs_products, self.options))

    @property
    def identity(self) -> list[object]:
        """What tells these ways from others."""
        return [[str(option) for option in self.options], self.group_size, self.compensated]

    def sizes(self, module: nn.Module, option: Option) -> dict[str, int] | None:
        """Return what the matrix then takes, as `sizes`."""
        return sizes(matrix_of(module).shape, option, self.group_size, _packed.dense_bytes(module))

    def weights(self, module: nn.Module, option: Option, inputs: Moments | None) -> torch.Tensor | None:
        """Return what the weights (out, in) then are, as `made`."""
        new = made(module, option, self.group_size, inputs)
        return None if new is None else weights_of(new)

    @staticmethod
    def needs_products(option: Option) -> bool:
        """Return whether an option is of two factors."""
        return option.keep < 1


def part_of(name: str) -> str:
    """Return the part of a layer that holds a matrix, which is removed as one.

    >>> part_of("model.layers.3.self_attn.q_proj")
    'model.layers.3.self_attn'
    """
    found = re.match(r".*?\.\d+\.[^.]+", name)
    return found[0] if found else name


def ties(parts: Mapping[str, Mapping[str, object]]) -> list[list[tuple[str, str]]]:
    """Return the options of matrices (name, option) that are taken all or none: those that remove a part of a layer."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, choices in parts.items():
        if REMOVED in choices:
            found.setdefault(part_of(name), []).append((name, REMOVED))
    return list(found.values())


def sizes(shape: Iterable[int], option: Option, group_size: int, dense_bytes: int) -> dict[str, int] | None:
    """Return what a matrix (out, in) takes in the artefact and in memory: {"bytes", "memory"}; None: it cannot be so."""
    outputs, inputs = shape
    if option.bits in (0, 16) and option.keep == 1:
        stored: int | None = dense_bytes if option.bits else 0
    elif option.keep < 1:
        rank = rank_for(outputs, inputs, option.keep)
        parts = [
            sizes(factor, Option(option.bits), group_size, dense_bytes // (outputs * inputs) * factor[0] * factor[1])
            for factor in ((outputs, rank), (rank, inputs))
        ]
        stored = sum(p["bytes"] for p in parts if p) if rank and all(parts) else None
    else:
        stored = _packed.packed_bytes((outputs, inputs), option.bits, group_size)
    if stored is None:
        return None
    if not option.zeros:
        return {"bytes": stored, "memory": stored}
    there = outputs * (inputs - round(option.zeros * inputs))
    groups = inputs // (_packed.usable_group_size(inputs, group_size) or inputs)
    return {"bytes": -(-outputs * inputs // 8) + -(-there // 8) * 4 + 2 * outputs * groups, "memory": stored}


def made(module: nn.Module, option: Option, group_size: int, inputs: Moments | None) -> nn.Module | None:
    """Return the module that stores a linear one so; None where its shape does not allow it or nothing is to change.

    Args:
        inputs: what entered it. With all products errors are compensated, as GPTQ and SparseGPT do; without, weights
            are rounded to nearest, and with nothing known the smallest become zero.
    """
    weight, bias = matrix_of(module), getattr(module, "bias", None)
    if option == Option(16) or sizes(weight.shape, option, group_size, weight.numel()) is None:
        return None
    if not option.bits:
        return ZeroLinear.from_weight(weight, bias)
    products = inputs.products if inputs is not None else None
    if option.keep < 1:
        rank = rank_for(weight.shape[0], weight.shape[1], option.keep)
        if products is None:
            products = torch.eye(weight.shape[1], device=weight.device)
        thin = LowRankLinear.factorise(weight, bias, products, rank=rank)
        for name in ("reduce", "expand"):
            if (factor := made(thin.get_submodule(name), Option(option.bits), group_size, None)) is not None:
                thin.set_submodule(name, factor)
        return thin
    if option.bits == 8:
        return _packed.Int8Linear.from_weight(weight, bias)
    size = _packed.usable_group_size(weight.shape[1], group_size)
    assert size is not None
    hessian = None if products is None or inputs is None else products / max(inputs.rows, 1)
    if option.zeros:
        pruned = _pruned(weight, option.zeros, inputs, hessian)
        quantised, scales = round_what_is_there(pruned, hessian, size)
        return SparseInt4Linear.from_quantised(quantised, scales, pruned != 0, bias, weight.dtype)
    kind = _packed.module_class(f"int{option.bits}")
    if hessian is None:
        levels = _packed.quantise_groups(weight, size, option.bits)
    else:
        levels = compensated_or_nearest(weight, hessian, size, option.bits).levels
    return kind.from_quantised(*levels, bias, weight.dtype)


def weights_of(module: nn.Module) -> torch.Tensor:
    """Return the weights (out, in) of what `made` gives, float32."""
    if isinstance(module, LowRankLinear):
        return weights_of(module.expand) @ weights_of(module.reduce)
    return module.dequantised() if isinstance(module, _packed._Packed) else matrix_of(module).float()


def _pruned(weight: torch.Tensor, zeros: float, inputs: Moments | None, hessian: torch.Tensor | None) -> torch.Tensor:
    """Return the weights (out, in) with that share of every row zero, and the others moved where the Hessian is known."""
    norms = inputs.squares.sqrt() if inputs is not None else torch.ones(weight.shape[1], device=weight.device)
    gone = _sparsity.lowest(weight.abs().float() * norms, zeros, rows=True)
    pruned = weight.float().masked_fill(gone, 0.0)
    if hessian is not None and (factor := inverse_factor(hessian)) is not None:
        moved = _sparsity.sweep(weight, factor, lambda part, first: gone[:, first : first + _sparsity.BLOCK])
        if _sparsity.change_of_outputs(weight, moved, hessian) < _sparsity.change_of_outputs(weight, pruned, hessian):
            pruned = moved
    return pruned.to(weight.dtype)
