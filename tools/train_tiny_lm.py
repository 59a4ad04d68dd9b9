"""Train the shipped model and its draft on the Python standard library's own text.

    python tools/train_tiny_lm.py data                    # corpus, held-out and calibration text, tokenizer
    python tools/train_tiny_lm.py train --minutes 90      # models/tiny-lm
    python tools/train_tiny_lm.py train --draft --minutes 8

Every machine with Python has this text, so the model can be made again anywhere. The learning-rate
schedule follows the clock, not the step count: a run of any length ends at the bottom of its schedule.
Modules are split by the hash of their path, so no module is in two of the three sets.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import pydoc_data.topics
import random
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".leanplan" / "training"
MODELS = ROOT / "models"
TEXTS = ROOT / "knowledge_base" / "data" / "texts"
SKIP_FOLDERS = {"site-packages", "ensurepip", "__pycache__"}
TRAIN_ONLY = {"test", "tests", "idlelib", "lib2to3", "turtledemo"}  # absent from some installations
VOCAB_SIZE = 4096
CONTEXT_TOKENS = 1024
BATCH = 4
HELDOUT_BYTES = 240_000
CALIB_BYTES = 160_000
SHAPES = {
    "tiny-lm": dict(
        hidden_size=256, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, intermediate_size=768
    ),
    "tiny-lm-draft": dict(
        hidden_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=512
    ),
}


def corpus() -> dict[str, list[str]]:
    """Return the standard library's texts as {"train" | "heldout" | "calib": [document, ...]}."""
    library = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[str]] = {"train": [], "heldout": [], "calib": []}

    def put(name: str, text: str) -> None:
        bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 16
        parts[{0: "heldout", 1: "calib"}.get(bucket, "train")].append(text)

    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if SKIP_FOLDERS & set(path.relative_to(library).parts) or "pydoc_data" in name or name.startswith("encodings/"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if not 200 < len(text) < 400_000:
            continue
        if TRAIN_ONLY & set(path.relative_to(library).parts):
            parts["train"].append(text)
        else:
            put(name, text)
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        put(f"topics/{topic}", text)
    return parts


def cut(documents: list[str], limit_bytes: int) -> str:
    """Return up to `limit_bytes` of text, a slice of each document, so that no single module dominates."""
    random.Random(0).shuffle(documents)
    share = 12_000
    out, size = [], 0
    for document in documents:
        piece = document[:share]
        size += len(piece.encode())
        if size > limit_bytes:
            break
        out.append(piece)
    return "\n".join(out)


def make_data() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    parts = corpus()
    TEXTS.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    (TEXTS / "heldout.txt").write_text(cut(parts["heldout"], HELDOUT_BYTES), encoding="utf-8")
    (TEXTS / "calib.txt").write_text(cut(parts["calib"], CALIB_BYTES), encoding="utf-8")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        parts["train"],
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>", model_max_length=CONTEXT_TOKENS
    )
    for name in SHAPES:
        fast.save_pretrained(MODELS / name)

    import numpy

    tokens: list[int] = []
    documents = parts["train"]
    random.Random(0).shuffle(documents)
    for encoding in tokenizer.encode_batch(documents):
        tokens += [*encoding.ids, 0]
    numpy.array(tokens, dtype=numpy.uint16).tofile(WORK / "train.bin")
    sizes = {part: sum(len(text.encode()) for text in texts) for part, texts in parts.items()}
    print(f"bytes {sizes}; train tokens {len(tokens):,}")


