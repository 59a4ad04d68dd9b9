"""Linear modules whose weights are held in 8 to 2 bits: what the quantisation techniques put in place of nn.Linear.

Each class has a `kind` (its name in an artefact's structure.json), `spec()` (the parameters written there),
`from_spec()` (an empty module of that shape, to be filled from a state dict), `from_weight()` (made from float
weights) and `dequantised()`. State dicts hold plain tensors only. Other modules of this package add kinds of the same
contract: 4-bit codebooks, 8-bit floats, tables.

The CPU multiplies int8 and int4 with PyTorch's own kernels, in bfloat16 whatever the model's dtype. Elsewhere, and in
the kinds without a kernel, weights are unpacked a block of rows at a time, so no dense matrix exists beside the packed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques._blocks import decoder_layers, is_matrix, matrix_of
from knowledge_base.techniques._experts_module import split_experts
from knowledge_base.techniques._kinds import module_class
from knowledge_base.techniques._weights import GROUP_SIZES
from knowledge_base.types import Session

# Rows above which dequantising once beats the int8 kernel; 768x256 and 5632x2048 on an AVX-512 CPU cross near here.
_ROWS_FOR_KERNEL = 32
_REFITS = 12  # errors hardly fall after
_BLOCK_WEIGHTS = 1 << 21  # unpacked at a time: fastest on an AVX-512 CPU, and 4 MiB in bfloat16

Quantised = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q uint8 (out, in), scales and zeros (out, groups)
Quantise = Callable[[torch.Tensor, int, int], Quantised]  # of float weights (out, in), group size, bits


class _Packed(nn.Module, ABC):
    """What the kinds share: shapes, an optional bias in the model's dtype, a view of the weights as floats."""

    kind: str
    grouped = False  # weights share scales in groups, of the parameter `group_size`

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        empty = torch.empty(out_features, dtype=dtype, device="meta")
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None

    @classmethod
    def from_spec(cls, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, **params: Any) -> _Packed:
        """Return an empty module on the meta device, to be filled by load_state_dict(assign=True).

        Raises:
            CandidateFailed: "load_error", the parameters do not fit the shape or are not this kind's.
        """
        try:
            return cls(in_features, out_features, bias, dtype, **params)
        except (TypeError, ValueError) as error:
            raise CandidateFailed(
                "load_error", f"a {out_features}x{in_features} matrix cannot be held as {cls.kind}: {error}",
                hint="build the artefact again",
            ) from error  # fmt: skip

    def spec(self) -> dict[str, Any]:
        """Return the parameters `from_spec` needs beyond the shape."""
        return {}

    @abstractmethod
    def rows(self, which: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return some rows of the weights (out, in), unpacked."""

    def dequantised(self) -> torch.Tensor:
        """Return the weights as (out, in) float32, as close as the storage holds them."""
        return self.rows(slice(None), torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply (..., in) by the weights; the result has the dtype of `x`."""
        states = x.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
        y = self.product(states).to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def product(self, states: torch.Tensor) -> torch.Tensor:
        """Return states (n, in) times the weights, without the bias, both in bfloat16."""
        step = max(1, _BLOCK_WEIGHTS // self.in_features)
        blocks = [slice(first, first + step) for first in range(0, self.out_features, step)]
        return torch.cat([linear(states, self.rows(block, torch.bfloat16)) for block in blocks], dim=1)

    @property
    def weight(self) -> torch.Tensor:
        """The weights in the model's dtype, made anew, for code that reads a Linear's weight: state-space mixers do."""
        return self.dequantised().to(self.dtype)

    def _fill(self, tensors: dict[str, torch.Tensor], bias: torch.Tensor | None) -> None:
        if bias is not None:
            tensors["bias"] = bias.detach().to(self.dtype)
        self.load_state_dict({name: tensor.contiguous() for name, tensor in tensors.items()}, assign=True)
        self.requires_grad_(False)

    def extra_repr(self) -> str:
        """Return the shape and parameters, for print(model)."""
        return ", ".join(
            [f"in={self.in_features}", f"out={self.out_features}", *(f"{k}={v}" for k, v in self.spec().items())]
        )


# ---------------------------------------------------------------- 8 bits


def quantise_channels(weight: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 weights (out, in) and their scales (out,): symmetric, one scale for each output channel.

    q = round(w / s), s = max|w| / 127 rounded to `scale_dtype`;  w is close to q s
    """
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    weight, block = weight.detach().float(), (1, weight.shape[1])
    scales, zeros = choose_qparams_affine(weight, MappingType.SYMMETRIC, block, torch.int8, -127, 127, eps=1e-12)
    scales = scales.to(scale_dtype)
    return quantize_affine(weight, block, scales.float(), zeros, torch.int8, -127, 127), scales


class Int8Linear(_Packed):
    """y = x (q s)^T + b: int8 weights with one bfloat16 scale for each output, 16-bit activations."""

    kind = "int8"
    scale_dtype = torch.bfloat16
    quantised: torch.Tensor  # int8 (out, in)
    scales: torch.Tensor  # (out,)

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, bias, dtype)
        self.register_buffer("quantised", torch.empty(out_features, in_features, dtype=torch.int8, device="meta"))
        self.register_buffer("scales", torch.empty(out_features, dtype=self.scale_dtype, device="meta"))

    @classmethod
    def from_weight(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> Int8Linear:
        """Return the module for float weights (out, in)."""
        module = cls(weight.shape[1], weight.shape[0], bias is not None, weight.dtype)
        quantised, scales = quantise_channels(weight, cls.scale_dtype)
        module._fill({"quantised": quantised, "scales": scales}, bias)
        return module

    def rows(self, which: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return some rows of the weights (out, in), unpacked."""
        return self.quantised[which].to(dtype) * self.scales[which].to(dtype)[:, None]

    def product(self, states: torch.Tensor) -> torch.Tensor:
        """Return states (n, in) times the weights, without the bias, both in bfloat16."""
        if states.device.type == "cpu" and states.shape[0] <= _ROWS_FOR_KERNEL:
            return torch.ops.aten._weight_int8pack_mm(states, self.quantised, self.scales.to(torch.bfloat16))
        return super().product(states)


class Int8DynamicLinear(Int8Linear):
    """y = (qx qw^T) sx sw + b: int8 weights and activations multiplied in integers.

    Activations get one scale for each row (token) at run time, so a token's result does not depend on the others.
    """

    kind = "int8_dynamic"
    scale_dtype = torch.float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply (..., in) by the weights; the result has the dtype of `x`."""
        rows = x.reshape(-1, self.in_features).float()
        scales = rows.abs().amax(dim=1, keepdim=True).clamp_(min=1e-12) / 127
        quantised = torch.round(rows / scales).to(torch.int8)
        count = rows.shape[0]
        if rows.device.type == "cuda" and count < 32:  # cuBLAS needs more than 16 rows
            quantised = nn.functional.pad(quantised, (0, 0, 0, 32 - count))
        y = torch._int_mm(quantised, self.quantised.T)[:count].float()
        y = (y * scales * self.scales.float()).to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


# ---------------------------------------------------------------- few bits, in groups


def group_qparams(weight: torch.Tensor, group_size: int, bits: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zeros, float32 (out, in / group_size), that cover each group's smallest and largest weight.

    w is close to (q - 2^(bits-1)) s + z with q in 0..2^bits - 1; both are rounded to bfloat16, as they are stored
    """
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine

    scales, points = choose_qparams_affine(
        weight.detach().float(), MappingType.ASYMMETRIC, (1, group_size), torch.uint8, 0, 2**bits - 1, eps=1e-12
    )
    # torchao drops the dimension of a single group
    scales, points = (t.reshape(weight.shape[0], -1) for t in (scales, points))
    scales = scales.to(torch.bfloat16).float()
    return scales, ((2 ** (bits - 1) - points) * scales).to(torch.bfloat16).float()


def quantise_groups(weight: torch.Tensor, group_size: int, bits: int = 4) -> Quantised:
    """Return weights in 0..2^bits - 1, uint8 (out, in), scales and zeros (out, in / group_size): round to nearest."""
    scales, zeros = group_qparams(weight, group_size, bits)
    return levels(weight, scales, zeros, bits), scales, zeros


def levels(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the nearest of 0..2^bits - 1 for each weight (out, in), uint8, by scales and zeros (out, groups)."""
    grouped = weight.detach().float().unflatten(1, (scales.shape[1], -1))
    nearest = ((grouped - zeros[..., None]) / scales[..., None]).round() + 2 ** (bits - 1)
    return nearest.clamp_(0, 2**bits - 1).to(torch.uint8).flatten(1)


def dequantise_groups(quantised: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Return (q - 2^(bits-1)) s + z as (out, in), in the dtype of scales and zeros (out, groups)."""
    # In place, and the middle level moved into the small tensor: this runs for every matrix of every step.
    weight = quantised.to(scales.dtype).unflatten(1, (scales.shape[1], -1))
    return weight.mul_(scales[..., None]).add_((zeros - 2 ** (bits - 1) * scales)[..., None]).flatten(1)


def refit(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zeros (out, groups), as they are stored, with a smaller squared error of rounding in each group.

    Weights are rounded and the line through them is fitted again by least squares, in turns (Lloyd's method), from the
    scales and zeros given; what was best is kept. `importance` (in,) weighs the squares.
    """
    grouped = weight.detach().float().unflatten(1, (scales.shape[1], -1))
    share = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.float()
    share = share.unflatten(0, (scales.shape[1], -1)).clamp_min(1e-12)
    share = share / share.sum(1, keepdim=True)
    middle, best = 2 ** (bits - 1), torch.full_like(scales, torch.inf)
    found = (scales, zeros)
    for _ in range(_REFITS):
        level = ((grouped - zeros[..., None]) / scales[..., None]).round_().clamp_(-middle, middle - 1)
        error = (((level * scales[..., None] + zeros[..., None] - grouped) ** 2) * share).sum(2)
        better = error < best
        best = torch.where(better, error, best)
        found = (torch.where(better, scales, found[0]), torch.where(better, zeros, found[1]))
        mean, target = ((t * share).sum(2, keepdim=True) for t in (level, grouped))
        spread = ((level - mean) ** 2 * share).sum(2)
        slope = ((level - mean) * (grouped - target) * share).sum(2) / spread.clamp_min(1e-12)
        # A group whose weights all fell on one level has no slope: it keeps its scale.
        scales = torch.where((spread > 0) & (slope > 0), slope, scales).to(torch.bfloat16).float().clamp_min(1e-12)
        zeros = (target[..., 0] - scales * mean[..., 0]).to(torch.bfloat16).float()
    return found


def usable_group_size(in_features: int, group_size: int) -> int | None:
    """Return the largest group size up to `group_size` that divides `in_features`; None when none does."""
    return next((g for g in sorted(GROUP_SIZES, reverse=True) if g <= group_size and in_features % g == 0), None)


class GroupedLinear(_Packed):
    """y = x ((q - 2^(bits-1)) s + z)^T + b: few bits a weight, a bfloat16 scale and zero for each group.

    Stored: `packed` uint8 (out, in x bits / 8) as `pack_bits` makes it, and `scales_and_zeros` (in / group_size, out, 2).
    """

    grouped = True
    bits: int
    packed: torch.Tensor
    scales_and_zeros: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, *, group_size: int) -> None:
        super().__init__(in_features, out_features, bias, dtype)
        if group_size not in GROUP_SIZES or in_features % group_size:
            raise ValueError(f"group_size is {group_size}, expected a divisor of {in_features} among {GROUP_SIZES}")
        self.group_size = group_size
        columns, groups = in_features * self.bits // 8, in_features // group_size
        self.register_buffer("packed", torch.empty(out_features, columns, dtype=torch.uint8, device="meta"))
        self.register_buffer(
            "scales_and_zeros", torch.empty(groups, out_features, 2, dtype=torch.bfloat16, device="meta")
        )

    @classmethod
    def from_weight(cls, weight: torch.Tensor, bias: torch.Tensor | None, *, group_size: int) -> GroupedLinear:
        """Return the module for float weights (out, in), rounded to nearest."""
        return cls.from_quantised(*quantise_groups(weight, group_size, cls.bits), bias, weight.dtype)

    @classmethod
    def from_quantised(
        cls,
        quantised: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> GroupedLinear:
        """Return the module for weights already in 0..2^bits - 1 (out, in) with scales and zeros (out, groups)."""
        outputs, inputs = quantised.shape
        module = cls(inputs, outputs, bias is not None, dtype, group_size=inputs // scales.shape[1])
        both = torch.stack([scales.T, zeros.T], dim=-1).to(torch.bfloat16).contiguous()
        module._fill({"packed": pack_bits(quantised, cls.bits), "scales_and_zeros": both}, bias)
        return module

    def spec(self) -> dict[str, Any]:
        """Return the parameters `from_spec` needs beyond the shape."""
        return {"group_size": self.group_size}

    def rows(self, which: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return some rows of the weights (out, in), unpacked."""
        both = self.scales_and_zeros[:, which].to(dtype)
        return dequantise_groups(unpack_bits(self.packed[which], self.bits), both[..., 0].T, both[..., 1].T, self.bits)


class Int2Linear(GroupedLinear):
    """2-bit weights in groups."""

    kind = "int2"
    bits = 2


class Int3Linear(GroupedLinear):
    """3-bit weights in groups: 32 of them in 12 bytes."""

    kind = "int3"
    bits = 3


class Int4Linear(GroupedLinear):
    """4-bit weights in groups, multiplied by PyTorch's own kernel on a CPU.

    On first use there `packed` is exchanged for the layout of that CPU's kernel, of the same size, so memory never
    holds both; state dicts and moves to other devices bring `packed` back.
    """

    kind = "int4"
    bits = 4
    kernel: torch.Tensor | None  # while it holds the weights, `packed` is empty

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, *, group_size: int) -> None:
        super().__init__(in_features, out_features, bias, dtype, group_size=group_size)
        self.register_buffer("kernel", None, persistent=False)

    def rows(self, which: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return some rows of the weights (out, in), unpacked."""
        if self.kernel is None:
            return super().rows(which, dtype)
        both = self.scales_and_zeros[:, : self.out_features][:, which].to(dtype)
        return dequantise_groups(self._from_kernel()[which], both[..., 0].T, both[..., 1].T, self.bits)

    def product(self, states: torch.Tensor) -> torch.Tensor:
        """Return states (n, in) times the weights, without the bias, both in bfloat16."""
        if states.device.type != "cpu":
            return super().product(states)
        if self.kernel is None:
            self.prepare()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(states, self.kernel, self.group_size, self.scales_and_zeros)
        return y[:, : self.out_features]

    # ------------------------------------------------ the kernel's layout

    @torch.compiler.disable
    def prepare(self) -> None:
        """Exchange the stored layout for the CPU kernel's; nothing elsewhere. `forward` does it on first use."""
        if self.kernel is not None or self.packed.device.type != "cpu":
            return
        spare = -self.out_features % 16  # the kernel wants whole blocks of 16 outputs
        quantised = nn.functional.pad(unpack_bits(self.packed, 4), (0, 0, 0, spare))
        both = self.scales_and_zeros.to(torch.bfloat16)
        self.scales_and_zeros = nn.functional.pad(both, (0, 0, 0, spare)).contiguous()
        self.kernel = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quantised.int(), 1)
        self.packed = self.packed.new_empty(0)

    def _from_kernel(self) -> torch.Tensor:
        """Return the weights in 0..15, uint8 (out, in), read back by multiplying the kernel's layout by unit vectors.

        The layout differs between CPUs and is nowhere specified; the product with scale 1 and zero 0 is exact.
        """
        plain = torch.zeros_like(self.scales_and_zeros)
        plain[..., 0] = 1
        columns = []
        for first in range(0, self.in_features, 256):
            units = torch.zeros(min(256, self.in_features - first), self.in_features, dtype=torch.bfloat16)
            units.diagonal(first).fill_(1)
            columns.append(torch.ops.aten._weight_int4pack_mm_for_cpu(units, self.kernel, self.group_size, plain).T + 8)
        return torch.cat(columns, dim=1)[: self.out_features].to(torch.uint8)

    def _restore(self) -> None:
        if self.kernel is not None:
            self.packed = pack_bits(self._from_kernel(), 4)
            self.scales_and_zeros = self.scales_and_zeros[:, : self.out_features].contiguous()
            self.kernel = None

    def _apply(self, fn: Callable, recurse: bool = True) -> Int4Linear:
        # The layout belongs to the CPU: bring the stored one back before the module moves.
        if self.kernel is not None and fn(self.packed).device != self.kernel.device:
            self._restore()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel is not None:
            destination[prefix + "packed"] = pack_bits(self._from_kernel(), 4)
            destination[prefix + "scales_and_zeros"] = self.scales_and_zeros[:, : self.out_features].contiguous()

    def _load_from_state_dict(self, *args: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*args)


# Widths of the parts a weight is cut into, so that bytes hold whole parts of 8, 4, 2 or 1 bits; lowest bits first.
_PARTS = {bits: [width for width in (8, 4, 2, 1) if bits & width] for bits in range(1, 9)}


def pack_bits(quantised: torch.Tensor, bits: int) -> torch.Tensor:
    """Return uint8 (out, in x bits / 8) of values in 0..2^bits - 1, uint8 (out, in); 8 must divide `in`.

    A part of n bits takes n/8 of the columns: byte k holds it of the weights k, k + in n/8, k + 2 in n/8 ...
    """
    if bits == 4:  # neighbours in one byte
        return quantised[:, ::2] | (quantised[:, 1::2] << 4)
    packed, shift = [], 0
    for width in _PARTS[bits]:
        part = ((quantised >> shift) & (2**width - 1)).chunk(8 // width, dim=1)
        byte = part[0].clone()
        for place in range(1, len(part)):
            byte |= part[place] << (width * place)
        packed.append(byte)
        shift += width
    return torch.cat(packed, dim=1)


def unpack_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the values, uint8 (out, in), of `pack_bits`' result."""
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    inputs = packed.shape[1] * 8 // bits
    values, shift, first = None, 0, 0
    for width in _PARTS[bits]:
        part = packed[:, first : first + inputs * width // 8]
        value = torch.cat([(part >> (width * place)) & (2**width - 1) for place in range(8 // width)], dim=1)
        values = value if values is None else values.bitwise_or_(value << shift)
        shift, first = shift + width, first + part.shape[1]
    assert values is not None
    return values


# ---------------------------------------------------------------- in a model


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the Linear and Conv1D modules inside the decoder layers, by name. Head and embeddings are not among them.

    Raises:
        CandidateFailed: the layers cannot be found, or hold no such module.
    """
    layers = {id(layer) for layer in decoder_layers(model)}
    roots = [name for name, module in model.named_modules() if id(module) in layers]
    found = {
        f"{root}.{name}": module
        for root in roots
        for name, module in model.get_submodule(root).named_modules()
        if is_matrix(module)
    }
    if not found:
        raise CandidateFailed("unsupported", f"the layers of {type(model).__name__} hold no linear modules to pack")
    return found


def pack(
    model: nn.Module, name: str, kind: str, group_size: int | None = None, quantise: Quantise | None = None, **spec: Any
) -> bool:
    """Replace one linear module by its packed kind; return whether its shape allowed it.

    A kind in groups takes the largest group size up to `group_size` that divides the inputs, and the weights
    `quantise` finds (to nearest where None). `spec` are further parameters of the kind.
    """
    module = model.get_submodule(name)
    weight, bias = matrix_of(module), getattr(module, "bias", None)
    made = module_class(kind)
    if made.grouped:
        size = usable_group_size(weight.shape[1], group_size or GROUP_SIZES[-1])
        if size is None:
            return False
        spec["group_size"] = size
    if quantise is None:
        packed: nn.Module = made.from_weight(weight, bias, **spec)
    else:
        packed = made.from_quantised(*quantise(weight, spec["group_size"], made.bits), bias, weight.dtype)
    model.set_submodule(name, packed)
    return True


def dense_bytes(module: nn.Module) -> int:
    """Return the bytes of a Linear's or Conv1D's weight as it is."""
    return module.weight.numel() * module.weight.element_size()  # type: ignore[operator, return-value]


def packed_bytes(shape: Sequence[int], bits: int, group_size: int) -> int | None:
    """Return the stored bytes of a matrix (out, in) at 2, 3, 4 or 8 bits, scales included; None: it cannot be packed."""
    outputs, inputs = shape
    if bits == 8:
        return outputs * inputs + 2 * outputs
    size = usable_group_size(inputs, group_size)
    return None if size is None else outputs * inputs * bits // 8 + 4 * outputs * (inputs // size)


def pack_all(
    session: Session,
    technique: str,
    kind: str,
    group_size: int | None = None,
    quantise: Quantise | None = None,
    **spec: Any,
) -> None:
    """Replace every linear module inside the layers by its packed kind; the notes tell what was left as it is.

    Experts stored as 3-D weights become linear modules first. The rest is as in `pack`.

    Raises:
        CandidateFailed: "unsupported", the layers hold nothing that can be packed.
    """
    left = []
    split_experts(session.model)
    modules = list(linears(session.model))  # names only: a dense matrix that was replaced must not stay
    for done, name in enumerate(modules):
        if not pack(session.model, name, kind, group_size, quantise, **spec):
            left.append(name)
        session.progress(technique, (done + 1) / len(modules))
    note(session, technique, len(modules) - len(left), left)


def note(session: Session, technique: str, packed: int, left: list[str]) -> None:
    """Write into the session's notes how many matrices were packed and which were left as they are.

    Raises:
        CandidateFailed: "unsupported", none could be packed.
    """
    if not packed:
        raise CandidateFailed(
            "unsupported",
            f"no matrix has inputs that groups of {GROUP_SIZES[0]} divide",
            hint="use weight_int8 instead",
        )
    session.notes[f"{technique}.matrices"] = packed
    if left:
        session.notes[f"{technique}.left_as_they_are"] = left
