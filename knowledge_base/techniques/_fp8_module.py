"""Linear modules whose weights are 8-bit floats: multiplied as they are where the GPU can, unpacked elsewhere."""

from __future__ import annotations

from functools import cache

import torch

from knowledge_base.techniques._packed import _Packed

_LARGEST = 448.0  # of float8_e4m3fn


class Fp8Linear(_Packed):
    """y = x (w s)^T + b: float8_e4m3fn weights (4 exponent bits, 3 of mantissa), a float32 scale for each output.

    On GPUs of compute capability 8.9 and above activations are rounded to 8-bit floats too, with a scale for each token,
    and multiplied in that format. Everywhere else weights are unpacked to bfloat16 and activations stay as they are.
    """

    kind = "fp8"
    values: torch.Tensor  # float8_e4m3fn (out, in)
    scales: torch.Tensor  # (out,)

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, bias, dtype)
        self.register_buffer("values", torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn, device="meta"))
        self.register_buffer("scales", torch.empty(out_features, device="meta"))

    @classmethod
    def from_weight(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> Fp8Linear:
        """Return the module for float weights (out, in), each output scaled to the format's range."""
        module = cls(weight.shape[1], weight.shape[0], bias is not None, weight.dtype)
        values, scales = _rounded(weight.detach().float())
        module._fill({"values": values, "scales": scales[:, 0]}, bias)
        return module

    def rows(self, which: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return some rows of the weights (out, in), unpacked."""
        return self.values[which].to(dtype) * self.scales[which].to(dtype)[:, None]

    def product(self, states: torch.Tensor) -> torch.Tensor:
        """Return states (n, in) times the weights, without the bias, both in bfloat16."""
        if self.in_features % 16 or self.out_features % 16 or not _multiplies(states.device):
            return super().product(states)
        rounded, scales = _rounded(states.float())
        return torch._scaled_mm(
            rounded, self.values.T, scale_a=scales, scale_b=self.scales[None], out_dtype=torch.bfloat16
        )


def _rounded(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float8_e4m3fn values (n, k) and float32 scales (n, 1) that bring each row's largest to the format's."""
    scales = values.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / _LARGEST
    return (values / scales).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), scales


@cache
def _multiplies(device: torch.device) -> bool:
    return (
        device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 9)
    )
