"""The stored form of experts as a list of Linear modules, where transformers keeps them as 3-D weights.

What works on Linear modules (packing, calibrated rounding, factorising) then works on experts too, each by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from knowledge_base.techniques._blocks import decoder_layers, experts_of


class Experts(nn.Module):
    """Every token through the experts chosen for it: down(act(gate(x)) * up(x)), weighed and summed.

    `gate_up` and `down` hold one Linear for each expert; a step may put other modules in their place, which
    structure.json then names by themselves.
    """

    kind = "experts"

    def __init__(self, gate_up: Sequence[nn.Module], down: Sequence[nn.Module], act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down, self.act_fn = nn.ModuleList(gate_up), nn.ModuleList(down), act_fn

    @classmethod
    def in_place_of(cls, experts: Any) -> Experts:
        """Return the module for experts with gate_up_proj (E, 2I, H) and down_proj (E, H, I), whose memory it shares."""
        return cls(
            [_linear(weight) for weight in experts.gate_up_proj.detach()],
            [_linear(weight) for weight in experts.down_proj.detach()],
            experts.act_fn,
        )

    def spec(self) -> dict[str, Any]:
        """Return nothing: the experts it takes the place of tell everything."""
        return {}

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return (tokens, hidden) for tokens (tokens, hidden) with experts and their weights (tokens, chosen)."""
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == expert)
            gate, up = self.gate_up[expert](hidden_states[token]).chunk(2, dim=-1)
            inner = self.down[expert](self.act_fn(gate) * up)
            result.index_add_(0, token, (inner * top_k_weights[token, place, None]).to(result.dtype))
        return result


def _linear(weight: torch.Tensor) -> nn.Linear:
    outputs, inputs = weight.shape
    module = nn.Linear(inputs, outputs, bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def split_experts(model: nn.Module) -> None:
    """Put `Experts` in place of every layer's experts stored as 3-D weights; nothing is copied.

    Raises:
        CandidateFailed: "unsupported", they are stored in an unknown way, or the layers cannot be found.
    """
    for layer in decoder_layers(model):
        if found := experts_of(layer):
            name, experts = found
            layer.set_submodule(name, Experts.in_place_of(experts))
