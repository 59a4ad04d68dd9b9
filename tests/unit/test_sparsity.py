"""Zeros: where they go, what makes up for them, how they are shared out, and how they are left out of the artefact."""

import itertools

import pytest
import torch
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD
from tiny_sessions import calibration, facts_of, logits, session_of, tiny_folder

from cost_models.demand import demand_of
from knowledge_base.engines import _torch_artefact
from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import (
    _sparsity,
    prune_magnitude,
    prune_sparsegpt,
    prune_wanda,
    store_sparse,
    weight_int4_sparse,
)
from knowledge_base.techniques._blocks import decoder_layers, experts_of, is_matrix, matrix_of
from knowledge_base.techniques._packed import Int4Linear
from knowledge_base.techniques._sparse_module import SparseInt4Linear, SparseLinear
from knowledge_base.techniques.weight_gptq import inverse_factor

ARCHITECTURES = ("llama", "gpt2", "mixtral")
HALF = {"sparsity": 0.5, "pattern": "unstructured"}
UNIFORM = {**HALF, "allocation": "uniform"}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrices(model) -> dict[str, torch.Tensor]:
    """Every matrix inside the layers as (out, in), experts one by one."""
    found = {n: matrix_of(m) for n, m in decoder_layers(model).named_modules() if is_matrix(m)}
    for index, layer in enumerate(decoder_layers(model)):
        if experts := experts_of(layer):
            for part in ("gate_up_proj", "down_proj"):
                found |= {f"{index}.{part}.{i}": w for i, w in enumerate(getattr(experts[1], part).data)}
    return found


def zeros_share(model) -> float:
    weights = matrices(model).values()
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


# ---------------------------------------------------------------- where zeros go


def test_the_lowest_of_all_of_each_row_or_of_each_run():
    scores = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    assert _sparsity.lowest(scores, 0.5).tolist() == [[True] * 4, [False] * 4]
    assert _sparsity.lowest(scores, 0.5, rows=True).tolist() == [[True, True, False, False]] * 2
    assert _sparsity.lowest(scores.flip(1), 0.5, "2:4").tolist() == [[False, False, True, True]] * 2
    assert _sparsity.lowest(torch.tensor([[9.0, 1, 8, 2, 7, 3, 6, 4]]), 0.5, "4:8").nonzero()[:, 1].tolist() == [
        1,
        3,
        5,
        7,
    ]


def test_equal_scores_give_exactly_the_share():
    assert _sparsity.lowest(torch.ones(3, 8), 0.5).sum() == 12


@pytest.mark.parametrize("pattern", ["3:2", "2-4", "0:4", ""])
def test_a_pattern_that_is_none_is_refused(pattern):
    with pytest.raises(CandidateFailed, match="no pattern of zeros"):
        _sparsity.lowest(torch.ones(2, 8), 0.5, pattern)


def test_a_row_that_runs_do_not_divide_is_refused():
    with pytest.raises(CandidateFailed, match="do not divide"):
        _sparsity.lowest(torch.ones(2, 6), 0.5, "2:4")


# ---------------------------------------------------------------- making up for zeros


def inputs(rows: int = 512, width: int = 16) -> torch.Tensor:
    """Inputs that go together, so that one weight can make up for another."""
    return random(rows, width, seed=1) @ random(width, width, seed=2)


