"""Properties of the formulas of Table 1, over drawn contexts and widths; the exact row against our own cost model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests_support import TOY_MODEL, TOY_WORKLOAD

from cost_models.attention import CHUNK, EXACT, SAMPLED_COLUMNS, Growth, formula, growth, prefill_flop_ratio, scale
from cost_models.demand import demand_of
from cost_models.roofline import causal_pairs
from knowledge_base.errors import BadInput
from knowledge_base.field import OURS, load

TABLE = load((OURS,)).attention
contexts = st.integers(2, 1_000_000)
widths = st.sampled_from((16, 64, 128, 1024))

# The table once more, as Python: what the parser makes of the file must be this.
EXPECTED: dict[str, Callable[[int, int, int, int], tuple[float, float]]] = {
    "standard_attention": lambda T, d, m, c: (T * T * d, T * T + T * d),
    "reformer": lambda T, d, m, c: (T * d * math.log2(T), T * math.log2(T) + T * d),
    "linear_transformer": lambda T, d, m, c: (T * d * d, T * d + d * d),
    "efficient_attention": lambda T, d, m, c: (T * T * d, T * d + d * d),
    "attention_free": lambda T, d, m, c: (T * d, T * d),
    "memory_efficient_attention": lambda T, d, m, c: (T * T * d, d * math.log2(T)),
    "sampled_attention": lambda T, d, m, c: (m * T * d, m * T),
    "gated_moving_average": lambda T, d, m, c: (c * T * d, c * T * d),
    "windowed_linear_attention": lambda T, d, m, c: (T * d * d, T * d * d),
    "recurrent_architecture": lambda T, d, m, c: (T * d, d),
}


def test_every_row_has_its_formula_here() -> None:
    assert TABLE.keys() == EXPECTED.keys()


@given(tokens=contexts, d=widths)
def test_rows_are_their_formulas(tokens: int, d: int) -> None:
    for name, row in TABLE.items():
        time, memory = EXPECTED[name](tokens, d, min(SAMPLED_COLUMNS, tokens), min(CHUNK, tokens))
        assert growth(row, tokens=tokens, d=d) == Growth(pytest.approx(time), pytest.approx(memory)), name


@given(tokens=contexts, d=widths)
def test_cost_grows_with_the_context_but_for_a_fixed_state(tokens: int, d: int) -> None:
    for name, row in TABLE.items():
        here, there = growth(row, tokens=tokens, d=d), growth(row, tokens=tokens + 1, d=d)
        assert here.time < there.time, name
        assert (here.memory == there.memory) if name == "recurrent_architecture" else (here.memory < there.memory), name


@given(tokens=contexts, d=widths)
def test_the_exact_row_is_the_measure_of_all(tokens: int, d: int) -> None:
    assert scale(EXACT, tokens=tokens, d=d) == Growth(1.0, 1.0)
    assert scale("attention_free", tokens=tokens, d=d).time == pytest.approx(1 / tokens)
    assert scale("efficient_attention", tokens=tokens, d=d).time == 1.0  # it saves memory only
    assert (scale("linear_transformer", tokens=tokens, d=d).time < 1) == (tokens > d)


@given(tokens=st.integers(2, 100_000))
def test_linear_attention_pays_for_long_prompts_only(tokens: int) -> None:
    ratio = prefill_flop_ratio(TOY_MODEL, "linear_transformer", tokens)
    assert ratio > prefill_flop_ratio(TOY_MODEL, "linear_transformer", 2 * tokens)
    assert (ratio < 1) == (tokens > TOY_MODEL.head_size)
    assert prefill_flop_ratio(TOY_MODEL, EXACT, tokens) == pytest.approx(1.0)


@given(tokens=st.integers(10_000, 1_000_000))
def test_our_cost_of_attention_grows_as_the_exact_row(tokens: int) -> None:
    row = TABLE[EXACT]
    workload = replace(TOY_WORKLOAD, prompt_tokens=tokens)
    demand = demand_of(TOY_MODEL, workload, "transformers")
    wide = demand_of(replace(TOY_MODEL, head_size=2 * TOY_MODEL.head_size), workload, "transformers")

    ours = causal_pairs(2 * tokens, math.inf) / causal_pairs(tokens, math.inf)
    theirs = growth(row, tokens=2 * tokens, d=64).time / growth(row, tokens=tokens, d=64).time
    assert ours == pytest.approx(theirs, rel=1e-3)
    per_width = wide.attention_flop_per_token_pair / demand.attention_flop_per_token_pair
    assert per_width == growth(row, tokens=tokens, d=128).time / growth(row, tokens=tokens, d=64).time
    # Our engines never store the table of scores: what is left of its memory is the cache, T x d.
    without_table = growth(row, tokens=tokens, d=128).memory - tokens**2
    assert wide.kv_bytes_per_token / demand.kv_bytes_per_token == without_table / (tokens * 64)


def test_a_window_already_there_leaves_less_to_save() -> None:
    windowed = replace(TOY_MODEL, sliding_window_tokens=1024)
    assert prefill_flop_ratio(windowed, "reformer", 50_000) > prefill_flop_ratio(TOY_MODEL, "reformer", 50_000)


@pytest.mark.parametrize(
    "text",
    ("", "T*", "x", "T - d", "T/d", "T^-1", "T^9", "T^d", "__import__('os')", "log(T, d)", "True", "'T'", "T if d else m",
     "(" * 300 + "T" + ")" * 300, "log.x(T)", "[T]", "T\nd"),
)  # fmt: skip
def test_nothing_else_is_a_formula(text: str) -> None:
    with pytest.raises(BadInput, match="cannot read the formula"):
        formula(text)


@pytest.mark.parametrize("text", ("((T^4)^4)^4", "log(0*T)", "T*" + "9" * 400))
def test_a_formula_without_a_value_names_its_row(text: str) -> None:
    row = replace(TABLE[EXACT], time=text, where="mine/attention.csv:3")
    with pytest.raises(BadInput, match="have no value") as caught:
        growth(row, tokens=10**6, d=64)
    assert caught.value.where == "mine/attention.csv:3"


def test_what_the_table_lacks_is_named() -> None:
    with pytest.raises(BadInput, match="no formula for 'flash_attention'"):
        scale("flash_attention", tokens=10, d=10)
