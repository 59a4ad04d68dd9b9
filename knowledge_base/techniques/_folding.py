"""Which norm or matrix feeds which matrices, so that scales and rotations fold into the weights on both sides.

What enters a matrix may be divided by a scale for each channel if its columns are multiplied by it: the model computes
what it did, and rounds otherwise. Norms and the modules that read their output are found by watching one forward pass,
values and gated channels by the names transformers gives their matrices. `unchanged` proves what was done on the model
itself, so an architecture that uses its weights in some other way is refused, never broken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques._blocks import Matrix, decoder_layers, experts_of, matrix_of
from knowledge_base.types import Session

PROOF_TOKENS = 64
# KL divergence, nats for each token, that rounding of re-written weights may cause: float32, and 16-bit dtypes.
_ROUNDING_NATS = {torch.float32: 1e-4}
_ROUNDING_NATS_16 = 1e-2


@dataclass(slots=True)
class Reader:
    """A weight (..., in) that multiplies a junction's channels; of experts one for each."""

    module: Any
    weight: torch.Tensor  # a view: writing to it changes the model
    expert: int | None = None
    part: str = ""  # as Matrix has it

    def inputs_of(self, matrices: Sequence[Matrix]) -> Matrix | None:
        """Return what calibration saw of this weight, if it watched it."""
        key = (self.module, self.expert, self.part)
        return next((m for m in matrices if (m.module, m.expert, m.part) == key), None)


@dataclass(slots=True)
class Norm:
    """A norm that scales each channel: by `weight`, or by 1 + weight as Gemma's do."""

    module: Any
    offset: float
    centred: bool  # it subtracts the mean first

    @property
    def gain(self) -> torch.Tensor:
        """What each channel is multiplied by, float32."""
        return self.module.weight.data.float() + self.offset

    @property
    def bias(self) -> torch.Tensor | None:
        """What is added to each channel after, or None."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.data

    def set_gain(self, gain: torch.Tensor) -> None:
        """Multiply each channel by `gain` from now on."""
        self.module.weight.data.copy_(gain - self.offset)

    def divide(self, scales: torch.Tensor) -> None:
        """Give each channel divided by its scale."""
        self.set_gain(self.gain / scales)
        if self.bias is not None:
            self.bias.div_(scales)


@dataclass(slots=True)
class Rows:
    """The rows of a matrix that make a junction's channels: `weight` (out, in) and `bias` (out,) are views."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    rows: torch.Tensor  # (channels,)

    def divide(self, scales: torch.Tensor) -> None:
        """Give each channel divided by its scale."""
        self.weight[self.rows] /= scales[:, None].to(self.weight.dtype)
        if self.bias is not None:
            self.bias[self.rows] /= scales.to(self.bias.dtype)


@dataclass(slots=True)
class Junction:
    """Channels that one feeder gives and some readers multiply."""

    feeder: Norm | Rows
    readers: list[Reader]
    channel_of: torch.Tensor | None = None  # (in,): which channel each input is, where heads share values

    def spread(self, scales: torch.Tensor) -> torch.Tensor:
        """Return the scale of each input of the readers from those of the channels."""
        return scales if self.channel_of is None else scales[self.channel_of]

    def gathered(self, values: torch.Tensor, how: str) -> torch.Tensor:
        """Return one figure for each channel from those of the inputs that share it: "mean" or "amax"."""
        if self.channel_of is None:
            return values
        channels = int(self.channel_of.max()) + 1
        return values.new_zeros(channels).scatter_reduce_(0, self.channel_of, values, how, include_self=False)


def fold(junction: Junction, scales: torch.Tensor) -> None:
    """Divide every channel by its scale where it is made and multiply it back where it is read."""
    junction.feeder.divide(scales)
    spread = junction.spread(scales)
    for reader in junction.readers:
        reader.weight.mul_(spread)


# ---------------------------------------------------------------- finding them


@dataclass(slots=True)
class Seen:
    """What one forward pass showed: the norms with the modules that read them, and those with none that is known."""

    readers: dict[nn.Module, list[Any]] = field(default_factory=dict)  # norm: modules its output enters
    norms: dict[nn.Module, Norm] = field(default_factory=dict)


