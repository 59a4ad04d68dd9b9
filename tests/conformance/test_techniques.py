"""Laws every technique keeps: what its file says, what it predicts, and what it does to real tiny models.

Parametrised over the registry: a new file in knowledge_base/techniques is covered as it is. What a technique needs
around it (an earlier step, an engine) is asked of the knowledge base, never written here.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import math
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import numpy
import pytest
import torch
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD
from tiny_sessions import session_of, tiny_folder

import cost_models
from cost_models.demand import apply_steps, demand_of
from knowledge_base import rules
from knowledge_base.errors import CandidateFailed, NoFeasiblePlan
from knowledge_base.metrics import METRICS
from knowledge_base.registry import engines, techniques
from knowledge_base.serde import plain, restore
from knowledge_base.types import STAGES, Evidence, Plan, Step
from planner.isolation.worker import asked_of
from planner.reading import read_model

# Predictions are judged on a model of a billion parameters: on the toy one starting operators outweighs reading bytes.
MODEL = replace(
    TOY_MODEL, layers=22, attention_layers=22, hidden_size=2048, heads=32, kv_heads=4, head_size=64, ffn_size=5632,
    vocab_size=32000, linear_params=968_884_224, embedding_params=65_536_000, params_total=1_034_512_384,
    params_active=1_034_512_384, weight_bytes=4_138_049_536, max_context_tokens=2048,
)  # fmt: skip
ARCHITECTURES = ("llama", "gpt2", "qwen2", "mistral", "mixtral", "mamba")
TECHNIQUES = techniques.all()
NAMES = tuple(TECHNIQUES)
NEW_TOKENS = 12
PAIRS = 150  # of techniques that may stand together, tried for real


def settings(name: str) -> list[Step]:
    """Return every knob setting of a technique as a step; the default is the first."""
    knobs = TECHNIQUES[name].TECHNIQUE.knobs
    steps = [Step(name, dict(zip(knobs, values))) for values in itertools.product(*(c.options for c in knobs.values()))]
    default = Step(name, {k: c.default for k, c in knobs.items()})
    return [default, *(s for s in steps if s != default)]


def legal(step: Step, model) -> str | None:
    module = TECHNIQUES[step.technique]
    why = module.rejects(model, TOY_WORKLOAD, TOY_MACHINE)
    return why or getattr(module, "legal", lambda *_: None)(step.knobs, model, TOY_WORKLOAD, TOY_MACHINE)


@cache
def before(name: str) -> tuple[Step, ...]:
    """Return the steps a technique cannot do without, as the composition rules tell; () for most."""
    step = settings(name)[0]
    if not rules.missing([step]):
        return ()
    for other in NAMES:
        steps = [settings(other)[0], step]
        if other != name and not rules.missing(steps) and not rules.conflict(steps):
            ordered = rules.order(steps)
            return tuple(ordered[: ordered.index(step)])  # what it requires may come after it
    raise AssertionError(f"nothing satisfies: {rules.missing([step])}")


def engine_for(step: Step):
    """Return the engine to try a step with: transformers where it offers what the step needs."""
    needs = TECHNIQUES[step.technique].TECHNIQUE.needs
    names = sorted(engines.names(), key=lambda name: name != "transformers")
    return next((engines.get(n) for n in names if needs <= engines.get(n).ENGINE.offers), None)


EVERY_SETTING = [pytest.param(step, id=str(step)) for name in NAMES for step in settings(name)]


# ---------------------------------------------------------------- what the file says


@pytest.mark.parametrize("name", NAMES)
def test_declaration(name):
    technique = TECHNIQUES[name].TECHNIQUE
    assert technique.stage in STAGES
    assert technique.family
    assert (technique.summary and technique.summary[0].islower()) or technique.summary[0].isdigit()
    assert technique.implements, "a technique names the methods of the field it executes"
    assert set(technique.saves) | set(technique.spends) <= set(METRICS)
    assert not set(technique.saves) & set(technique.spends)
    assert technique.sources, "a technique names where it comes from"
    for knob, choice in technique.knobs.items():
        assert choice.default in choice.options, knob
        assert len(set(choice.options)) == len(choice.options)
    if technique.lossless:
        assert not {"perplexity", "quality_loss_ratio"} & set(technique.spends)


@pytest.mark.parametrize("name", NAMES)
def test_evidence_is_traceable(name):
    evidence = TECHNIQUES[name].EVIDENCE
    assert isinstance(evidence, tuple)
    for row in evidence:
        assert isinstance(row, Evidence)
        assert row.source.startswith(("https://", "http://", "arXiv:", "doi:"))
        assert row.model and row.setting and row.quantity
        assert math.isfinite(row.value)


@pytest.mark.parametrize("name", NAMES)
def test_predicting_and_doing_take_the_same_knobs(name):
    module = TECHNIQUES[name]
    knobs = list(module.TECHNIQUE.knobs)
    for function in (module.rewrite, module.execute):
        assert list(inspect.signature(function).parameters)[1:] == knobs, function


@pytest.mark.parametrize("name", NAMES)
def test_some_engine_offers_what_it_needs(name):
    assert engine_for(settings(name)[0]) is not None


@pytest.mark.parametrize("step", EVERY_SETTING)
def test_step_survives_json(step):
    again = restore(Step, json.loads(json.dumps(plain(step))))
    assert again == step
    assert hash(again) == hash(step)


@pytest.mark.parametrize("name", NAMES)
def test_rejections_are_sentences(name):
    odd = replace(TOY_MODEL, hidden_size=100, ffn_size=300, weight_dtype="bfloat16")
    models = (
        TOY_MODEL, odd, replace(TOY_MODEL, experts=8, experts_active=2), replace(TOY_MODEL, weight_dtype="int8"),
        replace(TOY_MODEL, attention_layers=0, heads=0, kv_heads=0, head_size=0, architecture="mamba", ffn_size=0),
        replace(TOY_MODEL, layers=1, attention_layers=1),
    )  # fmt: skip
    for model in models:
        for step in settings(name):
            why = legal(step, model)
            assert why is None or (len(why.split()) >= 4 and not why.endswith(".") and "  " not in why)


# ---------------------------------------------------------------- what it predicts


def predictable() -> list:
    return [p for p in EVERY_SETTING if legal(p.values[0], MODEL) is None]


@pytest.mark.parametrize("step", predictable())
def test_rewrite_is_pure_and_finite(step):
    engine = engine_for(step).__name__.rpartition(".")[2]
    demand = apply_steps(demand_of(MODEL, TOY_WORKLOAD, engine), before(step.technique))
    copy = replace(demand)
    rewrite = TECHNIQUES[step.technique].rewrite
    after = rewrite(demand, **step.knobs)
    assert demand == copy
    assert rewrite(demand, **step.knobs) == after
    assert len(after.because) >= len(demand.because)
    assert after != demand
    for field, value in plain(replace(after, because=())).items():  # plain() refuses numbers that are not finite
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert value >= 0, field
    assert after.perplexity_ratio >= 1.0


@pytest.mark.parametrize("step", predictable())
def test_predictions_move_as_declared(step):
    technique = TECHNIQUES[step.technique].TECHNIQUE
    engine = engine_for(step).__name__.rpartition(".")[2]
    steps = before(step.technique)
    plans = [Plan(model_digest="toy", engine=engine, steps=s) for s in (steps, (*steps, step))]
    figures = cost_models.estimate_many(plans, MODEL, TOY_WORKLOAD, TOY_MACHINE)
    better, worse = set(), set()
    for name in figures:
        start, end = figures[name].mid[:2]
        if METRICS[name].better == "higher":
            start, end = end, start
        if end < start * (1 - 1e-6):
            better.add(name)
        elif end > start * (1 + 1e-6):
            worse.add(name)
    assert better & set(technique.saves) or not technique.saves, f"improves {better}, worsens {worse}"
    # Whoever spends perplexity spends quality and the other way round; derived figures follow what they derive from.
    worse -= {"requests_per_s"} if "throughput_tokens_per_s" in technique.spends else set()
    assert not worse - set(technique.spends), f"declares spending only {technique.spends}"


# ---------------------------------------------------------------- what it does


def open_session(architecture: str):
    from transformers import AutoTokenizer

    folder = tiny_folder(architecture)
    session = session_of(folder)
    session.facts = read_model(folder).model
    session.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return session


def run(session, steps: tuple[Step, ...]) -> None:
    for number, step in enumerate(steps):
        if hasattr(TECHNIQUES[step.technique], "options"):
            session.allocation = {**(session.allocation or {}), **chosen(session, steps[: number + 1])}
        TECHNIQUES[step.technique].execute(session, **step.knobs)


_CHOSEN: dict[tuple, dict[str, str]] = {}  # what was measured is given: times differ, what is made of them must not


def chosen(session, steps: tuple[Step, ...]) -> dict[str, str]:
    """What the last of the steps executes, chosen as the planner does."""
    from search.allocation import allocate

    key, technique = (session.facts.digest, steps), TECHNIQUES[steps[-1].technique]
    try:
        if key not in _CHOSEN:
            measured = technique.options(session, time_limit_s=60.0, **asked_of(steps[-1]))
            budgets = technique.budgets(measured, **steps[-1].knobs)
            _CHOSEN[key] = dict(allocate(measured["parts"], budgets, ties=measured.get("ties", ())).chosen)
    except NoFeasiblePlan as error:
        raise CandidateFailed("unsupported", error.message, hint=error.hint) from error
    return _CHOSEN[key]


def tokens() -> list[int]:
    """A passage that repeats, so that drafting from the prompt has something to find."""
    return numpy.random.default_rng(0).integers(1, 500, size=12).tolist() * 4


@torch.no_grad()
def log_probs_of(model) -> numpy.ndarray:
    return model(torch.tensor([tokens()]), use_cache=False).logits[0].float().log_softmax(-1).numpy()


def file_bytes(folder: Path) -> int:
    """Bytes of all tensors in an artefact, without headers and tokenizer."""
    from gguf import GGUFReader

    from planner._safetensors_header import read_header

    plain = sum(t.stop - t.start for file in folder.rglob("*.safetensors") for t in read_header(file).values())
    for file in folder.rglob("openvino_model.xml"):  # equal tensors, all zero or one, are in the .bin once
        plain += sum(int(data.get("size", 0)) for data in ElementTree.parse(file).iter("data"))
    plain += sum(file.stat().st_size for file in folder.rglob("*.onnx.data"))  # nothing but tensors either
    return plain + sum(int(t.n_bytes) for file in folder.rglob("*.gguf") for t in GGUFReader(file).tensors)


@cache
def unchanged(architecture: str, engine_name: str, steps: tuple[Step, ...] = ()) -> dict:
    """What the artefact of the model takes before the technique in question."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder, session = Path(name), open_session(architecture)
        run(session, steps)
        engine = engines.get(engine_name)
        engine.export(session, folder)
        running = engine.open_artefact(folder, session.runtime)
        running.generate([tokens()], NEW_TOKENS)
        found = {"artefact_bytes": file_bytes(folder), **running.memory()}
        running.close()
    return found


