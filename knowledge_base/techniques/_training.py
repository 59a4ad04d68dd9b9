"""What brings a damaged model back: the unchanged model's answers on calibration text, and one loop that trains on them.

The unchanged model is loaded once, asked and dropped before training starts; while it is in memory the damaged one is
parked on disk, so memory never holds both. Its answers lie on disk too: for each position the log-probabilities of all
tokens, or of the likeliest with the rest as one more outcome, within ANSWER_BYTES_MAX. Where the text is short for the
steps asked for, the unchanged model continues it: on the shipped model, 2,000 tokens of text brought back 21 % of the loss
that dropping two layers caused, and 28 % with 6,000 tokens written by the model beside them (20 steps).

The last quarter of the rows is kept out of training. The state nearest to the unchanged model there is what stays, the
state before training among them, so recovery never does harm that this text would show. A training that was cut off
goes on from its last saved state.
"""

from __future__ import annotations

import contextlib
import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from knowledge_base.errors import CandidateFailed
from knowledge_base.serde import digest
from knowledge_base.techniques._blocks import decoder_layers, is_matrix
from knowledge_base.techniques._loading import reading_unmapped
from knowledge_base.types import Session

TOKENS_PER_STEP = 1024
VIEWS_MAX = 4  # of one row; rather than see a text more often, the model learns from what the unchanged one writes
CHECKS = 4  # times the held-out part is scored while training
ANSWER_BYTES_MAX = 256 << 20
LIKELIEST_FEWEST = 64  # tokens kept for each position, however long the text
WRITTEN_AT_ONCE = 32  # rows
LOGIT_BYTES_MAX = 128 << 20  # of one forward pass; a larger step is added up from several
ZEROS_SHARE = 0.01  # a matrix with more exact zeros than this was pruned
STATE_EVERY_S = 60.0


# ---------------------------------------------------------------- the unchanged model


