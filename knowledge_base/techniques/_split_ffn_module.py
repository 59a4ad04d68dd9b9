"""The stored form of a dense feed-forward part cut into experts: some neurons for every token, the rest by a router."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from knowledge_base.techniques._experts_module import Experts


class SplitFfn(Experts):
    """y = shared(x) + the `active` experts that the router likes best; each is down(act(gate x) * up x), of equal weight.

    All parts are ordinary Linear modules, so later steps can train or quantise them.
    """

    kind = "split_ffn"

    def __init__(
        self, hidden: int, act_fn: nn.Module, dtype: torch.dtype, *, shared: int, experts: int, size: int, active: int
    ) -> None:
        def linears(outputs: int, inputs: int, count: int) -> list[nn.Linear]:
            return [nn.Linear(inputs, outputs, bias=False, dtype=dtype, device="meta") for _ in range(count)]

        super().__init__(linears(2 * size, hidden, experts), linears(hidden, size, experts), act_fn)
        self.sizes = {"shared": shared, "experts": experts, "size": size, "active": active}
        self.shared_gate_up, self.shared_down = *linears(2 * shared, hidden, 1), *linears(hidden, shared, 1)
        self.router = nn.Linear(hidden, experts, dtype=dtype, device="meta")

    @classmethod
    def in_place_of(cls, ffn: Any, /, **sizes: int) -> SplitFfn:  # type: ignore[override]
        """Return an empty module for a gated feed-forward part, dense so far, with `down_proj` and `act_fn`."""
        act_fn = getattr(ffn, "act_fn", None) or ffn.activation_fn
        weight = ffn.down_proj.weight
        return cls(weight.shape[0], act_fn, weight.dtype, **sizes)

    def spec(self) -> dict[str, Any]:
        """Return what `in_place_of` needs beside the part it takes the place of."""
        return self.sizes

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # (..., hidden), routed in here
        rows = x.reshape(-1, x.shape[-1])
        chosen = self.router(rows).topk(self.sizes["active"]).indices
        y = self._expert(rows, self.shared_gate_up, self.shared_down)
        if len(rows) == 1:
            for expert in chosen[0].tolist():
                y = y + self._expert(rows, self.gate_up[expert], self.down[expert])
        else:
            y = y + super().forward(rows, chosen, torch.ones_like(chosen, dtype=x.dtype))
        return y.reshape(x.shape)

    def _expert(self, rows: torch.Tensor, gate_up: nn.Module, down: nn.Module) -> torch.Tensor:
        gate, up = gate_up(rows).chunk(2, dim=-1)
        return down(self.act_fn(gate) * up)
