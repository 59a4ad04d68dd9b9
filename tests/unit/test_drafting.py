"""Guessing tokens: by a draft model, by the model's own first layers, and trusted where they are sure.

Everything goes the way a plan goes: technique, export, engine. The models are small and have learnt nothing, which is
enough for whether output stays what it was; they soon go round in circles, so that guesses come true.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch
from tests_support import TOY_MACHINE, TOY_WORKLOAD
from tiny_sessions import calibration, tiny_folder

import cost_models
from cost_models.demand import demand_of
from knowledge_base import serde
from knowledge_base.engines import _drafting
from knowledge_base.engines import _torch_drafting as drafting
from knowledge_base.engines import transformers as engine
from knowledge_base.errors import BadInput, CandidateFailed, EnvironmentProblem
from knowledge_base.registry import techniques
from knowledge_base.techniques import _drafts, _lens
from knowledge_base.techniques._loading import load_session
from knowledge_base.types import Plan, Step
from planner import building
from planner import spec as specs
from planner._safetensors_header import read_header
from planner.cli import main
from planner.preparing import read_models
from planner.progress import Progress
from planner.reading import read_model
from planner.recipe import Recipe, read_recipe, write_recipe
from planner.spec import Prices
from planner.tiny_models import make_tiny_model
from planner.validation import Validator, rebuild

ARCHITECTURES = ("llama", "gpt2", "qwen2", "mistral", "mixtral")  # qwen2 and mistral slide a window
NEW_TOKENS = 50
PROMPTS = [
    *numpy.random.default_rng(0).integers(1, 512, size=(2, 80)).tolist(),  # longer than the window
    [5, 6, 7] * 12,
    [9],
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Each architecture's model with a draft beside it: the same weights, disturbed, so that it is right at times."""
    made = {}

    def get(architecture: str):
        if architecture not in made:
            folder = tmp_path_factory.mktemp("models") / "model"
            shutil.copytree(tiny_folder(architecture), folder)
            made[architecture] = folder
            add_draft(folder)
        return made[architecture]

    return get


def add_draft(folder) -> None:
    draft = folder.with_name(f"{folder.name}-draft")
    shutil.copytree(folder, draft)
    model = drafting.read_model(folder)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter += 0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(draft)


def session_of(folder, workspace):
    session = load_session(folder, read_model(folder).model, calibration=calibration(16), seed=0, workspace=workspace)
    session.workspace = workspace
    return session


def built(name: str, folder, out, **knobs):
    """Return the artefact, its runtime and notes, of a technique executed on a model folder."""
    out.mkdir(exist_ok=True)
    session = session_of(folder, out)
    techniques.get(name).execute(session, **knobs)
    artefact = out / "artefact"
    engine.export(session, artefact)
    return artefact, session.runtime, session.notes


def assert_same(ours, theirs, plain, prompt) -> None:
    """Equal, up to a tie: what was quantised rounds either way, and a model that learnt nothing has near-ties."""
    first = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
    if first is not None:
        assert plain._kv_bits, "not the same tokens"
        row = plain.log_probs([*prompt, *theirs[:first]])[-1]
        assert row[theirs[first]] - row[ours[first]] < 0.02


def same_output(found, plain, prompts=PROMPTS) -> int:
    """Return how many steps were saved on prompts whose output must stay what it was."""
    saved = 0
    for prompt in prompts:
        ours, theirs = found.generate([prompt], NEW_TOKENS), plain.generate([prompt], NEW_TOKENS)
        assert_same(ours.tokens[0], theirs.tokens[0], plain, prompt)
        assert ours.steps <= theirs.steps == NEW_TOKENS - 1
        saved += theirs.steps - ours.steps
    assert numpy.array_equal(found.log_probs(PROMPTS[0]), plain.log_probs(PROMPTS[0]))
    return saved


# ---------------------------------------------------------------- lossless


