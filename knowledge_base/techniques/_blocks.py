"""The parts of a transformers decoder that compression acts on: layers, their matrices, their feed-forward part.

Found by structure, not by a list of models: decoder layers are the ModuleList as long as the config says;
matrices are its Linear and Conv1D modules and the 3-D expert weights; the feed-forward part is recognised by
the names its matrices have in transformers. What is not recognised is refused with CandidateFailed, never guessed.

`each_layer` walks a model once, from the first layer to the last: a layer is changed after its inputs were seen,
and the next layer sees what the changed one gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from knowledge_base.build_memory import ACTIVATION_BYTES_MAX
from knowledge_base.errors import CandidateFailed
from knowledge_base.types import Session

SAMPLE_ROWS = 256  # of the vectors that enter a matrix, kept as they are
PART_BYTES = 32 << 20  # of activations that a layer is run on at once: they stay near the processor, and small


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the model's decoder layers, in order.

    Raises:
        CandidateFailed: no list of modules is as long as the config's `num_hidden_layers`.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise CandidateFailed("unsupported", f"found no list of {count} decoder layers in {type(model).__name__}")


def is_matrix(module: Any) -> bool:
    """Return whether a module multiplies by one stored matrix. Gates with a few outputs are left alone."""
    return isinstance(module, nn.Linear | Conv1D) and min(module.weight.shape) >= 8


def matrix_of(module: Any) -> torch.Tensor:
    """Return a Linear's or Conv1D's weight as (out, in): a view, so writing to it changes the model."""
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


def experts_of(layer: nn.Module) -> tuple[str, Any] | None:
    """Return (name, module) of a layer's experts stored as 3-D weights, or None.

    Raises:
        CandidateFailed: they are stored in another way than gate_up_proj (E, 2I, H) and down_proj (E, H, I).
    """
    for name, module in layer.named_modules():
        up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
        if not (isinstance(up, nn.Parameter) and isinstance(down, nn.Parameter) and up.dim() == 3):
            continue
        transposed = getattr(module, "is_transposed", False) or up.shape != (
            down.shape[0],
            2 * down.shape[2],
            down.shape[1],
        )
        if transposed or len(list(module.parameters())) != 2 or not hasattr(module, "act_fn"):
            raise CandidateFailed("unsupported", f"experts of {type(module).__name__} are stored in an unknown way")
        return name, module
    return None


# ---------------------------------------------------------------- what a matrix sees


@dataclass(slots=True)
class Moments:
    """Second moments of the vectors that enter a matrix: their squares, and if asked all products; and a few of them."""

    squares: torch.Tensor  # (in,) float32: sum of x_j^2
    products: Any  # None or (in, in) float32: sum of x x^T
    rows: int
    peaks: torch.Tensor  # (in,) float32: largest |x_j|
    sample: torch.Tensor  # (up to SAMPLE_ROWS, in) float32: every n-th vector

    @classmethod
    def of(cls, inputs: torch.Tensor, *, full: bool, parts: int = 1) -> Moments:
        """Return the moments of inputs (..., in), the first of so many parts of them."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        products = x.T @ x if full else None
        squares = products.diagonal().clone() if products is not None else x.square().sum(0)
        step = max(1, -(-len(x) * parts // SAMPLE_ROWS))
        return cls(squares, products, x.shape[0], x.abs().amax(0), x[::step].clone())

    def add(self, other: Moments) -> None:
        """Take in the moments of another part."""
        self.squares += other.squares
        if self.products is not None:
            self.products += other.products
        self.rows += other.rows
        self.peaks = self.peaks.maximum(other.peaks)
        self.sample = torch.cat([self.sample, other.sample])


@dataclass(slots=True)
class Matrix:
    """One weight matrix of a layer and what entered it. `name` is the module's name inside the layer."""

    name: str
    module: Any
    weight: torch.Tensor  # (out, in), a view
    inputs: Moments
    expert: int | None = None
    part: str = ""  # of an expert: "gate_up" | "down"


@dataclass(slots=True)
class _Recorder:
    """Hooks on one layer's matrices for the length of its forward passes, one for each part of the calibration text."""

    layer: nn.Module
    full: bool
    parts: int = 1
    found: list[Matrix] = field(default_factory=list)
    handles: list = field(default_factory=list)
    last: tuple[torch.Tensor, Moments] | None = None  # query, key and value share one input

    def start(self) -> None:
        for name, module in self.layer.named_modules():
            if is_matrix(module):
                self.handles.append(module.register_forward_pre_hook(self._saw(name)))
        if experts := experts_of(self.layer):
            self.handles.append(experts[1].register_forward_pre_hook(self._saw_experts(experts[0])))

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.last = None

    def _moments(self, inputs: torch.Tensor) -> Moments:
        if self.last is None or self.last[0] is not inputs:
            self.last = (inputs, Moments.of(inputs, full=self.full, parts=self.parts))
        return self.last[1]

    def _saw(self, name: str) -> Callable:
        def hook(module: Any, args: tuple) -> None:
            earlier = next((m for m in self.found if m.name == name), None)
            if earlier is None:
                self.found.append(Matrix(name, module, matrix_of(module), self._moments(args[0])))
            elif self.last is None or self.last[0] is not args[0]:  # else added with the matrix that shares it
                earlier.inputs.add(self._moments(args[0]))

        return hook

    def _saw_experts(self, name: str) -> Callable:
        def hook(module: Any, args: tuple) -> None:
            states, chosen = args[0], args[1]  # (tokens, hidden), (tokens, experts for each token)
            for expert in range(module.gate_up_proj.shape[0]):
                routed = (chosen == expert).any(-1)
                # An expert that calibration never chose is judged on all tokens: some view beats none.
                seen = states[routed] if routed.any() else states
                gate, up = nn.functional.linear(seen, module.gate_up_proj[expert]).chunk(2, dim=-1)
                inner = module.act_fn(gate) * up
                for part, weight, inputs in (("gate_up", module.gate_up_proj, seen), ("down", module.down_proj, inner)):
                    moments = Moments.of(inputs, full=self.full)
                    self.found.append(Matrix(name, module, weight.data[expert], moments, expert, part))

        return hook


def calibration_rows(session: Session, bytes_per_token: float) -> torch.Tensor:
    """Return the calibration tokens (rows, tokens) on the model's device, as many rows as memory allows.

    Raises:
        CandidateFailed: the session has no calibration text.
    """
    if session.calibration is None or len(session.calibration) == 0:
        raise CandidateFailed(
            "build_error", "this technique needs calibration text", hint="give `calibration` in the spec"
        )
    rows = int(ACTIVATION_BYTES_MAX / (bytes_per_token * session.calibration.shape[1]))
    return session.calibration[: max(rows, 1)].to(next(session.model.parameters()).device)


def each_layer(
    session: Session,
    change: Callable[[int, nn.Module, list[Matrix]], None],
    *,
    full: bool,
    label: str,
    same: bool = False,
    whole: bool = False,
) -> None:
    """Run the calibration text through the model and change each layer once its inputs are known.

    After `change(index, layer, matrices)` the layer is run again, so the next layer is calibrated on what the
    changed one gives; `same` says that it gives what it gave, so that once is enough. `full` asks for all products of
    inputs (memory: in x in for each matrix), else squares only. A layer is run on a few windows at once, or, `whole`, on all:
    for callers with hooks of their own.

    Raises:
        CandidateFailed: no calibration text, or a changed layer gives a number that is not finite.
    """
    model, layers = session.model, decoder_layers(session.model)
    config = model.config.get_text_config()
    widest = max([config.hidden_size, *(max(p.shape[-2:]) for p in layers[0].parameters() if p.dim() > 1)])
    bytes_per_token = 4.0 * 4 * widest  # float32, four live copies
    tokens = calibration_rows(session, bytes_per_token)
    at_once = max(1, int(PART_BYTES / (bytes_per_token * tokens.shape[1])))

    def watched(index: int, layer: nn.Module, forward: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            del layer.forward  # `change` may call the layer
            # An expert that calibration never chose is judged on all tokens, which only the whole text can tell.
            size = len(tokens) if whole or experts_of(layer) else at_once
            parts = [slice(first, first + size) for first in range(0, len(tokens), size)]

            def outputs() -> Any:
                found = [forward(*_part(args, part, len(tokens)), **_part(kwargs, part, len(tokens))) for part in parts]
                return tuple(map(_joined, zip(*found))) if isinstance(found[0], tuple) else _joined(found)

            recorder = _Recorder(layer, full, len(parts))
            recorder.start()
            try:
                output = outputs()
            finally:
                recorder.stop()
            change(index, layer, recorder.found)
            if not same:
                del output
                output = outputs()
            states = output[0] if isinstance(output, tuple) else output
            if not torch.isfinite(states).all():
                raise CandidateFailed("non_finite", f"layer {index} gives numbers that are not finite after {label}")
            session.progress(label, (index + 1) / len(layers))
            return output

        return run

    model.eval()
    try:
        for index, layer in enumerate(layers):
            layer.forward = watched(index, layer, layer.forward)
        with torch.no_grad():
            model.base_model(tokens, use_cache=False)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _part(value: Any, part: slice, rows: int) -> Any:
    """Return what a layer was given, but of some rows: of every tensor that has one for each row."""
    if isinstance(value, dict):
        return {key: _part(one, part, rows) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_part(one, part, rows) for one in value)
    if isinstance(value, torch.Tensor) and value.dim() > 1 and len(value) == rows:
        return value[part]
    return value


def _joined(parts: Any) -> Any:
    """Return what a layer gave for the parts, as one."""
    return torch.cat(list(parts)) if isinstance(parts[0], torch.Tensor) else parts[0]


@torch.no_grad()
def mean_loss(model: nn.Module, tokens: torch.Tensor) -> float:
    """Return the mean next-token loss in nats over tokens (rows, tokens), one row at a time."""
    model.eval()
    total = 0.0
    for row in tokens:
        logits = model(row[None], use_cache=False).logits[0, :-1].float()
        total += nn.functional.cross_entropy(logits, row[1:]).item()
    return total / len(tokens)


# ---------------------------------------------------------------- the feed-forward part


# (matrices whose outputs are the channels, matrix whose inputs are) by the names transformers gives them
_FFN_NAMES = (
    (("gate_proj", "up_proj"), "down_proj"),  # llama, qwen, mistral, gemma, olmo
    (("gate_up_proj",), "down_proj"),  # phi3: gate and up in one matrix
    (("c_fc",), "c_proj"),  # gpt2
    (("dense_h_to_4h",), "dense_4h_to_h"),  # gpt_neox
    (("fc1",), "fc2"),  # phi, opt
)
_FFN_SIZE_KEYS = ("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")


@dataclass(slots=True)
class Ffn:
    """The feed-forward part of one layer. For experts `ups` and `down` are empty and `experts` is set."""

    size: int  # channels
    holder: Any
    ups: tuple[Any, ...] = ()
    down: Any = None
    experts: Any = None


def ffn_of(layer: nn.Module) -> Ffn:
    """Return a decoder layer's feed-forward part; of a mixture of experts the routed experts.

    Raises:
        CandidateFailed: none of the known shapes is there.
    """
    if experts := experts_of(layer):
        return Ffn(experts[1].down_proj.shape[2], experts[1], experts=experts[1])
    for holder in layer.modules():
        for up_names, down_name in _FFN_NAMES:
            parts = [getattr(holder, name, None) for name in (*up_names, down_name)]
            if all(isinstance(part, nn.Linear | Conv1D) for part in parts):
                return Ffn(matrix_of(parts[-1]).shape[1], holder, ups=tuple(parts[:-1]), down=parts[-1])
    raise CandidateFailed("unsupported", f"found no feed-forward part in {type(layer).__name__}")


def ffn_config_key(model: Any, ffn: Ffn) -> str:
    """Return the config field that holds the number of channels.

    Raises:
        CandidateFailed: no field does, so a smaller model could not be described by its config.
    """
    config = model.config.get_text_config()
    for key in _FFN_SIZE_KEYS:
        if key.startswith("moe") and ffn.experts is None:
            continue
        value = getattr(config, key, "absent")
        if value == ffn.size or (key == "n_inner" and value is None and ffn.size == 4 * config.hidden_size):
            return key
    raise CandidateFailed("unsupported", f"the config of {type(model).__name__} has no field for {ffn.size} channels")


def keep_outputs(module: Any, keep: torch.Tensor) -> None:
    """Keep the outputs `keep` of a Linear or Conv1D."""
    if isinstance(module, Conv1D):
        module.weight = nn.Parameter(module.weight.data[:, keep].contiguous())
        module.nf = len(keep)
    else:
        module.weight = nn.Parameter(module.weight.data[keep].contiguous())
        module.out_features = len(keep)
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias.data[keep].contiguous())


def keep_inputs(module: Any, weight: torch.Tensor) -> None:
    """Store `weight` (out, fewer inputs) as the matrix of a Linear or Conv1D, in its own dtype."""
    weight = weight.to(module.weight.dtype)
    if isinstance(module, Conv1D):
        module.weight = nn.Parameter(weight.T.contiguous())
        module.nx = weight.shape[1]
    else:
        module.weight = nn.Parameter(weight.contiguous())
        module.in_features = weight.shape[1]


def shrink_ffn(ffn: Ffn, keep: torch.Tensor, down: torch.Tensor) -> None:
    """Keep the channels `keep` (sorted indices) and store `down` (out, kept) as the new down matrix of a dense part."""
    for up in ffn.ups:
        fused = matrix_of(up).shape[0] == 2 * ffn.size
        keep_outputs(up, torch.cat([keep, keep + ffn.size]) if fused else keep)
    keep_inputs(ffn.down, down)
    if hasattr(ffn.holder, "intermediate_size"):
        ffn.holder.intermediate_size = len(keep)


def shrink_experts(ffn: Ffn, keeps: list[torch.Tensor], downs: list[torch.Tensor]) -> None:
    """Keep the channels `keeps[e]` of each expert and store `downs[e]` (hidden, kept) as its new down matrix."""
    experts = ffn.experts
    up, down = experts.gate_up_proj.data, experts.down_proj.data
    experts.gate_up_proj = nn.Parameter(torch.stack([up[e][torch.cat([k, k + ffn.size])] for e, k in enumerate(keeps)]))
    experts.down_proj = nn.Parameter(torch.stack(downs).to(down.dtype))
    if hasattr(experts, "intermediate_dim"):
        experts.intermediate_dim = len(keeps[0])
