"""Cut each dense feed-forward part into experts, of which every token goes through a few.

As MoEfication (Zhang et al., arXiv:2110.01786) with the shared part of CMoE (arXiv:2502.04416): the neurons that matter
most for all tokens are always computed; the others are clustered by what they contribute to the same tokens, into
experts of one size. A linear router, fitted by ridge regression, predicts each expert's share of the output, and
the down matrices are fitted again to what the routed model computes. All weights stay stored and take no less memory;
one sequence reads fewer of them for each token. Prompts and batches wake every expert and gain less.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from knowledge_base.techniques._blocks import Ffn
    from knowledge_base.techniques._split_ffn_module import SplitFfn

TECHNIQUE = Technique(
    summary="cut dense feed-forward parts into routed experts: a share is computed for each token",
    stage="compress",
    family="experts",
    implements=("moefication",),
    knobs={"keep": Choice(options=(0.5, 0.75), default=0.75)},
    saves=(
        "tpot_s", "latency_s", "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token",
        "cost_usd_per_token",
    ),
    spends=(
        "perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "build_s", "ttft_s",
        "weights_bytes", "artefact_bytes", "peak_memory_bytes", "network_bytes_per_start",
    ),
    needs=frozenset({"split_ffn"}),
    provides=frozenset({"experts"}),
    needs_calibration=True,
    sources=("arXiv:2110.01786", "arXiv:2502.04416"),
)  # fmt: skip

EVIDENCE: tuple[Evidence, ...] = ()

# (log perplexity ratio, its standard deviation): own runs on the shipped model, 1.075 and 1.016.
_LOSS = {0.5: (0.072, 0.07), 0.75: (0.016, 0.016)}
_SAMPLE = 512  # tokens that tell which neurons act together
_ROUNDS = 10  # of clustering
_DAMPING = 0.01  # share of the mean diagonal


def sizes(ffn_size: int, keep: float) -> dict[str, int] | None:
    """Return the shared neurons, number, size and active number of experts; None where no grain of 32 fits.

    About eight equal parts; half of what is kept is shared.

    >>> sizes(768, 0.5), sizes(100, 0.5)
    ({'shared': 192, 'experts': 6, 'size': 96, 'active': 2}, None)
    """
    size = 32 * max(1, round(ffn_size / 256))
    parts = ffn_size // size
    active = round(keep * parts)
    shared = max(1, active // 2)
    if ffn_size % size or not shared < active < parts:
        return None
    return {"shared": shared * size, "experts": parts - shared, "size": size, "active": active - shared}


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.experts:
        return f"the model has {model.experts} experts already"
    if model.attention_layers < model.layers or model.ffn_size <= 0:
        return f"{model.architecture} has no feed-forward part in every layer"
    if not model.gated_ffn:
        return f"the feed-forward parts of {model.architecture} are not gated, which is what the experts here are"
    return None


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting means nothing for that model, or None."""
    if sizes(model.ffn_size, knobs["keep"]) is None:
        return f"{model.ffn_size} neurons cannot be cut into equal experts of a multiple of 32"
    return None


def rewrite(demand: Demand, *, keep: float) -> Demand:
    """Return the demand of a mixture of experts: all weights stored, those of idle experts unread by a token."""
    model = demand.model
    parts = sizes(model.ffn_size, keep)
    assert parts is not None  # legal() said so
    loss, sd = _LOSS[keep]
    idle = model.layers * 3 * model.hidden_size * parts["size"] * (parts["experts"] - parts["active"])
    routers = model.layers * (model.hidden_size + 1) * parts["experts"]
    each = demand.linear_bytes / demand.linear_params
    routed = model.but(
        experts=parts["experts"], experts_active=parts["active"], params_total=model.params_total + routers,
        params_active=model.params_active + routers - idle, linear_params=model.linear_params + routers,
    )  # fmt: skip
    return demand.but(
        model=routed,
        linear_params=demand.linear_params + routers,
        linear_bytes=demand.linear_bytes + each * routers,
        linear_flop_per_token=demand.linear_flop_per_token + 2 * (routers - idle),
        kernels_per_step=demand.kernels_per_step + demand.layers * (4 + 4 * parts["active"]),
        build_flop=demand.build_flop + 16_384 * (6 * demand.linear_params + 2 * demand.layers * model.ffn_size**2),
        perplexity_ratio=demand.perplexity_ratio * math.exp(loss),
        perplexity_log_sd=math.hypot(demand.perplexity_log_sd, sd),
        because=(
            *demand.because,
            f"{parts['shared']} shared neurons and {parts['active']} of {parts['experts']} experts for each token",
        ),
    )


def execute(session: Session, *, keep: float) -> None:
    """Replace every layer's feed-forward part, each fitted on what the ones before it give.

    Raises:
        CandidateFailed: no calibration text, or "unsupported", parts that are not gated, biased, packed or too narrow.
    """

    from knowledge_base.errors import CandidateFailed
    from knowledge_base.techniques._blocks import Matrix, decoder_layers, each_layer, ffn_of, matrix_of

    parts = [ffn_of(layer) for layer in decoder_layers(session.model)]
    for part in parts:
        names = {id(module): name for name, module in part.holder.named_children()} if part.down is not None else {}
        gated = part.down is not None and sum(len(matrix_of(up)) for up in part.ups) == 2 * part.size
        if (
            not gated
            or names.get(id(part.down)) != "down_proj"
            or any(m.bias is not None for m in (*part.ups, part.down))
        ):
            raise CandidateFailed(
                "unsupported", "only gated feed-forward parts without biases are cut into experts here"
            )
        if sizes(part.size, keep) is None:
            raise CandidateFailed("unsupported", f"{part.size} neurons cannot be cut into equal experts")
    seen: dict[int, torch.Tensor] = {}

    def watch(index: int) -> Callable:
        def hook(module: torch.nn.Module, args: tuple) -> None:
            seen[index] = args[0].reshape(-1, args[0].shape[-1])

        return hook

    handles = [part.holder.register_forward_pre_hook(watch(index)) for index, part in enumerate(parts)]

    def change(index: int, layer: torch.nn.Module, found: list[Matrix]) -> None:
        handles[index].remove()
        name = next(name for name, module in layer.named_modules() if module is parts[index].holder)
        layer.set_submodule(name, _split(parts[index], seen.pop(index), keep, session.seed))

    try:
        each_layer(session, change, full=False, label="experts_from_dense", whole=True)
    finally:
        for handle in handles:
            handle.remove()
    session.notes["experts_from_dense.neurons"] = sizes(parts[0].size, keep)