@dataclass(slots=True)
class Answers:
    """The unchanged model's next-token distributions on rows of text. `tokens` is None where every token is kept."""

    rows: torch.Tensor  # (rows, tokens)
    held_out: range  # rows kept out of training
    batch: int  # rows of one step
    log_probs: numpy.ndarray  # float16 (rows, tokens, kept), a file
    tokens: numpy.ndarray | None  # int32, likewise

    @property
    def trained_on(self) -> torch.Tensor:
        """The numbers of the other rows."""
        return torch.tensor([row for row in range(len(self.rows)) if row not in self.held_out])

    def divergence(self, model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        """Return KL(unchanged || model) in nats, the mean over the tokens of these rows."""
        device = self.rows.device
        logits = model(input_ids=self.rows[rows.to(device)], use_cache=False).logits.float()
        wanted = torch.from_numpy(self.log_probs[rows.numpy()]).to(device).float()
        if self.tokens is None:
            given, wanted = logits.log_softmax(-1), wanted.log_softmax(-1)  # float16 left them a little off
        else:
            kept = torch.from_numpy(self.tokens[rows.numpy()]).to(device).long()
            given = _with_rest(logits.gather(-1, kept) - logits.logsumexp(-1, keepdim=True))
            wanted = _with_rest(wanted)
        return (wanted.exp() * (wanted - given)).sum(-1).mean()

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """Return the divergence on the rows kept out of training."""
        watched = torch.tensor(self.held_out)
        return sum(self.divergence(model, row[None]).item() for row in watched) / len(watched)


def _with_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities (..., kept) with one more outcome for all that was not kept, summing to one."""
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp_min(1e-6).log()
    return torch.cat([log_probs, rest], dim=-1).log_softmax(-1)


@contextlib.contextmanager
def answers(session: Session, *, label: str, steps: int) -> Iterator[Answers]:
    """Ask the unchanged model about the calibration text; where that is short for so many steps, it first writes more.

    Raises:
        CandidateFailed: too little calibration text to hold some out, or the unchanged model cannot be loaded again.
    """
    given, first = split(session)
    batch = rows_of_step(given[:first])
    with tempfile.TemporaryDirectory(prefix="answers-", dir=session.workspace) as folder:

        def ask(teacher: Any) -> tuple[torch.Tensor, numpy.ndarray, numpy.ndarray | None]:
            rows = given
            needed = math.ceil(steps * batch / VIEWS_MAX) - first
            if needed > 0:
                rows = torch.cat([given, written(teacher, given[:first], needed, session.seed)])
            return rows, *_ask(teacher, rows, Path(folder), partial(session.progress, f"{label}: asking"))

        rows, log_probs, tokens = of_unchanged(session, ask)
        yield Answers(rows, range(first, len(given)), batch, log_probs, tokens)


def rows_of_step(rows: torch.Tensor) -> int:
    """Return how many of the rows (rows, tokens) to train on make one step."""
    return max(1, min(len(rows), TOKENS_PER_STEP // rows.shape[1]))


def split(session: Session) -> tuple[torch.Tensor, int]:
    """Return the calibration tokens (rows, tokens) on the model's device, and the first row kept out of training.

    Raises:
        CandidateFailed: too few rows to hold some out.
    """
    rows = session.calibration
    if rows is None or len(rows) < 4:
        raise CandidateFailed(
            "build_error", "recovery needs at least 4 rows of calibration text", hint="give more `calibration` samples"
        )
    rows = rows.to(next(session.model.parameters()).device)
    return rows, len(rows) - len(rows) // 4  # neighbouring rows are of one document, so the split is not interleaved


def of_unchanged(session: Session, question: Callable[[Any], Any]) -> Any:
    """Return what `question` finds on the model as it came, in memory in place of the session's, which is parked on disk.

    Raises:
        CandidateFailed: it cannot be loaded from where it came.
    """
    with tempfile.TemporaryDirectory(prefix="parked-", dir=session.workspace) as folder:
        with _parked(session.model, Path(folder, "parameters")):
            found = question(_unchanged(session.model))
            gc.collect()  # before the other comes back
    return found


def _unchanged(model: Any) -> Any:
    """Return the model as it came, loaded again from where it was loaded."""
    from transformers import AutoModelForCausalLM

    try:
        with reading_unmapped():
            teacher = AutoModelForCausalLM.from_pretrained(
                model.name_or_path,
                dtype=model.dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
    except (OSError, ValueError) as error:
        raise CandidateFailed(
            "build_error",
            f"recovery needs the unchanged model, which cannot be loaded from `{model.name_or_path}`: {error}",
        ) from error
    return teacher.to(model.device).eval().requires_grad_(False)


@contextlib.contextmanager
def _parked(model: nn.Module, path: Path) -> Iterator[None]:
    """Keep a model's parameters in a file meanwhile, and nothing of them in memory."""
    places = [(parameter, parameter.shape, parameter.device) for parameter in model.parameters()]
    with path.open("wb") as file:
        for parameter, _, _ in places:
            file.write(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            parameter.data = torch.empty(0, dtype=parameter.dtype)
    try:
        yield
    finally:
        with path.open("rb") as file:
            for parameter, shape, device in places:
                parameter.data = torch.empty(shape, dtype=parameter.dtype)
                if parameter.numel():  # a layer may have lost all its heads or channels
                    file.readinto(parameter.data.flatten().view(torch.uint8).numpy().data)
                parameter.data = parameter.data.to(device)


@torch.no_grad()
def _ask(
    teacher: Any, rows: torch.Tensor, folder: Path, progress: Callable[[float], None]
) -> tuple[numpy.ndarray, numpy.ndarray | None]:
    vocabulary = teacher.config.get_text_config().vocab_size
    kept = min(vocabulary, max(LIKELIEST_FEWEST, ANSWER_BYTES_MAX // (6 * rows.numel())))
    shape = (*rows.shape, kept)
    log_probs = numpy.lib.format.open_memmap(folder / "log_probs.npy", mode="w+", dtype=numpy.float16, shape=shape)
    tokens = None
    if kept < vocabulary:
        tokens = numpy.lib.format.open_memmap(folder / "tokens.npy", mode="w+", dtype=numpy.int32, shape=shape)
    for number, row in enumerate(rows):
        given = teacher(input_ids=row[None], use_cache=False).logits[0, :, :vocabulary].float().log_softmax(-1)
        if tokens is not None:
            given, chosen = given.topk(kept, dim=-1)
            tokens[number] = chosen.cpu().numpy()
        log_probs[number] = given.cpu().numpy()
        progress((number + 1) / len(rows))
    return log_probs, tokens


@torch.no_grad()
def written(teacher: Any, rows: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Return `count` rows as long as these: an eighth is taken from one of them, the rest is what the model samples."""
    length = rows.shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        starts = rows[torch.arange(count) % len(rows), : max(1, length // 8)]
        return torch.cat([
            teacher.generate(
                part, attention_mask=torch.ones_like(part), do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0,
                min_length=length, max_length=length,
            )
            for part in starts.split(WRITTEN_AT_ONCE)
        ])  # fmt: skip


# ---------------------------------------------------------------- the loop


def train(
    session: Session,
    label: str,
    groups: Sequence[dict[str, Any]],
    loss: Callable[[torch.Tensor], torch.Tensor],
    score: Callable[[], float],
    rows: torch.Tensor,
    *,
    steps: int,
    batch: int,
    row_bytes: float,
) -> tuple[float, float]:
    """Train parameters with AdamW, leave the best state in them, and return the score before and after.

    Rows are drawn in an order of the session's seed, every row once before any again. The learning rate warms up over
    a tenth of the steps and falls as a cosine; gradients are clipped to norm 1. Dropout is off: a few steps towards
    given answers do not overfit by what it prevents, and the same state gives the same step after a break.

    Args:
        groups: of parameters, each {"params": [...], "lr": highest learning rate}.
        loss: of some rows, by number; their mean.
        score: what the best state is chosen by, the lower the better.
        batch: rows of one step.
        row_bytes: of the logits of one row.

    Raises:
        CandidateFailed: "non_finite", a loss that is not finite.
    """
    parameters = [p for group in groups for p in group["params"]]
    optimiser = torch.optim.AdamW([dict(group) for group in groups], weight_decay=0.0)
    rates = [group["lr"] for group in groups]
    session.model.eval()
    at_once = max(1, min(batch, int(LOGIT_BYTES_MAX / row_bytes)))
    warm_up = max(1, steps // 10)
    generator = torch.Generator().manual_seed(session.seed)
    rounds = math.ceil(steps * batch / len(rows))
    order = torch.cat([rows[torch.randperm(len(rows), generator=generator)] for _ in range(rounds)])

    before = score()
    place = session.workspace / f"{label}-{digest([label, steps, session.seed, repr(before), len(rows)])[:16]}"
    best_file, state_file = place.with_suffix(".best.pt"), place.with_suffix(".state.pt")
    first, best = 0, before
    if state_file.exists() and best_file.exists():
        state = torch.load(state_file, weights_only=True)
        first, best = state["step"], state["best"]
        _fill(parameters, state["parameters"])
        optimiser.load_state_dict(state["optimiser"])
    else:
        _save(best_file, [p.detach() for p in parameters])
    saved = time.monotonic()
    for step in range(first, steps):
        done = max(0.0, (step - warm_up) / max(1, steps - warm_up))
        share = (step + 1) / warm_up if step < warm_up else 0.5 + 0.5 * math.cos(math.pi * done)
        for group, rate in zip(optimiser.param_groups, rates):
            group["lr"] = rate * share
        optimiser.zero_grad()
        chosen = order[step * batch : (step + 1) * batch]
        for part in chosen.split(at_once):
            value = loss(part)
            if not torch.isfinite(value):
                raise CandidateFailed("non_finite", f"the training loss is not finite at step {step + 1}")
            (value * (len(part) / len(chosen))).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        session.progress(label, (step + 1) / steps)
        if (step + 1) % max(1, steps // CHECKS) == 0 and (reached := score()) < best:
            best = reached
            _save(best_file, [p.detach() for p in parameters])
        if time.monotonic() - saved > STATE_EVERY_S:
            state = {"step": step + 1, "best": best, "optimiser": optimiser.state_dict()}
            _save(state_file, state | {"parameters": [p.detach() for p in parameters]})
            saved = time.monotonic()
    _fill(parameters, torch.load(best_file, weights_only=True))
    best_file.unlink()
    state_file.unlink(missing_ok=True)
    return before, best


def distil(session: Session, label: str, groups: Sequence[dict[str, Any]], told: Answers, *, steps: int) -> list[float]:
    """Train towards the unchanged model's answers; return the divergence before and after on rows kept out, in nats."""
    model = session.model
    length = told.rows.shape[1]
    row_bytes = 4.0 * length * model.config.get_text_config().vocab_size
    return list(train(
        session, label, groups, lambda rows: told.divergence(model, rows), lambda: told.score(model), told.trained_on,
        steps=steps, batch=told.batch, row_bytes=row_bytes,
    ))  # fmt: skip


def _save(path: Path, what: Any) -> None:
    partial = path.with_suffix(".partial")
    torch.save(what, partial)
    partial.replace(path)


@torch.no_grad()
def _fill(parameters: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


# ---------------------------------------------------------------- what is trained


def matrices(model: nn.Module) -> dict[str, Any]:
    """Return the matrices inside the decoder layers by their name in the model."""
    inside = {id(module) for module in decoder_layers(model).modules() if is_matrix(module)}
    return {name: module for name, module in model.named_modules() if id(module) in inside}


def pruned(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return where zeros are, for those of the tensors that were pruned: they have to stay zero."""
    masks = {name: weight.detach() == 0 for name, weight in weights.items()}
    return {name: mask for name, mask in masks.items() if mask.float().mean() > ZEROS_SHARE}


@contextlib.contextmanager
def widened(model: nn.Module, types: Sequence[torch.dtype]) -> Iterator[None]:
    """Hold parameters of these types in float32 meanwhile. Buffers keep theirs: they are computed as a model loads."""
    stored = {name: p.dtype for name, p in model.named_parameters() if p.dtype in types}
    for name, parameter in model.named_parameters():
        if name in stored:
            parameter.data = parameter.data.float()
    yield
    for name, parameter in model.named_parameters():
        parameter.grad = None
        if name in stored:
            parameter.data = parameter.data.to(stored[name])
    model.eval().requires_grad_(False)


HALF = (torch.float16,)  # its gradients underflow without scaling, and processors compute it slowly


@contextlib.contextmanager
def adapters(session: Session, rank: int) -> Iterator[list[nn.Parameter]]:
    """Put LoRA adapters (peft's) on every matrix inside the layers meanwhile; what they have learnt is merged after.

    Zeros left by pruning stay zero, in training too: what is trained is what will be merged.

    Raises:
        CandidateFailed: "unsupported", the layers hold no matrix that can be adapted.
    """
    from peft import LoraConfig, get_peft_model

    model = session.model
    targets = matrices(model)
    if not targets:
        raise CandidateFailed("unsupported", f"the layers of {type(model).__name__} hold no matrix to adapt")
    zeros = pruned({name: module.weight for name, module in targets.items()})
    with widened(model, HALF), torch.random.fork_rng():
        torch.manual_seed(session.seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(targets), bias="none")
        wrapped = get_peft_model(model, config)  # puts the adapters into `model` itself
        for name, mask in zeros.items():
            model.get_submodule(name).register_forward_hook(partial(_without_zeros, mask))
        yield [p for p in wrapped.parameters() if p.requires_grad]
        wrapped.merge_and_unload()
        for name, mask in zeros.items():
            model.get_submodule(name).weight.data[mask] = 0.0


def _without_zeros(mask: torch.Tensor, layer: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """Take the adapter's part at pruned weights out of a LoRA layer's output."""
    delta = layer.get_delta_weight("default") * mask  # in the weight's own layout
    if layer.fan_in_fan_out:  # Conv1D stores (in, out)
        delta = delta.T
    return output - nn.functional.linear(args[0].to(delta.dtype), delta).to(output.dtype)
