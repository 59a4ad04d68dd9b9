"""Every executable technique at two or three strengths: what it saves and costs on the shipped model and on a larger one.

    python benchmarks/techniques.py                        # both models: about 55 minutes on two quiet cores
    python benchmarks/techniques.py --model shipped        # all techniques on models/tiny-lm: about 40 minutes
    python benchmarks/techniques.py --model random-110m    # a selection on a random Llama of 110 M parameters: about 15
    python benchmarks/techniques.py --only weight_gptq     # one technique, measured again

Plans are built, served and scored as `leanplan plan` does it (planner/validation.py): each in a process of its own, then
the settings of a technique in blocks interleaved with the unchanged model on the same engine, which gives the ratios. What
was measured is kept in techniques.json technique by technique: the same command goes on where it was stopped, `--again`
measures all anew. A technique that does nothing alone stands beside the step it is for, and the row says which. The run
itself is an ordinary one, kept under .leanplan: `leanplan explain METHOD` tells these figures afterwards.

Writes techniques.json and the tables of README.md.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.readme_tables import figures, keep_figures, placed, plain
from knowledge_base import units
from knowledge_base.errors import Terminated
from knowledge_base.registry import techniques
from knowledge_base.types import Figure, Plan, Step
from planner.estimating.asking import read_step
from planner.loop import Run, Settings
from planner.measuring import Protocol
from planner.preparing import Prepared, prepare
from planner.progress import Progress
from planner.results import Rejection
from planner.store import Record
from search.space import Refusal, Space

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS, README = HERE / "techniques.json", HERE / "README.md"
KEPT = ROOT / ".leanplan"
UNCHANGED = "unchanged"
# Enough for ratios of a few per cent: the blocks are what the ratios are from, screening is for the figures beside them.
PROTOCOL = Protocol(requests=5, least_s=0.5, most_s=2.5, blocks=9, block_s=0.25, blocks_s=60.0)
TIME_LIMIT_S = 360.0  # of a spec; here it only says how long a technique may measure what it can choose from
LONGEST_STEPS = 20  # of training: 60 take more than a minute each
EVERY_SETTING = ("weight_gguf",)  # whose settings are formats of their own, and quick to build


# What stands beside a technique, or one setting of it, that alone has nothing to work on or changes nothing.
BESIDE: dict[str, tuple[str, ...]] = {
    "chunked_prefill": ("batch_size:count=8",),
    "correct_low_rank": ("weight_low_bits:bits=2",),
    "distil_text": ("prune_width:keep=0.5",),
    "importance_matrix": ("weight_gguf:type=iq3_s",),
    "recover_full": ("prune_width:keep=0.5",),
    "recover_lora": ("prune_width:keep=0.5",),
    "recover_quantised": ("weight_gptq:bits=2",),
    "rotate": ("weight_low_bits:bits=2",),
    "scale_awq": ("weight_int4",),
    "scale_awq(bits=3)": ("weight_low_bits:bits=3",),
    "smooth_quant": ("activation_int8_static",),
    "store_sparse": ("prune_magnitude:sparsity=0.5",),
    "weight_int4_sparse": ("prune_sparsegpt:sparsity=0.5",),
}
# Those for which speed at a size beyond the caches is the question.
LARGE = (
    "weight_dtype", "weight_int8", "activation_int8", "activation_int8_static", "weight_int4", "weight_low_bits:bits=2",
    "weight_nf4", "weight_gguf:type=q4_k", "weight_gguf:type=q8_0", "prune_width:keep=0.5", "prune_heads:keep=0.5",
    "drop_layers:count=2", "low_rank:keep=0.6", "activation_threshold", "ffn_prompt_neurons:keep=0.5", "kv_cache_quantised",
    "prompt_lookup", "torch_compile",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model that techniques are measured on. `chosen`: the steps as on the command line, None for every technique."""

    title: str
    note: str
    folder: Callable[[], Path]
    heldout: Callable[[Path], Path]
    prompt_tokens: int
    output_tokens: int
    samples: int  # windows of calibration text
    chosen: tuple[str, ...] | None
    quality: bool  # whether what it says of text means anything


