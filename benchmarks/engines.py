"""Every engine with every weight format it offers, against the memory's bandwidth; and what `leanplan plan` finds of it.

    python benchmarks/engines.py                          # both models: about an hour on two quiet cores
    python benchmarks/engines.py --model shipped          # models/tiny-lm: about a quarter of an hour
    python benchmarks/engines.py --model random-394m      # a random Llama of 394 M parameters in bfloat16, made on demand
    python benchmarks/engines.py --only openvino          # one engine, measured again
    python benchmarks/engines.py --tables                 # only writes the tables anew from engines.json

A grid of plans, one for each engine and weight format that takes no calibration text (torch.compile beside a few), is
built, scored and served as `leanplan plan` does it, each in a process of its own. Then the plans of an engine are timed in
blocks interleaved with the unchanged model on transformers, once with one request at a time and once with eight. The bound
is the bandwidth that planner/probes/bandwidth.py finds at the start, over the bytes that a decode step reads: the matrices
and the output table in the format they are stored in, and the keys and values of half the output.

Before that, `leanplan plan` is asked the questions of QUESTIONS, within a quarter of the grid's runs, over the same
techniques (one question: over all there are) and in a store of its own, which knows nothing of the grid. What it recommends is then timed again, interleaved
in 31 rounds with the best of the grid within the same quality budget (as the planner judges it: the whole interval of
the loss is within) and with what a user would pick by hand.

What was measured is kept in engines.json engine by engine and question by question: the same command goes on from there,
`--again` measures all anew. Writes engines.json and the tables of README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import techniques as single
from benchmarks.readme_tables import figures, keep_figures, placed, plain
from cost_models.demand import chains, step_read_bytes
from knowledge_base import units
from knowledge_base.errors import CandidateFailed, EnvironmentProblem, Terminated
from knowledge_base.registry import engines, techniques
from knowledge_base.serde import plain as as_data
from knowledge_base.serde import restore
from knowledge_base.types import Demand, Figure, Plan, Step, Workload
from planner import measuring
from planner.loop import Run, Settings
from planner.preparing import Prepared
from planner.progress import Progress
from planner.store import Record

if TYPE_CHECKING:
    from planner.results import ParetoSet
    from planner.spec import Spec
    from planner.validation import Validator

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "engines.json", HERE / "README.md"
PAGE = HERE.parent / "docs" / "concepts" / "engines.md"
KEPT = single.KEPT
FOLDER = KEPT / "engines"

BATCHES = (1, 8)
# Screened for memory and quality only: speeds are of the blocks.
PROTOCOL = measuring.Protocol(requests=3, least_s=0.2, most_s=1.0, blocks=9, block_s=0.25, blocks_s=90.0)
# Few plans of nearly the same speed: five per cent are to be told apart.
COMPARING = replace(PROTOCOL, blocks=31, block_s=0.5, blocks_s=300.0)
FORMATS = ("dtype", "weights")  # families of techniques that choose how weights are stored
COMPILE = "compile"  # the family of torch.compile, which takes half a minute for each plan:
COMPILED = ("bfloat16", "int4")  # what stands beside it, apart from the model as it came
SHARE = 1 / 4  # of the grid's runs, that the planner may use
SAME_QUALITY = 0.01  # of perplexity, that an engine's fastest formats may lose
BEST = 3  # of the grid, timed again beside the recommended plan: the first of many is often first by luck
ATTEMPTS = 2  # a run may end before its number of plans, where they take longer than forecast
WITHIN = 0.95  # of the speed of the best of the grid
SAME = 0.001  # of the perplexity: as much is no difference on so few windows
SLOWEST = 3.0  # times the unchanged model's time per token, that plans timed in turns may take
ROOM = 0.7  # of the memory limit, that plans timed together may take

# What a user picks without measuring: an engine and a format by its name in `Demand.weight_format`.
BY_HAND = {
    "transformers, bfloat16": ("transformers", ("bfloat16",)),
    "llama.cpp, Q4_K": ("llama_cpp", ("q4_k_m", "q4_k")),
    "OpenVINO, int4": ("openvino", ("int4",)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What the planner is asked: the fastest plan for so many requests at a time, within a loss of perplexity."""

    batch: int
    quality_loss: float | None = None
    any_technique: bool = False  # not those of the grid alone: what answers a user who restricts nothing

    @property
    def metric(self) -> str:
        """What it is judged by."""
        return "tpot_s" if self.batch == 1 else "throughput_tokens_per_s"

    @property
    def words(self) -> str:
        what = "time per token" if self.batch == 1 else f"tokens each second, {self.batch} requests at a time"
        within = "" if self.quality_loss is None else f", perplexity within {self.most_lost}"
        return what + within + (", any technique" if self.any_technique else "")

    @property
    def most_lost(self) -> str:
        """The loss of perplexity it may bring, as a budget says it."""
        return f"{100 * (self.quality_loss or 0):g}%"


