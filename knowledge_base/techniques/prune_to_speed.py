"""Make the model so many times faster on this machine: heads and channels chosen per layer from measured times.

After ZipLM (arXiv:2302.04089). `options` measures, for each layer's attention with k groups of heads and its
feed-forward part with c channels,

    loss     KL divergence from the unchanged model when this part alone is cut, the rest of it made up for
    seconds  of one decode step through the part, timed on this machine in the model's own dtype

and the time of whatever else a step does, which nothing here makes shorter. The planner's exact program
(search/allocation.py) picks one option for each part, the least summed loss within the wanted time; `execute` carries it
out, layer after layer, each calibrated on the cut ones before it. A feed-forward part may go entirely.

Times are those of the transformers engine: 1.5 means a decode step of two thirds, at the length of the calibration text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from knowledge_base.techniques import _speed
from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="heads and channels removed until a step is so many times faster on this machine",
    stage="compress",
    family="width",
    implements=("block_pruning",),
    knobs={"speedup": Choice(options=(1.25, 1.5, 2.0), default=1.25)},
    saves=("ttft_s", "tpot_s", "latency_s", "throughput_tokens_per_s", "energy_j_per_token"),
    spends=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "build_s"),
    needs=frozenset({"torch"}),
    needs_calibration=True,
    sources=("arXiv:2302.04089",),
)

EVIDENCE: tuple[Evidence, ...] = ()

# Any speed can be aimed at: the search adds the gentlest that meets a budget of time.
RANGE = dict.fromkeys(_speed.TIMES, ("speedup", tuple(share / 20 for share in range(21, 81))))


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.attention_layers < model.layers or model.kv_values_per_layer is not None:
        return f"{model.architecture} has layers whose attention is of another kind than heads with keys and values"
    if model.experts:
        return "the experts of one layer are stored together, so how long fewer channels take is not timed here"
    return None


def rewrite(demand: Demand, *, speedup: float) -> Demand:
    """Return the demand as it would be if time fell with weights; how many really go is told by measuring.

    A step's time is taken as the bytes it reads, so what must go is the layers' part of them: (1 - 1 / speedup) of all.
    """
    model = demand.model
    wanted = (1 - 1 / speedup) * (demand.linear_bytes + demand.head_read_bytes) / demand.linear_bytes
    share = 1 - min(wanted, 0.8)
    heads = max(share, 1 / max(model.kv_heads, 1))
    removed = demand.linear_params * (1 - share)
    smaller = model.but(
        linear_params=round(model.linear_params - removed), params_total=round(model.params_total - removed),
        params_active=round(model.params_active - removed),
    )  # fmt: skip
    demand = loss_after(demand, "flap", sparsity=1 - share)
    return demand.but(
        model=smaller,
        linear_params=demand.linear_params - removed,
        linear_bytes=demand.linear_bytes * share,
        linear_flop_per_token=demand.linear_flop_per_token * share,
        attention_flop_per_token_pair=demand.attention_flop_per_token_pair * heads,
        kv_bytes_per_token=demand.kv_bytes_per_token * heads,
        build_flop=demand.build_flop + 16_384 * 8 * demand.linear_params + 8 * model.layers * model.ffn_size**3,
        because=(
            *demand.because,
            f"layers cut until a step is {speedup:g} times faster: about {1 - share:.0%} of them",
        ),
    )


def channel_levels(size: int) -> list[int]:
    """Return the numbers of channels a feed-forward part may keep, from all to none.

    >>> channel_levels(768)
    [768, 672, 576, 480, 384, 256, 128, 0]
    """
    grain = next((g for g in (256, 128, 64) if 32 * g <= size), 32)
    shares = (0.875, 0.75, 0.625, 0.5, 0.33, 0.17, 0.0)
    return sorted({size, *(round(share * size / grain) * grain for share in shares)}, reverse=True)


def options(session: Session, time_limit_s: float = 120.0) -> dict[str, Any]:
    """Return what each part costs and takes: {"parts": {name: {setting: {"loss_increase", "seconds"}}}, ...}.

    Beside them "step_s", seconds of one decode step, and "unchanged_s", of all parts as they are.

    A setting is the number of groups of heads or of channels kept; names are those of the modules. The losses take one
    pass each, from the changed layer on; where all would take longer than `time_limit_s`, fewer tokens are read. The
    model is unchanged after.

    Raises:
        CandidateFailed: no calibration text, or a layer whose parts are not known.
    """
    import torch

    from knowledge_base.techniques import _sensitivity
    from knowledge_base.techniques._blocks import Matrix, decoder_layers, each_layer, ffn_of, matrix_of
    from knowledge_base.techniques._structure import attention_of, columns, shrinking

    model, layers = session.model.eval(), decoder_layers(session.model)
    names = {id(module): name for name, module in model.named_modules()}
    file = session.workspace / "prune_to_speed"
    file.mkdir(parents=True, exist_ok=True)
    times = _times(session)

    def keep(index: int, layer: torch.nn.Module, matrices: list[Matrix]) -> None:
        """Write down the corrected matrices of every option, so that memory holds those of one layer."""
        found = []
        for module, size, levels, at_once in _parts(layer):
            matrix = next(m for m in matrices if m.module is module)
            cuts = shrinking(matrix.weight, matrix.inputs.products, size, levels[1:], at_once=at_once)
            found.append([(r.kept, r.weight.float()) for r in cuts])
        torch.save(found, file / f"{index}.pt")

    each_layer(session, keep, full=True, label="prune_to_speed: what each part is worth")
    parts: dict[str, dict[str, dict[str, float]]] = {}
    with torch.no_grad():
        tokens = _sensitivity.calibration_tokens(session)
        trial = _sensitivity.Trial(model, layers, tokens)
        passes = sum(len(p[2]) * (1 - i / len(layers)) for i, layer in enumerate(layers) for p in _parts(layer))
        if passes * trial.forward_s > time_limit_s:
            tokens = _sensitivity._fewer(tokens, time_limit_s / (passes * trial.forward_s))
            trial = _sensitivity.Trial(model, layers, tokens)
        for index, layer in enumerate(layers):
            found = torch.load(file / f"{index}.pt", weights_only=True)
            holders = (attention_of(layer).module, ffn_of(layer).holder)
            for holder, (module, size, levels, _), cuts in zip(holders, _parts(layer), found):
                rows = {str(levels[0]): {"loss_increase": 0.0, "seconds": times[size > 1, levels[0]]}}
                original = matrix_of(module).clone()
                try:
                    for level, (kept, weight) in zip(levels[1:], cuts):
                        matrix_of(module).zero_()
                        matrix_of(module)[:, columns(kept, size)] = weight.to(original.dtype)
                        rows[str(level)] = {
                            "loss_increase": trial.divergence(index), "seconds": times[size > 1, level]
                        }  # fmt: skip
                finally:
                    matrix_of(module).copy_(original)
                parts[names[id(holder)]] = rows
            (file / f"{index}.pt").unlink()
            session.progress("prune_to_speed: losses", (index + 1) / len(layers))
    return _speed.of_step({name: str(max(map(int, rows))) for name, rows in parts.items()}, parts, times["step"])


def budgets(measured: dict[str, Any], *, speedup: float) -> dict[str, float]:
    """Return what the chosen options together may take, of what `options` measured.

    Raises:
        NoFeasiblePlan: says how fast a step can get.
    """
    return {"seconds": _speed.seconds_for(measured, speedup, "removing heads and channels")}


def _parts(layer: Any) -> list[tuple[Any, int, list[int], int]]:
    """Return (matrix whose inputs go, inputs in a group, numbers of groups, groups at once) of attention and channels."""
    from transformers.pytorch_utils import Conv1D

    from knowledge_base.techniques._blocks import ffn_of
    from knowledge_base.techniques._structure import attention_of

    attention, ffn = attention_of(layer), ffn_of(layer)
    groups = sorted({max(1, round(attention.groups * i / 8)) for i in range(1, 9)}, reverse=True)
    channels = channel_levels(ffn.size)
    if isinstance(ffn.down, Conv1D):
        channels = channels[:-1]  # its code cannot multiply nothing
    return [(attention.out, attention.size, groups, 1), (ffn.down, 1, channels, max(1, ffn.size // 64))]


def _times(session: Session) -> dict[Any, float]:
    """Return seconds of one decode step, under "step", and of each part at each size, under (is attention, size).

    All are timed in turn. A part goes through as many copies of its weights as the model has layers (up to
    WEIGHTS_TIMED), for in a model they come from memory too.
    """
    from knowledge_base.techniques._blocks import decoder_layers, ffn_of
    from knowledge_base.techniques._latency import decode_step, least_seconds
    from knowledge_base.techniques._structure import attention_of

    layers = decoder_layers(session.model)
    attention, ffn = attention_of(layers[0]), ffn_of(layers[0])
    (_, _, groups, _), (_, _, channels, _) = _parts(layers[0])
    weights = _Weights(attention.out.weight, len(layers))
    work: dict[Any, tuple[Callable[[], None], int]] = {"step": decode_step(session)}
    for count in groups:
        work[True, count] = _attention_work(session, attention, count, weights)
    for count in channels:
        work[False, count] = _ffn_work(session, ffn, count, weights)
    return least_seconds(work, session, "prune_to_speed: times")


class _Weights:
    """Copies of a part's matrices to go through in turn: parts of one block of memory, whichever part is timed."""

    def __init__(self, like: Any, layers: int) -> None:
        self._block, self._layers = like.new_empty(0), layers

    def copies(self, shapes: list[tuple[int, int]]) -> list[list[Any]]:
        from knowledge_base.techniques._latency import WEIGHTS_TIMED

        sizes = [rows * columns for rows, columns in shapes]
        most = WEIGHTS_TIMED // max(1, sum(sizes) * self._block.element_size())
        count = max(1, min(self._layers, most))
        if self._block.numel() < count * sum(sizes):
            self._block = self._block.new_full((count * sum(sizes),), 0.01)
        flat = self._block[: count * sum(sizes)].split(sizes * count)
        matrices = [part.view(shape) for part, shape in zip(flat, shapes * count)]
        return [matrices[first : first + len(shapes)] for first in range(0, len(matrices), len(shapes))]


