"""How long this machine takes for a decode step, and to multiply one token by a matrix stored in each of several ways.

The same modules as in the engine that runs the artefact, one row of input. Pieces of work are done in turn, so that a
machine that slows down slows all of them, and the fastest round counts, for what else the machine does only ever adds.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques._choices import AS_IT_IS, Option, made, sizes
from knowledge_base.techniques._sparse_module import SparseLinear
from knowledge_base.techniques.low_rank import rank_for
from knowledge_base.types import Session

ROUNDS = 15
TIMED_S = 60.0  # no round is begun after that
CONTEXT_TOKENS = 256  # in the cache while a step is timed
STEPS = 4  # timed at once
WEIGHTS_TIMED = 64 << 20  # bytes of one option's weights gone through in turn: more than caches hold
COPIES_MAX = 32

Key = TypeVar("Key", bound=Hashable)
Shape = tuple[int, int]  # out, in
Work = tuple[Callable[[], None], int]  # what to do, and how often it does what is timed


def least_seconds(work: Mapping[Key, Work], session: Session, label: str) -> dict[Key, float]:
    """Return the seconds of each piece of work in its fastest round."""
    wait = torch.cuda.synchronize if session.model.device.type == "cuda" else lambda: None
    best = dict.fromkeys(work, float("inf"))
    started = time.monotonic()
    with torch.inference_mode():
        for round_ in range(ROUNDS + 1):
            for key, (run, count) in work.items():
                wait()
                began = time.perf_counter()
                run()
                wait()
                if round_:  # the first warms up, and lays out int4 for the kernel
                    best[key] = min(best[key], (time.perf_counter() - began) / count)
            session.progress(label, (round_ + 1) / (ROUNDS + 1))
            if round_ and time.monotonic() - started > TIMED_S:
                break
    return best


def decode_step(session: Session) -> Work:
    """Return the work of decoding tokens behind CONTEXT_TOKENS of calibration text.

    Raises:
        CandidateFailed: "unsupported", the model keeps no keys and values from one step to the next.
    """
    model = session.model.eval()
    assert session.calibration is not None
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    tokens = max(1, min(CONTEXT_TOKENS, limit - STEPS * (ROUNDS + 1)))  # the cache grows a little from round to round
    context = session.calibration[:1, :tokens].to(model.device)
    with torch.inference_mode():
        cache = getattr(model(context, use_cache=True), "past_key_values", None)
    if cache is None:
        raise CandidateFailed(
            "unsupported", f"a decode step of {type(model).__name__} cannot be timed: it keeps no cache"
        )

    def run() -> None:
        for _ in range(STEPS):
            model(context[:, -1:], past_key_values=cache, use_cache=True)

    return run, STEPS


def matrix_seconds(
    session: Session, shapes: Iterable[Shape], options: Sequence[Option], group_size: int, *, layers: int
) -> dict[Shape, dict[str, float]]:
    """Return seconds of one multiplication by shape and option, in the model's dtype; some a shape does not allow.

    Args:
        layers: of the model; as many copies are gone through (within WEIGHTS_TIMED), as in a step they come one after another.
    """
    like = {"dtype": session.model.dtype, "device": session.model.device}
    found = {}
    for shape in dict.fromkeys(shapes):
        with torch.no_grad():
            plain, x = nn.Linear(shape[1], shape[0], bias=False, **like), torch.randn(1, 1, shape[1], **like)
            stored = {AS_IT_IS: plain} | {str(o): new for o in options if (new := _stored(plain, o, group_size))}
            work = {name: _through(module, x, layers) for name, module in stored.items()}
        found[shape] = least_seconds(work, session, f"timing matrices of {shape[0]} x {shape[1]}")
    return found


def _stored(plain: nn.Linear, option: Option, group_size: int) -> nn.Module | None:
    """Return the module that computes with a matrix held so; None where its shape does not allow it."""
    if sizes(plain.weight.shape, option, group_size, plain.weight.nbytes) is None:
        return None
    if option.keep < 1:  # any two factors of that size take as long
        rank = rank_for(plain.out_features, plain.in_features, option.keep)
        assert rank is not None
        shapes = (plain.in_features, rank), (rank, plain.out_features)
        factors = [nn.Linear(*shape, bias=False).to(plain.weight) for shape in shapes]
        return nn.Sequential(*(made(factor, Option(option.bits), group_size, None) or factor for factor in factors))
    module = made(plain, option, group_size, None)
    return module.unpacked() if isinstance(module, SparseLinear) else module  # as it is once it is loaded


def _through(module: nn.Module, x: torch.Tensor, layers: int) -> Work:
    """Return the work of multiplying one token by as many copies of a module as a step goes through."""
    size = sum(t.nbytes for t in module.state_dict().values())
    copies = [copy.deepcopy(module) for _ in range(max(1, min(layers, COPIES_MAX, WEIGHTS_TIMED // max(size, 1))))]

    def run() -> None:
        for each in copies:
            each(x)

    return run, len(copies)
