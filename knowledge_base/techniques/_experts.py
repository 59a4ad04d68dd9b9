"""Mixtures of experts with fewer experts: what each one adds on calibration text, and how the rest is stored.

Experts are 3-D tensors (E, out, in), the router is a matrix with a row for each; config.json gives their number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import _blocks
from knowledge_base.techniques._mixture_size import kept_experts
from knowledge_base.types import Session

_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(slots=True)
class Mixture:
    """The routed experts of one layer, their router, and what calibration showed of them."""

    experts: Any
    router: Any
    used: torch.Tensor  # (E,) tokens sent to each
    added: torch.Tensor  # (E,) sum over those of the square of what it added to the output
    states: torch.Tensor  # (tokens, hidden) that entered

    @property
    def count(self) -> int:
        return self.experts.down_proj.shape[0]


def each_mixture(session: Session, keep: float, change: Callable[[Mixture, int], None], label: str) -> list[int]:
    """Let `change` leave so many experts in every layer, each calibrated on the changed ones before it; [before, after].

    Raises:
        CandidateFailed: "unsupported", a layer without experts, routers of an unknown form, or fewer experts left than
            each token is sent to.
    """
    layers = _blocks.decoder_layers(session.model)
    found = [_blocks.experts_of(layer) for layer in layers]
    if any(entry is None for entry in found):
        raise CandidateFailed(
            "unsupported", "some layers of this model have no experts, so their number is not one for all"
        )
    config = session.model.config.get_text_config()
    counts = {entry[1].down_proj.shape[0] for entry in found if entry}
    before = counts.pop()
    active = config.num_experts_per_tok
    if counts or (getattr(config, "n_group", None) or 1) > 1:
        raise CandidateFailed("unsupported", "this model's experts come in groups or differ from layer to layer")
    wanted = kept_experts(before, active, keep)
    if wanted >= before:
        raise CandidateFailed(
            "unsupported", f"keep={keep} of {before} experts, {active} for each token, leaves all of them"
        )

    seen: dict[int, tuple] = {}
    handles = [
        entry[1].register_forward_pre_hook(lambda module, args: seen.__setitem__(id(module), args))
        for entry in found if entry
    ]  # fmt: skip

    def shrink(index: int, layer: nn.Module, matrices: list) -> None:
        entry = found[index]
        assert entry
        router = _router_of(layer, before)
        change(_measured(entry[1], router, *seen.pop(id(entry[1]))[:3]), wanted)

    try:
        _blocks.each_layer(session, shrink, full=False, label=label)
    finally:
        for handle in handles:
            handle.remove()
    _tell(session.model, before, wanted)
    return [before, wanted]


def _router_of(layer: nn.Module, experts: int) -> Any:
    """Return the module that sends tokens to experts: the one with a row for each."""
    routers = [
        m for m in layer.modules()
        if (w := getattr(m, "weight", None)) is not None and w.dim() == 2 and w.shape[0] == experts
    ]  # fmt: skip
    if len(routers) != 1 or any(p.shape[0] != experts for p in routers[0].parameters()):
        raise CandidateFailed("unsupported", f"{type(layer).__name__} sends tokens to its experts in an unknown way")
    return routers[0]


def _measured(experts: Any, router: Any, states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> Mixture:
    count = experts.down_proj.shape[0]
    used, added = torch.zeros(count), torch.zeros(count)
    for expert in range(count):
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        if len(rows):
            output = _output(experts, expert, states[rows]).float() * weights[rows, places, None].float()
            used[expert], added[expert] = len(rows), output.square().sum()
    return Mixture(experts, router, used, added, states)


def _output(experts: Any, expert: int, states: torch.Tensor) -> torch.Tensor:
    gate, up = nn.functional.linear(states, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return nn.functional.linear(experts.act_fn(gate) * up, experts.down_proj[expert])


def store(mixture: Mixture, up: torch.Tensor, down: torch.Tensor, rows: dict[str, torch.Tensor]) -> None:
    """Store fewer experts: `up` (kept, 2 I, hidden), `down` (kept, hidden, I), and the router's tensors by name."""
    experts, router = mixture.experts, mixture.router
    experts.gate_up_proj = nn.Parameter(up.contiguous(), requires_grad=False)
    experts.down_proj = nn.Parameter(down.contiguous(), requires_grad=False)
    for name, tensor in rows.items():
        setattr(router, name, nn.Parameter(tensor.contiguous(), requires_grad=False))
    for module in (experts, router):
        if hasattr(module, "num_experts"):
            module.num_experts = len(down)


def _tell(model: Any, before: int, after: int) -> None:
    """Say the new number wherever the model keeps it: config.json and the modules' own counts."""
    config = model.config.get_text_config()
    keys = [key for key in _KEYS if getattr(config, key, None) == before]
    if not keys:
        raise CandidateFailed("unsupported", f"the config of {type(model).__name__} has no field for {before} experts")
    for key in keys:
        setattr(config, key, after)
    for module in model.modules():
        for name in ("num_experts", "n_routed_experts", "num_local_experts", "out_features"):
            holds = name != "out_features" or getattr(getattr(module, "weight", None), "shape", (0,))[0] == after
            if type(getattr(module, name, None)) is int and getattr(module, name) == before and holds:
                setattr(module, name, after)