def claims(architecture: str) -> list:
    """The lowest setting of each technique, which is the cheapest to do; of the first architecture also the default.

    In every run each technique meets one architecture at its lowest setting; the rest where there is time.
    """
    params = []
    for number, name in enumerate(NAMES):
        lowest = Step(name, {k: c.options[0] for k, c in TECHNIQUES[name].TECHNIQUE.knobs.items()})
        chosen = (lowest, settings(name)[0]) if architecture == ARCHITECTURES[0] else (lowest,)
        turn = architecture == ARCHITECTURES[number % len(ARCHITECTURES)]
        for step in dict.fromkeys(chosen):
            often = turn and step == lowest and "compile" not in TECHNIQUES[name].TECHNIQUE.needs
            marks = [] if often else [pytest.mark.slow]
            params.append(pytest.param(architecture, step, id=f"{architecture}-{step}", marks=marks))
    return params


@pytest.mark.parametrize(("architecture", "step"), [p for a in ARCHITECTURES for p in claims(a)])
def test_executed_on_a_real_model(architecture, step, tmp_path):
    technique = TECHNIQUES[step.technique].TECHNIQUE
    engine = engine_for(step)
    if why := engine.find():
        pytest.skip(why)
    session = open_session(architecture)
    facts = session.facts
    steps = before(step.technique)
    refused = engine.accepts(facts) or next((why for s in (*steps, step) if (why := legal(s, facts))), None)
    if refused:
        assert len(refused.split()) >= 4
        return
    name = engine.__name__.rpartition(".")[2]
    base = unchanged(architecture, name, steps)

    try:
        run(session, (*steps, step))
        now = log_probs_of(session.model)
        engine.export(session, tmp_path)
        running = engine.open_artefact(tmp_path, session.runtime)
    except CandidateFailed as failed:
        assert failed.kind == "unsupported", failed
        assert len(failed.message.split()) >= 4
        return
    try:
        then = running.log_probs(tokens())
        generation = running.generate([tokens()] * session.runtime.get("batch", 1), NEW_TOKENS)
        memory = running.memory()
        if TECHNIQUES[step.technique].rewrite(demand_of(facts, TOY_WORKLOAD, name), **step.knobs).tokens_per_step > 1:
            # Greedy choices of a model that learnt nothing soon go round in circles, so drafts come true.
            assert running.generate([tokens()], 150).steps < 149
    finally:
        running.close()

    # What is reloaded is what was built.
    assert numpy.isfinite(then).all()
    difference = float((numpy.exp(now) * (now - then)).sum(-1).mean())
    if session.storage:
        assert difference < 0.5  # the engine rounds while it stores
    elif technique.stage == "serve" and not technique.lossless:
        assert difference < 0.2  # half of the neurons of a model that learnt nothing: 0.13
    else:
        assert numpy.abs(now - then).max() < 1e-3 + getattr(engine, "LOG_PROB_TOLERANCE", 0.0)
    assert all(len(row) == NEW_TOKENS for row in generation.tokens)

    # What was claimed is there.
    demand = apply_steps(demand_of(facts, TOY_WORKLOAD, name), (*steps, step))
    stored = file_bytes(tmp_path)
    claimed = (
        demand.linear_bytes * demand.disk_share + demand.embedding_bytes + demand.head_stored_bytes + demand.other_bytes
    )
    found = {"artefact_bytes": stored, **memory}
    for metric in ("artefact_bytes", "weights_bytes", "kv_cache_bytes"):
        if metric in technique.saves and base[metric]:
            assert found[metric] < base[metric], metric
    if "artefact_bytes" in technique.saves:
        assert stored == pytest.approx(claimed, rel=0.02)
    if technique.lossless:
        again = open_session(architecture)
        run(again, steps)
        assert numpy.abs(log_probs_of(again.model) - then).max() < 1e-2