def _split(ffn: Ffn, x: torch.Tensor, keep: float, seed: int) -> SplitFfn:
    """Return the experts of one layer, fitted on inputs x (tokens, hidden)."""
    import torch

    from knowledge_base.techniques._blocks import matrix_of
    from knowledge_base.techniques._split_ffn_module import SplitFfn

    numbers = sizes(ffn.size, keep)
    assert numbers is not None
    module = SplitFfn.in_place_of(ffn.holder, **numbers)
    gate_up = torch.cat([matrix_of(up) for up in ffn.ups]).view(2, ffn.size, -1)
    down = matrix_of(ffn.down)

    def active(rows: torch.Tensor) -> torch.Tensor:
        gate, up = (rows @ part.T for part in gate_up)
        return (module.act_fn(gate) * up).float()

    # What a neuron contributes to a token: |h_j| times the length of its column of the down matrix.
    weight = down.float().norm(dim=0)
    sample = active(x[:: max(1, len(x) // _SAMPLE)]).abs() * weight
    order = sample.mean(0).argsort(descending=True, stable=True)
    shared, rest = order[: numbers["shared"]].sort().values, order[numbers["shared"] :].sort().values
    groups = [rest[group] for group in _clusters(sample[:, rest].T, numbers["experts"], seed)]

    # The router tells from the input how long each expert's output will be.
    lengths, chunks = [], x.split(2048)
    for rows in chunks:
        energy = (active(rows) * weight).square()
        lengths.append(torch.stack([energy[:, group].sum(1).sqrt() for group in groups], dim=1))
    wanted = torch.cat(lengths)
    router, bias = _ridge(x.float(), wanted)
    module.router.weight = torch.nn.Parameter(router.to(down.dtype), requires_grad=False)
    module.router.bias = torch.nn.Parameter(bias.to(down.dtype), requires_grad=False)

    # The down matrix makes up for experts that are left out: least squares on what the routed model computes.
    gram = torch.zeros(ffn.size, ffn.size, dtype=torch.float64, device=x.device)
    crossed = torch.zeros(len(down), ffn.size, dtype=torch.float64, device=x.device)
    member = torch.full((ffn.size,), -1, device=x.device)
    for number, group in enumerate(groups):
        member[group] = number
    for rows in chunks:
        chosen = torch.nn.functional.one_hot(
            module.router(rows).topk(numbers["active"]).indices, numbers["experts"]
        ).amax(1)  # (tokens, experts)
        whole = active(rows)
        on = torch.cat([chosen, torch.ones_like(chosen[:, :1])], dim=1)[:, member]  # -1, the shared, is the last column
        routed = (whole * on).double()
        gram += routed.T @ routed
        crossed += (whole @ down.float().T).double().T @ routed
    damping = _DAMPING * gram.diagonal().mean().clamp_min(1e-12)
    gram.diagonal().add_(damping)
    fitted = torch.linalg.solve(gram, (crossed + damping * down.double()).T).T.to(down.dtype)

    def put(linear: torch.nn.Module, values: torch.Tensor) -> None:
        linear.weight = torch.nn.Parameter(values.contiguous(), requires_grad=False)

    for number, group in ((-1, shared), *enumerate(groups)):
        put(module.shared_gate_up if number < 0 else module.gate_up[number], gate_up[:, group].flatten(0, 1))
        put(module.shared_down if number < 0 else module.down[number], fitted[:, group])
    return module


def _ridge(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight (outputs, inputs) and bias of the linear function of x (rows, inputs) nearest to y."""
    import torch

    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = (x - mean_x).double()
    gram = centred.T @ centred
    gram.diagonal().add_(_DAMPING * gram.diagonal().mean().clamp_min(1e-12))
    weight = torch.linalg.solve(gram, centred.T @ (y - mean_y).double()).T.float()
    return weight, mean_y - weight @ mean_x


def _clusters(points: torch.Tensor, count: int, seed: int) -> list[torch.Tensor]:
    """Return `count` sorted index groups of equal size: k-means on directions, nearest pairs assigned first."""
    import torch

    points = torch.nn.functional.normalize(points, dim=1)
    room = len(points) // count
    first = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:count]
    centres = points[first.to(points.device)]
    for _ in range(_ROUNDS):
        near = points @ centres.T
        assigned, left = [-1] * len(points), [room] * count
        for pair in near.flatten().argsort(descending=True, stable=True).tolist():
            point, cluster = divmod(pair, count)
            if assigned[point] < 0 and left[cluster]:
                assigned[point] = cluster
                left[cluster] -= 1
        member = torch.tensor(assigned, device=points.device)
        centres = torch.stack([points[member == cluster].mean(0) for cluster in range(count)])
        centres = torch.nn.functional.normalize(centres, dim=1)
    return [(member == cluster).nonzero()[:, 0] for cluster in range(count)]
