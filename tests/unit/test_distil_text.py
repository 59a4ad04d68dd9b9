"""Training on what the unchanged model writes: the text is its own, and a damaged model comes nearer to it."""

import pytest
import torch
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD
from tiny_sessions import calibration, facts_of, load, session_of, tiny_folder

from cost_models.demand import demand_of
from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import _training, distil_text, prune_width
from knowledge_base.techniques._blocks import mean_loss


def test_the_unchanged_model_goes_on_from_the_text_it_is_given():
    teacher, rows = load(tiny_folder()), calibration(3, 32)
    found = _training.written(teacher, rows, 4, seed=0)
    assert found.shape == (4, 32)
    for number, row in enumerate(found):
        assert torch.equal(row[:4], rows[number % 3, :4])
        assert not torch.equal(row, rows[number % 3])
    assert torch.equal(found, _training.written(teacher, rows, 4, seed=0))
    assert not torch.equal(found, _training.written(teacher, rows, 4, seed=1))
    # What a model samples it finds likelier than chance.
    assert mean_loss(teacher, found) < mean_loss(teacher, calibration(4, 32, teacher.config.vocab_size))


def session_on_own_text(tmp_path):
    """Return a damaged session whose calibration text the unchanged model wrote, so that there is something to learn."""
    session = session_of(tiny_folder())
    session.workspace = tmp_path
    session.calibration = _training.written(session.model, calibration(12), 12, seed=5)
    prune_width.execute(session, **{k: c.options[0] for k, c in prune_width.TECHNIQUE.knobs.items()})
    return session


def test_training_on_written_text_never_ends_worse_and_keeps_the_structure(tmp_path):
    session = session_on_own_text(tmp_path)
    shapes = {name: (t.shape, t.dtype) for name, t in session.model.state_dict().items()}
    distil_text.execute(session, steps=20)
    before, after = session.notes["distil_text.heldout_loss_nats"]
    assert after <= before
    assert mean_loss(session.model, session.calibration[9:]) == pytest.approx(after, rel=1e-4)
    assert {name: (t.shape, t.dtype) for name, t in session.model.state_dict().items()} == shapes
    assert not any(tmp_path.iterdir())


def test_failures_are_sentences(tmp_path):
    session = session_on_own_text(tmp_path)
    session.calibration = session.calibration[:3]
    with pytest.raises(CandidateFailed, match="at least 4 rows"):
        distil_text.execute(session, steps=20)
    mamba = facts_of(session_of(tiny_folder("mamba")).model)
    assert "would not be trained" in distil_text.rejects(mamba, TOY_WORKLOAD, TOY_MACHINE)


def test_prediction_counts_the_writing():
    demand = demand_of(TOY_MODEL, TOY_WORKLOAD, "transformers")
    damage = prune_width.rewrite(demand, **{k: c.default for k, c in prune_width.TECHNIQUE.knobs.items()})
    short, long = (distil_text.rewrite(damage, steps=steps) for steps in (20, 60))
    assert damage.perplexity_ratio > short.perplexity_ratio > long.perplexity_ratio > 1
    assert damage.build_flop < short.build_flop < long.build_flop
