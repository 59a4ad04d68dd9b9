"""The loop behind recovery: what it asks the unchanged model, what it holds in memory, and going on after a break."""

import math
import weakref
from dataclasses import replace

import numpy
import pytest
import torch
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD
from tiny_sessions import load, session_of, tiny_folder

from cost_models.demand import demand_of
from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import _training, drop_layers, prune_wanda, prune_width, recover_full, recover_lora
from knowledge_base.techniques._blocks import decoder_layers


@pytest.fixture(autouse=True)
def text_seen_again(monkeypatch):
    """These models learnt nothing, so what they gain lies in seeing the same rows again, not in text written anew."""
    monkeypatch.setattr(_training, "VIEWS_MAX", 1000)


def damaged(tmp_path, architecture="llama", dtype=torch.float32, technique=prune_width):
    """Return a session whose held-out rows repeat the training rows: a model that learnt nothing cannot generalise."""
    session = session_of(tiny_folder(architecture), dtype)
    session.workspace = tmp_path
    session.calibration = session.calibration[:3].repeat(4, 1)
    technique.execute(session, **{k: c.options[0] for k, c in technique.TECHNIQUE.knobs.items()})
    return session


def divergence(session, rows):
    with torch.no_grad():
        wanted = load(tiny_folder())(rows, use_cache=False).logits.log_softmax(-1)
        given = session.model(rows, use_cache=False).logits.log_softmax(-1)
    return (wanted.exp() * (wanted - given)).sum(-1).mean().item()


# ---------------------------------------------------------------- answers


def test_the_answers_give_the_divergence_from_the_unchanged_model(tmp_path):
    session = damaged(tmp_path)
    with _training.answers(session, label="x", steps=1) as told:
        assert told.tokens is None
        assert told.held_out == range(9, 12)
        assert told.trained_on.tolist() == list(range(9))
        rows = torch.tensor([2, 10])
        wanted = divergence(session, session.calibration[rows])
        assert told.divergence(session.model, rows).item() == pytest.approx(wanted, abs=2e-6)  # kept in float16
    assert not any(tmp_path.iterdir())


def test_a_long_text_keeps_the_likeliest_tokens_and_the_rest_as_one(tmp_path, monkeypatch):
    session = damaged(tmp_path, technique=drop_layers)
    rows = torch.arange(12)
    whole = divergence(session, session.calibration)
    found = {}
    for kept in (64, 500):
        monkeypatch.setattr(_training, "ANSWER_BYTES_MAX", 6 * session.calibration.numel() * kept)
        with _training.answers(session, label="x", steps=1) as told:
            assert told.log_probs.shape == (12, 32, kept)
            found[kept] = told.divergence(session.model, rows).item()
    # Telling fewer outcomes apart can only make two distributions look nearer.
    assert 0 < found[64] < found[500] <= 1.01 * whole  # kept in float16


def test_a_text_too_short_for_the_steps_is_continued_by_the_unchanged_model(tmp_path, monkeypatch):
    monkeypatch.setattr(_training, "TOKENS_PER_STEP", 64)  # two rows
    monkeypatch.setattr(_training, "VIEWS_MAX", 4)
    session = damaged(tmp_path)
    with _training.answers(session, label="x", steps=18) as told:
        assert len(told.rows) == 12
    with _training.answers(session, label="x", steps=22) as told:  # 44 views, 4 of each row: 11 rows, 9 are there
        assert told.trained_on.tolist() == [*range(9), 12, 13]
        assert torch.equal(told.rows[12, :4], session.calibration[0, :4])
        assert not torch.equal(told.rows[12], session.calibration[0])
        assert told.log_probs.shape[0] == 14