def _made() -> Path:
    from planner.tiny_models import make_tiny_model

    folder = KEPT / "models" / "random-110m"
    if not (folder / "config.json").is_file():
        make_tiny_model(folder, "llama", vocab_size=4096, hidden_size=1024, layers=11, context_tokens=512)
    return folder


def _whole(folder: Path) -> Path:
    from planner.data import bundled

    return bundled("heldout")


def _beginning(folder: Path) -> Path:
    """Return a text just long enough to be scored: a random model says nothing of it."""
    path = folder.parent / "some-text.txt"
    path.write_text(_whole(folder).read_text(encoding="utf-8")[:2000], encoding="utf-8")
    return path


SUBJECTS = {
    "shipped": Subject(
        title="models/tiny-lm", note="", folder=lambda: ROOT / "models" / "tiny-lm", heldout=_whole, prompt_tokens=128,
        output_tokens=32, samples=64, chosen=None, quality=True,
    ),
    "random-110m": Subject(
        title="a Llama of 110 M parameters", note="random weights, made on the spot: what it says means nothing, so size, "
        "speed and building are told; calibrated on 8 windows of text where that is needed",
        folder=_made, heldout=_beginning, prompt_tokens=128, output_tokens=16, samples=8, chosen=LARGE, quality=False,
    ),
}  # fmt: skip


# ---------------------------------------------------------------- what is measured


def strengths(legal: Sequence[Step]) -> list[Step]:
    """Return the settings to measure of a technique's legal ones.

    Three values of its first knob at most (the ends and the default), the other knobs at their defaults where that is
    legal; then one setting for each other value of those.
    """
    knobs = techniques.get(legal[0].technique).TECHNIQUE.knobs
    legal = [s for s in legal if s.knobs.get("steps", 0) <= LONGEST_STEPS]
    if not knobs or legal[0].technique in EVERY_SETTING:
        return list(legal)
    usual = {name: choice.default for name, choice in knobs.items()}

    def nearest(knob: str, value: Any) -> Step | None:
        """Return the legal setting with that value whose other knobs differ least from the defaults."""
        fitting = [s for s in legal if s.knobs[knob] == value]
        return min(fitting, key=lambda s: sum(s.knobs[k] != v for k, v in usual.items()), default=None)

    first, *others = knobs
    there = [o for o in knobs[first].options if any(s.knobs[first] == o for s in legal)]
    values = [o for i, o in enumerate(there) if i in (0, len(there) - 1) or o == usual[first] or len(there) <= 3]
    found = [nearest(first, value) for value in values]
    found += [nearest(knob, value) for knob in others for value in knobs[knob].options if value != usual[knob]]
    return list(dict.fromkeys(step for step in found if step is not None))


def plans_of(
    space: Space, refused: Sequence[Rejection | Refusal], chosen: Sequence[str] | None = None
) -> tuple[dict[str, list[Plan]], dict[str, str]]:
    """Return the plans by technique, each with the step and what must stand beside it; and why others have none.

    Args:
        chosen: steps as on the command line; None for several settings of every technique.
    """
    plans: dict[str, list[Plan]] = {}
    left_out: dict[str, str] = {}
    for name in techniques.names():
        wanted = None if chosen is None else [step for step in map(read_step, chosen) if step.technique == name]
        if wanted == []:
            continue
        offered = {
            engine: [step for steps in families.values() for step in steps if step.technique == name]
            for engine, families in space.options.items()
        }
        engine, legal = next(((e, steps) for e, steps in offered.items() if steps), ("", []))
        if not legal:
            reasons = [r.why for r in refused if name in r.what]
            left_out[name] = reasons[0] if reasons else "no setting of it is legal here"
            continue
        for step in strengths(legal) if wanted is None else wanted:
            beside = map(read_step, BESIDE.get(str(step), BESIDE.get(name, ())))
            whole, rules = (step, *beside), space.rules[engine]
            if (plan := space.plan(engine, whole)) is not None:
                plans.setdefault(name, []).append(plan)
            else:
                left_out[str(step)] = rules.conflict(whole) or rules.missing(whole) or "a rule forbids it"
    return plans, left_out


