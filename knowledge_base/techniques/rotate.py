"""Turn the space the layers compute in, so that no channel and no weight stands out: fewer bits then lose less.

QuaRot (Ashkboos et al., arXiv:2404.00456) without its rotations at run time: norms keep lengths, so an orthogonal R can
be multiplied into every matrix that reads the residual stream and its transpose into every one that adds to it, once the
norms' gains are folded into their readers (SliceGPT, arXiv:2401.15024); values are turned head by head. Of a few random
rotations the one is taken that 3-bit rounding harms least on calibration text: SpinQuant's observation that they differ,
without its training. Keys stay: they are rotated by position, which no other rotation passes.

The last norm's gain stands between the layers and the head, so a head tied to the embedding table cannot turn with it.
`ends` says what to do then: "folded" gives the head weights of its own (any engine, and their bytes), "online" leaves
table and head as they are and turns states as they enter and leave the layers: two small products a token, no bytes.
Where a norm subtracts the mean, a rotation that keeps it is drawn, so LayerNorm needs no conversion.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from knowledge_base.techniques import _weights
from knowledge_base.techniques._quality import eased
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

if TYPE_CHECKING:
    import torch

    from knowledge_base.techniques._blocks import Matrix
    from knowledge_base.techniques._folding import Reader, Seen
    from knowledge_base.techniques._rotation_module import Rotation

TECHNIQUE = Technique(
    summary="hidden space turned by a Hadamard rotation, folded into the weights (QuaRot)",
    stage="quantise",
    family="rotation",
    implements=("quarot",),
    knobs={"ends": Choice(options=("folded", "online"), default="folded")},
    spends=("build_s", "ttft_s", *(name for name in _weights.SAVES)),
    provides=frozenset({"rotated", "ready_to_round"}),
    needs_calibration=True,
    sources=("arXiv:2404.00456", "arXiv:2401.15024", "arXiv:2405.16406"),
)

_SPIN = "https://github.com/facebookresearch/SpinQuant"
EVIDENCE = (
    Evidence(model="Llama-2-7B", setting="QuaRot, 4-bit weights; GPTQ alone 11.3", quantity="WikiText-2 perplexity",
             baseline=5.5, value=5.6, source=_SPIN),
    Evidence(model="Llama-2-13B", setting="QuaRot, 4-bit weights; GPTQ alone 5.6", quantity="WikiText-2 perplexity",
             baseline=5.0, value=5.0, source=_SPIN),
    Evidence(model="Llama-2-7B", setting="QuaRot, 4-bit weights and activations; GPTQ alone 8000",
             quantity="WikiText-2 perplexity", baseline=5.5, value=6.1, source=_SPIN),
    Evidence(model="Llama-3-70B", setting="QuaRot, 4-bit weights", quantity="WikiText-2 perplexity",
             baseline=2.8, value=7.9, source=_SPIN),
)  # fmt: skip

SEEDS = 4  # rotations tried
BITS, GROUP_SIZE = 3, 64  # of the rounding that judges them
_OUTPUTS_JUDGED = 256
_ROWS_AT_ONCE = 4096  # of a table
_LEFT = 0.9  # share of a later loss by rounding that stays: 0.95 on the shipped model, far less where a few channels stand out
_KERNELS = 24  # launches of turning at both ends


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.kind != "decoder" or model.attention_layers < model.layers:
        return f"layers of {model.architecture} hold more than norms, attention and feed-forward parts to turn"
    return _weights.why_not_again(model)


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting means nothing for that model, or None."""
    if knobs["ends"] == "online" and not model.tied_embeddings:
        return f"table and head of {model.name} are not tied, so folding costs nothing"
    return None


def rewrite(demand: Demand, *, ends: str) -> Demand:
    """Return the demand with less to lose for later rounding; where the head was tied, its bytes or the turning."""
    model = demand.model
    demand = eased(demand, weights=_LEFT, activations=_LEFT).but(
        build_flop=demand.build_flop + demand.linear_params * (4 * 16_384 + 2 * 256 * (SEEDS + 1)),
        because=(*demand.because, f"hidden space turned, {ends} at table and head"),
    )
    if ends == "online":
        return demand.but(
            other_bytes=demand.other_bytes + 10 * model.hidden_size,  # signs twice, gain and bias
            kernels_per_step=demand.kernels_per_step + _KERNELS,
        )
    if demand.head_stored_bytes:
        return demand
    return demand.but(head_stored_bytes=demand.head_read_bytes)


