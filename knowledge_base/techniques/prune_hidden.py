"""Remove directions of the hidden state: every matrix of the model gets narrower on the side that meets it.

The state that layers add to is turned to its principal components and the least of them are deleted (SliceGPT,
arXiv:2401.15024). SliceGPT turns anew between any two blocks, which takes a matrix in every residual connection; here one
basis serves all layers. That deletes a little more of what some layer uses, but the result is a plain dense model
with a smaller hidden_size, which config.json describes, every engine runs and every later step can work on.

What reads the state is corrected for what was deleted: with x the normalised state of the unchanged model and y that of
the narrow one on the same text, each reading matrix W becomes W A, A = argmin sum |x - A y|^2 over the calibrated tokens.
Both models run side by side, a layer at a time.

A head that shares the embedding's table goes on sharing it: logits are T diag(g) x with g the last norm's gain, so in the
basis diag(g)^1/2 Q one table T diag(g)^1/2 Q serves both ends. That basis is not quite orthogonal, so norms see lengths
slightly changed, which A corrects on average.

Where norms subtract the mean first, states are turned within the space that has none, and the basis of the narrow model
keeps it so: LayerNorm stays what it is, and one direction goes with the mean. What such a norm adds moves into the biases
behind it. A norm behind a matrix (Gemma 2 and 3) keeps its place: its gain moves into the matrix, which changes the length
it divides by, and gets anew the one that fits the calibrated states best.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from knowledge_base.techniques._quality import loss_after
from knowledge_base.techniques.prune_width import kept_channels
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="remove directions of the hidden state: a narrower dense model",
    stage="compress",
    family="hidden",
    implements=("slicegpt",),
    knobs={"keep": Choice(options=(0.625, 0.75, 0.875), default=0.875)},
    saves=(
        "weights_bytes", "artefact_bytes", "peak_memory_bytes", "network_bytes_per_start", "ttft_s", "tpot_s",
        "latency_s", "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token", "cost_usd_per_token",
    ),
    spends=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "build_s"),
    needs_calibration=True,
    sources=("arXiv:2401.15024",),
)  # fmt: skip

_PPL = "WikiText-2 perplexity"
EVIDENCE = tuple(
    Evidence(model=model, setting=setting, quantity=_PPL, baseline=baseline, value=value, source="arXiv:2401.15024")
    for model, setting, baseline, value in (
        ("Llama-2-7B", "20% sliced", 5.47, 6.64), ("Llama-2-7B", "30% sliced", 5.47, 8.12),
        ("OPT-6.7B", "20% sliced", 10.85, 11.48), ("OPT-6.7B", "30% sliced", 10.85, 12.51),
    )
)  # fmt: skip

_BY_HEADS = ("gpt2", "opt")  # transformers builds them only where heads divide the hidden size
DAMPING = 0.01


def kept_size(architecture: str, hidden_size: int, head_size: int, keep: float) -> int:
    """Return how many directions stay: as many as of channels, or where heads must divide them the nearest such number.

    >>> kept_size("llama", 576, 64, 0.875), kept_size("gpt2", 768, 64, 0.875), kept_size("gpt2", 1600, 64, 0.875)
    (512, 672, 1400)
    """
    kept, heads = kept_channels(hidden_size, keep), max(hidden_size // max(head_size, 1), 1)
    if architecture not in _BY_HEADS or kept % heads == 0:
        return kept
    grain = heads * next((g for g in (16, 8, 4, 2) if 16 * heads * g <= hidden_size), 1)
    return max(round(keep * hidden_size / grain), 1) * grain


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.attention_layers < model.layers:
        return f"{model.architecture} has layers without attention, which mix the hidden state in their own way"
    return None


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting means nothing for that model, or None."""
    if kept_size(model.architecture, model.hidden_size, model.head_size, knobs["keep"]) >= model.hidden_size:
        return f"keep={knobs['keep']} of a hidden size of {model.hidden_size} rounds to all of it"
    return None