# ---------------------------------------------------------------- again, and beside others


def files_of(architecture: str, engine, steps: tuple[Step, ...], folder: Path) -> dict[str, str]:
    """Build the steps on a fresh session; return the digest of every file that holds weights."""
    session = open_session(architecture)
    run(session, steps)
    engine.export(session, folder)
    weights = (p for p in folder.rglob("*") if p.suffix in (".safetensors", ".gguf", ".bin", ".data"))
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in weights}


def lowest(name: str) -> Step:
    return Step(name, {k: c.options[0] for k, c in TECHNIQUES[name].TECHNIQUE.knobs.items()})


BUILDING = [n for n in NAMES if TECHNIQUES[n].TECHNIQUE.stage != "serve"]


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDING)
def test_one_seed_gives_one_artefact(name, tmp_path):
    step = lowest(name)
    engine = engine_for(step)
    facts = open_session("llama").facts
    if why := engine.find() or legal(step, facts):
        pytest.skip(why)
    if step.knobs.get("speedup"):
        pytest.skip("what it removes follows measured times, which differ from one build to the next")
    steps = (*before(name), step)
    first, second = (files_of("llama", engine, steps, tmp_path / n) for n in "ab")
    assert first
    assert first == second


def legal_pairs() -> list:
    """Every two techniques the knowledge base lets stand together on an engine; a sample, always the same."""
    pairs = []
    for a, b in itertools.combinations(NAMES, 2):
        steps = [lowest(a), lowest(b)]
        needs = TECHNIQUES[a].TECHNIQUE.needs | TECHNIQUES[b].TECHNIQUE.needs
        same = TECHNIQUES[a].TECHNIQUE.family == TECHNIQUES[b].TECHNIQUE.family
        if same or "compile" in needs or rules.conflict(steps) or rules.missing(steps):
            continue
        here = sorted(name for name in engines.names() if engines.get(name).ENGINE.environment is None)
        pairs += [(name, a, b) for name in here if needs <= engines.get(name).ENGINE.offers][-1:]
    return random.Random(0).sample(pairs, min(len(pairs), PAIRS))


