"""Pruning on real transformers models: zeros, channels and layers really go, and what stays still fits together."""

import copy

import pytest
import torch
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD
from tiny_sessions import calibration, facts_of, logits, reloaded, session_of, tiny_folder

from cost_models.demand import demand_of
from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import drop_layers, prune_wanda, prune_width
from knowledge_base.techniques._blocks import decoder_layers, each_layer, ffn_of, is_matrix, matrix_of, mean_loss

TRANSFORMERS = ("llama", "llama_untied", "gpt2", "qwen2", "mistral", "mixtral")
SETTINGS = {prune_wanda: {"sparsity": 0.5}, prune_width: {"keep": 0.75}, drop_layers: {"count": 1, "by": "loss"}}


def weights(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def inside_matrices(model) -> dict:
    return {name: matrix_of(module) for name, module in decoder_layers(model).named_modules() if is_matrix(module)}


# ---------------------------------------------------------------- prune_wanda


@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_wanda_zeroes_the_share_in_every_row_and_nothing_else(architecture):
    sparsity = 0.3 if architecture == "gpt2" else 0.5
    session = session_of(tiny_folder(architecture))
    before = weights(session.model)
    prune_wanda.execute(session, sparsity=sparsity)
    matrices = inside_matrices(session.model)
    assert matrices
    for name, matrix in matrices.items():
        assert ((matrix == 0).sum(dim=1) == round(sparsity * matrix.shape[1])).all(), name
    after = session.model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        kept = tensor != 0
        assert torch.equal(tensor[kept], before[name][kept]), name  # weights that stay are not touched
        if "experts" in name:
            assert abs((tensor == 0).float().mean() - sparsity) < 0.01
    assert session.notes["prune_wanda.zeros_ratio"] == pytest.approx(sparsity, abs=0.01)


def test_wanda_is_the_paper_s_formula():
    folder = tiny_folder()
    session = session_of(folder)
    layer = decoder_layers(session.model)[0]
    with torch.no_grad():
        inputs = layer.input_layernorm(session.model.model.embed_tokens(session.calibration))
    weight = layer.self_attn.q_proj.weight.clone()
    expected = weight.clone()
    for row in range(weight.shape[0]):  # slow and obvious
        score = [abs(weight[row, j].item()) * inputs[..., j].norm().item() for j in range(weight.shape[1])]
        for j in sorted(range(len(score)), key=score.__getitem__)[: len(score) // 2]:
            expected[row, j] = 0
    prune_wanda.execute(session, sparsity=0.5)
    different = (layer.self_attn.q_proj.weight != expected).float().mean()
    assert different < 1e-3  # ties within float rounding


def test_wanda_beats_magnitude_on_skewed_inputs():
    """Where inputs differ in scale, the norm matters: the pruned matrix gives outputs nearer to the whole one's."""
    session = session_of(tiny_folder())
    layer = decoder_layers(session.model)[0]
    with torch.no_grad():
        layer.input_layernorm.weight.mul_(torch.logspace(-1.5, 1.5, 128))
        inputs = layer.input_layernorm(session.model.model.embed_tokens(session.calibration)).flatten(0, 1)
    weight = layer.self_attn.q_proj.weight.clone()
    magnitude = weight.clone().scatter_(1, weight.abs().argsort(dim=1)[:, :64], 0.0)
    prune_wanda.execute(session, sparsity=0.5)

    def error(pruned):
        return (inputs @ (pruned - weight).T).norm().item()

    assert error(layer.self_attn.q_proj.weight) < 0.7 * error(magnitude)


def test_wanda_claims_no_saving():
    assert prune_wanda.TECHNIQUE.saves == ()
    demand = demand_of(TOY_MODEL, TOY_WORKLOAD, "transformers")
    after = prune_wanda.rewrite(demand, sparsity=0.5)
    assert (after.linear_bytes, after.linear_flop_per_token) == (demand.linear_bytes, demand.linear_flop_per_token)
    assert after.perplexity_ratio > 1
    assert "skip nothing" in after.because[-1]


# ---------------------------------------------------------------- prune_width


@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_width_shrinks_every_layer_and_its_config_alone_rebuilds_it(architecture, tmp_path):
    keep = 0.75 if architecture in ("llama", "mixtral") else 0.5
    session = session_of(tiny_folder(architecture))
    before = facts_of(session.model)
    prune_width.execute(session, keep=keep)
    count = prune_width.kept_channels(before.ffn_size, keep)
    assert {ffn_of(layer).size for layer in decoder_layers(session.model)} == {count}
    after = facts_of(session.model)
    assert after.ffn_size == count
    back = reloaded(session.model, tmp_path)
    assert torch.equal(logits(back), logits(session.model))
    predicted = prune_width.rewrite(demand_of(before, TOY_WORKLOAD, "transformers"), keep=keep)
    assert predicted.linear_params == after.linear_params
    assert predicted.model.ffn_size == count
    assert predicted.model.params_total == pytest.approx(after.params_total, rel=0.01)  # biases are not counted
    assert predicted.model.params_active == pytest.approx(after.params_active, rel=0.01)


def test_width_correction_brings_outputs_nearer():
    session = session_of(tiny_folder(), rows=32)
    whole = copy.deepcopy(decoder_layers(session.model)[0].mlp)
    seen = []
    decoder_layers(session.model)[0].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    prune_width.execute(session, keep=0.5)
    pruned = decoder_layers(session.model)[0].mlp
    inputs = seen[0].flatten(0, 1)
    kept = [int((whole.up_proj.weight == row).all(dim=1).nonzero()) for row in pruned.up_proj.weight]
    assert kept == sorted(set(kept))  # real channels, in their order
    hidden = whole.act_fn(whole.gate_proj(inputs)) * whole.up_proj(inputs)
    wanted = whole.down_proj(hidden)
    plain = hidden[:, kept] @ whole.down_proj.weight[:, kept].T
    assert (pruned(inputs) - wanted).norm() < 0.9 * (plain - wanted).norm()


def test_width_drops_dead_channels_for_free():
    session = session_of(tiny_folder())
    dead = torch.arange(0, 256, 4)
    for layer in decoder_layers(session.model):
        layer.mlp.down_proj.weight.data[:, dead] = 0
    wanted = logits(session.model)
    prune_width.execute(session, keep=0.75)
    assert torch.allclose(logits(session.model), wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("size", "keep", "kept"),
    [(768, 0.67, 512), (768, 0.875, 672), (11008, 0.75, 8192), (14336, 0.5, 7168), (64, 0.75, 64)],
)
def test_width_grain(size, keep, kept):
    assert prune_width.kept_channels(size, keep) == kept


def test_width_refuses_what_it_cannot_do():
    mamba = facts_of(session_of(tiny_folder("mamba")).model)
    assert "no feed-forward part" in prune_width.rejects(mamba, TOY_WORKLOAD, TOY_MACHINE)
    with pytest.raises(CandidateFailed, match="found no feed-forward part in MambaBlock") as failed:
        prune_width.execute(session_of(tiny_folder("mamba")), keep=0.5)
    assert failed.value.kind == "unsupported"
    small = tiny_folder("llama", hidden_size=64)  # 128 channels
    assert "rounds to all" in prune_width.legal(
        {"keep": 0.875}, facts_of(session_of(small).model), TOY_WORKLOAD, TOY_MACHINE
    )
    with pytest.raises(CandidateFailed, match="rounds to all"):
        prune_width.execute(session_of(small), keep=0.875)


def test_width_refuses_layers_of_different_widths():
    session = session_of(tiny_folder())
    mlp = decoder_layers(session.model)[1].mlp
    for name, shape in (("gate_proj", (128, 64)), ("up_proj", (128, 64)), ("down_proj", (64, 128))):
        setattr(mlp, name, torch.nn.Linear(*shape, bias=False))
    with pytest.raises(CandidateFailed, match="one config field cannot describe them"):
        prune_width.execute(session, keep=0.75)


# ---------------------------------------------------------------- drop_layers


@pytest.mark.parametrize("architecture", [*TRANSFORMERS, "mamba"])
def test_drop_leaves_a_whole_smaller_model(architecture, tmp_path):
    session = session_of(tiny_folder(architecture))
    before = facts_of(session.model)
    drop_layers.execute(session, count=1, by="loss")
    after = facts_of(session.model)
    assert after.layers == before.layers - 1
    assert len(session.notes["drop_layers.dropped"]) == 1
    assert torch.equal(logits(reloaded(session.model, tmp_path)), logits(session.model))
    predicted = drop_layers.rewrite(demand_of(before, TOY_WORKLOAD, "transformers"), count=1, by="loss")
    assert predicted.linear_params == pytest.approx(after.linear_params)
    assert predicted.model.layers == after.layers
    assert predicted.model.params_total == pytest.approx(after.params_total, rel=0.01)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_drop_renumbers_layers_for_the_cache(architecture):
    """Token by token through the KV cache gives what one pass gives: every layer has its own place in the cache."""
    session = session_of(tiny_folder(architecture))
    drop_layers.execute(session, count=1, by="loss")
    model, row = session.model, calibration(1)
    with torch.no_grad():
        whole = model(row, use_cache=False).logits[0]
        first = model(row[:, :20], use_cache=True)
        second = model(row[:, 20:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.allclose(torch.cat([first.logits[0], second.logits[0]]), whole, atol=1e-3)


@pytest.mark.parametrize(("useless", "by"), [(1, "loss"), (2, "influence"), (3, "loss"), (3, "influence")])
def test_drop_finds_the_layer_that_does_nothing(useless, by):
    session = session_of(tiny_folder())
    layer = decoder_layers(session.model)[useless]
    layer.self_attn.o_proj.weight.data.zero_()
    layer.mlp.down_proj.weight.data.zero_()
    wanted = logits(session.model)
    # The model's own text: random tokens are equally unlikely with any layer gone.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        session.calibration = session.model.generate(
            calibration(4, 4), do_sample=True, min_new_tokens=60, max_new_tokens=60
        )
    drop_layers.execute(session, count=1, by=by)
    assert session.notes["drop_layers.dropped"] == [useless]
    assert torch.allclose(logits(session.model), wanted, atol=1e-5)


def test_drop_keeps_the_kind_of_every_layer_that_stays():
    session = session_of(tiny_folder("qwen2"))
    kinds = list(session.model.config.layer_types)
    drop_layers.execute(session, count=1, by="loss")
    del kinds[session.notes["drop_layers.dropped"][0]]
    assert session.model.config.layer_types == kinds


def test_drop_refuses_more_than_a_third():
    model = facts_of(session_of(tiny_folder()).model)
    assert drop_layers.legal({"count": 1}, model, TOY_WORKLOAD, TOY_MACHINE) is None
    assert "more than a third" in drop_layers.legal({"count": 2}, model, TOY_WORKLOAD, TOY_MACHINE)
    with pytest.raises(CandidateFailed, match="more than a third"):
        drop_layers.execute(session_of(tiny_folder()), count=2, by="loss")


# ---------------------------------------------------------------- all three


@pytest.mark.parametrize("technique", SETTINGS, ids=lambda t: t.__name__.rsplit(".", 1)[-1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_plan_gives_bit_identical_weights(technique, dtype):
    built = []
    for _ in range(2):
        session = session_of(tiny_folder(), dtype)
        technique.execute(session, **SETTINGS[technique])
        assert {t.dtype for t in session.model.parameters()} == {dtype}
        built.append(weights(session.model))
    assert built[0].keys() == built[1].keys()
    assert all(torch.equal(built[0][name], built[1][name]) for name in built[0])


@pytest.mark.parametrize("technique", SETTINGS, ids=lambda t: t.__name__.rsplit(".", 1)[-1])
def test_no_calibration_text_is_a_named_failure(technique):
    session = session_of(tiny_folder())
    session.calibration = None
    with pytest.raises(CandidateFailed, match="needs calibration text"):
        technique.execute(session, **SETTINGS[technique])


def test_numbers_that_are_not_finite_are_a_named_failure():
    session = session_of(tiny_folder())
    decoder_layers(session.model)[2].mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(CandidateFailed, match=r"layer 2 .* not finite") as failed:
        prune_wanda.execute(session, sparsity=0.3)
    assert failed.value.kind == "non_finite"


def test_pruned_width_then_zeros_then_fewer_layers_compose(tmp_path):
    session = session_of(tiny_folder())
    drop_layers.execute(session, count=1, by="loss")
    prune_width.execute(session, keep=0.5)
    prune_wanda.execute(session, sparsity=0.3)
    assert torch.equal(logits(reloaded(session.model, tmp_path)), logits(session.model))
    assert mean_loss(session.model, calibration(2)) > 0


def test_each_layer_leaves_no_hooks_behind_when_a_change_fails():
    session = session_of(tiny_folder())

    def fail(index, layer, matrices):
        raise CandidateFailed("build_error", "on purpose")

    with pytest.raises(CandidateFailed, match="on purpose"):
        each_layer(session, fail, full=False, label="test")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in session.model.modules())
