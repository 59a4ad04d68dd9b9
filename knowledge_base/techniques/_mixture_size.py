"""What fewer experts mean for a model's size, without loading anything."""

from __future__ import annotations

from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Demand, Model

CALIBRATION_TOKENS = 16_384


def kept_experts(experts: int, active: int, keep: float) -> int:
    """Return how many experts stay, at least as many as a token is sent to.

    >>> kept_experts(8, 2, 0.75), kept_experts(60, 4, 0.5), kept_experts(4, 4, 0.5)
    (6, 30, 4)
    """
    return max(round(keep * experts), active)


def fewer(demand: Demand, keep: float) -> Demand:
    """Return the demand with fewer experts. Each token still goes through as many: memory falls, arithmetic does not.

    No published table of perplexities prices this: it is taken to lose what removing half that share of a dense model's
    channels does.

    removed = layers * (experts before - experts kept) * (3 * hidden_size * channels + one row of the router)
    """
    model = demand.model
    kept = kept_experts(model.experts, model.experts_active, keep)
    router = model.layers * (model.experts - kept) * model.hidden_size
    removed = 3 * model.ffn_size * router + router
    left = 1 - removed / demand.linear_params
    smaller = model.but(
        experts=kept, linear_params=round(model.linear_params - removed),
        params_total=round(model.params_total - removed), params_active=round(model.params_active - router),
    )  # fmt: skip
    after = demand.but(
        model=smaller, linear_params=demand.linear_params - removed, linear_bytes=demand.linear_bytes * left,
        linear_flop_per_token=demand.linear_flop_per_token - 2 * router,
        build_flop=demand.build_flop + CALIBRATION_TOKENS * 4 * demand.linear_flop_per_token,
    )  # fmt: skip
    return loss_after(after, "flap", sparsity=(1 - left) / 2)


def why_not(model: Model, keep: float) -> str | None:
    """Return why a share of experts means nothing for that model, or None."""
    if kept_experts(model.experts, model.experts_active, keep) >= model.experts:
        return f"keep={keep} of {model.experts} experts, {model.experts_active} for each token, leaves all of them"
    return None