def execute(session: Session, *, ends: str) -> None:
    """Choose a rotation and multiply it in, layer by layer; the model computes what it did.

    Raises:
        CandidateFailed: no calibration text; "unsupported", the model reads or writes its hidden states in a way that
            is not known here.
    """
    from knowledge_base.techniques._folding import unchanged, watch
    from knowledge_base.techniques._rotation_module import Rotation

    hidden = session.model.get_input_embeddings().weight.shape[1]
    seen = watch(session)
    parts = _parts(session, seen, hidden)
    device = session.model.get_input_embeddings().weight.device
    drawn = [
        Rotation.drawn(hidden, session.seed + number, device, keeps_mean=parts.keeps_mean) for number in range(SEEDS)
    ]
    errors = _errors(session, parts, [None, *drawn])
    best = min(range(SEEDS), key=lambda number: errors[1 + number])
    session.notes["rotate.output_error_ratios"] = [round(e / max(errors[0], 1e-12), 4) for e in errors[1:]]
    with unchanged(session, "turning the hidden space"):
        _turn(session, parts, drawn[best], ends)


class _Parts:
    """What a rotation is multiplied into."""

    def __init__(self) -> None:
        self.norms: list[tuple[Any, list[Reader]]] = []  # of the layers: (Norm, what reads it)
        self.last: Any = None  # Norm before the head
        self.writers: list[tuple[Any, torch.Tensor]] = []  # module, weight (hidden, in) or (experts, hidden, in)
        self.tables: list[Any] = []
        self.keeps_mean = False


def _parts(session: Session, seen: Seen, hidden: int) -> _Parts:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from knowledge_base.errors import CandidateFailed
    from knowledge_base.techniques._blocks import decoder_layers, experts_of, matrix_of
    from knowledge_base.techniques._folding import readers_of

    model, parts = session.model, _Parts()

    def unknown(why: str) -> CandidateFailed:
        return CandidateFailed("unsupported", f"{type(model).__name__} {why}, so its hidden space cannot be turned")

    layers = decoder_layers(model)
    inside = set(layers.modules())
    reading = {module for modules in seen.readers.values() for module in modules}
    head = model.get_output_embeddings()
    for module, norm in seen.norms.items():
        if len(norm.gain) != hidden:
            continue
        readers = [readers_of(m) for m in seen.readers[module]]
        if not readers or any(r is None for r in readers):
            raise unknown(f"has a norm ({type(module).__name__}) whose output is not read by matrices alone")
        if not norm.gain.all():
            raise unknown(f"has a norm ({type(module).__name__}) that multiplies a channel by 0")
        parts.keeps_mean |= norm.centred
        if seen.readers[module] == [head]:
            parts.last = norm
        elif module in inside:
            parts.norms.append((norm, [r for some in readers for r in some or []]))
    if parts.last is None:
        raise unknown("has no norm right before its head")
    # What the first factor of a pair reads, the second does not add to the hidden state.
    reading |= {m.expand for m in inside if getattr(m, "kind", None) == "low_rank" and m.reduce in reading}
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear | Conv1D) and module not in reading and len(matrix_of(module)) == hidden:
                parts.writers.append((module, matrix_of(module)))
        if experts := experts_of(layer):
            parts.writers.append((experts[1], experts[1].down_proj.data))
    parts.tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m not in inside]
    if any(table.weight.shape[1] != hidden for table in parts.tables):
        raise unknown("has tables of several widths")
    return parts


def _errors(session: Session, parts: _Parts, rotations: list[Rotation | None]) -> list[float]:
    """Return what rounding does to the outputs of the layers' matrices under each rotation, None for none.

    A matrix's error is relative to its outputs; values are judged as if not turned, which is the same for all.
    """

    from knowledge_base.techniques._blocks import each_layer

    totals = [0.0] * len(rotations)
    reading = {(r.module, r.expert): norm for norm, readers in parts.norms for r in readers if r.part != "down"}
    writing = {module for module, _ in parts.writers}

    def change(index: int, layer: Any, matrices: list[Matrix]) -> None:
        for matrix in matrices:
            norm = reading.get((matrix.module, matrix.expert)) if matrix.part != "down" else None
            weight, sample = matrix.weight.float(), matrix.inputs.sample
            whole = (sample @ weight.T).square().sum().item()
            for number, rotation in enumerate(rotations):
                turned, inputs = weight, sample
                if rotation is not None and norm is not None:
                    turned = rotation.turn(weight * norm.gain)
                    inputs = rotation.turn(sample / norm.gain)
                elif rotation is not None and matrix.module in writing:
                    turned = rotation.turn(weight.T).T
                totals[number] += _rounding_error(turned, inputs) / max(whole, 1e-12)

    each_layer(session, change, full=False, label="choose a rotation")
    return totals


