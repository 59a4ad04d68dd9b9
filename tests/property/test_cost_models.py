"""Properties of the formulas and of the statistics, over drawn numbers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD

from cost_models.calibrate import conformal_quantile
from cost_models.case import CACHE_GAIN, _cached_share, case_of
from cost_models.demand import Node, chains, demand_of
from cost_models.efficiency import efficiency
from cost_models.error_report import spearman
from cost_models.predict import estimate_many
from cost_models.roofline import causal_pairs, memory_parts, power_w, rows_worth
from knowledge_base.types import Plan

PLAN = Plan(model_digest="toy", engine="transformers")
share = st.floats(0, 1)


@given(tokens=st.integers(1, 5000), window=st.integers(1, 5000))
def test_pairs_grow_with_window_up_to_full_attention(tokens: int, window: int) -> None:
    full = tokens * (tokens + 1) / 2
    assert tokens <= causal_pairs(tokens, window) <= causal_pairs(tokens, window + 1) <= full


@given(idle=st.floats(0.1, 100), more=st.floats(0, 1000), memory=share, compute=share, base=share)
def test_power_lies_between_idle_and_busy(idle: float, more: float, memory: float, compute: float, base: float) -> None:
    watts = power_w(idle, idle + more, memory, compute, base=base)
    assert idle <= watts <= (idle + more) * (1 + 1e-12)
    assert watts <= power_w(idle, idle + more, 1.0, 1.0, base=base) * (1 + 1e-12)


@settings(deadline=None, max_examples=40)
@given(prompt=st.integers(1, 100_000), output=st.integers(2, 10_000), batch=st.integers(1, 64))
def test_memory_grows_with_batch_and_context(prompt: int, output: int, batch: int) -> None:
    def peak(prompt: int, output: int, batch: int) -> float:
        workload = replace(TOY_WORKLOAD, prompt_tokens=prompt, output_tokens=output)
        node = Node(replace(demand_of(TOY_MODEL, workload, "transformers"), batch=batch))
        return float(sum(memory_parts(case_of([node], workload, TOY_MACHINE)).values())[0])

    here = peak(prompt, output, batch)
    assert here < peak(2 * prompt, output, batch)
    assert here < peak(prompt, 2 * output, batch)
    assert here < peak(prompt, output, batch + 1)


@settings(deadline=None, max_examples=40)
@given(prompt=st.integers(1, 50_000), output=st.integers(2, 5_000), bandwidth=st.floats(1e9, 1e13))
def test_latency_is_its_parts_and_throughput_its_inverse(prompt: int, output: int, bandwidth: float) -> None:
    machine = replace(TOY_MACHINE, devices=(replace(TOY_MACHINE.devices[0], memory_bytes_per_s=bandwidth),))
    workload = replace(TOY_WORKLOAD, prompt_tokens=prompt, output_tokens=output)
    figures = {name: v.mid[0] for name, v in estimate_many([PLAN], TOY_MODEL, workload, machine).items()}
    assert np.isclose(figures["latency_s"], figures["ttft_s"] + (output - 1) * figures["tpot_s"])
    assert np.isclose(figures["throughput_tokens_per_s"] * figures["latency_s"], output)
    # a decode step cannot be faster than reading the layers once
    assert figures["tpot_s"] >= 4 * TOY_MODEL.linear_params / bandwidth


@given(scores=st.lists(st.floats(0, 50), max_size=40))
def test_a_worse_fit_never_gives_narrower_intervals(scores: list[float]) -> None:
    assert conformal_quantile(scores) > 0
    assert conformal_quantile([2 * s for s in scores]) >= conformal_quantile(scores)


@given(values=st.lists(st.integers(-50, 50), min_size=3, max_size=30, unique=True))
def test_rank_correlation_sees_only_order(values: list[int]) -> None:
    a = np.array(values, dtype=float)
    assert np.isclose(spearman(a, np.exp(a / 10)), 1.0)
    assert np.isclose(spearman(a, -a), -1.0)


@given(st.floats(1e3, 1e12), st.floats(1e3, 1e12))
def test_a_cache_holds_most_of_the_smallest_models(first: float, second: float) -> None:
    machine = replace(TOY_MACHINE.device, cache_bytes=32 * 2**20)
    small, large = _cached_share(np.array(sorted((first, second))), machine)
    assert 0.0 <= large <= small <= 1.0
    assert not np.any(_cached_share(np.array([1e3, 1e12]), TOY_MACHINE.device))


@given(share=st.floats(0, 1), first=st.floats(0.01, 3), second=st.floats(0.01, 3))
def test_a_cache_only_helps_and_what_is_unpacked_longest_least(share: float, first: float, second: float) -> None:
    rates = case_of([chains(TOY_MODEL, TOY_WORKLOAD).node(PLAN)], TOY_WORKLOAD, TOY_MACHINE).rates
    slow, fast = sorted((first, second))
    streamed = rates.bytes_per_s * np.array([slow, fast])
    reached = replace(rates, streamed_bytes_per_s=streamed, cached_share=share).weights_bytes_per_s
    assert np.all(reached >= np.minimum(streamed, CACHE_GAIN * rates.bytes_per_s) * (1 - 1e-12))
    assert np.all(reached <= CACHE_GAIN * rates.bytes_per_s * (1 + 1e-12))
    if fast <= 1:  # beyond, both may be read as fast as the cache
        assert reached[0] / streamed[0] <= reached[1] / streamed[1] * (1 + 1e-12)


@given(ratio=st.floats(0.01, 0.99), first=st.floats(1e8, 1e12), second=st.floats(1e8, 1e12), cores=st.integers(1, 64))
def test_faster_memory_or_more_cores_read_no_slower(ratio: float, first: float, second: float, cores: int) -> None:
    shares = replace(
        efficiency("llama_cpp", "q4_k", False, "cpu", frozenset()), read_ratio=ratio, core_bytes_per_s=15e9
    )
    slow, fast = sorted((first, second))
    assert slow * shares.read_share(slow, cores) <= fast * shares.read_share(fast, cores) * (1 + 1e-12)
    assert shares.read_share(fast, cores) <= shares.read_share(fast, 2 * cores) <= 1
    assert np.isclose(shares.read_share(15e9 * cores, cores), ratio)


@given(rows=st.floats(1, 5000), more=st.floats(0, 5000), share=st.floats(0.05, 1.0), routed=st.floats(0.01, 1.0))
def test_few_rows_cost_no_less_than_they_are_and_more_of_them_no_less(
    rows: float, more: float, share: float, routed: float
) -> None:
    case = SimpleNamespace(rates=SimpleNamespace(few_rows_share=share))
    fewer, further = (float(rows_worth(case, n, routed=routed)) for n in (rows, rows + more))
    assert rows * (1 - 1e-12) <= fewer <= further * (1 + 1e-12)
    assert float(rows_worth(case, 1.0, routed=routed)) == 1.0
    assert np.isclose(float(rows_worth(SimpleNamespace(rates=SimpleNamespace(few_rows_share=1.0)), rows)), rows)
