"""Linear modules whose weights are held in 8 or 4 bits: what the quantisation techniques put in place of nn.Linear.

Each class has a `kind` (its name in an artefact's structure.json), `spec()` (the parameters written there),
`from_spec()` (an empty module of that shape, to be filled from a state dict), `from_weight()` (made from float
weights) and `dequantised()`. State dicts hold plain tensors only.

On the CPU the 16-bit-activation kinds multiply with PyTorch's own kernels in bfloat16, whatever the model's dtype;
on other devices, and where a prompt is long enough that unpacking once is cheaper, weights are dequantised first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques._blocks import decoder_layers, is_matrix, matrix_of
from knowledge_base.types import Session

GROUP_SIZES = (32, 64, 128)  # of int4; what both the CPU kernel and the techniques offer
# Rows above which dequantising once beats the int8 kernel; 768x256 and 5632x2048 on an AVX-512 CPU cross near here.
_ROWS_FOR_KERNEL = 32


class _Packed(nn.Module, ABC):
    """What the kinds share: shapes, an optional bias in the model's dtype, a view of the weights as floats."""

    kind: str

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
    def dequantised(self) -> torch.Tensor:
        """Return the weights as (out, in) float32, as close as the storage holds them."""

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

    def dequantised(self) -> torch.Tensor:
        """Return the weights as (out, in) float32."""
        return self.quantised.float() * self.scales.float()[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply (..., in) by the weights; the result has the dtype of `x`."""
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
        if rows.device.type == "cpu" and rows.shape[0] <= _ROWS_FOR_KERNEL:
            y = torch.ops.aten._weight_int8pack_mm(rows, self.quantised, self.scales.to(torch.bfloat16))
        else:
            y = linear(rows, self.quantised.to(torch.bfloat16)) * self.scales.to(torch.bfloat16)
        y = y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


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


# ---------------------------------------------------------------- 4 bits


def group_qparams(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zeros, float32 (out, in / group_size), that cover each group's smallest and largest weight.

    w is close to (q - 8) s + z with q in 0..15; both are rounded to bfloat16, as they are stored
    """
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine

    scales, points = choose_qparams_affine(
        weight.detach().float(), MappingType.ASYMMETRIC, (1, group_size), torch.uint8, 0, 15, eps=1e-12
    )
    # torchao drops the dimension of a single group
    scales, points = (t.reshape(weight.shape[0], -1) for t in (scales, points))
    scales = scales.to(torch.bfloat16).float()
    return scales, ((8 - points) * scales).to(torch.bfloat16).float()


def quantise_groups(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return 4-bit weights uint8 (out, in) in 0..15, scales and zeros (out, in / group_size): round to nearest."""
    from torchao.quantization.quant_primitives import quantize_affine

    scales, zeros = group_qparams(weight, group_size)
    points = (8 - zeros / scales).round().to(torch.int32)
    block = (1, group_size)
    return quantize_affine(weight.detach().float(), block, scales, points, torch.uint8, 0, 15), scales, zeros


def usable_group_size(in_features: int, group_size: int) -> int | None:
    """Return the largest group size up to `group_size` that divides `in_features`; None when none does."""
    return next((g for g in sorted(GROUP_SIZES, reverse=True) if g <= group_size and in_features % g == 0), None)


class Int4Linear(_Packed):
    """y = x ((q - 8) s + z)^T + b: 4-bit weights, a bfloat16 scale and zero for each group, 16-bit activations.

    Stored: `packed` uint8 (out, in / 2), even columns in the low half-byte, and `scales_and_zeros`
    (in / group_size, out, 2). On first use on a CPU `packed` is exchanged for the layout of that CPU's kernel, of
    the same size, so memory never holds both; state dicts and moves to other devices bring `packed` back.
    """

    kind = "int4"
    packed: torch.Tensor  # empty while `kernel` holds the weights
    scales_and_zeros: torch.Tensor
    kernel: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, *, group_size: int) -> None:
        super().__init__(in_features, out_features, bias, dtype)
        if group_size not in GROUP_SIZES or in_features % group_size:
            raise ValueError(f"group_size is {group_size}, expected a divisor of {in_features} among {GROUP_SIZES}")
        self.group_size = group_size
        groups = in_features // group_size
        self.register_buffer("packed", torch.empty(out_features, in_features // 2, dtype=torch.uint8, device="meta"))
        self.register_buffer(
            "scales_and_zeros", torch.empty(groups, out_features, 2, dtype=torch.bfloat16, device="meta")
        )
        self.register_buffer("kernel", None, persistent=False)

    @classmethod
    def from_weight(cls, weight: torch.Tensor, bias: torch.Tensor | None, *, group_size: int) -> Int4Linear:
        """Return the module for float weights (out, in), rounded to nearest."""
        return cls.from_quantised(*quantise_groups(weight, group_size), bias, weight.dtype)

    @classmethod
    def from_quantised(
        cls,
        quantised: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> Int4Linear:
        """Return the module for weights already in 0..15 (out, in) with scales and zeros (out, groups)."""
        outputs, inputs = quantised.shape
        module = cls(inputs, outputs, bias is not None, dtype, group_size=inputs // scales.shape[1])
        both = torch.stack([scales.T, zeros.T], dim=-1).to(torch.bfloat16).contiguous()
        module._fill({"packed": _pack(quantised), "scales_and_zeros": both}, bias)
        return module

    def spec(self) -> dict[str, Any]:
        """Return the parameters `from_spec` needs beyond the shape."""
        return {"group_size": self.group_size}

    def dequantised(self) -> torch.Tensor:
        """Return the weights as (out, in) float32."""
        packed = self.packed if self.kernel is None else _pack(self._from_kernel())
        both = self.scales_and_zeros.float().repeat_interleave(self.group_size, dim=0)  # (in, out, 2)
        return (_unpack(packed).float() - 8) * both[..., 0].T + both[..., 1].T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply (..., in) by the weights; the result has the dtype of `x`."""
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
        if rows.device.type == "cpu":
            if self.kernel is None:
                self.prepare()
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.kernel, self.group_size, self.scales_and_zeros)
            y = y[:, : self.out_features]
        else:
            y = linear(rows, self.dequantised().to(torch.bfloat16))
        y = y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    # ------------------------------------------------ the kernel's layout

    @torch.compiler.disable
    def prepare(self) -> None:
        """Exchange the stored layout for the CPU kernel's; nothing elsewhere. `forward` does it on first use."""
        if self.kernel is not None or self.packed.device.type != "cpu":
            return
        spare = -self.out_features % 16  # the kernel wants whole blocks of 16 outputs
        quantised = nn.functional.pad(_unpack(self.packed), (0, 0, 0, spare))
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
            self.packed = _pack(self._from_kernel())
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
            destination[prefix + "packed"] = _pack(self._from_kernel())
            destination[prefix + "scales_and_zeros"] = self.scales_and_zeros[:, : self.out_features].contiguous()

    def _load_from_state_dict(self, *args: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*args)


def _pack(quantised: torch.Tensor) -> torch.Tensor:
    """Return uint8 (out, in / 2) of values in 0..15 (out, in): even columns in the low half-byte."""
    return quantised[:, ::2] | (quantised[:, 1::2] << 4)


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """Return the values in 0..15, uint8 (out, in), of `_pack`'s result."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


# ---------------------------------------------------------------- in a model


KINDS: dict[str, type[_Packed]] = {cls.kind: cls for cls in (Int8Linear, Int8DynamicLinear, Int4Linear)}


def module_class(kind: str) -> Any:
    """Return the class of a kind named in structure.json.

    Raises:
        CandidateFailed: "load_error", no such kind.
    """
    from knowledge_base.techniques._low_rank_module import LowRankLinear

    kinds = {**KINDS, LowRankLinear.kind: LowRankLinear}
    if kind not in kinds:
        raise CandidateFailed(
            "load_error", f"unknown kind of module `{kind}`; known: {', '.join(sorted(kinds))}",
            hint="build the artefact again with this version",
        )  # fmt: skip
    return kinds[kind]


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


def expert_tensors(model: nn.Module) -> Iterator[str]:
    """Yield the names of 3-D expert weights; the packed kinds hold one matrix, so they stay as they are."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and "experts" in name:
            yield name


def pack(model: nn.Module, name: str, kind: str, group_size: int | None = None) -> bool:
    """Replace one linear module by its packed kind; return whether its shape allowed it.

    int4 takes the largest group size up to `group_size` that divides the inputs.
    """
    module = model.get_submodule(name)
    weight, bias = matrix_of(module), getattr(module, "bias", None)
    if kind == "int4":
        size = usable_group_size(weight.shape[1], group_size or GROUP_SIZES[-1])
        if size is None:
            return False
        packed: nn.Module = Int4Linear.from_weight(weight, bias, group_size=size)
    else:
        packed = module_class(kind).from_weight(weight, bias)
    model.set_submodule(name, packed)
    return True


def dense_bytes(module: nn.Module) -> int:
    """Return the bytes of a Linear's or Conv1D's weight as it is."""
    return module.weight.numel() * module.weight.element_size()  # type: ignore[operator, return-value]


def packed_bytes(shape: Sequence[int], bits: int, group_size: int) -> int | None:
    """Return the stored bytes of a matrix (out, in) at 4 or 8 bits, scales included; None: it cannot be packed."""
    outputs, inputs = shape
    if bits == 8:
        return outputs * inputs + 2 * outputs
    size = usable_group_size(inputs, group_size)
    return None if size is None else outputs * inputs // 2 + 4 * outputs * (inputs // size)


def pack_all(session: Session, technique: str, kind: str, group_size: int | None = None) -> None:
    """Replace every linear module inside the layers by its packed kind; the notes tell what was left as it is.

    Raises:
        CandidateFailed: "unsupported", the layers hold nothing that can be packed.
    """
    modules = linears(session.model)
    left = []
    for done, name in enumerate(modules):
        if not pack(session.model, name, kind, group_size):
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
    if left := [*left, *expert_tensors(session.model)]:
        session.notes[f"{technique}.left_as_they_are"] = left