QUESTIONS: dict[str, dict[str, Question]] = {
    "shipped": {
        "one": Question(batch=1, quality_loss=0.01),
        "eight": Question(batch=8, quality_loss=0.01),
        # 2.1 %: the end of the interval of what Q4_K loses
        "one, as good as Q4_K": Question(batch=1, quality_loss=0.021),
        "one, any technique": Question(batch=1, quality_loss=0.021, any_technique=True),
    },
    "random-394m": {"one": Question(batch=1), "eight": Question(batch=8)},
}


# ---------------------------------------------------------------- the models


def make_random(folder: Path) -> Path:
    """Write a Llama of 394 M random parameters in bfloat16 with the shipped tokenizer, unless it is there; return its folder."""
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from knowledge_base.techniques._loading import TOKENIZER_FILES

    config = LlamaConfig(
        vocab_size=8192, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=8,
        intermediate_size=4096, max_position_embeddings=1024, tie_word_embeddings=False, initializer_range=1024**-0.5,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:  # what is there is whole
        partial = Path(work) / folder.name
        model.save_pretrained(partial)
        for name in TOKENIZER_FILES:
            if (source := single.ROOT / "models" / "tiny-lm" / name).is_file():
                shutil.copy(source, partial / name)
        partial.rename(folder)
    return folder


SUBJECTS = {
    "shipped": single.SUBJECTS["shipped"],
    "random-394m": single.Subject(
        title="a Llama of 394 M parameters", note="random weights in bfloat16, made on the spot: what it says means nothing",
        folder=lambda: make_random(KEPT / "models" / "random-394m"), heldout=single.SUBJECTS["random-110m"].heldout,
        prompt_tokens=64, output_tokens=32, samples=8, chosen=None, quality=False,
    ),
}  # fmt: skip


# ---------------------------------------------------------------- the grid


def grid(prepared: Prepared) -> dict[str, dict[Plan, str]]:
    """Return by engine its plans, each with the name of its format: the model as it came, then one for each other format."""
    space = prepared.space
    demands = chains(prepared.model, prepared.spec.workload)
    found: dict[str, dict[Plan, str]] = {}
    for engine, families in space.options.items():
        steps = [
            step
            for family in FORMATS
            for step in families.get(family, ())
            if not techniques.get(step.technique).TECHNIQUE.needs_calibration
        ]
        compiling = families.get(COMPILE, ())
        by_name: dict[str, Plan] = {}
        for chosen in ((), *((step,) for step in sorted(steps, key=_unusual)), *_compiled(steps, compiling)):
            if (plan := space.plan(engine, chosen)) is None:
                continue
            demand = demands.node(plan).demand
            name = demand.weight_format + (", compiled" if demand.compiled else "")
            if not demand.compiled or not plan.steps[:-1] or demand.weight_format in COMPILED:
                by_name.setdefault(name, plan)
        found[engine] = {plan: name for name, plan in by_name.items()}
    return found


def _unusual(step: Step) -> tuple[int, int, str]:
    """Return how far a step is from what a user gets who says nothing: knobs off their defaults, knobs at all."""
    knobs = techniques.get(step.technique).TECHNIQUE.knobs
    return sum(step.knobs[name] != choice.default for name, choice in knobs.items()), len(knobs), str(step)


def _compiled(steps: Sequence[Step], compiling: Sequence[Step]) -> list[tuple[Step, ...]]:
    return [(*beside, step) for step in compiling for beside in ((), *((s,) for s in sorted(steps, key=_unusual)))]


def read_bytes(demand: Demand, workload: Workload, batch: int) -> float:
    """Return what one decode step reads: matrices and output table once, keys and values of each sequence, half-way."""
    weights = step_read_bytes(demand) + demand.head_read_bytes + demand.other_bytes
    tokens = workload.prompt_tokens + workload.output_tokens / 2
    return weights + batch * tokens * demand.kv_bytes_per_token


# ---------------------------------------------------------------- measuring the grid


class Grid(Run):
    """A run that measures an engine's formats, then the comparisons that are due. `tell` gets each when it is done."""

    def __init__(
        self, prepared: Prepared, settings: Settings, *, plans: Mapping[str, Mapping[Plan, str]], bandwidth: float, quality: bool,
        comparisons: Callable[[], Mapping[str, Comparison]], tell: Callable[[str, str, Any], None],
    ) -> None:  # fmt: skip
        super().__init__(prepared, settings, Progress(live=False), time.monotonic())
        self.plans, self.bandwidth, self.quality = plans, bandwidth, quality
        self.comparisons, self.tell = comparisons, tell

    def time_left(self) -> float:
        """Every plan is measured, however long it takes."""
        return math.inf

    def _stages(self, validator: Validator, only: Any) -> None:
        validator.protocol = PROTOCOL
        self._baseline(validator)
        for engine, plans in self.plans.items():
            self.progress.line(f"{engine}: {len(plans)} formats")
            self.tell("rows", engine, self._rows(validator, plans))
            self._forget_artefacts()
        for name, comparison in self.comparisons().items():
            self.progress.line(f"comparing: {name}")
            self.tell("compared", name, self._compared(validator, comparison))
            self._forget_artefacts()

    def _forget_artefacts(self) -> None:
        for folder in self.folder.artefacts.iterdir():  # dozens of them are not kept
            if folder.name != self.baseline.id:
                shutil.rmtree(folder, ignore_errors=True)

    def _served(self, validator: Validator, plan: Plan, why: str) -> bool:
        self.known.before[plan] = self._estimate(plan, None)
        failure = self._measure(validator, plan, why).measurement.failure
        return failure is None or failure.kind == "quality_collapse"  # it runs, whatever it says

    def _rows(self, validator: Validator, plans: Mapping[Plan, str]) -> list[dict[str, Any]]:
        """Measure an engine's plans, each alone and then in turns, and return their rows."""
        served = [plan for plan, name in plans.items() if self._served(validator, plan, f"{plan.engine}, {name}")]
        slow = {plan: why for plan in served if (why := self._too_slow(plan))}
        quick = [plan for plan in served if plan not in slow]
        timed = {batch: slow | self._in_turns(validator, self.baseline, quick, batch) for batch in BATCHES}
        demands = chains(self.prepared.model, self.spec.workload)
        found = []
        for plan, name in plans.items():
            row = row_of(name, self.known.records[plan], quality=self.quality)
            for batch in BATCHES if plan in served else ():
                told = timed[batch][plan]
                row[f"batch {batch}"] = (
                    {"why": told}
                    if isinstance(told, str)
                    else speeds(told, demands.node(plan).demand, self.spec.workload, batch, self.bandwidth)
                )
            found.append(row)
        return found

    def _too_slow(self, plan: Plan) -> str | None:
        """Return why a plan is not timed in turns: a round of them would last for minutes, and it is the fastest of nothing."""
        first, own = (self.known.records[p].measurement.figures.get("tpot_s") for p in (self.baseline, plan))
        times = own.value / first.value if first and own else 0.0
        return f"{times:.2g} times the unchanged model's time per token when screened" if times > SLOWEST else None

    def _compared(self, validator: Validator, comparison: Comparison) -> list[dict[str, Any]]:
        """Time the recommended plan in turns with others; return for each how many times its speed the recommended has."""
        question, recommended = comparison.question, comparison.recommended
        for plan in (recommended, *comparison.others):
            self._served(validator, plan, "compared with what others pick")
        told = self._in_turns(validator, recommended, list(comparison.others), question.batch, COMPARING)
        rows = []
        for plan, name in {recommended: "recommended", **comparison.others}.items():
            row = row_of(name, self.known.records[plan], quality=self.quality)
            observed = told[plan]
            if isinstance(observed, str):
                row["why"] = observed
            else:
                row["value"] = _rounded(observed.figures[question.metric].value)
                row["times"] = times(observed.ratios.get(question.metric), question.metric)
            rows.append(row)
        return rows

    # ------------------------------------------------------------ in turns

    def _in_turns(
        self,
        validator: Validator,
        base: Plan,
        plans: Sequence[Plan],
        batch: int,
        protocol: measuring.Protocol = PROTOCOL,
    ) -> dict[Plan, measuring.Observed | str]:
        """Time plans in blocks interleaved with `base`, as many together as fit; a plan that fails is told with its reason."""
        found: dict[Plan, measuring.Observed | str] = {}
        waiting = [plan for plan in plans if plan != base]
        while waiting or base not in found:
            room = ROOM * self.prepared.hardware.memory_limit_bytes - self._peak_bytes(base)
            together: list[Plan] = []
            while waiting and (not together or sum(map(self._peak_bytes, (*together, waiting[0]))) <= room):
                together.append(waiting.pop(0))
            while base not in found or together:
                try:
                    found |= self._timed_together(validator, base, together, batch, protocol)
                    break
                except _TurnFailed as failed:
                    self.progress.line(f"left out: {failed.plan.words}: {failed}")
                    found[failed.plan] = str(failed)
                    if failed.plan == base:
                        return found | dict.fromkeys((*together, *waiting), f"beside {base.words}: {failed}")
                    together.remove(failed.plan)
        return found

    def _peak_bytes(self, plan: Plan) -> float:
        figure = self.known.records[plan].measurement.figures.get("peak_memory_bytes")
        return figure.value if figure else 0.0

    def _timed_together(
        self, validator: Validator, base: Plan, plans: Sequence[Plan], batch: int, protocol: measuring.Protocol
    ) -> dict[Plan, measuring.Observed]:
        by_id = {plan.id: plan for plan in (base, *plans)}
        with contextlib.ExitStack() as candidates:
            jobs = {}
            for name, plan in by_id.items():
                try:
                    candidate = candidates.enter_context(validator._started(plan, "turns"))
                    job = validator._open(candidate, plan, self.folder.artefacts / name)
                except CandidateFailed as error:
                    raise _TurnFailed(plan, error) from error
                jobs[name] = replace(job, batch=max(batch, job.batch))
            try:
                observed = measuring.interleave(
                    jobs, base.id, protocol, self.prepared.hardware, counters=validator.counters, waiting=self.progress.line
                )  # fmt: skip
            except CandidateFailed as error:
                failed = by_id.get(error.message.partition(":")[0])
                if failed is None:
                    raise
                raise _TurnFailed(failed, error) from error
        return {by_id[name]: one for name, one in observed.items()}


class _TurnFailed(Exception):
    """A plan failed while plans were timed in turns."""

    def __init__(self, plan: Plan, error: CandidateFailed) -> None:
        super().__init__(f"{error.kind}: {error.message.removeprefix(f'{plan.id}: ')}")
        self.plan = plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A recommended plan and what it is timed against, by plan with its name."""

    question: Question
    recommended: Plan
    others: Mapping[Plan, str]


def row_of(name: str, record: Record, *, quality: bool) -> dict[str, Any]:
    """Return what a plan is and how large and, where that means anything, how good; its speed is of other measurements."""
    measured = record.measurement
    figures = {n: f.value for n, f in measured.figures.items()}
    row: dict[str, Any] = {
        "format": name, "engine": measured.plan.engine, "steps": [str(s) for s in measured.plan.steps], "id": measured.plan.id,
        "plan": as_data(measured.plan), "taken_at": measured.taken_at, "versions": dict(measured.versions),
        "failure": f"{measured.failure.kind}: {measured.failure.message}" if measured.failure else None,
    }  # fmt: skip
    row |= {n: _rounded(figures[n]) for n in ("artefact_bytes", "peak_memory_bytes", "build_s") if n in figures}
    if quality and (loss := measured.figures.get("quality_loss_ratio")):
        row["perplexity_ratio"] = [_rounded(1 + x) for x in (loss.value, loss.low, loss.high)]
    return row


def speeds(
    observed: measuring.Observed, demand: Demand, workload: Workload, batch: int, bandwidth: float
) -> dict[str, Any]:
    """Return decode and prefill tokens a second with their intervals, and the share of the bound that decoding reaches."""
    step, first = observed.figures["tpot_s"], observed.figures["ttft_s"]
    read = read_bytes(demand, workload, batch)
    return {
        "decode_tokens_per_s": [_rounded(batch / s) for s in (step.value, step.high, step.low)],
        "prefill_tokens_per_s": [_rounded(batch * workload.prompt_tokens / s) for s in (first.value, first.high, first.low)],
        "decode_times": times(observed.ratios.get("tpot_s"), "tpot_s", ours=True),
        "step_read_bytes": round(read), "bound_share": _rounded(read / bandwidth / step.value),
        "other_cores": _rounded(observed.protocol.get("other_cores", 0.0)),
    }  # fmt: skip


def times(ratio: Figure | None, metric: str, *, ours: bool = False) -> list[float]:
    """Return how many times as fast, with the interval, from a ratio of figures to those of the plan in whose turns it was.

    Of that plan to the measured one; `ours`: of the measured one to that plan. Without a ratio it is that plan itself.
    """
    if ratio is None:
        return [1.0, 1.0, 1.0]
    slower_is_more = metric != "throughput_tokens_per_s"
    ends = [ratio.value, ratio.low, ratio.high]
    return [_rounded(x) for x in (ends if slower_is_more != ours else (1 / ends[0], 1 / ends[2], 1 / ends[1]))]


def _rounded(value: float) -> float:
    return round(value) if abs(value) >= 1e5 else float(f"{value:.5g}")


# ---------------------------------------------------------------- asking the planner


def spec_of(subject: single.Subject, question: Question, names: Iterable[str], most: int) -> Spec:
    """Return the spec of a question, over some techniques unless it is over any, with at most so many measured plans."""
    from planner import spec as specs
    from planner.data import bundled

    folder = subject.folder()
    speed = "tpot_p50" if question.batch == 1 else "throughput"
    rest = [] if question.quality_loss else ["quality_loss" if subject.quality else "artefact_size"]
    return specs.from_mapping({
        "model": str(folder), "objectives": [speed, *rest],
        "workload": {"prompt_tokens": subject.prompt_tokens, "output_tokens": subject.output_tokens, "concurrency": question.batch},
        **({"budgets": {"quality_loss": {"max": question.most_lost}}} if question.quality_loss else {}),
        "quality": {"data": str(subject.heldout(folder))}, "calibration": {"data": str(bundled("calib")), "samples": subject.samples},
        **({} if question.any_technique else {"techniques": {"only": sorted(names)}}), "limits": {"time_per_candidate": "10 min"},
        "search": {"effort": "quick", "seed": 0, "max_measured": most, "time_limit": "10 min" if subject.quality else "30 min"},
    })  # fmt: skip


def runs_allowed(size: int) -> int:
    """Return the most plans that the planner may measure, beside a grid of that many; the unchanged model is one of them."""
    return max(2, math.floor(size * SHARE))


def asked(spec: Spec, folder: Path) -> dict[str, Any]:
    """Run `leanplan plan` on a spec, in a store that knows the machine alone, and return what it recommends."""
    from planner.loop import run

    shutil.copytree(KEPT / "machines", folder / "store" / "machines", dirs_exist_ok=True)
    settings = Settings(run_root=folder / "runs", store_root=folder / "store")
    began = time.monotonic()
    for _ in range(ATTEMPTS):
        answer = run(spec, settings, Progress(live=False))
        if len(answer.results) >= spec.search.max_measured:
            break
    return told(answer) | {"wall_s": round(time.monotonic() - began, 1)}


def told(answer: ParetoSet) -> dict[str, Any]:
    """Return what is kept of an answer: every plan measured counts as a run, the unchanged model and failures too."""
    best = answer.recommended
    return {
        "runs": len(answer.results),
        "recommended": as_data(best.plan) if best else None,
        "measured": [r.plan.words for r in answer.results],
        "sentence": answer.sentence,
    }


def best_of(rows: Iterable[Mapping[str, Any]], question: Question, count: int = BEST) -> list[Plan]:
    """Return the fastest plans of the grid that did not fail, surely within a question's quality budget, best first."""
    within = [
        row for row in rows
        if not row["failure"] and "decode_tokens_per_s" in row.get(f"batch {question.batch}", {})
        and (question.quality_loss is None or row["perplexity_ratio"][2] <= 1 + question.quality_loss)
    ]  # fmt: skip
    within.sort(key=lambda row: -row[f"batch {question.batch}"]["decode_times"][0])
    return [restore(Plan, row["plan"]) for row in within[:count]]


def picks_by_hand(rows: Sequence[Mapping[str, Any]]) -> dict[Plan, str]:
    """Return what users pick by hand, of the rows of the grid, with its name."""
    found = {}
    for name, (engine, formats) in BY_HAND.items():
        there = {row["format"]: row for row in rows if row["engine"] == engine and not row["failure"]}
        if row := next((there[one] for one in formats if one in there), None):
            found[restore(Plan, row["plan"])] = name
    return found


def comparisons(found: Mapping[str, Any], questions: Mapping[str, Question]) -> dict[str, Comparison]:
    """Return what is to be timed for the questions that were answered and not compared yet."""
    rows = [row for rows in found["rows"].values() for row in rows]
    due = {}
    for name, question in questions.items():
        answer = found["asked"].get(name)
        if answer is None or answer["recommended"] is None or name in found["compared"]:
            continue
        recommended = restore(Plan, answer["recommended"])
        others = {plan: f"best of the grid, {place}" for place, plan in enumerate(best_of(rows, question), 1)}
        others |= {plan: f"{others[plan]}; {by}" if plan in others else by for plan, by in picks_by_hand(rows).items()}
        others.pop(recommended, None)
        due[name] = Comparison(question=question, recommended=recommended, others=others)
    return due


# ---------------------------------------------------------------- what is written


def as_markdown(found: Mapping[str, Any], model: str) -> str:
    """Return the grid, and the answers beside what others pick, as tables."""
    answers = f"\n{answers_table(found, model)}" if found["asked"] else ""
    return grid_table(found, quality=SUBJECTS[model].quality) + answers


def grid_table(found: Mapping[str, Any], *, quality: bool) -> str:
    """Return one line for each engine and format: sizes, quality, speeds with one and eight requests, shares of the bound."""
    heads = ["engine", "format", "steps", "artefact", "memory, running", *(["perplexity"] if quality else [])]
    for batch in BATCHES:
        heads += [f"decode, {batch}: tokens/s", "of the bound", f"prefill, {batch}: tokens/s"]
    rows = [row for rows in found["rows"].values() for row in rows]
    best = {
        key: max(
            (row[key[0]][key[1]][0] for row in rows if not row["failure"] and key[1] in row.get(key[0], {})),
            default=0.0,
        )
        for key in ((f"batch {b}", what) for b in BATCHES for what in ("decode_tokens_per_s", "prefill_tokens_per_s"))
    }
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    failed = [f"- {name}: {plain(why)}" for name, why in found["left_out"].items()]
    for row in rows:
        name = f"{row['engine']}, {row['format']}"
        if "batch 1" not in row:
            failed.append(f"- {plain(name)}: {plain(row['failure'] or 'not served')}")
            continue
        if row["failure"]:
            failed.append(f"- {plain(name)}, which no answer may be: {plain(row['failure'])}")
        cells = [row["engine"], row["format"], " + ".join(row["steps"]) or "as it came"]
        cells += [_bytes(row.get("artefact_bytes")), _bytes(row.get("peak_memory_bytes"))]
        cells += [f"{row['perplexity_ratio'][0]:.4g}×" if "perplexity_ratio" in row else "-"] if quality else []
        for batch in BATCHES:
            key = f"batch {batch}"
            if "why" in row[key]:
                failed.append(f"- {plain(name)}, {batch} requests: {plain(row[key]['why'])}")
                cells += ["-", "-", "-"]
                continue
            cells += [_rate(row[key], "decode_tokens_per_s", best[key, "decode_tokens_per_s"])]
            cells += [f"{row[key]['bound_share']:.0%}{'†' if _in_cache(row[key], found) else ''}"]
            cells += [_rate(row[key], "prefill_tokens_per_s", best[key, "prefill_tokens_per_s"])]
        lines.append(_line(*cells))
    bound = f"Bandwidth {found['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s"
    cached = any(_in_cache(row.get("batch 1", {}), found) for row in rows)
    note = (
        f"; † of what may stay in the caches ({_bytes(found['cache_bytes'])}), which memory does not bound"
        if cached
        else ""
    )
    return "\n".join([*lines, "", f"{bound}{note}.", *(["", "Left out:", "", *failed] if failed else [])]) + "\n"


def summary(found: Mapping[str, Any]) -> str:
    """Return one line for each engine: its fastest formats that keep the quality, for one request, for eight, for prompts."""
    kinds = {
        "decoding, 1 request": ("batch 1", "decode_tokens_per_s"), "decoding, 8 requests": ("batch 8", "decode_tokens_per_s"),
        "reading a prompt": ("batch 1", "prefill_tokens_per_s"),
    }  # fmt: skip
    lines = [_line("engine", *(f"{kind}: tokens/s" for kind in kinds)), "|---" * (1 + len(kinds)) + "|"]
    for engine, rows in found["rows"].items():
        kept = [row for row in rows if not row["failure"] and row.get("perplexity_ratio", [1.0])[0] <= 1 + SAME_QUALITY]
        cells = []
        for batch, what in kinds.values():
            best = max((row for row in kept if what in row.get(batch, {})), key=lambda row: row[batch][what][0], default=None)  # fmt: skip
            cells.append(f"{best[batch][what][0]:.0f} ({best['format']})" if best else "-")
        lines.append(_line(engine, *cells))
    return "\n".join(lines) + "\n"


def _in_cache(speed: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    return bool(speed.get("step_read_bytes", math.inf) <= (found["cache_bytes"] or 0))


def _rate(speed: Mapping[str, Any], what: str, best: float) -> str:
    text = f"{speed[what][0]:.0f}" if speed[what][0] >= 10 else f"{speed[what][0]:.2g}"
    return f"**{text}**" if speed[what][0] == best else text


def answers_table(found: Mapping[str, Any], model: str) -> str:
    """Return one line for each question: runs used, what is recommended, and how many times as fast as what else."""
    lines = [
        "| asked for | runs | recommended | its perplexity | against | times as fast | its perplexity |",
        "|---" * 7 + "|",
    ]
    size = found["grid"]
    for name, question in QUESTIONS[model].items():
        if name not in found["asked"]:
            continue
        answer = found["asked"][name]
        first = [question.words, f"{answer['runs']} of {size} ({answer['runs'] / size:.0%})"]
        if not (rows := found["compared"].get(name, ())):
            why = "-" if answer["recommended"] else answer["sentence"]
            lines.append(_line(*first, why, "-", "-", "-", "-"))
        else:
            best, *others = rows
            first += [_what(best), _perplexity(best)]
            lines.append(_line(*first, *_against(others[0] if others else best)))
            lines += [_line("", "", "", "", *_against(row)) for row in others[1:]]
    said = [
        verdict(found, name, question) for name, question in QUESTIONS[model].items() if found["compared"].get(name)
    ]
    return "\n".join([*lines, *([""] if said else []), *said]) + "\n"


def _line(*cells: str) -> str:
    return f"| {' | '.join(map(plain, cells))} |"


def _what(row: Mapping[str, Any]) -> str:
    return f"{row['engine']}: {' + '.join(row['steps']) or 'as it came'}"


def _against(row: Mapping[str, Any]) -> list[str]:
    times = "{:.2f}× ({:.2f} to {:.2f})".format(*row["times"]) if "times" in row else row["why"]
    return [f"{row['format']}: {_what(row)}", times, _perplexity(row)]


def _perplexity(row: Mapping[str, Any]) -> str:
    return f"{row['perplexity_ratio'][0]:.4f}×" if "perplexity_ratio" in row else "-"


def verdict(found: Mapping[str, Any], name: str, question: Question) -> str:
    """Return whether the recommended plan is within 5 % of the best of the grid, and which picks by hand it beats."""
    rows, runs = found["compared"][name], found["asked"][name]["runs"]
    share = least_of_the_grid(rows)
    within = "within" if share >= WITHIN else "not within"
    beaten = [f"{_name(row)} ({row['times'][0]:.2f}×)" for row in rows[1:] if _by_hand(row) and _beats(rows[0], row)]
    quality = "" if question.quality_loss is None else "at equal or better perplexity "
    faster = f"; faster {quality}than {', '.join(beaten)}" if beaten else ""
    return (
        f"- {question.words}: {share:.2f} times the speed of the best of the grid, {within} 5 % of it, with {runs} runs where "
        f"the grid has {found['grid']}{faster}."
    )


def _by_hand(row: Mapping[str, Any]) -> bool:
    return "times" in row and any(name in row["format"] for name in BY_HAND)


def _name(row: Mapping[str, Any]) -> str:
    return next(name for name in BY_HAND if name in row["format"])


def _beats(recommended: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether a plan surely is faster than another and loses no more perplexity, as far as is told."""
    ours, theirs = (one.get("perplexity_ratio", [1.0])[0] for one in (recommended, row))
    return bool(row["times"][1] > 1 and ours <= theirs + SAME)


def least_of_the_grid(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return how many times as fast as the best of the grid the recommended plan is: 1 where it is that plan itself."""
    against = [row["times"][0] for row in rows[1:] if row["format"].startswith("best of the grid") and "times" in row]
    return min([1.0, *against])


def _bytes(value: float | None) -> str:
    return "-" if value is None else units.format(value, "bytes")


def with_summaries(page: str, kept: Mapping[str, Any]) -> str:
    """Return the text of the page on engines with the summaries of what is kept."""
    for model, found in kept.items():
        within = f"; perplexity within {SAME_QUALITY:.0%}" if SUBJECTS[model].quality else ""
        size = f"{found['params'] / 1e6:.3g} M parameters"
        what = found["model"] if size in found["model"] else f"{found['model']}, {size}"
        told = f"{what}, on {found['machine']}, {found['date']}{within}:"
        page = placed(page, f"engines, {model}", f"{told}\n\n{summary(found)}")
    return page


def with_tables(readme: str, kept: Mapping[str, Any]) -> str:
    """Return the text of README.md with the tables of what is kept."""
    for model, found in kept.items():
        told = f"On {found['machine']}, {found['date']}: {found['workload']['prompt_tokens']} prompt and {found['workload']['output_tokens']} output tokens."
        readme = placed(readme, f"engines, {model}", f"{told}\n\n{as_markdown(found, model)}")
    return readme


def write(kept: Mapping[str, Any]) -> None:
    """Write the figures, and the tables between the marks of README.md and of the page on engines."""
    keep_figures(RESULTS, kept)
    README.write_text(with_tables(README.read_text(encoding="utf-8"), kept), encoding="utf-8")
    PAGE.write_text(with_summaries(PAGE.read_text(encoding="utf-8"), kept), encoding="utf-8")


# ---------------------------------------------------------------- the command


def complete(rows: Sequence[Mapping[str, Any]], plans: Mapping[Plan, str]) -> bool:
    """Whether an engine need not be measured again: each of its plans has both speeds, or a reason that will not go away."""
    there = {row["id"]: row for row in rows}
    return all(
        plan.id in there
        and (
            (there[plan.id]["failure"] or "").startswith("unsupported")
            or all(f"batch {batch}" in there[plan.id] for batch in BATCHES)
        )
        for plan in plans
    )


def measured_bandwidth() -> float:
    """Return the bytes each second that memory gives now, to as many threads as read fastest.

    Raises:
        EnvironmentProblem: it cannot be measured.
    """
    from planner.probes import bandwidth

    facts = bandwidth.find()
    if "problem" in facts:
        raise EnvironmentProblem(
            f"memory bandwidth cannot be measured: {facts['problem']}", hint="try again on a quieter machine"
        )
    return max(facts["read_bytes_per_s"].values())


def measure(model: str, *, only: Sequence[str], again: bool) -> None:
    """Measure what is not kept yet of one model, and write after every engine and question."""
    from planner.predicting import versions

    subject, kept, questions = SUBJECTS[model], figures(RESULTS), QUESTIONS[model]
    prepared = single.prepared_for(subject)
    plans = grid(prepared)
    device, size = prepared.hardware.device, sum(map(len, plans.values()))
    before = {} if again else kept.get(model, {})
    if again:
        shutil.rmtree(FOLDER / model, ignore_errors=True)
    found: dict[str, Any] = {
        "model": subject.title, "note": subject.note, "params": prepared.model.params_total, "grid": size,
        "machine": f"{device.name}, {device.cores} cores", "cache_bytes": device.cache_bytes, "versions": versions(),
        "workload": {"prompt_tokens": subject.prompt_tokens, "output_tokens": subject.output_tokens},
        "bandwidth_bytes_per_s": before.get("bandwidth_bytes_per_s"), "date": time.strftime("%Y-%m-%d"),
        "left_out": {r.what: r.why for r in prepared.refused if r.what in engines.names()},
        **{part: dict(before.get(part, {})) for part in ("rows", "asked", "compared")},
    }  # fmt: skip
    found["rows"] = {engine: rows for engine, rows in found["rows"].items() if engine in plans}
    due = {e: p for e, p in plans.items() if e in only or not complete(found["rows"].get(e, ()), p)}
    print(f"{subject.title}: {size} plans on {len(plans)} engines; to measure: {', '.join(due) or 'none'}", flush=True)

    def tell(part: str, name: str, value: Any) -> None:
        found[part][name] = value
        found["rows"] = {engine: found["rows"][engine] for engine in plans if engine in found["rows"]}
        kept[model] = found
        write(kept)

    if due or found["bandwidth_bytes_per_s"] is None:
        found["bandwidth_bytes_per_s"] = _rounded(measured_bandwidth())
    names = {step.technique for some in plans.values() for plan in some for step in plan.steps}
    most = runs_allowed(size)
    for name, question in questions.items():
        if name not in found["asked"]:
            print(f"asking for {question.words}: at most {most} runs", flush=True)
            wanted = {*names, "batch_size"} if question.batch > 1 else names
            tell("asked", name, asked(spec_of(subject, question, wanted, most), FOLDER / model / name))
            found["compared"].pop(name, None)
    if due:
        found["compared"] = {}
    if due or comparisons(found, questions):
        Grid(
            prepared, Settings(run_root=FOLDER / model / "runs", store_root=KEPT, fresh=again or bool(only)), plans=due,
            bandwidth=found["bandwidth_bytes_per_s"], quality=subject.quality, comparisons=lambda: comparisons(found, questions), tell=tell,
        ).go(only=(prepared.space.unchanged(), None))  # fmt: skip
    kept[model] = found
    write(kept)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SUBJECTS), help="only this one (default: both)")
    parser.add_argument(
        "--only", action="append", default=[], choices=engines.names(), metavar="ENGINE",
        help="measure this engine again; may be repeated",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="measure what is kept as well")
    parser.add_argument("--tables", action="store_true", help="measure nothing, write the tables anew")
    given = parser.parse_args(arguments)
    if given.tables:
        write(figures(RESULTS))
        return
    for model in [given.model] if given.model else SUBJECTS:
        try:
            measure(model, only=given.only, again=given.again)
        except (KeyboardInterrupt, Terminated):
            sys.exit("stopped; the same command goes on from here")
        print(as_markdown(figures(RESULTS)[model], model), flush=True)


if __name__ == "__main__":
    main()