def rewrite(demand: Demand, *, keep: float) -> Demand:
    """Return the demand with every matrix narrower on one side; the model in it has the new hidden size."""
    model = demand.model
    kept = kept_size(model.architecture, model.hidden_size, model.head_size, keep)
    share = kept / model.hidden_size
    narrower = model.but(
        hidden_size=kept, linear_params=round(model.linear_params * share),
        embedding_params=round(model.embedding_params * share), params_total=round(model.params_total * share),
        params_active=round(model.params_active * share),
    )  # fmt: skip
    activations = (3 * model.ffn_size + 4 * kept) / (3 * model.ffn_size + 4 * model.hidden_size)
    demand = loss_after(demand, "slicegpt", sparsity=1 - share)
    return demand.but(
        model=narrower,
        linear_params=demand.linear_params * share,
        linear_bytes=demand.linear_bytes * share,
        embedding_bytes=demand.embedding_bytes * share,
        head_stored_bytes=demand.head_stored_bytes * share,
        head_read_bytes=demand.head_read_bytes * share,
        other_bytes=demand.other_bytes * share,
        linear_flop_per_token=demand.linear_flop_per_token * share,
        head_flop_per_token=demand.head_flop_per_token * share,
        activation_bytes_per_token=demand.activation_bytes_per_token * activations,
        build_flop=demand.build_flop + 16_384 * (6 * demand.linear_params + 12 * demand.layers * model.hidden_size**2),
        because=(
            *demand.because, f"hidden size {kept} of {model.hidden_size}: {1 - share:.0%} fewer weights everywhere"
        ),
    )  # fmt: skip


