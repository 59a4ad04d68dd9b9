"""Merge experts that the router treats alike: fewer of them, each the average of a group weighted by use.

In each layer the experts that add most stay apart as heads of groups; every other joins the one whose router scores vary
most like its own over calibration text (M-SMoE, arXiv:2310.01334). Before averaging, an expert's channels are put in the
order in which they match those of its head best (linear assignment), for a channel's place carries no meaning. The
group's row of the router is the least-squares fit of the logarithm of the sum of its members' scores, so that it is sent
the tokens they were sent. Every layer keeps as many experts, which config.json gives.
"""

from __future__ import annotations

from typing import Any

from knowledge_base.techniques.prune_experts import SAVES, SPENDS
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="merge experts that the router treats alike",
    stage="compress",
    family="expert_count",
    implements=("expert_pruning",),
    knobs={"keep": Choice(options=(0.5, 0.75), default=0.75)},
    saves=SAVES,
    spends=SPENDS,
    needs_calibration=True,
    modules=("scipy",),
    sources=("arXiv:2310.01334",),
)

EVIDENCE: tuple[Evidence, ...] = ()

DAMPING = 0.01


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.experts < 2:
        return f"{model.name} has no experts to merge"
    return None


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting means nothing for that model, or None."""
    from knowledge_base.techniques import _mixture_size

    return _mixture_size.why_not(model, knobs["keep"])


def rewrite(demand: Demand, *, keep: float) -> Demand:
    """Return the demand with fewer experts; the model in it has the new number."""
    from knowledge_base.techniques import _mixture_size

    after = _mixture_size.fewer(demand, keep)
    share = 1 - after.linear_params / demand.linear_params
    before, kept = demand.model.experts, after.model.experts
    matching = demand.layers * (before - kept) * demand.model.ffn_size**2 * (6 * demand.model.hidden_size + 1000)
    return after.but(
        build_flop=after.build_flop + matching,
        because=(*demand.because, f"{before} experts merged into {kept}: {share:.0%} fewer weights in the layers"),
    )


def execute(session: Session, *, keep: float) -> None:
    """Merge experts layer by layer, each layer judged on what the merged ones before it give.

    Raises:
        CandidateFailed: "unsupported", experts or routers of an unknown form, or too few would be left.
    """
    import torch

    from knowledge_base.techniques import _experts

    def change(mixture: _experts.Mixture, count: int) -> None:
        groups, scores = grouped(mixture, count)
        up, down = (torch.stack(parts) for parts in zip(*(_merged(mixture, group) for group in groups)))
        heads = [group[0] for group in groups]
        rows = {name: p.data[heads] for name, p in mixture.router.named_parameters()}
        rows["weight"] = _rows(mixture, groups, scores).to(rows["weight"].dtype)
        _experts.store(mixture, up, down, rows)

    session.notes["merge_experts.experts"] = _experts.each_mixture(session, keep, change, "merge_experts")


def grouped(mixture: Any, count: int) -> tuple[list[list[int]], Any]:
    """Return the experts in `count` groups, each with its head first, and the router's scores (tokens, E)."""
    import torch

    scores = mixture.states.float() @ mixture.router.weight.data.float().T
    if getattr(mixture.router, "bias", None) is not None:
        scores = scores + mixture.router.bias.data.float()
    heads = sorted(mixture.added.argsort(descending=True, stable=True)[:count].tolist())
    alike = torch.corrcoef(scores.T).nan_to_num()
    groups = {head: [head] for head in heads}
    for expert in range(scores.shape[1]):
        if expert not in groups:
            groups[max(heads, key=lambda head: (float(alike[expert, head]), -head))].append(expert)
    return list(groups.values()), scores


def _merged(mixture: Any, group: list[int]) -> tuple[Any, Any]:
    """Return the average (gate_up, down) of a group, weighted by use, with channels in the order of its head's."""
    from scipy.optimize import linear_sum_assignment

    ups, downs = mixture.experts.gate_up_proj.data, mixture.experts.down_proj.data
    uses = mixture.used[group] + 1e-6  # a group that no token was sent to is averaged evenly
    shares = (uses / uses.sum()).tolist()
    head = group[0]
    up, down = shares[0] * ups[head].float(), shares[0] * downs[head].float()
    for expert, share in zip(group[1:], shares[1:]):
        match = _channels(ups[head], downs[head]) @ _channels(ups[expert], downs[expert]).T
        order = linear_sum_assignment(match.cpu().numpy(), maximize=True)[1]
        half = len(order)
        up += share * ups[expert].float()[[*order, *(order + half)]]
        down += share * downs[expert].float()[:, order]
    return up.to(ups.dtype), down.to(downs.dtype)


def _channels(up: Any, down: Any) -> Any:
    """Return each channel as one vector of length one: what gates it, what fills it and where it leads."""
    import torch

    gate, fill = up.float().chunk(2)
    return torch.cat([torch.nn.functional.normalize(part, dim=-1) for part in (gate, fill, down.float().T)], dim=-1)


def _rows(mixture: Any, groups: list[list[int]], scores: Any) -> Any:
    """Return a row of the router for each group: rows of groups of one are as they were."""
    import torch

    weight = mixture.router.weight.data.float()
    states = mixture.states.double()
    gram = states.T @ states
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    rows = []
    for group in groups:
        row = weight[group[0]]
        if len(group) > 1:  # fitted as a change of the head's row, which is what is left where text is short
            wanted = scores[:, group].double().logsumexp(1) - scores[:, group[0]].double()
            row = row + torch.linalg.solve(damped, states.T @ wanted).float()
        rows.append(row)
    return torch.stack(rows)