def test_one_column_is_made_up_for_as_least_squares_would():
    """Zeroing the first column, the sweep leaves the weights that fit the outputs best without it."""
    x, weight = inputs(), random(3, 16)
    hessian = (x.T @ x).double()
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()
    first = torch.zeros(3, 16, dtype=torch.bool)
    first[:, 0] = True
    moved = _sparsity.sweep(weight, factor, lambda part, column: first[:, column : column + part.shape[1]])
    best = torch.linalg.lstsq(x[:, 1:], x @ weight.T).solution.T
    assert (moved[:, 0] == 0).all()
    torch.testing.assert_close(moved[:, 1:], best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", _sparsity.PATTERNS)
@pytest.mark.parametrize("width", [16, 160])  # within one block and over two
def test_the_sweep_beats_masks_alone(pattern, width):
    x, weight = inputs(width=width), random(24, width)
    hessian = x.T @ x / len(x)
    factor = inverse_factor(hessian)
    spread = factor.diagonal()

    def choose(part, first):
        return _sparsity.lowest((part / spread[first : first + part.shape[1]]).square(), 0.5, pattern)

    moved = _sparsity.sweep(weight, factor, choose, run=_sparsity.run_of(pattern))
    wanda = _sparsity.lowest(weight.abs() * x.norm(dim=0), 0.5, pattern, rows=True)
    errors = [_sparsity.change_of_outputs(weight, w, hessian) for w in (moved, weight.masked_fill(wanda, 0.0))]
    assert errors[0] < 0.9 * errors[1]
    assert (moved == 0).float().mean() == 0.5


def test_the_change_of_outputs_is_the_squared_error_of_the_outputs():
    x, a, b = inputs(), random(3, 16), random(3, 16, seed=5)
    expected = (x @ (a - b).T).square().sum(1).mean().item()
    assert _sparsity.change_of_outputs(a, b, x.T @ x / len(x)) == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------- on models


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pattern", _sparsity.PATTERNS)
@pytest.mark.parametrize("technique", [prune_magnitude, prune_wanda, prune_sparsegpt])
def test_zeros_are_where_the_pattern_says_and_nowhere_else(technique, pattern, architecture):
    session = session_of(tiny_folder(architecture))
    inside = {w.data_ptr() for w in matrices(session.model).values()}
    before = {
        n: p.clone() for n, p in session.model.named_parameters() if "experts" not in n and p.data_ptr() not in inside
    }
    knobs = {"allocation": "uniform"} if technique is prune_sparsegpt else {}
    technique.execute(session, sparsity=0.5, pattern=pattern, **knobs)
    for name, weight in matrices(session.model).items():
        assert (weight == 0).float().mean() == 0.5, name
        if pattern == "2:4":
            assert ((weight.reshape(-1, 4) == 0).sum(1) == 2).all(), name
    after = dict(session.model.named_parameters())
    assert before
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert session.notes[f"{technique.__name__.rpartition('.')[2]}.zeros_ratio"] == 0.5


def test_magnitude_keeps_the_largest():
    session = session_of(tiny_folder())
    before = matrices(session_of(tiny_folder()).model)
    prune_magnitude.execute(session, sparsity=0.3, pattern="unstructured")
    for name, weight in matrices(session.model).items():
        gone = weight == 0
        assert before[name][gone].abs().max() <= weight[~gone].abs().min()
        assert torch.equal(weight[~gone], before[name][~gone])


def test_a_matrix_without_inputs_is_pruned_as_wanda_does():
    session = session_of(tiny_folder())
    with torch.no_grad():
        decoder_layers(session.model)[0].input_layernorm.weight.zero_()
    prune_sparsegpt.execute(session, **UNIFORM)
    assert session.notes["prune_sparsegpt.not_made_up_for"] == [f"0.self_attn.{n}_proj" for n in "qkvo"]
    assert zeros_share(session.model) == 0.5


@pytest.mark.parametrize("technique", [prune_wanda, prune_sparsegpt])
def test_without_calibration_text_it_fails_with_its_name(technique):
    session = session_of(tiny_folder())
    session.calibration = None
    with pytest.raises(CandidateFailed, match="calibration"):
        technique.execute(session, **(UNIFORM if technique is prune_sparsegpt else HALF))


# ---------------------------------------------------------------- sharing zeros out


def test_zeros_go_where_they_cost_least():
    measured = {(0, "a"): (0.1, 0.4), (0, "b"): (0.001, 0.004), (1, "a"): (0.1, 0.4), (1, "b"): (0.1, 0.4)}
    sizes = dict.fromkeys(measured, 1000)
    given = _sparsity.spread(measured, sizes, 0.5)
    assert given[0, "b"] > 0.6 > 0.5 > given[0, "a"]
    assert given[0, "a"] == pytest.approx(given[1, "b"], abs=0.011)
    assert sum(given.values()) / 4 == pytest.approx(0.5, abs=0.01)


def test_sharing_out_is_as_good_as_trying_everything():
    measured = {(0, "a"): (0.03, 0.2), (0, "b"): (0.01, 0.03), (1, "a"): (0.05, 0.1)}
    sizes = {(0, "a"): 100, (0, "b"): 300, (1, "a"): 200}
    powers = {
        part: torch.tensor(b / a).log().item() / torch.tensor(0.7 / 0.5).log().item()
        for part, (a, b) in measured.items()
    }

    def loss(given):
        return sum(measured[part][0] * (share / 0.5) ** powers[part] for part, share in given.items())

    found = _sparsity.spread(measured, sizes, 0.6)
    tried = (dict(zip(sizes, shares)) for shares in itertools.product([i / 20 for i in range(7, 18)], repeat=3))
    fair = (g for g in tried if sum(s * sizes[p] for p, s in g.items()) >= 0.6 * 600)
    assert loss(found) <= min(map(loss, fair)) * 1.02
    assert sum(share * sizes[part] for part, share in found.items()) == pytest.approx(360, abs=3)


def test_parts_that_seem_to_cost_nothing_or_gain_do_not_break_it():
    measured = {(0, "a"): (0.0, 0.0), (0, "b"): (0.02, 0.01), (1, "a"): (0.1, 0.4)}
    given = _sparsity.spread(measured, dict.fromkeys(measured, 10), 0.5)
    assert all(0 <= share <= 0.95 for share in given.values())
    assert sum(given.values()) / 3 == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layerwise_keeps_the_number_of_zeros(architecture):
    session = session_of(tiny_folder(architecture))
    prune_sparsegpt.execute(session, **HALF, allocation="layerwise")
    assert zeros_share(session.model) == pytest.approx(0.5, rel=0.02)
    shares = {float((w == 0).float().mean().round(decimals=2)) for w in matrices(session.model).values()}
    assert len(shares) > 1
    assert len(session.notes["prune_sparsegpt.shares"]) == 2 * len(decoder_layers(session.model))
    assert session.notes["prune_sparsegpt.zeros_ratio"] == pytest.approx(0.5, rel=0.02)


def test_measuring_leaves_the_model_as_it_was():
    session = session_of(tiny_folder())
    before = {n: p.clone() for n, p in session.model.state_dict().items()}
    measured, sizes = _sparsity._probe(session)
    assert all(torch.equal(before[n], p) for n, p in session.model.state_dict().items())
    assert all(0 < first < second for first, second in measured.values())
    assert sum(sizes.values()) == sum(w.numel() for w in matrices(session.model).values())


# ---------------------------------------------------------------- leaving zeros out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 16), (9, 13), (1, 1)])
def test_what_is_stored_sparsely_comes_back_bit_by_bit(shape, dtype):
    weight = random(*shape).to(dtype)
    weight[random(*shape, seed=3) > 0] = 0
    module = SparseLinear.from_weight(weight, None)
    assert torch.equal(module.unpacked().weight, weight)
    assert torch.equal(module.dequantised(), weight.float())
    assert torch.equal(module.rows(slice(0, 1), dtype), weight[:1])
    stored = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    assert stored == -(-weight.numel() // 8) + int((weight != 0).sum()) * weight.element_size()


def test_the_sparse_module_is_the_linear_it_unpacks_to():
    weight, bias, x = random(8, 16), random(8, seed=1), random(3, 16, seed=2)
    weight[:, ::2] = 0
    torch.testing.assert_close(SparseLinear.from_weight(weight, bias)(x), x @ weight.T + bias)


def test_a_matrix_of_zeros_and_one_without():
    for weight in (torch.zeros(4, 8), torch.ones(4, 8)):
        assert torch.equal(SparseLinear.from_weight(weight, None).unpacked().weight, weight)


def test_a_count_that_cannot_be_is_refused():
    for nonzeros in (-1, 129):
        with pytest.raises(CandidateFailed, match="cannot be held as sparse"):
            SparseLinear.from_spec(16, 8, False, torch.float32, nonzeros=nonzeros)
    with pytest.raises(CandidateFailed, match="cannot be held as sparse_int4"):
        SparseInt4Linear.from_spec(48, 8, False, torch.float32, nonzeros=4, group_size=64)


def rounded(weight: torch.Tensor, x: torch.Tensor | None, group_size: int = 32) -> SparseInt4Linear:
    hessian = None if x is None else x.T @ x / len(x)
    found = weight_int4_sparse.round_what_is_there(weight, hessian, group_size)
    return SparseInt4Linear.from_quantised(*found, weight != 0, None, weight.dtype)


def half_zero(width: int = 64) -> torch.Tensor:
    weight = random(24, width)
    return weight.masked_fill(_sparsity.lowest(weight.abs(), 0.5), 0.0)


def test_rounding_keeps_zeros_and_is_near_elsewhere():
    weight = half_zero()
    module = rounded(weight, None)
    there = module.dequantised()
    assert (there[weight == 0] == 0).all()
    steps = module.scales.float().abs().repeat_interleave(32, dim=1)
    assert ((there - weight).abs() <= 1.7 * steps).all()  # the grid's last step may be cut off
    assert (there - weight).norm() < 0.1 * weight.norm()


def test_rounding_with_compensation_beats_nearest():
    weight, x = half_zero(), inputs(width=64)
    hessian = x.T @ x / len(x)
    errors = [_sparsity.change_of_outputs(weight, rounded(weight, seen).dequantised(), hessian) for seen in (x, None)]
    assert errors[0] < 0.9 * errors[1]


def test_four_bits_are_unpacked_into_the_kernel_s_kind():
    weight, x = half_zero(), random(3, 64, seed=4)
    module = rounded(weight, None)
    unpacked = module.unpacked()
    assert isinstance(unpacked, Int4Linear)
    assert torch.equal(unpacked.dequantised(), module.dequantised())
    torch.testing.assert_close(module(x), x @ module.dequantised().T, rtol=0.03, atol=0.1)


def test_a_group_without_weights_is_no_division_by_zero():
    weight = half_zero()
    weight[:, :32] = 0
    assert torch.isfinite(rounded(weight, inputs(width=64)).dequantised()).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("technique", "knobs"), [(store_sparse, {}), (weight_int4_sparse, {"group_size": 64})])
def test_the_artefact_is_as_small_as_claimed_and_gives_the_same(technique, knobs, architecture, tmp_path):
    session = session_of(tiny_folder(architecture))
    facts = facts_of(session.model)
    prune_sparsegpt.execute(session, **UNIFORM)
    if technique is store_sparse:
        pruned = logits(session.model)
    technique.execute(session, **knobs)
    now = logits(session.model)
    _torch_artefact.save(session.model, None, tmp_path)
    again = _torch_artefact.load(tmp_path, torch.device("cpu"))
    torch.testing.assert_close(logits(again), now, rtol=1e-4, atol=1e-4)
    if technique is store_sparse:
        torch.testing.assert_close(now, pruned, rtol=1e-4, atol=1e-4)
    assert not [m for m in again.modules() if isinstance(m, SparseLinear)]

    demand = prune_sparsegpt.rewrite(demand_of(facts, TOY_WORKLOAD, "transformers"), **UNIFORM)
    demand = technique.rewrite(demand, **knobs)
    rest = demand.embedding_bytes + demand.head_stored_bytes + demand.other_bytes
    on_disk = (tmp_path / "model.safetensors").stat().st_size
    assert on_disk == pytest.approx(demand.linear_bytes * demand.disk_share + rest, rel=0.03)  # 2 % and the header
    in_memory = sum(
        t.numel() * t.element_size() for t in {t.data_ptr(): t for t in again.state_dict().values()}.values()
    )
    assert in_memory == pytest.approx(demand.linear_bytes + rest, rel=0.02)


def test_few_zeros_are_not_worth_a_bit_for_each_weight():
    with pytest.raises(CandidateFailed, match="no matrix has more zeros"):
        store_sparse.execute(session_of(tiny_folder()))
    with pytest.raises(CandidateFailed, match="too few to leave out"):
        weight_int4_sparse.execute(session_of(tiny_folder()), group_size=64)


def test_experts_calibration_never_reached_are_stored_too():
    session = session_of(tiny_folder("mixtral"))
    prune_magnitude.execute(session, sparsity=0.5, pattern="unstructured")
    session.calibration = calibration(1, 2)  # two tokens choose at most four of the experts
    weight_int4_sparse.execute(session, group_size=64)
    kinds = {type(m) for n, m in session.model.named_modules() if "experts" in n and hasattr(m, "rows")}
    assert kinds == {SparseInt4Linear}


# ---------------------------------------------------------------- what is claimed


def test_zeros_alone_save_nothing_and_storage_saves_what_it_leaves_out():
    demand = demand_of(TOY_MODEL, TOY_WORKLOAD, "transformers")
    pruned = prune_sparsegpt.rewrite(demand, **UNIFORM)
    assert (pruned.linear_bytes, pruned.disk_share, pruned.zeros_share) == (demand.linear_bytes, 1.0, 0.5)
    stored = store_sparse.rewrite(pruned)
    assert stored.linear_bytes == demand.linear_bytes  # memory and time are those of the unpacked model
    assert stored.disk_share == pytest.approx(1 / 32 + 1 / 2)  # float32
    packed = weight_int4_sparse.rewrite(pruned, group_size=64)
    assert 8 * packed.linear_bytes / packed.linear_params == pytest.approx(4.5)
    assert 8 * packed.linear_bytes * packed.disk_share / packed.linear_params == pytest.approx(1 + 2 + 0.25)


def test_layerwise_is_expected_to_lose_less():
    demand = demand_of(TOY_MODEL, TOY_WORKLOAD, "transformers")
    ratios = [
        prune_sparsegpt.rewrite(demand, sparsity=0.7, pattern="unstructured", allocation=a).perplexity_ratio
        for a in ("layerwise", "uniform")
    ]
    assert ratios[0] < ratios[1]


@pytest.mark.parametrize(
    ("knobs", "why"),
    [
        ({"sparsity": 0.7, "pattern": "2:4", "allocation": "uniform"}, "2:4 means 50% of zeros, not 70%"),
        ({"sparsity": 0.5, "pattern": "2:4", "allocation": "layerwise"}, "nothing to allocate"),
        ({"sparsity": 0.7, "pattern": "unstructured", "allocation": "layerwise"}, None),
    ],
)
def test_knobs_that_do_not_go_together(knobs, why):
    found = prune_sparsegpt.legal(knobs, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE)
    assert found is None if why is None else why in found
