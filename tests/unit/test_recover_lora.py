"""Recovery: a damaged model comes nearer to the unchanged one, keeps its structure, and never gets worse."""

from pathlib import Path

import pytest
import torch
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD
from tiny_sessions import facts_of, load, reloaded, session_of, tiny_folder
from transformers import AutoTokenizer

from cost_models.demand import demand_of
from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import _training, drop_layers, low_rank, prune_wanda, prune_width, recover_lora
from knowledge_base.techniques._blocks import decoder_layers, is_matrix, matrix_of, mean_loss

DAMAGE = [
    ("llama", prune_width, {"keep": 0.5}),
    ("gpt2", drop_layers, {"count": 1, "by": "loss"}),
    ("llama", drop_layers, {"count": 1, "by": "loss"}),
    ("llama", low_rank, {"keep": 0.6}),
    ("mixtral", drop_layers, {"count": 1, "by": "loss"}),
]


@pytest.fixture(autouse=True)
def text_seen_again(monkeypatch):
    """These models learnt nothing, so what they gain lies in seeing the same rows again, not in text written anew."""
    monkeypatch.setattr(_training, "VIEWS_MAX", 1000)


def damaged(architecture, technique, knobs, dtype=torch.float32):
    """Return a session whose held-out rows repeat the training rows: a model that learnt nothing cannot generalise."""
    session = session_of(tiny_folder(architecture), dtype)
    session.calibration = session.calibration[:3].repeat(4, 1)
    defaults = {knob: choice.default for knob, choice in technique.TECHNIQUE.knobs.items()}
    technique.execute(session, **(defaults | knobs))
    return session


@pytest.mark.slow
def test_recovery_of_a_trained_model_holds_on_text_it_never_saw(monkeypatch):
    monkeypatch.setattr(_training, "TOKENS_PER_STEP", 512)
    folder = Path(__file__).parents[2]
    tokenizer = AutoTokenizer.from_pretrained(folder / "models" / "tiny-lm")

    def rows(name: str, count: int) -> torch.Tensor:
        """Return `count` rows of 128 tokens spread over a shipped text."""
        text = (folder / "knowledge_base" / "data" / "texts" / f"{name}.txt").read_text(encoding="utf-8")
        ids = torch.tensor(tokenizer(text)["input_ids"])
        whole = ids[: len(ids) // 128 * 128].view(-1, 128)
        return whole[torch.arange(count) * len(whole) // count]

    session = session_of(folder / "models" / "tiny-lm")
    session.calibration = rows("calib", 48)
    unseen = rows("heldout", 12)
    whole = mean_loss(session.model, unseen)
    drop_layers.execute(session, count=2, by="loss")
    before = mean_loss(session.model, unseen)
    recover_lora.execute(session, steps=20)
    after = mean_loss(session.model, unseen)
    assert after - whole < 0.9 * (before - whole), (whole, before, after)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "technique", "knobs"), DAMAGE)
def test_recovery_brings_the_unchanged_model_nearer_and_keeps_the_structure(architecture, technique, knobs):
    session = damaged(architecture, technique, knobs)
    shapes = {name: (t.shape, t.dtype) for name, t in session.model.state_dict().items()}
    recover_lora.execute(session, steps=20)
    before, after = session.notes["recover_lora.heldout_kl_nats"]
    assert after < 0.9 * before
    assert {name: (t.shape, t.dtype) for name, t in session.model.state_dict().items()} == shapes
    assert not any("lora" in type(m).__module__ for m in session.model.modules())


