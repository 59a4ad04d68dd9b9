"""Allocated against uniform settings at equal bytes on the shipped model, to a speed on this machine, and how long the program takes.

    python benchmarks/allocation.py            # about fifteen minutes on two idle cores; writes benchmarks/allocation.json
    python benchmarks/allocation.py --again    # measures anew what is kept

Rows that are kept are not measured again, nor are sensitivities (.leanplan/allocation-benchmark), so it goes on where it was
stopped. In four parts:

    bytes   what the layers' matrices take, and the perplexity on held-out text over the unchanged model's; a uniform row and
            the allocated ones below it are of one size. `nearest`: matrices rounded to nearest; `compensated`: as GPTQ does.
            `everything` may also choose half of the weights in 4 bits, two thin factors in 8, or to remove a layer's part.
            Sensitivities are the KL divergence, else the change of the next token's loss or of the matrix's outputs
    gguf    the same of a GGUF file's block types, tables included: one type for the layers and at least 6 bits for the tables,
            and what weight_gguf_mixed allocates of as many bytes; with `importance` errors are weighted by what enters columns
    speed   a decode step asked to be so many times as fast, as it was told and as it came to be, beside the unchanged model
    solver  the program at the size of a 70B model
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from knowledge_base.errors import NoFeasiblePlan
from knowledge_base.registry import techniques
from knowledge_base.techniques._choices import BITS, EVERYTHING, Option, PackedWays, made, parse, ties
from knowledge_base.types import Session
from search.allocation import LOSS, Options, allocate

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tiny-lm"
OUT = Path(__file__).with_suffix(".json")
KEPT = ROOT / ".leanplan" / "allocation-benchmark"
WORK = tempfile.TemporaryDirectory(prefix="leanplan-allocation-")
GROUP_SIZE = 64
UNIFORM = ("2", "3", "4", "8")
BETWEEN = (3.0, 4.0)  # bits for each weight that no uniform setting meets
WINDOWS, TOKENS = 8, 512  # of held-out text
BLOCK_WINDOWS = 64  # for block types, of which some lose a few thousandths
MEASURED_TOKENS = 512  # that sensitivities are measured on; those of block types on as many as in a build
MEASURING_S = 3600.0  # more than it takes: every option of each matrix is measured
SPEEDS = (1.25, 1.5, 2.0, 3.0)
SOLVER = "solver: 80 layers of 7 matrices of 20 options"
BLOCKS = ("q2_k", "iq3_s", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k")
PARTS = ("facts", SOLVER, "bytes", "gguf", "speed")


def session() -> Session:
    """Return the shipped model with calibration text, anew."""
    import torch

    from knowledge_base.techniques import _loading
    from planner.data import bundled, calibration_windows
    from planner.reading import read_model

    rows = torch.tensor(calibration_windows(bundled("calib"), MODEL, 32, 256))
    facts = read_model(str(MODEL)).model
    return _loading.load_session(MODEL, facts, calibration=rows, seed=0, allow_pickle=False, workspace=Path(WORK.name))


def loss_of(model: Any, windows: int = WINDOWS) -> float:
    """Return the mean loss on so many windows of held-out text, nats for each token."""
    import torch

    from knowledge_base.techniques._blocks import mean_loss
    from planner import texts
    from planner.data import bundled

    ids = texts.tokenise(MODEL, texts.read_text(bundled("heldout")))
    return mean_loss(model, torch.tensor(ids[: windows * TOKENS]).reshape(windows, TOKENS))


class Results:
    """The rows of allocation.json, written after each; one that is there is not made again."""

    def __init__(self, again: bool) -> None:
        kept = {} if again or not OUT.exists() else json.loads(OUT.read_text(encoding="utf-8"))
        self.data: dict[str, Any] = {part: kept[part] for part in PARTS if part in kept}
        self.again = again

    def row(self, part: str, key: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> None:
        """Keep what `make` gives under `key` in a part, unless it is kept."""
        rows = self.data.setdefault(part, [])
        if not any(key.items() <= row.items() for row in rows):
            rows.append({**key, **make()})
            print(part, rows[-1], flush=True)
            OUT.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")

    def fact(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a single figure, kept as rows are."""
        self.row("facts", {"name": name}, lambda: {"value": make()})
        return next(row["value"] for row in self.data["facts"] if row["name"] == name)

    def measured(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return what is measured once and chosen from again and again."""
        path = KEPT / f"{name}.json"
        if self.again or not path.exists():
            print(f"measuring: {name}", flush=True)
            began = time.monotonic()
            found = measure()
            KEPT.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"wall_s": round(time.monotonic() - began, 1), "found": found}))
        kept = json.loads(path.read_text(encoding="utf-8"))
        self.fact(f"measuring: {name}, seconds", lambda: kept["wall_s"])
        return kept["found"]


# ---------------------------------------------------------------- bytes


def sensitivities(options: Sequence[Option], *, compensated: bool) -> Options:
    """Return what each option of each matrix costs and takes."""
    from knowledge_base.techniques import _sensitivity

    _sensitivity.TOKENS_MAX = MEASURED_TOKENS
    ways = PackedWays(tuple(options), GROUP_SIZE, compensated)
    return _sensitivity.measure_sensitivities(session(), ways, MEASURING_S)


def by(options: Options, figure: str) -> Options:
    """Return the options with another of their figures in the place of the loss; a gain counts as no loss."""
    return {
        name: {option: {**choice, LOSS: max(0.0, choice[figure])} for option, choice in choices.items()}
        for name, choices in options.items()
    }


def built(chosen: Mapping[str, str], *, compensated: bool) -> float:
    """Return the held-out loss of the model with its matrices as chosen."""
    fresh = session()
    if compensated:
        fresh.allocation = chosen
        techniques.get("weight_mixed").execute(fresh, average_bits=32.0, choose="everything", speedup=0.0)
    else:
        for name, option in chosen.items():
            setting = parse(option)
            assert setting is not None
            if (new := made(fresh.model.get_submodule(name), setting, GROUP_SIZE, None)) is not None:
                fresh.model.set_submodule(name, new)
    return loss_of(fresh.model)


def bytes_part(results: Results) -> None:
    """Fill the table of sizes and perplexity ratios."""
    unchanged = results.fact("unchanged loss, nats", lambda: round(loss_of(session().model), 5))
    bits = results.measured("bits, to nearest", lambda: sensitivities(BITS, compensated=False))
    weights = sum(choices["16"]["params"] for choices in bits.values())
    sizes = {8 * sum(choices[b]["bytes"] for choices in bits.values()) / weights: b for b in UNIFORM}
    averages = sorted([*sizes, *BETWEEN])

    def row(
        setting: str, average: float, options: Options, rounding: str, chosen: Callable[[], Mapping[str, str]]
    ) -> None:
        def make() -> dict[str, Any]:
            options_of = chosen()
            size = sum(options[name][option]["bytes"] for name, option in options_of.items())
            loss = built(options_of, compensated=rounding == "compensated")
            return {
                "bytes": int(size), "bits_per_weight": round(8 * size / weights, 3), "ppl_ratio": round(math.exp(loss - unchanged), 4),
                "told_nats": round(sum(options[name][option][LOSS] for name, option in options_of.items()), 5),
                "matrices": dict(sorted(Counter(options_of.values()).items())),
            }  # fmt: skip

        results.row("bytes", {"setting": setting, "rounding": rounding, "at": round(average, 3)}, make)

    def allocated(setting: str, average: float, options: Options, rounding: str) -> None:
        budgets = {"bytes": weights * average / 8}
        row(setting, average, options, rounding, lambda: allocate(options, budgets, ties=ties(options)).chosen)

    for rounding in ("compensated", "nearest"):
        for average in averages:
            if average in sizes:
                uniform = dict.fromkeys(bits, sizes[average])
                row(f"all at {sizes[average]} bits", average, bits, rounding, functools.partial(dict, uniform))
            if average > averages[0]:
                allocated("allocated", average, bits, rounding)
    known = results.measured("bits, compensated", lambda: sensitivities(BITS, compensated=True))
    everything = results.measured("everything", lambda: sensitivities(EVERYTHING, compensated=True))
    for average in averages[1:-1]:
        allocated("allocated, measured compensated", average, known, "compensated")
        allocated("allocated, by the loss", average, by(known, "next_token_change_nats"), "compensated")
        allocated("allocated, by the outputs", average, by(known, "output_error"), "compensated")
    for average in averages[:-1]:
        allocated("allocated from everything", average, everything, "compensated")


# ---------------------------------------------------------------- block types


def in_blocks(chosen: Mapping[str, str], *, weighed: bool) -> float:
    """Return the held-out loss of the model with its matrices and tables as a GGUF file gives them back."""
    from knowledge_base.techniques._blocks import Moments, each_layer, matrix_of
    from knowledge_base.techniques._gguf_choices import BlockType, BlockWays

    fresh = session()
    seen: dict[int, Moments] = {}
    each_layer(
        fresh, lambda _, layer, found: seen.update((id(m.module), m.inputs) for m in found), full=False, same=True,
        label="what enters columns",
    )  # fmt: skip
    ways = BlockWays(tuple(set(chosen.values())), weighed)
    for name, type in chosen.items():
        module = fresh.model.get_submodule(name)
        matrix_of(module).copy_(ways.weights(module, BlockType(type), seen.get(id(module))))
    return loss_of(fresh.model, BLOCK_WINDOWS)


def gguf_part(results: Results) -> None:
    """Fill the table of block types."""
    from knowledge_base.techniques import _sensitivity
    from knowledge_base.techniques._gguf_choices import BlockWays
    from knowledge_base.techniques.weight_gguf_mixed import TYPES

    for weighed in (False, True):
        ways = BlockWays(tuple(dict.fromkeys(type for types in TYPES.values() for type in types)), weighed)
        measure = functools.partial(_sensitivity.measure_sensitivities, ways=ways, time_limit_s=MEASURING_S)
        name = f"block types{', importance' * weighed}"
        parts = results.measured(name, lambda: measure(session()))  # noqa: B023  # called at once
        for type in BLOCKS:
            block_rows(results, parts, type, weighed=weighed)


def block_rows(results: Results, parts: Options, type: str, *, weighed: bool) -> None:
    """Fill the rows of one size: that of a file with one type for all layers."""
    from knowledge_base.techniques.weight_gguf import table_type
    from knowledge_base.techniques.weight_gguf_mixed import TYPES

    name = f"unchanged loss of {BLOCK_WINDOWS} windows, nats"
    unchanged = results.fact(name, lambda: round(loss_of(session().model, BLOCK_WINDOWS), 6))
    uniform = {name: type if ".layers." in name else table_type(type) for name in parts}
    size = sum(parts[name][stored]["bytes"] for name, stored in uniform.items())
    weights = sum(choices[type]["params"] for choices in parts.values())

    def row(setting: str, chosen: Mapping[str, str]) -> None:
        def make() -> dict[str, Any]:
            ratio = math.exp(in_blocks(chosen, weighed=weighed) - unchanged)
            types = dict(sorted(Counter(chosen.values()).items()))
            return {"bits_per_weight": round(8 * size / weights, 3), "ppl_ratio": round(ratio, 4), "types": types}

        results.row("gguf", {"setting": setting, "importance": weighed, "bytes of": type}, make)

    row("uniform", uniform)
    for name, types in TYPES.items():
        options = {matrix: {t: c for t, c in choices.items() if t in types} for matrix, choices in parts.items()}
        row(f"allocated, {name}", allocate(options, {"bytes": size}).chosen)


# ---------------------------------------------------------------- speed


def speed_part(results: Results) -> None:
    """Fill the table of speeds that were asked for, told and measured."""
    unchanged = results.fact("unchanged loss, nats", lambda: round(loss_of(session().model), 5))
    everything = {"choose": "everything"}
    for name, asked, knobs in (
        ("prune_to_speed", {}, {}),
        ("weight_mixed", everything, {"average_bits": 32.0, **everything}),
    ):
        technique = techniques.get(name)
        measure = functools.partial(technique.options, time_limit_s=MEASURING_S, **asked)
        measured = results.measured(f"{name}, on this machine", lambda: measure(session()))  # noqa: B023  # called at once
        for speedup in SPEEDS:
            make = functools.partial(to_speed, technique, {**knobs, "speedup": speedup}, measured, unchanged)
            results.row("speed", {"technique": name, "asked": speedup}, make)


def to_speed(technique: Any, knobs: Mapping[str, Any], measured: Mapping[str, Any], unchanged: float) -> dict[str, Any]:
    """Return what a technique with an allocation to a speed came to, or why it cannot."""
    from knowledge_base.techniques._latency import decode_step, least_seconds

    try:
        answer = allocate(measured["parts"], technique.budgets(measured, **knobs), ties=measured.get("ties", ()))
    except NoFeasiblePlan as error:
        return {"refused": error.message}
    changed, plain = session(), session()
    changed.allocation = answer.chosen
    technique.execute(changed, **knobs)
    for name, module in [(n, m) for n, m in changed.model.named_modules() if hasattr(m, "unpacked")]:
        changed.model.set_submodule(name, module.unpacked())  # as an engine computes with it
    steps = least_seconds({"plain": decode_step(plain), "changed": decode_step(changed)}, plain, "timing")
    told_s = measured["step_s"] - measured["unchanged_s"] + answer.takes["seconds"]
    return {
        "told": round(measured["step_s"] / told_s, 3), "measured": round(steps["plain"] / steps["changed"], 3),
        "step_ms": round(1e3 * steps["changed"], 3), "ppl_ratio": round(math.exp(loss_of(changed.model) - unchanged), 4),
        "options": dict(sorted(Counter(answer.chosen.values()).items())),
    }  # fmt: skip


# ---------------------------------------------------------------- solver


def solver_part(results: Results) -> None:
    """Fill in what the program takes for 80 layers of 7 matrices of 20 options, by the budgets it is under."""
    chance = random.Random(0)
    shapes = [8192**2, 8192 * 1024, 8192 * 1024, 8192**2, 8192 * 28_672, 8192 * 28_672, 28_672 * 8192]
    options: dict[str, dict[str, dict[str, float]]] = {}
    for matrix in range(80 * 7):
        params, scale = shapes[matrix % 7], 10 ** chance.uniform(-5, -2)
        options[str(matrix)] = {
            f"{bits} bits, {share:.0%} of the weights": {
                LOSS: scale * (4.0 ** (4 - bits) + 4 * (1 - share) ** 2) * chance.uniform(0.7, 1.4),
                "bytes": round(params * (bits * share + (share < 1) + 0.5) / 8),
                "memory": round(params * (bits * (share if bits > 4 else 1) + 0.5) / 8),
                "seconds": params * (bits + 0.5) / 8 / 50e9 * (3 if bits < 4 else 1) * chance.uniform(0.9, 1.1),
            }
            for bits in (2, 3, 4, 8, 16)
            for share in (0.5, 0.7, 0.9, 1.0)
        }
    half = {
        what: sum(sorted(choice[what] for choice in choices.values())[8] for choices in options.values())
        for what in ("bytes", "memory", "seconds")
    }
    for budgets in (("bytes",), ("seconds",), ("bytes", "seconds"), tuple(half)):

        def make(budgets: Sequence[str] = budgets) -> dict[str, Any]:
            began = time.monotonic()
            answer = allocate(options, {what: half[what] for what in budgets}, time_limit_s=60)
            return {"wall_s": round(time.monotonic() - began, 2), "gap": answer.gap}

        results.row(SOLVER, {"budgets": list(budgets)}, make)


def main() -> None:
    parser = argparse.ArgumentParser(description="allocated against uniform settings, on the shipped model")
    parser.add_argument("--again", action="store_true", help="measure anew what is kept")
    results = Results(parser.parse_args().again)
    solver_part(results)
    bytes_part(results)
    gguf_part(results)
    speed_part(results)


if __name__ == "__main__":
    main()