def _attention_work(session: Session, attention: Any, groups: int, weights: _Weights) -> tuple[Callable[[], None], int]:
    import torch
    from torch.nn.functional import linear, scaled_dot_product_attention

    from knowledge_base.techniques._latency import CONTEXT_TOKENS

    like, hidden, size = attention.out.weight, session.model.config.get_text_config().hidden_size, attention.head_size
    heads = groups * attention.queries
    shapes = [(heads * size, hidden), (groups * size, hidden), (groups * size, hidden)]
    if len(attention.ins) == 1:
        shapes = [((heads + 2 * groups) * size, hidden)]
    shapes.append((hidden, heads * size))
    sets = weights.copies(shapes)
    x = torch.ones(1, 1, hidden, dtype=like.dtype, device=like.device)
    query = torch.ones(1, heads, 1, size, dtype=like.dtype, device=like.device)
    cache = torch.ones(1, groups, CONTEXT_TOKENS, size, dtype=like.dtype, device=like.device)

    def run() -> None:
        for *ins, out in sets:
            for weight in ins:
                linear(x, weight)
            mixed = scaled_dot_product_attention(query, cache, cache, enable_gqa=groups < heads)
            linear(mixed.reshape(1, 1, -1), out)

    return run, len(sets)


def _ffn_work(session: Session, ffn: Any, channels: int, weights: _Weights) -> tuple[Callable[[], None], int]:
    import torch
    from torch.nn.functional import linear, silu

    like, hidden = ffn.down.weight, session.model.config.get_text_config().hidden_size
    sets = weights.copies([(channels, hidden)] * len(ffn.ups) + [(hidden, channels)])
    x = torch.ones(1, 1, hidden, dtype=like.dtype, device=like.device)

    def run() -> None:
        for *ups, down in sets:
            inner = silu(linear(x, ups[0]))
            for up in ups[1:]:
                inner = inner * linear(x, up)
            linear(inner, down)

    return run, len(sets)