class Singles(Run):
    """A run that measures given plans by technique instead of searching. `told` gets a technique's rows when it is done."""

    def __init__(
        self, prepared: Prepared, settings: Settings, plans: Mapping[str, Sequence[Plan]],
        told: Callable[[str, list[dict[str, Any]]], None],
    ) -> None:  # fmt: skip
        super().__init__(prepared, settings, Progress(live=False), time.monotonic())
        self.plans, self.told = plans, told

    def time_left(self) -> float:
        """Every plan is measured, however long it takes."""
        return math.inf

    def _stages(self, validator: Any, only: Any) -> None:
        validator.protocol = PROTOCOL
        self._baseline(validator)
        unchanged = {self.baseline.engine: self.baseline}
        others = [e for e in self.prepared.space.options if e != self.baseline.engine]
        for engine in others:
            plan = self.prepared.space.unchanged(engine)
            if any(p.engine == engine for plans in self.plans.values() for p in plans):
                self._measure(validator, plan, f"the model as it came, on {engine}")
                unchanged[engine] = plan
        self._tell_rows(validator, UNCHANGED, self.baseline, list(unchanged.values()))
        for number, (name, plans) in enumerate(self.plans.items()):
            self.progress.line(f"{number + 1} of {len(self.plans)}: {name}")
            for plan in plans:
                self.known.before[plan] = self._estimate(plan, None)
                self._measure(validator, plan, f"what {name} does")
            self._tell_rows(validator, name, unchanged[plans[0].engine], plans)
            for plan in plans:  # dozens of artefacts are not kept
                shutil.rmtree(self.folder.artefacts / plan.id, ignore_errors=True)

    def _tell_rows(self, validator: Any, name: str, base: Plan, plans: Sequence[Plan]) -> None:
        """Measure a technique's plans again in blocks interleaved with the unchanged model, and hand their rows on."""
        served = [p for p in plans if p != base and _served(self.known.records[p])]
        ratios: dict[Plan, Mapping[str, Figure]] = {}
        if served:
            for plan, (record, found) in validator.interleave(base, served, self.known.records, math.inf).items():
                self._keep(record)
                ratios[plan] = found
        records = self.known.records
        self.told(name, [row(name, p, records[p], ratios.get(p), records[self.baseline]) for p in plans])


def _served(record: Record) -> bool:
    """Whether a plan runs, whatever it says."""
    failure = record.measurement.failure
    return failure is None or failure.kind == "quality_collapse"


def row(
    name: str, plan: Plan, record: Record, ratios: Mapping[str, Figure] | None, unchanged: Record
) -> dict[str, Any]:
    """Return what one plan came to. Speeds are ratios of rates to the unchanged model's on the same engine."""
    measured = record.measurement
    step = next((s for s in plan.steps if s.technique == name), None)
    found: dict[str, Any] = {
        "technique": name, "step": str(step) if step else UNCHANGED, "beside": [str(s) for s in plan.steps if s != step],
        "engine": plan.engine, "plan": plan.id, "taken_at": measured.taken_at,
        "failure": f"{measured.failure.kind}: {measured.failure.message}" if measured.failure else None,
    }  # fmt: skip
    figures = {n: f.value for n, f in measured.figures.items()}
    for metric in (
        "artefact_bytes",
        "peak_memory_bytes",
        "weights_bytes",
        "build_s",
        "agreement_ratio",
        "kl_divergence_nats",
    ):
        if metric in figures:
            found[metric] = _rounded(figures[metric])
    for metric in ("artefact_bytes", "peak_memory_bytes"):
        if metric in figures:
            found[metric.replace("_bytes", "_ratio")] = _rounded(
                figures[metric] / unchanged.measurement.figures[metric].value
            )
    found["build_peak_bytes"] = measured.protocol.get("build_peak_bytes")
    found["framework_bytes"] = measured.protocol.get("framework_bytes")
    found["other_cores"] = _rounded(measured.protocol.get("other_cores", 0.0))
    if loss := measured.figures.get("quality_loss_ratio"):
        found["perplexity_ratio"] = [_rounded(1 + x) for x in (loss.value, loss.low, loss.high)]
    for metric, speed, faster_is_less in (
        ("tpot_s", "decode", True), ("ttft_s", "prefill", True), ("throughput_tokens_per_s", "throughput", False),
    ):  # fmt: skip
        if ratios and (ratio := ratios.get(metric)):
            ends = (ratio.value, ratio.low, ratio.high)
            found[speed] = (
                [_rounded(1 / x) for x in (ends[0], ends[2], ends[1])] if faster_is_less else list(map(_rounded, ends))
            )
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.5g}") if isinstance(value, float) and abs(value) < 1e5 else round(value)