@pytest.mark.parametrize("tokens", [2, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_draft_model_changes_steps_but_no_token(model_folder, tmp_path, architecture, tokens, no_lookup):
    folder = model_folder(architecture)
    artefact, runtime, notes = built("draft_model", folder, tmp_path, tokens=tokens)
    found, plain = engine.open_artefact(artefact, runtime), engine.open_artefact(artefact, {})
    assert same_output(found, plain) > NEW_TOKENS
    assert 0 < notes["draft_model.accepted_ratio"] < 1
    ours, theirs = found.memory(), plain.memory()
    draft = engine.open_artefact(artefact / "draft", {}).memory()
    assert ours["weights_bytes"] == theirs["weights_bytes"] + draft["weights_bytes"]
    assert theirs["kv_cache_bytes"] < ours["kv_cache_bytes"] <= 2.2 * theirs["kv_cache_bytes"]


@pytest.mark.parametrize("right", [0, 2, 4])
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_a_draft_model_forgets_what_was_refused(architecture, right):
    model, prompt = drafting.read_model(tiny_folder(architecture)), PROMPTS[0]
    readers = [drafting.DraftModel(model, model) for _ in "ab"]
    drafter, fresh = (_drafting.ModelDrafts(reader, reader.cost) for reader in readers)
    with torch.inference_mode():
        drafter.begin(prompt, None)
        drafter.append([3])
        guessed = drafter.draft(4, 0.0)
        kept = [*guessed[:right], 7 if right == 4 else (guessed[right] + 1) % 512]
        drafter.append(kept)
        fresh.begin([*prompt, 3, *kept[:-1]], None)
        fresh.append(kept[-1:])
        assert drafter.draft(4, 0.0) == fresh.draft(4, 0.0)
    lengths = [reader._cache.get_seq_length() for reader in readers]
    assert lengths == [len(prompt) + 1 + len(kept) + 3] * 2


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_first_layers_change_steps_but_no_token(tmp_path, architecture, no_lookup):
    folder = tiny_folder(architecture)
    artefact, runtime, notes = built("draft_layers", folder, tmp_path)
    found, plain = engine.open_artefact(artefact, runtime), engine.open_artefact(artefact, {})
    assert same_output(found, plain) > 5
    assert 0 <= notes["draft_layers.accepted_ratio"] <= 1
    lens = sum(t.nbytes for t in engine.open_artefact(artefact, runtime)._decoding.tensors())
    assert found.memory()["weights_bytes"] == plain.memory()["weights_bytes"] + lens
    assert found.memory()["kv_cache_bytes"] <= 1.1 * plain.memory()["kv_cache_bytes"]  # the model's own cache serves


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_drafts_go_with_a_quantised_cache(model_folder, tmp_path, bits, no_lookup):
    for name, knobs in (("draft_model", {"tokens": 4}), ("draft_layers", {})):
        artefact, runtime, _ = built(name, model_folder("mistral"), tmp_path / name, **knobs)
        found = engine.open_artefact(artefact, {**runtime, "kv_bits": bits})
        assert same_output(found, engine.open_artefact(artefact, {"kv_bits": bits})) > 0, name


@pytest.fixture
def no_lookup(monkeypatch):
    """Nothing is found in the text, so that every draft is the draft model's or the first layers'."""
    monkeypatch.setattr(_drafting.PromptLookup, "draft", lambda self, most, least=0.0: [])
    monkeypatch.setattr(_drafting, "HOPE", 50.0)  # draft on and on, as if it always paid: the hardest case


@pytest.mark.parametrize("cost", [0.1, 0.6])
def test_a_draft_that_is_always_wrong_is_asked_ever_less(cost):
    class Wrong(_drafting.PromptLookup):
        asked = 0

        def draft(self, most, least=0.0):
            self.asked += 1
            return [(truth[len(self._tokens) - len(prompt)] + 1) % 512]

    folder, prompt = tiny_folder("llama"), PROMPTS[0]
    running = engine.open_artefact(folder, {})
    truth = running.generate([prompt], 150).tokens[0]
    drafter = Wrong()
    drafter.cost = cost
    running._decoding = drafting.Drafted([drafter], 4)
    found = running.generate([prompt], 150)
    assert found.tokens == [truth]
    assert found.steps == 149
    expected = math.log(cost / _drafting.HOPE) / math.log(_drafting.MEMORY)  # until it no longer pays
    assert expected <= drafter.asked <= expected + 2 + 149 / _drafting.PROBE


def test_a_draft_stops_where_it_is_unlikely_to_be_kept():
    logits = torch.tensor([[4.0, 0.0], [0.0, 0.5], [9.0, 0.0]])  # sure, unsure, sure
    asked = []

    def read(tokens):
        asked.append(list(tokens))
        return drafting._best(logits[len(asked) - 1])

    assert _drafting.likeliest(read, [7, 8], 3, 0.7) == [0, 1]
    assert asked == [[7, 8], [0]]
    asked.clear()
    assert _drafting.likeliest(read, [7, 8], 3, 1.0) == [0]  # a probe: one token, however unlikely


# ---------------------------------------------------------------- early exit


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_early_exit_scores_what_it_decodes(tmp_path, architecture, monkeypatch):
    """One pass over prompt and output chooses the tokens that decoding chose: late reading leaves the cache as it would be."""
    monkeypatch.setattr(drafting, "PENDING_MAX", 10**6)
    artefact, runtime, notes = built("exit_early", tiny_folder(architecture), tmp_path, share=0.5, confidence=0.7)
    plain = engine.open_artefact(artefact, {})
    prompt = PROMPTS[0]
    running = engine.open_artefact(artefact, runtime)
    guessed = running._decoding._model.guess(torch.tensor([prompt]), None)[0][0].softmax(-1).amax(-1)
    running._decoding._confidence = (
        guessed.median().item()
    )  # of a model that learnt nothing: about half of the tokens leave
    made = running.generate([prompt], NEW_TOKENS)
    assert 0 < made.steps < NEW_TOKENS - 1
    scored = running.log_probs([*prompt, *made.tokens[0]])
    assert scored.argmax(-1)[len(prompt) : -1].tolist() == made.tokens[0][1:]
    assert scored[len(prompt) - 1].shape == (512,)
    assert made.tokens[0][0] == plain.generate([prompt], 1).tokens[0][0]  # the prompt is read by the whole model
    assert not numpy.array_equal(scored, plain.log_probs([*prompt, *made.tokens[0]]))
    assert 0 <= notes["exit_early.wrong_ratio"] <= notes["exit_early.leave_ratio"] <= 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nobody_leaves_who_is_never_sure(tmp_path, architecture):
    artefact, runtime, _ = built("exit_early", tiny_folder(architecture), tmp_path, share=0.5, confidence=0.9)
    found, plain = engine.open_artefact(artefact, runtime), engine.open_artefact(artefact, {})
    found._decoding._confidence = 1.1
    assert same_output(found, plain) == 0


def test_those_that_left_do_not_wait_for_ever(tmp_path):
    artefact, runtime, _ = built("exit_early", tiny_folder("llama"), tmp_path, share=0.5, confidence=0.7)
    running = engine.open_artefact(artefact, runtime)
    running._decoding._confidence = 0.0  # everybody leaves
    steps = running.generate([PROMPTS[0]], NEW_TOKENS).steps
    assert steps == math.ceil((NEW_TOKENS - 1) / (drafting.PENDING_MAX + 1))


def test_a_lens_is_the_linear_map_that_was_there(tmp_path):
    """Where the other layers are one linear map, the lens is that map and the guess the model's own."""
    session = session_of(tiny_folder("llama"), tmp_path)
    for layer in session.model.model.layers[1:]:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight.zero_()  # what is left of the layer is the residual
    cut, kept_out = _lens.fit_lens(session, 1, "test")
    assert _lens.guesses(cut, session.model, kept_out)[1].all()
    assert torch.allclose(cut._lens.weight, torch.eye(cut._lens.weight.shape[0]), atol=0.05)


# ---------------------------------------------------------------- refusals


def spoil(draft, fault: str) -> None:
    """Make the folder of a draft that does not fit the tiny llama, or none."""
    if fault == "vocabulary":
        make_tiny_model(draft, "llama", vocab_size=600, layers=1)
        shutil.copy(tiny_folder("llama") / "tokenizer.json", draft)
    elif fault == "context":
        make_tiny_model(draft, "llama", seed=5, layers=1, context_tokens=16)
    elif fault == "larger":
        make_tiny_model(draft, "llama", seed=5, layers=9)
    elif fault == "itself":
        shutil.copytree(tiny_folder("llama"), draft)
    elif fault != "none":
        make_tiny_model(draft, "mamba" if fault == "recurrent" else "llama", seed=5, layers=1)
    if fault == "tokenizer":
        change(draft / "tokenizer.json", swap_two_tokens)
    elif fault == "no tokenizer":
        for file in draft.glob("tokenizer*"):
            file.unlink()
    elif fault == "cut off":
        weights = draft / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])