def execute(session: Session, *, speedup: float) -> None:
    """Cut every layer as `session.allocation` says: module name -> groups of heads, or channels, that stay.

    Raises:
        CandidateFailed: "build_error", no allocation; "unsupported", it was made for another model.
    """
    import torch

    from knowledge_base.errors import CandidateFailed
    from knowledge_base.techniques._blocks import Matrix, decoder_layers, each_layer, ffn_of, shrink_ffn
    from knowledge_base.techniques._kinds import other_sizes
    from knowledge_base.techniques._structure import attention_of, describe_heads, keep_groups, shrinking

    if not session.allocation:
        raise CandidateFailed(
            "build_error", "prune_to_speed needs an allocation of heads and channels to layers",
            hint="plan with calibration text, so that the planner can measure what each part takes",
        )  # fmt: skip
    layers = decoder_layers(session.model)
    names = {id(module): name for name, module in session.model.named_modules()}
    counts = []
    for layer in layers:
        attention, ffn = attention_of(layer), ffn_of(layer)
        texts = [str(session.allocation.get(names[id(m)])) for m in (attention.module, ffn.holder)]
        wanted = [int(text) if text.isdecimal() else -1 for text in texts]
        if not (1 <= wanted[0] <= attention.groups and 0 <= wanted[1] <= ffn.size):
            raise CandidateFailed(
                "unsupported", f"the allocation was made for another model: `{names[id(layer)]}` does not fit it",
                hint="allocate anew for this model",
            )  # fmt: skip
        counts.append(wanted)

    def change(index: int, layer: torch.nn.Module, matrices: list[Matrix]) -> None:
        attention, ffn = attention_of(layer), ffn_of(layer)
        for (module, size, levels, at_once), count in zip(_parts(layer), counts[index]):
            if count == levels[0]:
                continue
            matrix = next(m for m in matrices if m.module is module)
            cut = next(shrinking(matrix.weight, matrix.inputs.products, size, [count], at_once=at_once))
            if module is attention.out:
                keep_groups(attention, cut.kept, cut.weight)
            else:
                shrink_ffn(ffn, cut.kept, cut.weight)

    each_layer(session, change, full=True, label="prune_to_speed")
    describe_heads(session.model, [attention_of(layer) for layer in layers])
    for layer in layers:
        ffn = ffn_of(layer)
        for module in (*ffn.ups, ffn.down):
            other_sizes(module)
    session.notes["prune_to_speed.groups"] = [groups for groups, _ in counts]
    session.notes["prune_to_speed.channels"] = [channels for _, channels in counts]
