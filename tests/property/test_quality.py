"""Properties of predicted losses of quality: what is stronger never loses less, intervals hold their guess."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knowledge_base import quality
from knowledge_base.quality import GGUF_BITS, Loss, compose, expected_loss

FITS = quality._fits()
FAMILIES = st.sampled_from(["", "no-such-family", *FITS["families"]])
SIZES = st.floats(1e6, 1e12)
BITS = st.floats(1, 8)
SHARES = st.floats(0.01, 0.99)


def methods_of(group: str) -> st.SearchStrategy[str]:
    return st.sampled_from([m for m, groups in FITS["methods"].items() if group in groups and m != "gguf"])


def setting(group: str) -> st.SearchStrategy[tuple[str, dict]]:
    """Any method of a group with any strength it can have."""
    knobs = {
        "weights": st.fixed_dictionaries({"bits": BITS}, optional={"group_size": st.sampled_from([32, 64, 128, 1024])}),
        "activations": st.fixed_dictionaries(
            {"bits": BITS, "activation_bits": BITS}, optional={"kv_bits": st.sampled_from([4, 8])}
        ),
        "zeros": st.fixed_dictionaries({"sparsity": SHARES}),
        "removal": st.fixed_dictionaries({"sparsity": SHARES}),
    }[group]
    return st.tuples(methods_of(group), knobs)


SETTINGS = st.one_of(*(setting(group) for group in quality.GROUPS))


def told(method: str, knobs: dict, params: float, family: str) -> Loss:
    loss = expected_loss(method, knobs, params, family)
    assert loss is not None
    return loss


@given(what=SETTINGS, params=SIZES, family=FAMILIES)
def test_the_interval_holds_its_guess_and_nothing_is_gained(what: tuple, params: float, family: str) -> None:
    loss = told(*what, params, family)
    assert loss.low <= loss.mid <= loss.high
    assert loss.low < loss.high
    assert loss.mid >= 0
    assert loss.sd > 0
    assert loss.n_rows >= loss.n_models >= 1


@given(what=setting("weights"), fewer=BITS, params=SIZES, family=FAMILIES)
def test_fewer_bits_never_lose_less(what: tuple, fewer: float, params: float, family: str) -> None:
    method, knobs = what
    low, high = sorted((knobs["bits"], fewer))
    assert (
        told(method, knobs | {"bits": low}, params, family).mid
        >= told(method, knobs | {"bits": high}, params, family).mid
    )


@given(
    what=setting("activations"),
    fewer=BITS,
    knob=st.sampled_from(["bits", "activation_bits"]),
    params=SIZES,
    family=FAMILIES,
)
def test_fewer_bits_of_activations_never_lose_less(
    what: tuple, fewer: float, knob: str, params: float, family: str
) -> None:
    method, knobs = what
    low, high = sorted((knobs[knob], fewer))
    assert (
        told(method, knobs | {knob: low}, params, family).mid >= told(method, knobs | {knob: high}, params, family).mid
    )


@given(what=setting("activations"), params=SIZES, family=FAMILIES)
def test_a_narrower_cache_never_loses_less(what: tuple, params: float, family: str) -> None:
    method, knobs = what
    mids = [told(method, knobs | {"kv_bits": bits}, params, family).mid for bits in (16, 8, 4, 2)]
    assert mids == sorted(mids)


@given(method=methods_of("weights"), bits=BITS, params=SIZES, family=FAMILIES)
def test_larger_groups_never_lose_less(method: str, bits: float, params: float, family: str) -> None:
    mids = [told(method, {"bits": bits, "group_size": size}, params, family).mid for size in (32, 64, 128, 1024)]
    assert mids == sorted(mids)


@pytest.mark.parametrize("kind", ["k", "iq", "plain"])
@given(params=SIZES, family=FAMILIES)
def test_types_of_one_kind_lose_by_their_bits(kind: str, params: float, family: str) -> None:
    def kind_of(type: str) -> str:
        return "iq" if type.startswith("iq") else "k" if "_k" in type else "plain"

    types = sorted((t for t in GGUF_BITS if kind_of(t) == kind), key=lambda t: -GGUF_BITS[t])
    mids = [told("gguf", {"type": type}, params, family).mid for type in types]
    assert mids == sorted(mids)


@given(what=st.one_of(setting("zeros"), setting("removal")), share=SHARES, params=SIZES, family=FAMILIES)
def test_more_removed_never_loses_less(what: tuple, share: float, params: float, family: str) -> None:
    method, knobs = what
    less, more = sorted((knobs["sparsity"], share))
    assert told(method, {"sparsity": more}, params, family).mid >= told(method, {"sparsity": less}, params, family).mid


@given(what=SETTINGS, params=SIZES, times=st.floats(1, 1000), family=FAMILIES)
def test_a_larger_model_never_loses_more(what: tuple, params: float, times: float, family: str) -> None:
    assert told(*what, params * times, family).mid <= told(*what, params, family).mid


@given(whats=st.lists(SETTINGS, min_size=1, max_size=4), params=SIZES, family=FAMILIES)
def test_a_composition_never_loses_less_than_its_worst_step(whats: list, params: float, family: str) -> None:
    parts = [told(*what, params, family) for what in whats]
    both = compose(parts)
    assert both.mid >= max(part.mid for part in parts)
    assert both.low <= both.mid <= both.high
    assert both.high - both.mid >= max(part.high - part.mid for part in parts) * (1 - 1e-12)
    assert math.isclose(compose(parts[::-1]).mid, both.mid, rel_tol=1e-12, abs_tol=1e-15)
