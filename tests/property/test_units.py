"""Laws of units: what is written is read back, for people to their rounding, for machines exactly."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knowledge_base import units
from knowledge_base.errors import BadInput

DIMENSIONS = st.sampled_from(sorted(units.DIMENSIONS))
SIZES = st.floats(min_value=1e-12, max_value=1e15, allow_nan=False)


@given(DIMENSIONS, SIZES)
def test_format_is_read_back_to_its_rounding(dimension: str, value: float) -> None:
    text = units.format(value, dimension, digits=4)
    assert units.parse(text, dimension, field="x") == pytest.approx(value, rel=5.1e-4)


@given(DIMENSIONS, st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False))
@settings(max_examples=300)
def test_exact_is_read_back_exactly(dimension: str, value: float) -> None:
    text = units.exact(value, dimension)
    if dimension == "ratio" and value > 1e300:
        return  # as a percentage this is beyond the largest float
    assert units.parse(text, dimension, field="x") == value


@given(DIMENSIONS, st.decimals(min_value="0.0001", max_value="9999", places=4).filter(lambda d: d > 0), st.data())
def test_every_unit_scales(dimension: str, number: object, data: st.DataObject) -> None:
    kind = units.DIMENSIONS[dimension]
    unit = data.draw(st.sampled_from(sorted(kind.units)))
    if dimension == "ratio" and not unit:
        return
    expected = float(number) * float(kind.units[unit])  # type: ignore[arg-type]
    assert units.parse(f"{number} {unit}", dimension, field="x") == pytest.approx(expected, rel=1e-12)


_PIECES = [
    "1",
    "5",
    "0",
    ".",
    ",",
    " ",
    "e",
    "-",
    "+",
    "$",
    "%",
    "/",
    "ms",
    "s",
    "GiB",
    "Gb",
    "tokens",
    "token",
    "USD",
    "1M",
    ":",
    "nan",
    "_",
    "J",
    "h",
]


@given(st.one_of(st.text(max_size=120), st.lists(st.sampled_from(_PIECES), max_size=8).map("".join)), DIMENSIONS)
@settings(max_examples=500)
def test_any_text_is_read_or_refused(text: str, dimension: str) -> None:
    matches = (
        re.search(units.pattern(dimension), text) is not None
        and not text.endswith("\n")
        and len(text.strip()) <= units.LONGEST
    )
    try:
        value = units.parse(text, dimension, field="x")
    except BadInput as error:
        assert error.message.isprintable() and error.hint
        # The schema's pattern cannot see sizes (1e400, 5 without %); everything else it refuses or takes alike.
        assert (
            not matches
            or "finite" in error.message
            or "not negative" in error.message
            or "unit missing" in error.message
        )
    else:
        assert 0 <= value < float("inf")
        assert matches, f"parse reads {text!r} as {value}, the schema's pattern does not"