def _rounding_error(weight: torch.Tensor, inputs: torch.Tensor) -> float:
    from knowledge_base.techniques._packed import dequantise_groups, quantise_groups, usable_group_size

    size = usable_group_size(weight.shape[1], GROUP_SIZE) or weight.shape[1]
    step = max(1, len(weight) // _OUTPUTS_JUDGED)
    judged = weight[::step].contiguous()
    change = dequantise_groups(*quantise_groups(judged, size, BITS), BITS) - judged
    return step * (inputs @ change.T).square().sum().item()


# ---------------------------------------------------------------- multiplying it in


def _turn(session: Session, parts: _Parts, rotation: Rotation, ends: str) -> None:
    import torch
    from torch import nn

    model = session.model
    config = model.config.get_text_config()
    for done, (norm, readers) in enumerate(parts.norms):
        _turn_reading(norm, [reader.weight for reader in readers], rotation)
        session.progress("rotate", (done + 1) / len(parts.norms))
    for module, weight in parts.writers:
        weight.copy_(rotation.turn(weight.transpose(-1, -2)).transpose(-1, -2))
        if (bias := getattr(module, "bias", None)) is not None:
            bias.data.copy_(rotation.turn(bias.data))
    _turn_values(session)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = table.weight.data_ptr() == head.weight.data_ptr()
    for other in parts.tables:
        if other is not table:
            other.weight.data.copy_(rotation.turn(other.weight.data))
    if ends == "online" and tied:
        _turn_online(session, parts, rotation, table, head)
        return
    if tied:
        head.weight = nn.Parameter(head.weight.data.clone(), requires_grad=False)
        model.config.tie_word_embeddings = config.tie_word_embeddings = False
    _turn_reading(parts.last, list(torch.split(head.weight.data, _ROWS_AT_ONCE)), rotation)
    for rows in torch.split(table.weight.data, _ROWS_AT_ONCE):
        rows.copy_(rotation.turn(rows))


def _turn_online(session: Session, parts: _Parts, rotation: Rotation, table: Any, head: Any) -> None:
    import torch

    from knowledge_base.techniques._rotation_module import RotatedHead, RotatedTable

    names = {module: name for name, module in session.model.named_modules()}
    scale = float(getattr(table, "embed_scale", 1.0))
    signs = rotation.signs.to(torch.int8)
    entry = RotatedTable.in_place_of(table, keeps_mean=rotation.keeps_mean, scale=scale)
    leave = RotatedHead.in_place_of(head, keeps_mean=rotation.keeps_mean)
    norm = parts.last
    entry.signs, leave.signs = signs, signs.clone()
    leave.gain = norm.gain.clone()
    leave.shift = torch.zeros_like(leave.gain) if norm.bias is None else norm.bias.float().clone()
    norm.set_gain(torch.ones_like(leave.gain))
    if norm.bias is not None:
        norm.bias.zero_()
    session.model.set_submodule(names[table], entry)
    session.model.set_submodule(names[head], leave)


def _turn_reading(norm: Any, weights: list[torch.Tensor], rotation: Rotation) -> None:
    """Move a norm's gain into the weights that read it, and turn them; what the norm adds is turned with it.

    W (g z + b) = (W g R) (R^T z + R^T b / g)
    """
    import torch

    gain = norm.gain
    for weight in weights:
        weight.copy_(rotation.turn(weight * gain))
    if norm.bias is not None:
        norm.bias.copy_(rotation.turn(norm.bias / gain))
    norm.set_gain(torch.ones_like(gain))


def _turn_values(session: Session) -> None:
    """Turn the values of each head, and back where they are read; of attention whose form is known."""
    import torch

    from knowledge_base.techniques._blocks import decoder_layers
    from knowledge_base.techniques._folding import Rows, value_heads
    from knowledge_base.techniques._rotation_module import Rotation

    for layer in decoder_layers(session.model):
        for junction, size in value_heads(layer, session.model.config.get_text_config()):
            rows, out = junction.feeder, junction.readers[0].weight
            assert isinstance(rows, Rows)
            one = Rotation(torch.ones(size, device=out.device), keeps_mean=False)
            values = rows.weight[rows.rows].unflatten(0, (-1, size)).transpose(1, 2)
            rows.weight[rows.rows] = one.turn(values).transpose(1, 2).flatten(0, 1).to(out.dtype)
            if rows.bias is not None:
                rows.bias[rows.rows] = one.turn(rows.bias[rows.rows].unflatten(0, (-1, size))).flatten().to(out.dtype)
            out.copy_(one.turn(out.unflatten(1, (-1, size))).flatten(1))
