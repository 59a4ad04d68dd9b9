"""The unchanged model's demand, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests_support import TOY_MODEL, TOY_WORKLOAD

from cost_models.demand import STEPS, Chains, apply_steps, demand_chain, demand_of, step_read_bytes
from cost_models.roofline import causal_pairs
from knowledge_base.errors import BadInput
from knowledge_base.types import Plan, Step


def test_dense_model_with_tied_head() -> None:
    demand = demand_of(TOY_MODEL, TOY_WORKLOAD, "transformers")
    assert demand.linear_bytes == 4 * 6_291_456
    assert demand.embedding_bytes == demand.head_read_bytes == 4 * 4096 * 256
    assert demand.head_stored_bytes == 0
    stored = demand.linear_bytes + demand.embedding_bytes + demand.head_stored_bytes + demand.other_bytes
    assert stored == TOY_MODEL.weight_bytes
    assert demand.linear_flop_per_token == 2 * 6_291_456
    assert demand.head_flop_per_token == 2 * 4096 * 256
    # 8 layers, 8 heads of 32: a dot product and a weighted sum, multiply and add counted as two
    assert demand.attention_flop_per_token_pair == 4 * 8 * 8 * 32
    # keys and values of 4 KV heads of 32 in 8 layers, float32
    assert demand.kv_bytes_per_token == 2 * 8 * 4 * 32 * 4


def test_untied_head_is_stored_and_read() -> None:
    model = replace(TOY_MODEL, tied_embeddings=False, weight_bytes=TOY_MODEL.weight_bytes + 4 * 4096 * 256)
    demand = demand_of(model, TOY_WORKLOAD, "transformers")
    assert demand.head_stored_bytes == demand.head_read_bytes == 4 * 4096 * 256


def test_grouped_heads_shrink_the_cache_and_not_the_arithmetic() -> None:
    few = demand_of(TOY_MODEL, TOY_WORKLOAD, "transformers")
    many = demand_of(replace(TOY_MODEL, kv_heads=8), TOY_WORKLOAD, "transformers")
    assert many.kv_bytes_per_token == 2 * few.kv_bytes_per_token
    assert many.attention_flop_per_token_pair == few.attention_flop_per_token_pair


def test_experts_not_chosen_cost_no_arithmetic_but_are_stored() -> None:
    model = replace(TOY_MODEL, experts=4, experts_active=1, params_active=TOY_MODEL.params_total - 3_000_000)
    demand = demand_of(model, TOY_WORKLOAD, "transformers")
    assert demand.linear_flop_per_token == 2 * (6_291_456 - 3_000_000)
    assert demand.linear_bytes == 4 * 6_291_456


def test_state_space_model_has_no_cache() -> None:
    model = replace(TOY_MODEL, attention_layers=0, heads=0, kv_heads=0, state_bytes=1000)
    demand = demand_of(model, TOY_WORKLOAD, "transformers")
    assert demand.kv_bytes_per_token == demand.attention_flop_per_token_pair == 0


@pytest.mark.parametrize(("dtype", "value_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_an_unchanged_cache_is_as_wide_as_the_weights(dtype: str, value_bytes: int) -> None:
    model = replace(TOY_MODEL, weight_dtype=dtype)
    for engine in ("transformers", "llama_cpp"):
        assert demand_of(model, TOY_WORKLOAD, engine).kv_bytes_per_token == value_bytes * model.kv_values_per_token


@pytest.mark.parametrize(("window", "pairs"), [(float("inf"), 5050), (100, 5050), (10, 955), (1, 100)])
def test_causal_pairs_by_counting(window: float, pairs: int) -> None:
    counted = sum(1 for query in range(100) for key in range(query + 1) if query - key < window)
    assert counted == pairs == causal_pairs(100, window)


def test_chain_shows_each_step() -> None:
    steps = (Step("drop_layers", {"count": 2, "by": "influence"}), Step("weight_dtype", {"dtype": "bfloat16"}))
    chain = demand_chain(Plan(model_digest="toy", engine="transformers", steps=steps), TOY_MODEL, TOY_WORKLOAD)
    assert [name for name, _ in chain] == [
        "unchanged",
        "drop_layers(by=influence, count=2)",
        "weight_dtype(dtype=bfloat16)",
    ]
    assert [d.linear_bytes for _, d in chain] == [25_165_824, 18_874_368, 9_437_184]


def test_memo_gives_what_the_rewrites_give() -> None:
    memo = Chains(TOY_MODEL, TOY_WORKLOAD)
    steps = (
        Step("drop_layers", {"count": 2, "by": "influence"}),
        Step("weight_dtype", {"dtype": "bfloat16"}),
        Step("batch_size", {"count": 4}),
    )
    for end in range(len(steps) + 1):
        for order in (steps[:end], steps[:end][::-1]):
            node = memo.node(Plan(model_digest="toy", engine="transformers", steps=order))
            assert node.demand == apply_steps(demand_of(TOY_MODEL, TOY_WORKLOAD, "transformers"), order)
            assert tuple(STEPS[number] for number, *_ in node.steps) == order
            assert sum(variance for _, variance, _ in node.steps) == pytest.approx(node.demand.perplexity_log_sd**2)
    again = memo.node(
        Plan(model_digest="toy", engine="transformers", steps=tuple(Step(s.technique, dict(s.knobs)) for s in steps))
    )
    assert again is memo.node(Plan(model_digest="toy", engine="transformers", steps=steps))


def test_what_eases_by_other_means_adds_and_in_any_order() -> None:
    scales, matrix, form = (
        Step("scale_awq", {"bits": 3}),
        Step("importance_matrix", {}),
        Step("weight_gguf", {"type": "q3_k"}),
    )
    scales_too = Step("rotate", {"ends": "folded"})
    unchanged = demand_of(TOY_MODEL, TOY_WORKLOAD, "llama_cpp")

    def loss(*steps: Step) -> float:
        return apply_steps(unchanged, (*steps, form)).perplexity_ratio - 1

    both = loss(scales, matrix)
    assert both == loss(matrix, scales)
    assert both < min(loss(scales), loss(matrix)) and max(loss(scales), loss(matrix)) < loss()
    assert loss(scales, scales_too) == min(loss(scales), loss(scales_too)), "both fold: the better one counts"


def test_unknown_technique_is_named() -> None:
    with pytest.raises(BadInput, match="unknown technique `drop_layer`"):
        apply_steps(demand_of(TOY_MODEL, TOY_WORKLOAD, "transformers"), [Step("drop_layer", {})])


def test_parts_add_up_to_the_file_for_every_architecture(tmp_path: Path) -> None:
    from planner.reading import read_model
    from planner.tiny_models import ARCHITECTURES, make_tiny_model

    for architecture in ARCHITECTURES:
        make_tiny_model(tmp_path / architecture, architecture=architecture)
        model = read_model(tmp_path / architecture).model
        demand = demand_of(model, TOY_WORKLOAD, "transformers")
        stored = demand.linear_bytes + demand.embedding_bytes + demand.head_stored_bytes + demand.other_bytes
        assert stored == model.weight_bytes, architecture
        assert 0 < demand.other_bytes < 0.05 * model.weight_bytes, architecture
        assert 0 < step_read_bytes(demand) <= demand.linear_bytes, architecture
        assert (step_read_bytes(demand) < demand.linear_bytes) == (model.experts > model.experts_active), architecture