def execute(session: Session, *, keep: float) -> None:
    """Choose a basis from the calibrated states, then narrow the model a layer at a time.

    Raises:
        CandidateFailed: "unsupported", norms of another kind or in other places than before attention and feed-forward
            part (and behind both), or a matrix whose place is not known.
    """
    import torch
    from torch import nn

    from knowledge_base.errors import CandidateFailed
    from knowledge_base.techniques._blocks import calibration_rows, decoder_layers, ffn_of
    from knowledge_base.techniques._structure import attention_of

    model, layers = session.model, decoder_layers(session.model)
    config = model.config.get_text_config()
    size = config.hidden_size
    attentions = [attention_of(layer) for layer in layers]
    count = kept_size(config.model_type, size, attentions[0].head_size, keep)
    if count >= size:
        raise CandidateFailed("unsupported", f"keep={keep} of a hidden size of {size} rounds to all of it")
    last = _last_norm(model, layers, size)
    norm = _facts(last, size)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight.data_ptr() == table.weight.data_ptr()
    if head is None or (getattr(head, "bias", None) is not None and tied):
        raise CandidateFailed("unsupported", "this model's head is no plain matrix")
    if tied and not bool((norm.gain > 0).all()):
        raise CandidateFailed("unsupported", "the last norm turns signs round, so the head cannot share the table")
    channels = ffn_of(layers[0]).size
    tokens = calibration_rows(session, bytes_per_token=4.0 * (8 * size + 4 * channels))

    stretch = (norm.gain / norm.gain.mean()).sqrt() if tied else torch.ones_like(norm.gain)
    basis = _basis(model, layers, last, tokens, stretch, count, centred=norm.centred)
    narrow = _Narrow(
        into=stretch[:, None] * basis, back=basis / stretch[:, None],
        scale=(count / size) ** 0.5 if hasattr(table, "embed_scale") else 1.0,
    )  # fmt: skip

    def begin(layer: Any, args: tuple, kwargs: dict) -> None:
        if narrow.state is None:
            narrow.state = _into(args[0] if args else kwargs["hidden_states"], narrow)

    def end(index: int) -> Any:
        def hook(layer: Any, args: tuple, kwargs: dict, output: Any) -> None:
            wide, narrow.wide = narrow.wide, {}
            narrow.written.clear()
            _require_places(layer, wide, norm.centred)
            kwargs = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            _narrow_layer(layer, narrow, wide, args[1:], kwargs, size, count)
            if not bool(torch.isfinite(narrow.state).all()):
                raise CandidateFailed("non_finite", f"layer {index} gives numbers that are not finite when narrowed")
            session.progress("prune_hidden", (index + 1) / len(layers))

        return hook

    handles = [layers[0].register_forward_pre_hook(begin, with_kwargs=True)]
    for index, layer in enumerate(layers):
        handles += [norm.register_forward_hook(_watch(narrow, norm, size)) for norm in _norms(layer, size)]
        for module in filter(_weights, layer.modules()):
            handles.append(module.register_forward_pre_hook(_reading(narrow, module)))
            handles.append(module.register_forward_hook(_writing(narrow, module, size)))
        handles.append(layer.register_forward_hook(end(index), with_kwargs=True))
    handles.append(last.register_forward_hook(_watch(narrow, last, size)))
    model.eval()
    try:
        with torch.no_grad():
            model.base_model(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()

    inside = set(layers.modules())
    with torch.no_grad():
        wide = narrow.wide[id(last)].states
        _set_norm(last, torch.ones(count))
        thin = last.forward(narrow.state)
        for other in (m for m in model.modules() if isinstance(m, nn.Embedding) and m not in inside):
            _replace(other, "weight", other.weight.data.float() @ narrow.into)
        if tied:
            added = None if norm.shift is None else head.weight.data.float() @ norm.shift
            wanted = (wide * (norm.gain / stretch)) @ basis
            flat = thin.flatten(0, -2).float()
            _set_norm(last, (wanted.flatten(0, -2) * flat).sum(0) / flat.square().sum(0).clamp_min(1e-12))
            head.weight, head.in_features = table.weight, count
            if added is not None:
                _shift(last, [head], [added])
        else:
            _correct_readers(last, [head], norm, _correction(wide, thin, narrow.back))
        if hasattr(table, "embed_scale"):
            table.embed_scale.fill_(count**0.5)
            table.scalar_embed_scale = count**0.5
    _describe(model, attentions, channels, size, count)
    session.notes["prune_hidden.size"] = [size, count]


@dataclass(slots=True)
class _Facts:
    """What a norm does beside dividing by the root mean square."""

    gain: Any  # (size,) float32
    shift: Any  # (size,) float32, or None
    centred: bool  # the mean is subtracted first


@dataclass(slots=True)
class _Seen:
    """What a norm gave in the unchanged model, before its gain, and the modules that read it."""

    states: Any
    output: Any  # what it gave: kept, so that no other tensor takes its place in memory
    facts: _Facts
    writer: Any  # the matrix whose output it norms, or None: the hidden state
    readers: list[Any] = field(default_factory=list)


@dataclass(slots=True)
class _Narrow:
    """The narrow model beside the unchanged one: how states go in and back, and its own state after the last layer."""

    into: Any  # (size, count): x -> y
    back: Any  # (size, count): y -> x
    scale: float  # of the narrow states: an embedding that is multiplied by the root of the hidden size loses some
    state: Any = None
    wide: dict[int, _Seen] = field(default_factory=dict)  # by the norm's id
    written: list[tuple[Any, Any]] = field(default_factory=list)  # (matrix, what it gave) since the last norm
    watching: bool = True  # the unchanged model; False while its layer runs narrow


def _into(states: Any, narrow: _Narrow) -> Any:
    return (narrow.scale * (states.float() @ narrow.into)).to(states.dtype)


def _weights(module: Any) -> bool:
    """Return whether a module has matrices of its own: Linear, router, experts."""
    return any(p.dim() >= 2 for p in module.parameters(recurse=False))


def _norms(layer: Any, size: int) -> list[Any]:
    """Return the norms of the hidden state in a layer, or in the part of a model outside the layers."""
    return [
        m for m in layer.modules()
        if not list(m.children()) and [tuple(p.shape) for p in m.parameters(recurse=False)][:1] == [(size,)]
    ]  # fmt: skip


def _last_norm(model: Any, layers: Any, size: int) -> Any:
    from knowledge_base.errors import CandidateFailed

    inside = {id(m) for m in layers.modules()}
    found = [m for m in _norms(model, size) if id(m) not in inside]
    if len(found) != 1:
        raise CandidateFailed("unsupported", f"found {len(found)} norms behind the layers, expected one")
    return found[0]


def _require_places(layer: Any, wide: dict[int, _Seen], centred: bool) -> None:
    """Refuse a layer whose norms leave its hidden state no freedom to turn.

    Raises:
        CandidateFailed: "unsupported".
    """
    from knowledge_base.errors import CandidateFailed

    before = [seen for seen in wide.values() if seen.readers and seen.writer is None]
    behind = [seen for seen in wide.values() if not seen.readers and seen.writer is not None]
    if len(before) not in (1, 2) or len(behind) not in (0, 2) or len(before) + len(behind) != len(wide):
        raise CandidateFailed(
            "unsupported",
            f"{type(layer).__name__} has {len(wide)} norms of the hidden state; only those before attention and feed-forward "
            "part, and behind both, leave it free to turn",
        )
    if any(seen.facts.centred != centred for seen in wide.values()) or (behind and centred):
        raise CandidateFailed("unsupported", f"{type(layer).__name__} has norms of several kinds")


def _facts(norm: Any, size: int) -> _Facts:
    """Return what a norm of whatever form does: read off what it makes of ones, and of ones whose signs take turns.

    Raises:
        CandidateFailed: "unsupported", it does more than that.
    """
    import torch

    from knowledge_base.errors import CandidateFailed

    ones = torch.ones(size, dtype=norm.weight.dtype, device=norm.weight.device)
    turns = ones.clone()
    turns[1::2] = -1
    with torch.no_grad():  # past the hooks
        level, up, down = (norm.forward(3 * x).float() for x in (ones, turns, -turns))
    gain, shift = turns.float() * (up - down) / 2, (up + down) / 2
    centred = torch.allclose(level, shift, rtol=1e-2, atol=1e-3)
    divided = torch.allclose(level - shift, gain, rtol=1e-2, atol=1e-3)
    own = getattr(norm, "bias", None)
    known = set(dict(norm.named_parameters())) <= {"weight", "bias"}
    if not known or not (centred or divided) or (own is None and bool(shift.any())):
        raise CandidateFailed(
            "unsupported",
            f"{type(norm).__name__} does more than divide by the root mean square, its mean subtracted or not, so states "
            "cannot be turned",
        )
    return _Facts(gain, None if own is None else shift, centred)


def _set_norm(norm: Any, gain: Any) -> None:
    """Make a norm one with that gain and so many channels, whether it stores the gain or what it adds to one."""
    import torch

    offset = float((_facts(norm, norm.weight.numel()).gain - norm.weight.data.float()).mean().round())
    weight = gain.to(norm.weight.device) - offset
    norm.weight = torch.nn.Parameter(weight.to(norm.weight.dtype), requires_grad=False)
    if getattr(norm, "bias", None) is not None:
        norm.bias = torch.nn.Parameter(torch.zeros_like(norm.weight), requires_grad=False)
    if isinstance(getattr(norm, "normalized_shape", None), tuple):
        norm.normalized_shape = (len(gain),)


def _watch(narrow: _Narrow, norm: Any, size: int) -> Any:
    def hook(module: Any, args: tuple, output: Any) -> None:
        if not narrow.watching:
            return
        facts, states = _facts(norm, size), args[0].float()
        if facts.centred:
            states = states - states.mean(-1, keepdim=True)
        states = states * states.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
        writer = next((module for module, given in narrow.written if _same(given, args[0])), None)
        narrow.written.clear()
        narrow.wide[id(norm)] = _Seen(states, output, facts, writer)

    return hook


def _reading(narrow: _Narrow, module: Any) -> Any:
    def hook(_: Any, args: tuple) -> None:
        if args and narrow.watching:
            for seen in narrow.wide.values():
                if _same(args[0], seen.output) and module not in seen.readers:
                    seen.readers.append(module)

    return hook


def _writing(narrow: _Narrow, module: Any, size: int) -> Any:
    import torch

    def hook(_: Any, args: tuple, output: Any) -> None:
        if narrow.watching and isinstance(output, torch.Tensor) and output.shape[-1] == size:
            narrow.written.append((module, output))

    return hook


def _same(a: Any, b: Any) -> bool:
    """Return whether two tensors lie in the same memory: one may be a view of the other."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _basis(model: Any, layers: Any, last: Any, tokens: Any, stretch: Any, count: int, *, centred: bool) -> Any:
    """Return the principal directions of the stretched states that norms see, all layers alike: (size, count).

    Of centred states there is one fewer, and none of what they make in the narrow space has a mean.
    """
    import torch

    products = torch.zeros(len(stretch), len(stretch), dtype=torch.float64, device=stretch.device)

    def see(module: Any, args: tuple) -> None:
        states = args[0].flatten(0, -2).float()
        if centred:
            states = states - states.mean(-1, keepdim=True)
        states = states * stretch
        if centred:  # what is left of the mean that a table shared with the head cannot leave out
            states = states - (states @ stretch)[:, None] * (stretch / stretch.square().sum())
        states = states * states.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
        products.add_((states.T @ states).double())

    writers = {id(norm) for layer in layers for norm in _norms(layer, len(stretch))}
    norms = [norm for norm in model.modules() if id(norm) in writers] + [last]
    handles = [norm.register_forward_pre_hook(see) for norm in norms]
    model.eval()
    try:
        with torch.no_grad():
            for row in tokens:
                model.base_model(row[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    vectors = torch.linalg.eigh(products).eigenvectors.flip(1)[:, : count - centred]
    # The sign of an eigenvector is arbitrary: the largest entry is made positive, so that one seed gives one artefact.
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    vectors = vectors * signs
    return (vectors @ _without_mean(count, vectors) if centred else vectors).float()


def _without_mean(count: int, like: Any) -> Any:
    """Return count - 1 orthonormal rows of `count` numbers that add to nothing: all but one of a reflection."""
    import torch

    mirror = torch.full((count,), count**-0.5, dtype=like.dtype, device=like.device)
    mirror[0] -= 1
    mirror = mirror / mirror.norm()
    return torch.eye(count, dtype=like.dtype, device=like.device)[1:] - 2 * mirror[1:, None] * mirror


def _correction(wide: Any, thin: Any, back: Any) -> Any:
    """Return A (size, count) with wide ~ A thin, drawn towards the plain way back where text is short."""
    import torch

    x, y = wide.flatten(0, -2).double(), thin.flatten(0, -2).double()
    gram = y.T @ y
    start = back.double()
    start = start * ((x * (y @ start.T)).sum() / (y @ start.T).square().sum().clamp_min(1e-12))
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return (start + torch.linalg.solve(damped, (x.T @ y - start @ gram).T).T).float()


def _matrix(module: Any, name: str) -> Any:
    """Return a module's weights as (..., out, in), float32."""
    from transformers.pytorch_utils import Conv1D

    weight = getattr(module, name).data.float()
    return weight.T if isinstance(module, Conv1D) else weight


def _replace(module: Any, name: str, values: Any) -> None:
    """Store values, (..., out, in) of a matrix, in the module's own dtype and form, and the sizes they have."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    old = getattr(module, name)
    if isinstance(module, Conv1D) and name == "weight":
        values = values.T
    setattr(module, name, nn.Parameter(values.to(old.dtype).contiguous(), requires_grad=False))
    if name != "weight":
        return
    if isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]


def _narrow_layer(
    layer: Any, narrow: _Narrow, wide: dict[int, _Seen], args: tuple, kwargs: dict, size: int, count: int
) -> None:
    """Make one layer narrow and move the narrow state through it; readers are corrected as their states appear."""
    import torch

    from knowledge_base.errors import CandidateFailed

    readers = {id(m) for seen in wide.values() for m in seen.readers}
    behind = {id(seen.writer): seen.facts.gain for seen in wide.values() if seen.writer is not None}
    experts = next((m for m in layer.modules() if getattr(m, "down_proj", None) is not None and _weights(m)), None)
    for module in layer.modules():
        if not _weights(module) or (id(module) in readers and module is not experts):
            continue
        name = "down_proj" if module is experts else "weight"
        weight = _matrix(module, name)
        if weight.shape[-2] != size:
            raise CandidateFailed("unsupported", f"the place of a {type(module).__name__} in the layer is not known")
        into = narrow.into * behind[id(module)][:, None] if id(module) in behind else narrow.into
        _replace(module, name, narrow.scale * (into.T @ weight))
        if getattr(module, "bias", None) is not None:
            _replace(module, "bias", narrow.scale * (module.bias.data.float() @ into))
    handles = []
    for norm in _norms(layer, size):
        handles.append(norm.register_forward_hook(_correct(wide[id(norm)], narrow, experts)))
        _set_norm(norm, torch.ones(count))
    for module in layer.modules():
        for attribute in ("hidden_dim", "hidden_size"):
            if type(getattr(module, attribute, None)) is int and getattr(module, attribute) == size:
                setattr(module, attribute, count)
    narrow.watching = False
    try:
        output = layer.forward(narrow.state, *args, **kwargs)
    finally:
        narrow.watching = True
        for handle in handles:
            handle.remove()
    narrow.state = output[0] if isinstance(output, tuple) else output


def _correct(seen: _Seen, narrow: _Narrow, experts: Any) -> Any:
    """Return a hook that, once the narrow state is normalised, corrects the matrices that read it, or the norm itself."""

    def hook(norm: Any, args: tuple, output: Any) -> Any:
        if seen.writer is None:
            _correct_readers(norm, seen.readers, seen.facts, _correction(seen.states, output, narrow.back), experts)
            return output if seen.facts.shift is None else output + norm.bias
        wanted = narrow.scale * ((seen.states * seen.facts.gain) @ narrow.into)
        flat = output.flatten(0, -2).float()
        gain = (wanted.flatten(0, -2) * flat).sum(0) / flat.square().sum(0).clamp_min(1e-12)
        _set_norm(norm, gain)
        return (output.float() * gain).to(output.dtype)

    return hook


def _correct_readers(norm: Any, readers: list[Any], facts: _Facts, change: Any, experts: Any = None) -> None:
    """Give the matrices behind a norm the columns of the narrow state, and what the norm added."""
    from knowledge_base.errors import CandidateFailed

    added = []
    for module in readers:
        name = "gate_up_proj" if module is experts else "weight"
        weight = _matrix(module, name)
        if facts.shift is not None:
            if module is experts:
                raise CandidateFailed("unsupported", f"{type(module).__name__} has no place for what a norm adds")
            added.append(weight @ facts.shift)
        _replace(module, name, (weight * facts.gain) @ change)
    if added:
        _shift(norm, readers, added)


def _shift(norm: Any, readers: list[Any], added: list[Any]) -> None:
    """Let matrices (out, count) behind a norm give `added` (out,) more: by their biases, or where there is none by the norm's.

    One norm's bias cannot serve all outputs of all matrices, so it is the one with the least squared error, and the
    matrices that have a bias make up for the rest.
    """
    import torch

    bare = [(_matrix(m, "weight"), a) for m, a in zip(readers, added) if getattr(m, "bias", None) is None]
    if bare:
        weight, wanted = torch.cat([w for w, _ in bare]).double(), torch.cat([a for _, a in bare]).double()
        gram = weight.T @ weight
        damped = gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        norm.bias.data.copy_(torch.linalg.solve(damped, weight.T @ wanted))
    for module, more in zip(readers, added):
        if getattr(module, "bias", None) is not None:
            module.bias.data.add_((more - _matrix(module, "weight") @ norm.bias.data.float()).to(module.bias.dtype))


def _describe(model: Any, attentions: list[Any], channels: int, size: int, count: int) -> None:
    """Let config.json tell the new size; where heads follow from it, structure.json tells those of before."""
    from knowledge_base.techniques._structure import describe_head_size

    config = model.config.get_text_config()
    config.hidden_size = count
    if getattr(config, "n_inner", channels) is None:
        config.n_inner = channels
    if getattr(config, "word_embed_proj_dim", count) == size:
        config.word_embed_proj_dim = count
    for module in model.modules():
        for name in ("hidden_dim", "hidden_size"):
            if getattr(module, name, None) == size and isinstance(getattr(module, name), int):
                setattr(module, name, count)
    for attention in attentions:
        describe_head_size(config, attention)