def test_the_merged_model_is_the_one_that_was_scored(tmp_path):
    session = damaged("llama", prune_width, {"keep": 0.5})
    recover_lora.execute(session, steps=20)
    held_out = session.calibration[9:]
    with torch.no_grad():
        wanted = load(tiny_folder()).forward(held_out, use_cache=False).logits.log_softmax(-1)
        given = reloaded(session.model, tmp_path)(held_out, use_cache=False).logits.log_softmax(-1)
    kl = (wanted.exp() * (wanted - given)).sum(-1).mean().item()
    assert kl == pytest.approx(session.notes["recover_lora.heldout_kl_nats"][1], rel=1e-3, abs=2e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_zeros_stay_zero_and_the_score_is_of_the_pruned_model(architecture):
    session = damaged(architecture, prune_wanda, {"sparsity": 0.5})
    zeros = {n: matrix_of(m) == 0 for n, m in decoder_layers(session.model).named_modules() if is_matrix(m)}
    recover_lora.execute(session, steps=20)
    for name, mask in zeros.items():
        assert (matrix_of(decoder_layers(session.model).get_submodule(name))[mask] == 0).all(), name
    before, after = session.notes["recover_lora.heldout_kl_nats"]
    assert after < before
    assert not any(m._forward_hooks for m in session.model.modules())
    held_out = session.calibration[9:]
    with torch.no_grad():
        wanted = load(tiny_folder(architecture))(held_out, use_cache=False).logits.log_softmax(-1)
        given = session.model(held_out, use_cache=False).logits.log_softmax(-1)
    assert (wanted.exp() * (wanted - given)).sum(-1).mean().item() == pytest.approx(after, rel=1e-3, abs=2e-6)


def test_a_model_that_is_not_damaged_is_left_alone():
    session = session_of(tiny_folder())
    before = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    recover_lora.execute(session, steps=20)
    assert all(torch.equal(tensor, before[name]) for name, tensor in session.model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_come_back_in_their_own_type(dtype):
    session = damaged("llama", prune_width, {"keep": 0.5}, dtype)
    recover_lora.execute(session, steps=20)
    assert {p.dtype for p in session.model.parameters()} == {dtype}
    before, after = session.notes["recover_lora.heldout_kl_nats"]
    assert after < before


def test_the_same_plan_gives_bit_identical_weights_and_another_seed_does_not():
    built = []
    for seed in (0, 0, 1):
        session = damaged("llama", prune_width, {"keep": 0.5})
        session.seed = seed
        state = torch.random.get_rng_state()
        recover_lora.execute(session, steps=20)
        assert torch.equal(torch.random.get_rng_state(), state)  # others' randomness is not moved
        built.append(session.model.state_dict())
    assert all(torch.equal(built[0][name], built[1][name]) for name in built[0])
    assert not all(torch.equal(built[0][name], built[2][name]) for name in built[0])


def test_failures_are_named():
    session = session_of(tiny_folder())
    session.calibration = session.calibration[:3]
    with pytest.raises(CandidateFailed, match="at least 4 rows"):
        recover_lora.execute(session, steps=20)
    session = session_of(tiny_folder())
    session.model.config._name_or_path = session.model.name_or_path = "/nowhere"
    with pytest.raises(CandidateFailed, match="unchanged model"):
        recover_lora.execute(session, steps=20)
    session = session_of(tiny_folder())
    decoder_layers(session.model)[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(CandidateFailed, match="not finite at step 1") as failed:
        recover_lora.execute(session, steps=20)
    assert failed.value.kind == "non_finite"


def test_state_space_models_are_refused():
    mamba = facts_of(session_of(tiny_folder("mamba")).model)
    assert "would not be trained" in recover_lora.rejects(mamba, TOY_WORKLOAD, TOY_MACHINE)


def test_prediction_undoes_part_of_the_damage_and_costs_a_build():
    demand = prune_wanda.rewrite(demand_of(TOY_MODEL, TOY_WORKLOAD, "transformers"), sparsity=0.5)
    ratios = [recover_lora.rewrite(demand, steps=steps).perplexity_ratio for steps in (20, 60, 200)]
    assert demand.perplexity_ratio > ratios[0] > ratios[1] > ratios[2] > 1
    assert recover_lora.rewrite(demand, steps=60).build_flop > demand.build_flop