def complete(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a technique need not be measured again: every row has its ratios, or its plan was refused for good."""
    return all("decode" in r or (r["failure"] or "").startswith("unsupported") or _is_base(r) for r in rows)


def _is_base(one: Mapping[str, Any]) -> bool:
    """Whether a row is of the model that all others are compared with."""
    return bool(one["technique"] == UNCHANGED and one["engine"] == "transformers")


# ---------------------------------------------------------------- what is written


def on_front(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the ids of the plans of a single step that none is both smaller and better than: size and perplexity."""
    import numpy as np

    from search.pareto import front

    singles = [r for r in rows if not r["failure"] and not r["beside"] and "perplexity_ratio" in r]
    costs = [(r["artefact_bytes"], r["perplexity_ratio"][0]) for r in singles]
    return {singles[i]["plan"] for i in front(np.array(costs))} if costs else set()


def as_markdown(found: Mapping[str, Any], *, quality: bool, only: str | None = None) -> str:
    """Return the rows for people: all, with what was left out, or those of one technique beside the unchanged model."""
    heads = ["technique", "beside", "artefact", "memory, running"]
    heads += ["perplexity", "same token", "KL, nats"] if quality else []
    heads += ["decode", "prefill", "tokens/s", "build", "memory, building"]
    rows = [
        r for name in (UNCHANGED, *sorted(found["rows"])) for r in found["rows"].get(name, ()) if name == r["technique"]
    ]
    rows = list({r["plan"]: r for r in rows}.values())
    best = on_front(rows) if quality else set()
    if only is not None:
        rows = [one for one in rows if one["technique"] in (UNCHANGED, only)]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---|" * (len(heads) - 2)]
    failed = []
    for one in rows:
        if one["failure"] and not {"artefact_bytes", "perplexity_ratio"} <= set(one):
            failed.append(f"- {plain(one['step'])}: {plain(one['failure'])}")
            continue
        name = plain(one["step"] + (f" on {one['engine']}" if one["engine"] != "transformers" else ""))
        cells = [
            f"**{name}** ●" if one["plan"] in best else name, plain(", ".join(one["beside"])),
            f"{_bytes(one['artefact_bytes'])} ({one['artefact_ratio']:.2f}×)",
            f"{_bytes(one['peak_memory_bytes'])} ({one['peak_memory_ratio']:.2f}×)",
        ]  # fmt: skip
        if quality:
            cells += [
                f"{one['perplexity_ratio'][0]:.4g}×", f"{one['agreement_ratio']:.1%}", f"{one['kl_divergence_nats']:.2g}",
            ]  # fmt: skip
        cells += [_speed(one, key) for key in ("decode", "prefill", "throughput")]
        cells += [units.format(one["build_s"], "time"), _bytes(one["build_peak_bytes"])]
        lines.append(f"| {' | '.join(cells)} |")
    left = [f"- {plain(name)}: {plain(why)}" for name, why in found["left_out"].items()]
    told = [*failed, *(left if only is None else [])]
    return "\n".join([*lines, *(["", "Left out:", "", *told] if told else [])]) + "\n"


def _bytes(value: float | None) -> str:
    return "-" if value is None else units.format(value, "bytes")


def _speed(one: Mapping[str, Any], key: str) -> str:
    if _is_base(one):
        return "1"
    if key not in one:
        return "-"
    mid, low, high = one[key]
    return f"{mid:.2f}× [{low:.2f}, {high:.2f}]"


def with_tables(readme: str, kept: Mapping[str, Any]) -> str:
    """Return the text of README.md with the tables of what is kept."""
    for model, found in kept.items():
        table = as_markdown(found, quality=SUBJECTS[model].quality)
        readme = placed(readme, f"techniques, {model}", f"On {found['machine']}, {found['date']}.\n\n{table}")
    return readme


def write(kept: Mapping[str, Any]) -> None:
    """Write the figures, and the tables between the marks of README.md."""
    keep_figures(RESULTS, kept)
    README.write_text(with_tables(README.read_text(encoding="utf-8"), kept), encoding="utf-8")


# ---------------------------------------------------------------- the command


def prepared_for(subject: Subject, store: Path = KEPT) -> Prepared:
    """Return a subject's model with every plan that is legal here; nothing is limited, so nothing is fitted to limits."""
    from planner import spec as specs
    from planner.data import bundled

    folder = subject.folder()
    spec = specs.from_mapping({
        "model": str(folder), "objectives": ["tpot_p50", "artefact_size", "quality_loss"],
        "workload": {"prompt_tokens": subject.prompt_tokens, "output_tokens": subject.output_tokens, "concurrency": 8},
        "quality": {"data": str(subject.heldout(folder))},
        "calibration": {"data": str(bundled("calib")), "samples": subject.samples},
        "search": {"effort": "quick", "seed": 0}, "limits": {"time_per_candidate": "20 min"},
    })  # fmt: skip
    spec = replace(spec, search=replace(spec.search, time_limit_s=TIME_LIMIT_S))
    return prepare(spec, store=store, tell=lambda text: print(text, flush=True))


def measure(model: str, *, only: Sequence[str], again: bool) -> None:
    """Measure what is not kept yet of one model, and write after every technique."""
    from planner.predicting import versions

    subject, kept = SUBJECTS[model], figures(RESULTS)
    prepared = prepared_for(subject)
    plans, left_out = plans_of(prepared.space, prepared.refused, subject.chosen)
    device = prepared.hardware.device
    told = {
        "model": subject.title, "note": subject.note, "params": prepared.model.params_total,
        "machine": f"{device.name}, {device.cores} cores", "versions": versions(),
        "workload": {"prompt_tokens": subject.prompt_tokens, "output_tokens": subject.output_tokens},
    }  # fmt: skip
    before = {} if again else kept.get(model, {}).get("rows", {})
    wanted = {
        name: found
        for name, found in plans.items()
        if (name in only if only else not (name in before and complete(before[name])))
    }
    rows = {name: before[name] for name in (UNCHANGED, *plans) if name in before}
    print(f"{subject.title}: {len(wanted)} of {len(plans)} techniques to measure", flush=True)
    for name, why in left_out.items():
        print(f"left out: {name}: {why}", flush=True)

    def tell(name: str, found: list[dict[str, Any]]) -> None:
        rows[name] = found
        kept[model] = told | {"date": time.strftime("%Y-%m-%d"), "left_out": left_out, "rows": rows}
        write(kept)

    if not wanted:
        tell(UNCHANGED, rows[UNCHANGED])
        return
    settings = Settings(run_root=KEPT / "benchmark-runs", store_root=KEPT, fresh=again or bool(only))
    run = Singles(prepared, settings, wanted, tell)
    run.go(only=(prepared.space.unchanged(), None))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SUBJECTS), help="only this one (default: both)")
    parser.add_argument(
        "--only", action="append", default=[], choices=techniques.names(), metavar="NAME",
        help="only this technique, measured again; may be repeated",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="measure what is kept as well")
    given = parser.parse_args(arguments)
    for model in [given.model] if given.model else SUBJECTS:
        try:
            measure(model, only=given.only, again=given.again)
        except (KeyboardInterrupt, Terminated):
            sys.exit("stopped; the same command goes on from here")
        print(as_markdown(figures(RESULTS)[model], quality=SUBJECTS[model].quality), flush=True)


if __name__ == "__main__":
    main()