def change(file, how) -> None:
    facts = json.loads(file.read_text())
    how(facts)
    file.write_text(json.dumps(facts))


def swap_two_tokens(words) -> None:
    vocabulary = words["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


# fault -> what is said of it
FAULTS = {
    "none": "is not a model folder", "tokenizer": "has another tokenizer than the model: .* is token 10 of the model",
    "vocabulary": "has 600 tokens and the model 512", "no tokenizer": "no tokenizer", "recurrent": "a refused token must be taken back",
    "cut off": "damaged", "context": "reads 16 tokens at most", "larger": "no fewer than the model's", "itself": "is the model itself",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_draft_that_does_not_fit_is_refused_in_a_sentence(tmp_path, fault):
    """Named by a person it is bad input; found beside the model it is left out, and the technique says why it has none."""
    folder, draft = tmp_path / "model", tmp_path / "model-draft"
    shutil.copytree(tiny_folder("llama"), folder)
    spoil(draft, fault)
    with pytest.raises(BadInput, match=FAULTS[fault]) as named:
        read_model(folder, draft=str(draft))
    assert len(named.value.message.split()) >= 2
    assert "\n" not in named.value.message
    assert named.value.where == "draft" or named.value.where.startswith(str(draft))

    read = read_model(folder)
    why = techniques.get("draft_model").rejects(read.model, TOY_WORKLOAD, TOY_MACHINE)
    assert len(why.split()) >= 4
    left_out = [note for note in read.notes if note.startswith("`model-draft` does not draft: ")]
    assert len(left_out) == (fault in ("tokenizer", "no tokenizer", "cut off"))
    assert (read.model.draft is None) == (fault == "none" or bool(left_out))
    if read.model.draft is None:
        with pytest.raises(CandidateFailed, match="has no draft") as built_without:
            built("draft_model", folder, tmp_path / "work", tokens=2)
        assert built_without.value.kind == "build_error"


@pytest.mark.parametrize("fault", ["tokenizer", "vocabulary", "recurrent", "cut off"])
def test_a_draft_is_looked_at_again_where_it_is_loaded(tmp_path, fault):
    """Its files may have changed since it was read."""
    folder, draft = tmp_path / "model", tmp_path / "model-draft"
    shutil.copytree(tiny_folder("llama"), folder)
    make_tiny_model(draft, "llama", seed=5, layers=1)
    session = session_of(folder, tmp_path)
    shutil.rmtree(draft)
    spoil(draft, fault)
    with pytest.raises(CandidateFailed) as caught:
        techniques.get("draft_model").execute(session, tokens=2)
    assert len(caught.value.message.split()) >= 4
    assert "\n" not in caught.value.message
    assert caught.value.kind == ("build_error" if fault == "cut off" else "unsupported")


@pytest.mark.parametrize(
    "runtime",
    [
        {"draft_tokens": 4, "batch": 2},
        {"draft_tokens": 4, "compile": True},
        {"draft_tokens": 4, "lookup_tokens": 4},
        {"exit_layers": 1, "exit_confidence": 0.9, "ffn_keep": 0.5},
        {"exit_layers": 1},
        {"draft_layers": 1},
        {"draft_tokens": 0},
        {"exit_layers": 1, "exit_confidence": 1.0},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(runtime):
    with pytest.raises(CandidateFailed) as caught:
        engine.open_artefact(tiny_folder("llama"), runtime)
    assert caught.value.kind == "unsupported"


@pytest.mark.parametrize("runtime", [{"draft_tokens": 4}, {"draft_layers": 1, "draft_tokens": 4}], ids=str)
def test_an_artefact_without_its_draft_does_not_open(runtime):
    with pytest.raises(CandidateFailed) as caught:
        engine.open_artefact(tiny_folder("llama"), runtime)
    assert caught.value.kind == "load_error"


def test_a_recurrent_state_is_refused(tmp_path):
    for name, knobs in (("draft_layers", {}), ("exit_early", {"share": 0.5, "confidence": 0.7})):
        facts = read_model(tiny_folder("mamba")).model
        assert "recurrent state" in techniques.get(name).rejects(facts, TOY_WORKLOAD, TOY_MACHINE)
        artefact, runtime, _ = built(name, tiny_folder("mamba"), tmp_path / name, **knobs)
        with pytest.raises(CandidateFailed, match="recurrent state") as caught:
            engine.open_artefact(artefact, runtime)
        assert caught.value.kind == "unsupported"


# ---------------------------------------------------------------- the draft a person names


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return the folders of a model and of a smaller one of its tokenizer, which do not lie side by side."""
    place = tmp_path_factory.mktemp("pair")
    shutil.copytree(tiny_folder("llama"), place / "model")
    make_tiny_model(place / "helpers" / "small", "llama", seed=5, layers=1)
    return place / "model", place / "helpers" / "small"


def test_a_spec_names_a_draft_as_it_names_the_model(pair, tmp_path):
    model, draft = pair
    asked = {"model": "model", "draft": "helpers/small", "objectives": ["tpot_p50"]}
    spec = specs.from_mapping(asked, folder=model.parent)
    assert specs.from_mapping(specs.as_mapping(spec), folder=model.parent) == spec
    assert (
        specs.from_mapping({**asked, "draft": {"source": "org/small", "revision": "a" * 40}}).draft.revision == "a" * 40
    )
    found = read_models(spec, offline=True, trust_remote_code=None, allow_pickle=False, weights="required").model
    assert found.draft.source == str(draft.resolve())
    assert found.draft.digest == read_model(draft).model.digest
    assert read_model(model).model.draft is None


def test_a_spec_without_a_draft_says_nothing_of_it(pair):
    spec = specs.from_mapping({"model": "model", "objectives": ["tpot_p50"]}, folder=pair[0].parent)
    assert "draft" not in specs.as_mapping(spec)
    assert "draft" not in serde.plain(spec)  # so what was keyed by specs of before is found again


@pytest.mark.parametrize(
    ("draft", "words"),
    [
        ("nowhere/at/all", "is not a folder here"),
        ("helpers", "no config.json"),
        ("https://x/y", "is not a model folder"),
    ],
)
def test_a_draft_that_is_none_has_its_place_in_the_spec(pair, draft, words):
    file = pair[0].parent / "leanplan.yaml"
    file.write_text(f"model: model\ndraft: {draft}\nobjectives: [tpot_p50]\n")
    with pytest.raises(BadInput, match=words) as caught:
        specs.check_files(specs.load(file), specs.read(file))
    assert "leanplan.yaml:2" in caught.value.where


def test_a_hub_id_is_asked_of_the_hub(pair):
    with pytest.raises(
        EnvironmentProblem, match="org/small is no folder here, and cannot be had from the hub"
    ) as caught:
        read_model(pair[0], draft="org/small", offline=True)
    assert caught.value.where == "draft"


def test_the_command_line_takes_a_draft(pair, capsys, monkeypatch):
    model = str(pair[0])
    monkeypatch.chdir(pair[1].parent)
    command = ["estimate", model, "--on", "h100-sxm", "--step", "draft_model"]
    assert main([*command, "--draft", "small"]) == 0
    assert "drafts of at most 4 tokens" in capsys.readouterr().out
    assert main([*command, "--draft", model]) == 2
    assert "the draft is the model itself" in capsys.readouterr().err
    assert main(command) == 2
    assert "no draft model: name one" in capsys.readouterr().err


# ---------------------------------------------------------------- what a draft is, is part of what was measured


PLANS = {
    steps: Plan(model_digest="toy", engine="transformers", steps=steps)
    for steps in ((), (Step("draft_model", {"tokens": 4}),), (Step("prompt_lookup", {"tokens": 4}),))
}


@pytest.mark.parametrize("steps", PLANS, ids=str)
def test_another_draft_is_another_measurement_and_another_build(pair, steps):
    plan = PLANS[steps]
    ours = read_model(pair[0], draft=str(pair[1])).model
    other = replace(ours, draft=replace(ours.draft, digest="changed"))
    asked = [step.technique for step in steps] == ["draft_model"]
    assert (building._key(plan, ours, None, 0) != building._key(plan, other, None, 0)) == asked
    keys = [measured_key(plan, model) for model in (ours, other, replace(ours, draft=None))]
    assert (keys[0] != keys[1]) == asked
    assert (keys[0] != keys[2]) == asked


def measured_key(plan, model) -> str:
    run = SimpleNamespace(data=SimpleNamespace(id="texts"))
    validator = SimpleNamespace(
        run=run, model=model, spec=SimpleNamespace(workload=TOY_WORKLOAD, prices=Prices()), hardware=TOY_MACHINE, allocations={},
        protocol={"blocks": 3}, _asked=lambda protocol: protocol,
    )  # fmt: skip
    return Validator.key(validator, plan)


def test_a_plan_is_not_rebuilt_with_another_draft(pair, tmp_path):
    model = read_model(pair[0], draft=str(pair[1])).model
    recipe = Recipe(
        plan=next(p for p in PLANS.values() if p.step("draft_model")), model=model.source, model_digest=model.digest,
        draft=model.draft.source, draft_digest="another",
    )  # fmt: skip
    write_recipe(tmp_path, recipe)
    assert read_recipe(tmp_path / "plan.json") == recipe
    with pytest.raises(BadInput, match="the draft is not the one the plan was made for") as caught:
        rebuild(recipe, tmp_path / "out", store=tmp_path / "store", progress=Progress(quiet=True))
    assert "--draft" in caught.value.hint


# ---------------------------------------------------------------- what is predicted


@pytest.mark.parametrize("accepted", [0.2, 0.6, 0.9])
@pytest.mark.parametrize("drafted", [1, 4])
def test_tokens_of_a_step_are_those_of_drawing_lots(accepted, drafted):
    lots = numpy.random.default_rng(0).random((200_000, drafted)) < accepted
    kept = 1 + numpy.cumprod(lots, axis=1).sum(1)
    assert _drafts.tokens_for_each_step(accepted, drafted) == pytest.approx(kept.mean(), rel=0.01)


@pytest.mark.parametrize("accepted", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("cost", [0.05, 0.3, 0.8])
def test_one_token_more_is_drafted_while_it_is_worth_its_price(accepted, cost):
    count = _drafts.drafted_tokens(accepted, cost, 50)
    assert count == 1 or accepted**count > cost
    assert accepted ** (count + 1) <= cost


def test_each_drafted_token_reads_the_draft(model_folder):
    folder = model_folder("llama")
    model = read_model(folder).model
    demand = demand_of(model, TOY_WORKLOAD, "transformers")
    stored, read, cache = _drafts.draft_bytes(demand, model.draft)
    technique = techniques.get("draft_model")
    for tokens in (2, 4):
        after = technique.rewrite(demand, tokens=tokens)
        drafted = after.verified_tokens_per_step - demand.verified_tokens_per_step
        assert after.draft_bytes_per_step == drafted * read
        assert after.other_bytes == demand.other_bytes + stored
        assert after.kv_bytes_per_token == demand.kv_bytes_per_token + cache
    tensors = read_header(folder.with_name("model-draft") / "model.safetensors").values()
    assert stored == sum(tensor.stop - tensor.start for tensor in tensors)
    assert cache == demand.kv_bytes_per_token  # a copy of the model, at its dtype


def test_a_small_draft_is_read_once_for_each_of_its_tokens():
    demand = demand_of(read_model(tiny_folder("llama")).model, TOY_WORKLOAD, "transformers")
    small = 0.05 * (demand.linear_bytes + demand.head_read_bytes)
    after = _drafts.drafting(
        demand, accepted=0.9, most=4, draft_bytes=small, draft_flop=7.0, draft_kernels=3.0, why="drafts"
    )
    assert after.draft_bytes_per_step == 4 * small
    assert (after.draft_flop_per_step, after.draft_kernels_per_step) == (28.0, 12.0)
    assert after.tokens_per_step == _drafts.tokens_for_each_step(0.9, 4)


def test_the_time_of_a_step_counts_the_drafts():
    """A draft as large as the model makes a step longer by a pass for each token; a small one hardly."""
    model = replace(
        read_model(tiny_folder("llama")).model, linear_params=10**9, params_total=10**9, params_active=10**9
    )
    demand = demand_of(model, TOY_WORKLOAD, "transformers")
    for part, lowest, highest in ((1.0, 1.9, 2.1), (0.1, 1.05, 1.2)):
        after = replace(demand, draft_bytes_per_step=part * (demand.linear_bytes + demand.head_read_bytes))
        seconds = [sum(parts_of_step(d, model).values()) for d in (demand, after)]
        assert lowest < seconds[1] / seconds[0] < highest


def parts_of_step(demand, model) -> dict[str, float]:
    from cost_models.roofline import decode_parts

    rates = SimpleNamespace(
        weights_bytes_per_s=1e10, flop_per_s=1e15, kv_bytes_per_s=1e10, bytes_per_s=1e10, kernel_s=0.0, step_s=0.0,
        asynchronous=0.0, few_rows_share=1.0,
    )  # fmt: skip
    facts = SimpleNamespace(
        **{name: getattr(model, name) for name in ("experts", "experts_active", "params_total", "params_active", "state_bytes")},
        window=numpy.inf, window_share=1.0,
    )  # fmt: skip
    case = SimpleNamespace(demand=demand, rates=rates, model=facts, workload=TOY_WORKLOAD, hardware=TOY_MACHINE)
    return {name: float(part) for name, part in decode_parts(case).items()}


@pytest.mark.parametrize("tokens", [2, 4])
def test_a_draft_is_priced_in_bytes_and_time(model_folder, tokens):
    model = read_model(model_folder("llama")).model
    plans = [
        Plan(model_digest="toy", engine="transformers", steps=steps)
        for steps in ((), (Step("draft_model", {"tokens": tokens}),))
    ]
    figures = cost_models.estimate_many(plans, model, TOY_WORKLOAD, TOY_MACHINE)
    for metric in ("artefact_bytes", "weights_bytes", "kv_cache_bytes", "peak_memory_bytes"):
        assert figures[metric].mid[1] > figures[metric].mid[0]
    # this draft is as large as the model, and is not believed to pay
    assert figures["tpot_s"].mid[1] > 0.9 * figures["tpot_s"].mid[0]