def tokens_of(path: Path, name: str):
    """Return the ids of a text file as a 1-D int64 tensor."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    return torch.tensor(tokenizer(path.read_text(encoding="utf-8"))["input_ids"])


def heldout_loss(model, ids) -> float:
    """Return the mean loss in nats for each token over consecutive windows of the context length."""
    import torch

    windows = ids[: len(ids) // CONTEXT_TOKENS * CONTEXT_TOKENS].view(-1, CONTEXT_TOKENS)
    model.eval()
    with torch.inference_mode():
        losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in windows]
    model.train()
    return sum(losses) / len(losses)


def unigram_loss(train, ids) -> float:
    """Return the loss of the best context-free guess: add-one smoothed token frequencies of the training text."""
    import torch

    counts = torch.bincount(train, minlength=VOCAB_SIZE).double() + 1
    return float(-(counts / counts.sum()).log()[ids].mean())


def train(name: str, minutes: float, threads: int, go_on: bool) -> None:
    """Train for so many minutes and write the model, its tokenizer and training.json.

    Args:
        go_on: start from the model that is there, in the second half of the schedule, instead of from scratch.
    """
    import numpy
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        attention_bias=False,
        mlp_bias=False,
        **SHAPES[name],
    )
    out = MODELS / name
    earlier = json.loads((out / "training.json").read_text()) if go_on else {}
    model = LlamaForCausalLM.from_pretrained(out) if go_on else LlamaForCausalLM(config)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    others = [p for n, p in model.named_parameters() if not any(p is m for m in matrices)]
    optimisers = [
        (torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.02), 0.02),
        (torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0), 4e-3),
    ]
    data = torch.from_numpy(numpy.fromfile(WORK / "train.bin", dtype=numpy.uint16).astype("int64"))
    heldout = tokens_of(TEXTS / "heldout.txt", name)
    print(
        f"{name}: {model.num_parameters():,} parameters; unigram held-out loss {unigram_loss(data, heldout):.3f}",
        flush=True,
    )

    log = earlier.get("course", [])
    generator = torch.Generator().manual_seed(int(earlier.get("steps", 0)))
    start = last_note = time.monotonic()
    order = torch.randperm(len(data) // CONTEXT_TOKENS - 1, generator=generator)
    at, seen, step, epoch = 0, 0, 0, 0
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        position = 0.4 + 0.6 * done if go_on else done
        scale = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * position)))
        for optimiser, peak in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = peak * scale
        if at + BATCH > len(order):
            at, epoch = 0, epoch + 1
            order = torch.randperm(len(data) // CONTEXT_TOKENS - 1, generator=generator)
        offset = int(torch.randint(0, CONTEXT_TOKENS, (1,), generator=generator))
        batch = torch.stack(
            [data[i * CONTEXT_TOKENS + offset :][:CONTEXT_TOKENS] for i in order[at : at + BATCH].tolist()]
        )
        at += BATCH
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, _ in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        step += 1
        seen += batch.numel()
        if step % 50 == 0:
            elapsed = time.monotonic() - start
            print(
                f"step {step} epoch {epoch} {elapsed / 60:.1f} min loss {loss.item():.3f} {seen / elapsed:.0f} tokens/s",
                flush=True,
            )
        if time.monotonic() - last_note > 600:
            last_note = time.monotonic()
            minute = round((last_note - start) / 60 + earlier.get("minutes", 0), 1)
            tokens = seen + earlier.get("train_tokens_seen", 0)
            log.append({"minutes": minute, "tokens": tokens, "heldout_loss": round(heldout_loss(model, heldout), 4)})
            print(json.dumps(log[-1]), flush=True)
            model.save_pretrained(out)
    final = heldout_loss(model, heldout)
    model.save_pretrained(out)
    facts = {
        "parameters": model.num_parameters(),
        "train_tokens_seen": seen + earlier.get("train_tokens_seen", 0),
        "steps": step + earlier.get("steps", 0),
        "minutes": minutes + earlier.get("minutes", 0),
        "threads": threads,
        "heldout_loss_nats_per_token": round(final, 4),
        "unigram_loss_nats_per_token": round(unigram_loss(data, heldout), 4),
        "heldout_perplexity": round(math.exp(final), 3),
        "course": log,
    }
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    (out / "README.md").write_text(card(name, facts), encoding="utf-8")
    print(json.dumps(facts, indent=1), flush=True)


def card(name: str, facts: dict) -> str:
    """Return the model card: what it is, what it was trained on, how good it is."""
    shape = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in SHAPES[name].items())
    purpose = (
        "A draft model with the same tokenizer, for speculative decoding."
        if name.endswith("draft")
        else "A model small enough to travel with the code and trained enough that compressing it has a visible price and gain."
    )
    return f"""---
license: apache-2.0
---

# {name}

{purpose}

| | |
|---|---|
| architecture | Llama: {shape}; tied embeddings, float32 |
| parameters | {facts["parameters"]:,} |
| tokenizer | byte-level BPE, {VOCAB_SIZE} tokens, trained on the same text |
| context | {CONTEXT_TOKENS} tokens |
| text | the CPython standard library's own sources and pydoc_data topics; held-out and calibration modules left out by the hash of their path |
| tokens seen | {facts["train_tokens_seen"]:,} in {facts["steps"]:,} steps of {BATCH * CONTEXT_TOKENS} |
| time | {facts["minutes"]:g} minutes on {facts["threads"]} CPU threads of a machine that was busy with other work |
| held-out loss | {facts["heldout_loss_nats_per_token"]} nats for each token (perplexity {facts["heldout_perplexity"]}) in windows of {CONTEXT_TOKENS} tokens |
| unigram loss on the same text | {facts["unigram_loss_nats_per_token"]} nats for each token |

Made by `python tools/train_tiny_lm.py data` and `train`; `training.json` holds these figures and the course of the loss.
It knows nothing but the look of Python code and its documentation, and is of no use beyond tests and demonstrations.
The weights are under the project's licence, Apache-2.0. The text is copyright Python Software Foundation, used under the PSF
License Agreement.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("data")
    command = verbs.add_parser("train")
    command.add_argument("--draft", action="store_true")
    command.add_argument("--minutes", type=float, default=90)
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--go-on", action="store_true", help="continue from the model that is there")
    options = parser.parse_args()
    if options.verb == "data":
        make_data()
    else:
        train("tiny-lm-draft" if options.draft else "tiny-lm", options.minutes, options.threads, options.go_on)


if __name__ == "__main__":
    main()