@torch.no_grad()
def watch(session: Session) -> Seen:
    """Run a few tokens through the model and see which modules read which norm's output.

    Raises:
        CandidateFailed: "build_error" without calibration text; "unsupported", a norm scales in an unknown way.
    """
    model, seen, handles = session.model, Seen(), []
    alive: dict[int, tuple[nn.Module, torch.Tensor]] = {}  # by address; kept, so that none is used twice

    def after_norm(module: Any, args: tuple, output: torch.Tensor) -> None:
        alive[output.data_ptr()] = (module, output)
        seen.readers.setdefault(module, [])
        seen.norms[module] = _norm_of(module, args[0], output)

    def before_reader(module: Any, args: tuple) -> None:
        if args and isinstance(args[0], torch.Tensor) and args[0].data_ptr() in alive:
            norm, output = alive[args[0].data_ptr()]
            if args[0].numel() == output.numel() and module not in seen.readers[norm]:
                seen.readers[norm].append(module)

    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if _is_norm(module, own):
            handles.append(module.register_forward_hook(after_norm))
        elif any(p.dim() > 1 for p in own.values()):
            handles.append(module.register_forward_pre_hook(before_reader))
    try:
        model.eval()
        model(proof_tokens(session), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def proof_tokens(session: Session) -> torch.Tensor:
    """Return a few calibration tokens (1, tokens) on the model's device.

    Raises:
        CandidateFailed: the session has no calibration text.
    """
    if session.calibration is None or len(session.calibration) == 0:
        raise CandidateFailed(
            "build_error", "this technique needs calibration text", hint="give `calibration` in the spec"
        )
    return session.calibration[:1, :PROOF_TOKENS].to(next(session.model.parameters()).device)


def _is_norm(module: nn.Module, own: dict[str, nn.Parameter]) -> bool:
    vectors = "weight" in own and own["weight"].dim() == 1 and set(own) <= {"weight", "bias"}
    return vectors and not any(True for _ in module.children())


def _norm_of(module: Any, inputs: torch.Tensor, output: torch.Tensor) -> Norm:
    """Return what a norm does, read off what it gives: by weight or 1 + weight, with or without the mean.

    Raises:
        CandidateFailed: "unsupported", it does something else.
    """
    x, weight, wanted = inputs.float(), module.weight.float(), output.float()
    if (bias := getattr(module, "bias", None)) is not None:
        wanted = wanted - bias.float()
    errors: dict[tuple[float, bool], float] = {}
    for centred in (False, True):
        from_mean = x - x.mean(-1, keepdim=True) if centred else x
        plain = from_mean * torch.rsqrt(from_mean.square().mean(-1, keepdim=True) + 1e-6)
        errors |= {(offset, centred): (plain * (weight + offset) - wanted).norm().item() for offset in (0.0, 1.0)}
    best = (0.0, True) if isinstance(module, nn.LayerNorm) else min(errors, key=lambda found: errors[found])
    if not errors[best] <= 0.1 * wanted.norm().item():
        raise CandidateFailed("unsupported", f"{type(module).__name__} scales its channels in an unknown way")
    return Norm(module, *best)


def readers_of(module: Any) -> list[Reader] | None:
    """Return the weights of a module that multiply its input, or None where that is not known."""
    if isinstance(module, nn.Linear | Conv1D):
        return [Reader(module, matrix_of(module))]
    own = dict(module.named_parameters(recurse=False))
    if set(own) == {"gate_up_proj", "down_proj"} and own["gate_up_proj"].dim() == 3:
        return [Reader(module, weight, e, "gate_up") for e, weight in enumerate(own["gate_up_proj"].data)]
    routers = [p for p in own.values() if p.dim() == 2]
    if len(routers) == 1 and set(own) <= {"weight", "bias", "e_score_correction_bias"}:
        return [Reader(module, routers[0].data)]
    return None


def junctions(session: Session) -> list[list[Junction]]:
    """Return for each decoder layer the junctions that scales can be folded into, values and gated channels first.

    Raises:
        CandidateFailed: "unsupported", there is none; "build_error" without calibration text.
    """
    seen, config = watch(session), session.model.config.get_text_config()
    found = []
    for layer in decoder_layers(session.model):
        inside = set(layer.modules())
        of_layer = [*(junction for junction, _ in value_heads(layer, config)), *_gated(layer)]
        for norm, modules in seen.readers.items():
            readers = [readers_of(module) for module in modules]
            if norm in inside and readers and all(r is not None and set(modules) <= inside for r in readers):
                of_layer.append(Junction(seen.norms[norm], [r for some in readers for r in some or []]))
        found.append(of_layer)
    if not any(found):
        raise CandidateFailed(
            "unsupported", f"found nothing in {type(session.model).__name__} that scales could be folded into"
        )
    return found


def value_heads(layer: nn.Module, config: Any) -> Iterator[tuple[Junction, int]]:
    """Yield (junction from the values to the output matrix, head size) of each attention whose form is known."""
    for holder in layer.modules():
        if (found := _value_rows(holder, config)) is None:
            continue
        value, out, size = found
        inputs, channels = matrix_of(out).shape[1], len(value.rows)
        if channels % size or inputs % channels:
            continue
        j = torch.arange(inputs, device=value.rows.device)
        shared = inputs // channels  # query heads that read the same values
        channel_of = j // size // shared * size + j % size if shared > 1 else None
        yield Junction(value, [Reader(out, matrix_of(out))], channel_of), size


def _value_rows(holder: Any, config: Any) -> tuple[Rows, Any, int] | None:
    """Return (the rows that make the values, the output matrix, the head size) of an attention module."""

    def named(*names: str) -> list[Any] | None:
        found = [getattr(holder, name, None) for name in names]
        return found if all(isinstance(m, nn.Linear | Conv1D) for m in found) else None

    if not getattr(config, "num_attention_heads", 0):
        return None
    size = getattr(holder, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if split := named("q_proj", "k_proj", "v_proj", "o_proj") or named("q_proj", "k_proj", "v_proj", "out_proj"):
        return _rows(split[2], slice(None)), split[3], size
    if fused := named("qkv_proj", "o_proj"):  # phi3: all queries, all keys, all values
        values = (matrix_of(fused[0]).shape[0] - matrix_of(fused[1]).shape[1]) // 2
        return _rows(fused[0], slice(-values, None)), fused[1], size
    if (fused := named("c_attn", "c_proj")) and matrix_of(fused[0]).shape[0] == 3 * matrix_of(fused[1]).shape[
        1
    ]:  # gpt2
        return _rows(fused[0], slice(2 * matrix_of(fused[1]).shape[1], None)), fused[1], size
    if (fused := named("query_key_value", "dense")) and matrix_of(fused[0]).shape[0] == 3 * matrix_of(fused[1]).shape[
        1
    ]:
        rows = (
            torch.arange(matrix_of(fused[0]).shape[0]).unflatten(0, (-1, 3, size))[:, 2].flatten()
        )  # gpt_neox: by head
        return _rows(fused[0], rows), fused[1], size
    return None


def _gated(layer: nn.Module) -> Iterator[Junction]:
    """Yield the junctions from the channels that a gate multiplies to the matrix that reads the product."""
    for holder in layer.modules():
        up, fused, down = (getattr(holder, name, None) for name in ("up_proj", "gate_up_proj", "down_proj"))
        if isinstance(down, nn.Linear):
            reader = [Reader(down, matrix_of(down))]
            if isinstance(up, nn.Linear) and isinstance(getattr(holder, "gate_proj", None), nn.Linear):
                yield Junction(_rows(up, slice(None)), reader)
            elif isinstance(fused, nn.Linear) and len(fused.weight) == 2 * down.in_features:
                yield Junction(_rows(fused, slice(down.in_features, None)), reader)
    if experts := experts_of(layer):
        module = experts[1]
        ups = torch.arange(module.down_proj.shape[2], module.gate_up_proj.shape[1])
        for e in range(len(module.down_proj)):
            rows = Rows(module.gate_up_proj.data[e], None, ups.to(module.gate_up_proj.device))
            yield Junction(rows, [Reader(module, module.down_proj.data[e], e, "down")])


def _rows(module: Any, rows: slice | torch.Tensor) -> Rows:
    weight = matrix_of(module)
    chosen = torch.arange(len(weight))[rows].to(weight.device)
    return Rows(weight, None if module.bias is None else module.bias.data, chosen)


# ---------------------------------------------------------------- the proof


@contextmanager
def unchanged(session: Session, what: str) -> Iterator[None]:
    """See that the model computes after the block what it did before, but for rounding.

    Raises:
        CandidateFailed: "unsupported", it does not: this architecture uses its weights in a way not known here.
    """
    model, tokens = session.model.eval(), proof_tokens(session)

    @torch.no_grad()
    def log_probs() -> torch.Tensor:
        return model(tokens, use_cache=False).logits.float().log_softmax(-1)

    before = log_probs()
    yield
    after = log_probs()
    divergence = (before.exp() * (before - after)).sum(-1).mean().item()
    if not divergence < _ROUNDING_NATS.get(model.dtype, _ROUNDING_NATS_16):
        raise CandidateFailed(
            "unsupported",
            f"{what} changes what {type(model).__name__} computes, by {divergence:.2g} nats a token",
            hint="its layers use their weights in a way this technique does not know",
        )