def test_the_rest_is_what_is_left():
    given = torch.tensor([[0.5, 0.3]]).log()
    assert _training._with_rest(given).exp()[0].tolist() == pytest.approx([0.5, 0.3, 0.2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_one_model_is_in_memory_at_a_time(tmp_path, monkeypatch, dtype):
    session = damaged(tmp_path, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    seen = []
    load_teacher = _training._unchanged

    def watched(model):
        teacher = load_teacher(model)
        seen.extend([sum(p.numel() for p in model.parameters()), weakref.ref(teacher)])
        return teacher

    monkeypatch.setattr(_training, "_unchanged", watched)
    with _training.answers(session, label="x", steps=1):
        parked, teacher = seen
        assert parked == 0
        assert teacher() is None
        after = session.model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_model_comes_back_when_the_unchanged_one_cannot_be_loaded(tmp_path):
    session = damaged(tmp_path)
    before = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    session.model.config._name_or_path = session.model.name_or_path = "/nowhere"
    with pytest.raises(CandidateFailed, match="unchanged model"), _training.answers(session, label="x", steps=1):
        pass
    assert all(torch.equal(t, before[name]) for name, t in session.model.state_dict().items())


# ---------------------------------------------------------------- the loop


def run(session, steps=8, loss=None, target=3.0):
    """Train one number towards a target; the score is how far it is. Return the number and what `train` says."""
    number = torch.nn.Parameter(torch.zeros(()))
    seen = []

    def usual(rows):
        seen.append(rows.tolist())
        return (number - target).square() + 0 * rows.sum()

    groups = [{"params": [number], "lr": 0.5}]
    found = _training.train(
        session, "test", groups, loss or usual, lambda: abs(number.item() - target), torch.arange(6),
        steps=steps, batch=2, row_bytes=1.0,
    )  # fmt: skip
    return number, found, seen


def test_every_row_is_seen_before_any_is_seen_again(tmp_path):
    session = session_of(tiny_folder())
    session.workspace = tmp_path
    number, (before, after), seen = run(session, steps=6)
    rows = [row for part in seen for row in part]
    assert all(len(part) == 2 for part in seen)
    assert sorted(rows[:6]) == sorted(rows[6:]) == list(range(6))
    assert before == 3.0
    assert after == pytest.approx(abs(number.item() - 3.0))


def test_a_step_that_takes_too_much_memory_is_added_up_from_parts(tmp_path, monkeypatch):
    session = session_of(tiny_folder())
    session.workspace = tmp_path
    whole = run(session)[0]
    monkeypatch.setattr(_training, "LOGIT_BYTES_MAX", 1)
    number, _, seen = run(session)
    assert {len(part) for part in seen} == {1}
    assert number.item() == pytest.approx(whole.item(), rel=1e-5)


def test_the_best_state_stays_and_the_first_if_none_is_better(tmp_path):
    session = session_of(tiny_folder())
    session.workspace = tmp_path
    number, (before, after), _ = run(session, target=0.0)
    assert (number.item(), before, after) == (0.0, 0.0, 0.0)
    # It runs past the target and is told to stop where it was nearest.
    number, (_, after), _ = run(session, steps=40, target=0.2)
    assert abs(number.item() - 0.2) == pytest.approx(after)


def test_a_training_that_was_cut_off_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(_training, "STATE_EVERY_S", 0.0)
    whole = damaged(tmp_path)
    recover_lora.execute(whole, steps=20)
    steps = []

    def cut_off(what, done):
        if what == "recover_lora" and done >= 0.5:
            raise KeyboardInterrupt

    session = damaged(tmp_path)
    session.progress = cut_off
    with pytest.raises(KeyboardInterrupt):
        recover_lora.execute(session, steps=20)
    again = damaged(tmp_path)
    again.progress = lambda what, done: steps.append(round(20 * done)) if what == "recover_lora" else None
    recover_lora.execute(again, steps=20)
    assert steps == list(range(10, 21))  # the tenth was cut off before it was kept
    assert again.notes == whole.notes
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------- every weight


@pytest.mark.parametrize(
    "architecture",
    ["llama", pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("mixtral", marks=pytest.mark.slow)],
)
def test_full_recovery_comes_nearer_and_keeps_the_structure(tmp_path, architecture):
    session = damaged(tmp_path, architecture, technique=drop_layers)
    shapes = {name: (t.shape, t.dtype) for name, t in session.model.state_dict().items()}
    recover_full.execute(session, steps=20)
    before, after = session.notes["recover_full.heldout_kl_nats"]
    assert after < 0.7 * before
    assert {name: (t.shape, t.dtype) for name, t in session.model.state_dict().items()} == shapes
    assert not any(p.requires_grad or p._backward_hooks or p.grad is not None for p in session.model.parameters())


def test_full_recovery_keeps_zeros_and_the_stored_type(tmp_path):
    session = session_of(tiny_folder(), torch.bfloat16)
    session.workspace = tmp_path
    session.calibration = session.calibration[:3].repeat(4, 1)
    prune_wanda.execute(
        session, **({k: c.options[0] for k, c in prune_wanda.TECHNIQUE.knobs.items()} | {"sparsity": 0.5})
    )
    zeros = {name: p == 0 for name, p in decoder_layers(session.model).named_parameters() if p.dim() > 1}
    assert any(mask.any() for mask in zeros.values())
    recover_full.execute(session, steps=20)
    for name, parameter in decoder_layers(session.model).named_parameters():
        assert parameter.dtype == torch.bfloat16
        if name in zeros:
            assert (parameter[zeros[name]] == 0).all(), name
    before, after = session.notes["recover_full.heldout_kl_nats"]
    assert after < before


def test_full_recovery_is_for_models_that_fit():
    assert recover_full.rejects(TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE) is None
    large = replace(TOY_MODEL, params_total=10**11)
    assert "recover_lora takes far less" in recover_full.rejects(large, TOY_WORKLOAD, TOY_MACHINE)


def test_full_recovery_predicts_what_it_brings_back():
    demand = demand_of(TOY_MODEL, TOY_WORKLOAD, "transformers")
    damage = prune_width.rewrite(demand, **{k: c.default for k, c in prune_width.TECHNIQUE.knobs.items()})
    found = [recover_full.rewrite(damage, steps=steps) for steps in (20, 60, 200)]
    ratios = [math.log(after.perplexity_ratio) for after in found]
    assert math.log(damage.perplexity_ratio) > ratios[0] > ratios[1] > ratios[2] > 0
    assert numpy.diff([after.build_flop for after in found]).min() > 0
