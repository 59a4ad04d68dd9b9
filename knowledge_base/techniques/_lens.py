"""Fitting a lens: the linear map from a model's state after some layers to its state after all, on calibration text.

Least squares has a closed form, so a lens takes two products of the states and no training. Own runs on models/tiny-lm,
16,000 tokens: after half of the layers the model's own norm and head choose its final token 18 % of the time, and 59 %
through the lens (200 steps of training it towards the model's distributions: 63 %).
"""

from __future__ import annotations

from typing import Any

import torch

from knowledge_base.engines._torch_layers import CutModel, Lens, write_lens
from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques._blocks import calibration_rows, decoder_layers
from knowledge_base.types import Session

RIDGE = 1e-4  # of the mean square of a state, for directions the text never took
HELD_OUT = 8  # one row in so many is kept to judge the lens by
AT_ONCE = 8  # rows
SCALED_BY = 8  # of the rows kept out
SCALES = tuple(step / 20 for step in range(8, 27))  # of logits, of which the best is taken


@torch.no_grad()
def fit_lens(session: Session, first: int, label: str) -> tuple[CutModel, torch.Tensor]:
    """Fit a lens after `first` layers, leave it for the export, and return the cut model and the rows kept out.

    Raises:
        CandidateFailed: no calibration text, or a model whose layers are not run one after the other in the plain way.
    """
    model, layers = session.model, decoder_layers(session.model)
    width = model.config.get_text_config().hidden_size
    rows = calibration_rows(session, 4.0 * 4 * width)
    kept_out = rows[-max(1, len(rows) // HELD_OUT) :]
    rows = rows[: -len(kept_out)] if len(rows) > 1 else rows
    model.eval()
    seen: dict[int, torch.Tensor] = {}

    def watch(index: int) -> Any:
        def hook(module: Any, args: tuple, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            seen[index] = states.flatten(0, -2).double()

        return layers[index].register_forward_hook(hook)

    products = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=rows.device)
    wanted = torch.zeros(width + 1, width, dtype=torch.float64, device=rows.device)
    handles = [watch(first - 1), watch(len(layers) - 1)]
    try:
        for number, part in enumerate(rows.split(AT_ONCE)):
            model.base_model(part, use_cache=False)
            states, last = seen[first - 1], seen[len(layers) - 1]
            states = torch.cat([states, torch.ones_like(states[:, :1])], dim=1)
            products += states.T @ states
            wanted += states.T @ last
            session.progress(label, min(1.0, (number + 1) * AT_ONCE / len(rows)))
    finally:
        for handle in handles:
            handle.remove()
    products += RIDGE * products.diagonal()[:-1].mean() * torch.eye(width + 1, dtype=torch.float64, device=rows.device)
    solved = torch.linalg.solve(products, wanted)
    lens = Lens(*(t.to(model.dtype).contiguous() for t in (solved[:-1].T, solved[-1], products.new_ones(1))))
    if not all(torch.isfinite(p).all() for p in lens.parameters()):
        raise CandidateFailed("non_finite", f"the lens after {first} layers has values that are not finite")
    cut = CutModel(model, first, lens)
    _require_whole(cut, model, kept_out[:1])
    lens.scale.fill_(_scale(cut, model, kept_out[:SCALED_BY]))
    path = session.workspace / "lens"
    write_lens(lens, path)
    session.storage["lens"] = str(path)
    return cut, kept_out


def _scale(cut: CutModel, model: Any, rows: torch.Tensor) -> float:
    """Return what the guess's logits are multiplied by to be nearest to the model's distributions on some rows."""
    found = torch.zeros(len(SCALES))
    for row in rows:
        whole = model(input_ids=row[None], use_cache=False).logits[0].float().softmax(-1)
        guessed = cut.guess(row[None], None)[0][0].float()
        found += torch.stack([-(whole * (scale * guessed).log_softmax(-1)).sum(-1).mean() for scale in SCALES]).cpu()
    return SCALES[int(found.argmin())]


def _require_whole(cut: CutModel, model: Any, row: torch.Tensor) -> None:
    """Refuse a model that is not the first layers and then the rest."""
    whole = model(input_ids=row, use_cache=False).logits
    try:
        logits = cut.finish(row, cut.guess(row, None)[1], None)
    except (TypeError, AttributeError, ValueError, LookupError, RuntimeError) as error:
        raise _not_plain(model) from error
    if logits.shape != whole.shape or (logits - whole).abs().max() > 0.01 * whole.abs().max():
        raise _not_plain(model)


def _not_plain(model: Any) -> CandidateFailed:
    return CandidateFailed(
        "unsupported", f"the layers of {type(model).__name__} do not run one after the other in the plain way",
        hint="plan without guesses of the first layers",
    )  # fmt: skip


@torch.no_grad()
def guesses(cut: CutModel, model: Any, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how sure the first layers are of each token, and whether the whole model chooses it, (rows, tokens) both."""
    sure, right = [], []
    for row in rows:
        share, token = cut.guess(row[None], None)[0][0].float().softmax(-1).max(-1)
        sure.append(share)
        right.append(token == model(input_ids=row[None], use_cache=False).logits[0].argmax(-1))
    return torch.stack(sure), torch.stack(right)
