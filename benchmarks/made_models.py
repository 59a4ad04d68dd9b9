"""Two models made for the purpose, beside the shipped one, so that no figure is of one model alone.

    python benchmarks/made_models.py              # both, where they are not there yet; about nine minutes on two idle cores
    python benchmarks/made_models.py outliers     # one of them; seconds

    from benchmarks.made_models import made
    folder = made("gpt2")                         # makes it if it is absent, and returns its folder either way

They lie in .leanplan/made-models/NAME as a folder of transformers' own files. Made twice on one machine with one number of
threads they are the same; another processor rounds in another order.

outliers: the shipped model, which computes what it did, with a few loud channels in what its matrices read, as large
    models have them (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339): scales are folded into norms, values and
    gated channels, and out of the matrices that read them. Scales, rotations and rounded activations have something to do.
gpt2: another architecture (LayerNorm, Conv1D, biases, learned positions, fused queries, keys and values) trained on the
    shipped model's own text and with its tokenizer. It has read an eighth of what the shipped one has, and is worse.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import train_tiny_lm as shipped

SHIPPED = shipped.MODELS / "tiny-lm"
FOLDER = shipped.ROOT / ".leanplan" / "made-models"
SEED = 0
LOUD_SHARE = 1 / 64  # of the channels of each junction
LOUDNESS = (16.0, 32.0, 64.0)  # powers of two: a weight loses no bit when it is multiplied by one
GPT2_SHAPE: dict[str, Any] = dict(n_embd=256, n_layer=6, n_head=8)
GPT2_TOKENS = 800 * 2048  # that it is trained on, each once
BATCH_WINDOWS, WARM_STEPS = 2, 50
MATRIX_RATE, OTHER_RATE = 0.02, 4e-3


# ---------------------------------------------------------------- outliers


def make_outliers(out: Path, source: Path = SHIPPED) -> None:
    """Write the model of `source` with loud channels folded in; it computes what it did."""
    from knowledge_base.techniques._folding import unchanged

    session = _session(source, out)
    with unchanged(session, "folding outliers in"):
        counts = fold_outliers(session)
    session.model.save_pretrained(out)
    _copy_tokenizer(out)
    _note(out, {"loud_channels_by_layer": counts, "loudness": LOUDNESS, "seed": SEED})


def fold_outliers(session: Any) -> list[int]:
    """Make a few channels loud where they are made and quiet where they are read; return how many in each layer."""
    import torch

    from knowledge_base.techniques._folding import fold, junctions

    chance = random.Random(SEED)
    counts = []
    for of_layer in junctions(session):
        counts.append(0)
        for junction in of_layer:
            inputs = junction.readers[0].weight.shape[-1]
            channels = inputs if junction.channel_of is None else int(junction.channel_of.max()) + 1
            scales = torch.ones(channels)
            for channel in chance.sample(range(channels), max(1, round(channels * LOUD_SHARE))):
                scales[channel] = 1 / chance.choice(LOUDNESS)
            fold(junction, scales)
            counts[-1] += int((scales < 1).sum())
    return counts


def _session(source: Path, work: Path) -> Any:
    """Return a session on the model of a folder, with a few tokens of calibration text to watch it by."""
    import torch

    from knowledge_base.techniques._loading import load_session
    from planner.data import bundled, calibration_windows
    from planner.reading import read_model

    rows = torch.tensor(calibration_windows(bundled("calib"), source, 1, 64))
    return load_session(source, read_model(str(source)).model, calibration=rows, seed=SEED, workspace=work)


# ---------------------------------------------------------------- gpt2


def make_gpt2(out: Path, tokens: int = GPT2_TOKENS, shape: dict[str, Any] | None = None) -> None:
    """Train a GPT-2 of `shape` on so many tokens of the shipped model's text and write it."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(SEED)
    config = GPT2Config(
        vocab_size=shipped.VOCAB_SIZE, n_positions=shipped.CONTEXT_TOKENS, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **(shape or GPT2_SHAPE),
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    began = time.monotonic()
    steps = train(model, training_windows(tokens))
    model.save_pretrained(out)
    _copy_tokenizer(out)
    loss = shipped.heldout_loss(model, shipped.tokens_of(shipped.TEXTS / "heldout.txt", "tiny-lm"))
    _note(out, {
        "parameters": model.num_parameters(), "train_tokens_seen": tokens, "steps": steps, "seed": SEED,
        "minutes": round((time.monotonic() - began) / 60, 1), "threads": torch.get_num_threads(),
        "heldout_loss_nats_per_token": round(loss, 4), "heldout_perplexity": round(math.exp(loss), 3),
    })  # fmt: skip


def training_windows(tokens: int) -> Any:
    """Return (windows, context) token ids of the standard library's training text, modules in a random order."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    documents = shipped.corpus()["train"]
    random.Random(SEED).shuffle(documents)
    ids: list[int] = []
    for document in documents:
        if len(ids) >= tokens:
            break
        ids += [*tokenizer(document, verbose=False)["input_ids"], tokenizer.eos_token_id]
    windows = torch.tensor(ids[:tokens]).unfold(0, shipped.CONTEXT_TOKENS, shipped.CONTEXT_TOKENS)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(SEED))]


def train(model: Any, windows: Any) -> int:
    """Train on every window once, matrices with Muon as the shipped model was; return the number of steps."""
    import torch

    inside = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in inside)]
    optimisers = [
        torch.optim.Muon(inside, lr=MATRIX_RATE, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    batches = windows.split(BATCH_WINDOWS)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARM_STEPS) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / len(batches))))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimiser, rate) for optimiser in optimisers]
    began = time.monotonic()
    for step, batch in enumerate(batches):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, schedule in zip(optimisers, schedules):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            schedule.step()
        if step % 50 == 0 or step + 1 == len(batches):
            print(
                f"step {step} of {len(batches)}, {time.monotonic() - began:.0f} s, loss {loss.item():.3f}", flush=True
            )
    return len(batches)


# ---------------------------------------------------------------- both

MAKERS: dict[str, Callable[[Path], None]] = {"outliers": make_outliers, "gpt2": make_gpt2}


def made(name: str, folder: Path = FOLDER) -> Path:
    """Return the folder of a made model, "outliers" or "gpt2"; it is made if it is absent."""
    out = folder / name
    if not out.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:  # what is there is whole
            MAKERS[name](Path(work) / name)
            (Path(work) / name).rename(out)
    return out


def _copy_tokenizer(out: Path) -> None:
    for path in SHIPPED.glob("tokenizer*"):
        shutil.copy(path, out)


def _note(out: Path, facts: dict[str, Any]) -> None:
    (out / "made.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"{out.name}: {json.dumps(facts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*MAKERS, []], help="which; both if none is named")
    for name in parser.parse_args().names or MAKERS:
        print(made(name))


if __name__ == "__main__":
    main()