def beside_a_pruned_layer() -> list[str]:
    """Techniques that change weights and may stand beside prune_to_speed."""
    beside = [n for n in NAMES if n != "prune_to_speed" and TECHNIQUES[n].TECHNIQUE.stage != "serve"]
    return [n for n in beside if not rules.conflict([lowest("prune_to_speed"), lowest(n)])]


@pytest.mark.slow
@pytest.mark.parametrize("name", beside_a_pruned_layer())
def test_a_layer_may_have_no_channels_left(name, tmp_path, monkeypatch):
    """How many channels stay is told by measured times, so one day it is none: what follows must take that."""
    pruning = lowest("prune_to_speed")
    steps = tuple(rules.order([*before(name), pruning, lowest(name)]))
    module, session = engine_for(lowest(name)), open_session("llama")
    if why := module.find() or next((w for s in steps if (w := legal(s, session.facts))), None):
        pytest.skip(why)
    layers = range(session.facts.layers)
    kept = {f"model.layers.{i}.self_attn": "1" for i in layers} | {f"model.layers.{i}.mlp": "192" for i in layers}
    kept["model.layers.1.mlp"] = "0"
    monkeypatch.setitem(_CHOSEN, (session.facts.digest, steps[: steps.index(pruning) + 1]), kept)
    try:
        run(session, steps)
        now = log_probs_of(session.model)
        module.export(session, tmp_path)
    except CandidateFailed as failed:
        assert failed.kind == "unsupported", failed
        pytest.skip(failed.message)
    running = module.open_artefact(tmp_path, session.runtime)
    try:
        then = running.log_probs(tokens())
    finally:
        running.close()
    assert numpy.isfinite(then).all()
    assert float((numpy.exp(now) * (now - then)).sum(-1).mean()) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "a", "b"), [pytest.param(*p, id="-".join(p)) for p in legal_pairs()])
def test_what_may_stand_together_does(engine, a, b, tmp_path):
    module = engines.get(engine)
    session = open_session("llama")
    steps = rules.order([lowest(a), lowest(b)])
    if why := module.find() or next((w for s in steps if (w := legal(s, session.facts))), None):
        pytest.skip(why)
    try:
        run(session, steps)
    except CandidateFailed as failed:
        assert failed.kind == "unsupported", failed
        pytest.skip(failed.message)
    now = log_probs_of(session.model)
    module.export(session, tmp_path)
    running = module.open_artefact(tmp_path, session.runtime)
    try:
        then = running.log_probs(tokens())
    finally:
        running.close()
    assert numpy.isfinite(then).all()
    assert float((numpy.exp(now) * (now - then)).sum(-1).mean()) < 0.5
    if any(step.knobs.get("speedup") for step in steps):
        return  # how many weights go is told by measured times
    demand = apply_steps(demand_of(session.facts, TOY_WORKLOAD, engine), steps)
    claimed = (
        demand.linear_bytes * demand.disk_share + demand.embedding_bytes + demand.head_stored_bytes + demand.other_bytes
    )
    assert file_bytes(tmp_path) == pytest.approx(claimed, rel=0.05)
