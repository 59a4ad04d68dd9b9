"""Quantities as people write them (`8 GiB`, `50 ms`, `$0.10/1M tokens`) to numbers in base units, and back.

One table says which units each dimension takes. Decimal and binary bytes are kept apart: 1 GB = 10^9 bytes,
1 GiB = 2^30 bytes. A unit is never guessed: a number without one is refused where the dimension has units.
Arithmetic is exact until the last step, so `0.5 s` and `500 ms` are the same float.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, Inexact, localcontext
from fractions import Fraction

from knowledge_base.errors import BadInput

LONGEST = 100  # characters of a quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """What a quantity measures, and the units it may be written in."""

    noun: str  # "a time"
    base: str  # unit of the parsed number: "s"
    units: Mapping[str, Fraction]  # spelling -> one of it in base units, small units first
    shown: tuple[str, ...]  # the units `format` chooses from, small first
    usual: tuple[str, ...]  # the units a number without one most likely meant
    examples: tuple[str, ...]
    zero: bool = False  # 0 means something: free electricity, no loss at all

    @property
    def listed(self) -> str:
        """The accepted units, for messages: `us, ms, s, min, h`; `mJ, J, kJ and /token, /1k tokens`."""
        names = [u for u in self.units if u not in _ALIASES]
        if len(names) > 10:
            above, below = (dict.fromkeys(u.split("/")[i] for u in names) for i in (0, 1))
            return f"{', '.join(above)} and {', '.join(f'/{b}' for b in below)}"
        return ", ".join(names) or "no unit"

    @property
    def wanted(self) -> str:
        """`a time, e.g. 50 ms, 0.2 s`."""
        return f"{self.noun}, e.g. {', '.join(self.examples)}"


def _per(above: Mapping[str, Fraction], below: Mapping[str, int]) -> dict[str, Fraction]:
    return {f"{a}/{b}": size / amount for b, amount in below.items() for a, size in above.items()}


_TIME = {
    "ns": Fraction(1, 10**9), "us": Fraction(1, 10**6), "µs": Fraction(1, 10**6), "μs": Fraction(1, 10**6),
    "ms": Fraction(1, 1000), "s": Fraction(1), "min": Fraction(60), "h": Fraction(3600), "d": Fraction(86400),
}  # fmt: skip
_BYTES = {
    "B": Fraction(1), "KiB": Fraction(2**10), "MiB": Fraction(2**20), "GiB": Fraction(2**30), "TiB": Fraction(2**40),
    "kB": Fraction(10**3), "KB": Fraction(10**3), "MB": Fraction(10**6), "GB": Fraction(10**9), "TB": Fraction(10**12),
}  # fmt: skip
_JOULES = {
    "mJ": Fraction(1, 1000),
    "J": Fraction(1),
    "kJ": Fraction(1000),
    "Wh": Fraction(3600),
    "kWh": Fraction(3600000),
}
_CARBON = {
    "ugCO2e": Fraction(1, 10**6), "mgCO2e": Fraction(1, 1000), "gCO2e": Fraction(1), "kgCO2e": Fraction(1000),
}  # fmt: skip
_USD = {"USD": Fraction(1)}  # `$5` is read as `5 USD`
_TOKENS = {"token": 1, "1k tokens": 1000, "1M tokens": 10**6}
_RATES = {"s": 1, "min": 60, "h": 3600}
_FLOP_PER_S = {
    "MFLOP/s": Fraction(10**6), "GFLOP/s": Fraction(10**9), "TFLOP/s": Fraction(10**12), "PFLOP/s": Fraction(10**15),
    "GFLOPS": Fraction(10**9), "TFLOPS": Fraction(10**12), "PFLOPS": Fraction(10**15), "TOPS": Fraction(10**12),
}  # fmt: skip
# Second spellings, and no unit at all.
_ALIASES = frozenset({"µs", "μs", "kB", "GFLOPS", "TFLOPS", "PFLOPS", "TOPS", ""})

DIMENSIONS: dict[str, Dimension] = {
    "time": Dimension(
        noun="a time", base="s", units=_TIME, shown=("us", "ms", "s", "min", "h"), usual=("ms", "s"),
        examples=("50 ms", "0.2 s")
    ),
    "bytes": Dimension(
        noun="bytes", base="B", units=_BYTES, shown=("B", "KiB", "MiB", "GiB", "TiB"), usual=("MiB", "GiB"),
        examples=("8 GiB", "600 MB")
    ),
    "rate": Dimension(
        noun="a token rate", base="tokens/s", units=_per({"tokens": Fraction(1)}, _RATES), shown=("tokens/s",),
        usual=("tokens/s",), examples=("20 tokens/s",),
    ),
    "energy": Dimension(
        noun="an energy for each token", base="J/token", units=_per(_JOULES, _TOKENS), shown=("mJ/token", "J/token"),
        usual=("J/token", "J/1k tokens"), examples=("0.3 J/token", "90 Wh/1M tokens"),
    ),
    "money": Dimension(
        noun="a price for tokens", base="USD/token", units=_per(_USD, _TOKENS), shown=("USD/1M tokens",),
        usual=("USD/1M tokens",), examples=("$0.10/1M tokens",),
    ),
    "carbon": Dimension(
        noun="carbon for each token", base="gCO2e/token", units=_per(_CARBON, _TOKENS),
        shown=("gCO2e/1M tokens", "kgCO2e/1M tokens", "gCO2e/token"), usual=("gCO2e/1M tokens",),
            examples=("50 gCO2e/1M tokens",),
    ),
    "ratio": Dimension(
        noun="a share", base="", units={"%": Fraction(1, 100), "": Fraction(1)}, shown=("%",), usual=("%",),
        examples=("2 %", "0.02"),
        zero=True,
    ),
    "number": Dimension(
        noun="a plain number", base="", units={"": Fraction(1)}, shown=("",), usual=("",), examples=("12.5",)
    ),
    "network": Dimension(
        noun="bytes for each start", base="B/start", units=_per(_BYTES, {"start": 1}),
        shown=("B/start", "KiB/start", "MiB/start", "GiB/start", "TiB/start"), usual=("MiB/start", "GiB/start"),
            examples=("1 GiB/start",),
    ),
    "requests": Dimension(
        noun="a request rate", base="requests/s", units=_per({"requests": Fraction(1)}, _RATES), shown=("requests/s",),
        usual=("requests/s",), examples=("2 requests/s",),
    ),
    "price_per_hour": Dimension(
        noun="a price for each hour", base="USD/h", units=_per(_USD, {"h": 1, "d": 24}), shown=("USD/h",),
        usual=("USD/h",), examples=("$0.35/h",), zero=True,
    ),
    "price_per_kwh": Dimension(
        noun="a price for electricity", base="USD/kWh", units=_per(_USD, {"kWh": 1, "MWh": 1000}), shown=("USD/kWh",),
        usual=("USD/kWh",), examples=("$0.12/kWh",), zero=True,
    ),
    "carbon_per_kwh": Dimension(
        noun="a carbon intensity", base="gCO2e/kWh", units=_per(_CARBON, {"kWh": 1}), shown=("gCO2e/kWh",),
        usual=("gCO2e/kWh",), examples=("380 gCO2e/kWh",), zero=True,
    ),
    "bandwidth": Dimension(
        noun="bytes for each second", base="B/s", units=_per(_BYTES, {"s": 1}), shown=("MB/s", "GB/s", "TB/s"),
        usual=("GB/s", "TB/s"), examples=("1008 GB/s", "3.35 TB/s"),
    ),
    "arithmetic": Dimension(
        noun="an arithmetic rate", base="FLOP/s", units={"FLOP/s": Fraction(1), **_FLOP_PER_S},
        shown=("GFLOP/s", "TFLOP/s", "PFLOP/s"), usual=("GFLOP/s", "TFLOP/s"), examples=("165 TFLOP/s", "661 TOPS"),
    ),
    "power": Dimension(
        noun="a power", base="W", units={"mW": Fraction(1, 1000), "W": Fraction(1), "kW": Fraction(1000)},
        shown=("mW", "W", "kW"), usual=("W",), examples=("450 W",), zero=True,
    ),
}  # fmt: skip

NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_NUMBER = re.compile(r"[+-]?" + NUMBER)
_NOT_FINITE = re.compile(r"[+-]?\.?(nan|inf|infinity)(?![a-z])", re.IGNORECASE)
_CLOCK = re.compile(r"[+-]?[0-9]+:[0-9]")
_MARKED = re.compile(r"[+-]?[0-9]+(?:[,_'][0-9]+)+(?:\.[0-9]+)?")
_BITS = re.compile(r"[kKmMgGtT]i?b(/.*)?$")


def parse(text: str, dimension: str, *, field: str) -> float:
    """Return a written quantity as a number in the dimension's base unit (s, B, tokens/s, J/token, USD/token, ...).

    Args:
        text: a number, an optional space, a unit; `$` may stand before the number instead of `USD` after it.
        dimension: a key of DIMENSIONS.
        field: what is being set, for messages.

    Raises:
        BadInput: no number, no unit, an unknown or ambiguous unit, one of another dimension, or a number that is not
            finite and positive (zero is fine where `Dimension.zero` says so).

    >>> parse("8 GiB", "bytes", field="memory"), parse("2 %", "ratio", field="loss")
    (8589934592.0, 0.02)
    """
    kind = DIMENSIONS[dimension]
    number, unit = _split(text, kind, field)
    if unit not in _spellings(kind):
        raise _unit_error(text, number, unit, dimension, field)
    size = float(number)
    if math.isfinite(size) and (size != 0 or kind.zero):
        size = _float(Fraction(number) * _spellings(kind)[unit]) if size else 0.0
    if not math.isfinite(size) or size < 0 or (size == 0 and not kind.zero):
        least = "finite and not negative" if kind.zero else "a finite positive number"
        raise BadInput(f"{field} must be {least}, got {quote(text)}", hint=f"expected {kind.wanted}")
    if dimension == "ratio" and unit == "" and size > 1:
        raise BadInput(
            f"unit missing for {field}: {number} %, or {number} times?",
            hint=f"write {number} % or {_plain(Fraction(number) * 100)} %",
        )
    return size


def _split(text: str, kind: Dimension, field: str) -> tuple[str, str]:
    """Return (number, normalised unit) of a quantity, or say what is wrong with its number."""
    body = text.strip()
    expected = f"expected {kind.wanted}; see: leanplan help units"
    if not body or len(body) > LONGEST:
        found = "nothing" if not body else f"{len(body)} characters"
        raise BadInput(f"{field} needs {kind.noun}, got {found}", hint=expected)
    if body[0] in "<>=≤≥":
        raise BadInput(f"{quote(text)}: limits are written with max and min", hint=f"max: {kind.examples[0]}")
    if body[0] in "€£¥":
        raise BadInput(f"{field}: prices are in US dollars, got {quote(text)}", hint=expected)
    sign, rest = (body[0], body[1:].lstrip()) if body[0] in "+-" else ("", body)
    dollars = rest.startswith("$")
    body = sign + (rest[1:].lstrip() if dollars else rest)
    if _NOT_FINITE.match(body):
        least = "finite and not negative" if kind.zero else "a finite positive number"
        raise BadInput(f"{field} must be {least}, got {quote(text)}", hint=expected)
    if _CLOCK.match(body):
        if kind is not DIMENSIONS["time"]:
            raise BadInput(f"{quote(text)} is not {kind.noun}", hint=expected)
        first, second = body.split(":")[:2]
        raise BadInput(
            f"{quote(text)} is not a duration: {first} min {second[:2]} s?",
            hint="write one number and one unit, e.g. 12.5 min",
        )
    if marked := _MARKED.match(body):
        raise _separator_error(text, marked[0], field)
    match = _NUMBER.match(body)
    if not match:
        raise BadInput(f"{field} needs {kind.noun}, got {quote(text)}", hint=expected)
    unit = _normal(body[match.end() :])
    return match[0], f"USD{unit}" if dollars else unit


def _separator_error(text: str, number: str, field: str) -> BadInput:
    joined = re.sub(r"[,_']", "", number)
    if number.count(",") == 1 and "_" not in number and "'" not in number and "." not in number:
        decimal = number.replace(",", ".")
        if not re.fullmatch(r"[+-]?[0-9]{1,3},[0-9]{3}", number):
            return BadInput(
                f"{quote(text)}: a decimal comma is not read; write {text.strip().replace(number, decimal)}",
                hint=f"numbers use a point, and no marks between thousands: {decimal}",
            )
        return BadInput(
            f"{quote(text)}: the comma could mean thousands or decimals; write {joined} or {decimal}",
            hint="numbers use a point, and no marks between thousands",
        )
    return BadInput(
        f"{quote(text)}: numbers have no marks between thousands; write {text.strip().replace(number, joined)}",
        hint=f"{field}: {joined}",
    )


def _unit_error(text: str, number: str, unit: str, dimension: str, field: str) -> BadInput:
    """Return the error that helps most with a unit the dimension does not take."""
    kind = DIMENSIONS[dimension]
    expected = f"expected {kind.wanted}; see: leanplan help units"
    if not unit:
        asked = " ".join(f"{_with_unit(number, u)}?" for u in kind.usual)
        return BadInput(f"unit missing for {field}: {asked}", hint=expected)
    if _BITS.match(unit):
        prefix = unit[0].upper()
        power = {"K": 1, "M": 2, "G": 3, "T": 4}[prefix]
        return BadInput(
            f"unit {quote(unit)} for {field}: bits? write {prefix}B (10^{3 * power} bytes) or {prefix}iB (2^{10 * power} bytes)",
            hint=expected,
        )
    if unit == "USD" or any(known.startswith(f"{unit}/") for known in _spellings(kind)):
        full = next((u for u in kind.shown if u.startswith(f"{unit}/")), kind.shown[-1])
        return BadInput(f"{quote(text)} does not say per what; write {_with_unit(number, full)}", hint=expected)
    for name, other in DIMENSIONS.items():
        if name != dimension and unit in _spellings(other):
            return BadInput(f"{quote(text)} is {other.noun}; {field} needs {kind.noun} ({kind.listed})", hint=expected)
    near = [u for u in kind.units if u.casefold() == unit.casefold() and u not in _ALIASES]
    near = near or difflib.get_close_matches(unit, [u for u in kind.units if u not in _ALIASES], n=1, cutoff=0.75)
    guess = f"; did you mean {' or '.join(near)}?" if near else ""
    return BadInput(f"unknown unit {quote(unit)} for {field} ({kind.noun}): use {kind.listed}{guess}", hint=expected)


def _normal(unit: str) -> str:
    """Return a unit with one spelling of spaces and singulars: `J / 1M tokens` -> `J/1M token`."""
    spaced = re.sub(r"\s*/\s*", "/", re.sub(r"\s+", " ", unit.strip()))
    return re.sub(r"\b(token|request)s\b", r"\1", spaced)


def _spellings(kind: Dimension) -> dict[str, Fraction]:
    return {_normal(unit): size for unit, size in kind.units.items()}


def _float(exact: Fraction) -> float:
    try:
        return float(exact)
    except OverflowError:
        return math.inf


def pattern(dimension: str) -> str:
    """Return the regular expression (ECMA 262, for JSON Schema) of the texts `parse` takes, sizes aside."""
    kind = DIMENSIONS[dimension]

    def unit(spelling: str) -> str:
        text = re.sub(r"\b(token|request)s?\b", r"\1s?", spelling)
        return text.replace("/", r"\s*/\s*").replace("1k ", r"1k\s+").replace("1M ", r"1M\s+")

    nonzero = "" if kind.zero else "(?=[0.]*[1-9])"
    number = r"\+?\s*" + nonzero + NUMBER
    names = [unit(u) for u in kind.units if u]
    plain = rf"{number}\s*(?:{'|'.join(names)}){'?' if '' in kind.units else ''}" if names else number
    dollars = [unit(u.removeprefix("USD")) for u in kind.units if u.startswith("USD")]
    either = rf"{plain}|\+?\s*\$\s*{nonzero}{NUMBER}(?:{'|'.join(dollars)})" if dollars else plain
    return rf"^\s*(?:{either})\s*$"


def format(value: float, dimension: str, *, digits: int = 3) -> str:
    """Return a value for people, in a unit of fitting size, rounded to `digits` significant digits.

    Whole numbers are never rounded away: 1234 tokens/s stays 1234. `parse` reads every text this returns of a
    positive value, and gives the value back to that rounding.

    >>> format(0.0501, "time"), format(2.36 * 2**30, "bytes"), format(1e-7, "money")
    ('50.1 ms', '2.36 GiB', '$0.1/1M tokens')
    """
    kind = DIMENSIONS[dimension]
    if not math.isfinite(value):
        return str(value)
    unit = kind.shown[0] if value or not kind.base else kind.base
    for candidate in kind.shown[1:]:
        if float(f"{abs(value) / float(kind.units[candidate]):.{digits}g}") >= 1:
            unit = candidate
    scaled = value / float(kind.units[unit])
    if not math.isfinite(scaled):
        return f"{value:.{digits}g} {kind.base}"
    return _with_unit(_rounded(scaled, digits), unit)


def exact(value: float, dimension: str) -> str:
    """Return a text that `parse` turns back into exactly `value`, in the most readable unit that can.

    >>> exact(0.05, "time"), exact(2e9, "bytes"), exact(1e-07, "money")
    ('50 ms', '2 GB', '$0.1/1M tokens')
    """
    kind = DIMENSIONS[dimension]
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"no text for {value}")
    written = Fraction(repr(float(value)))
    texts = {}
    for unit in dict.fromkeys((*reversed(kind.shown), *kind.units)):
        number = _plain(written / kind.units[unit])
        if number is None or unit in _ALIASES:
            continue
        if math.isfinite(float(number)) and (float(number) or not value):  # neither too large nor too small for a float
            texts[unit] = number
    if dimension == "ratio" and value <= 1:
        texts.setdefault("", repr(value))
    usual = format(value, dimension).lstrip("$")
    for unit, number in texts.items():
        if len(number) <= 5 and usual.startswith(number) and _with_unit(number, unit).lstrip("$") == usual:
            return _with_unit(number, unit)
    if not texts:
        return _with_unit(repr(value), kind.base)
    unit = min(texts, key=lambda u: len(texts[u]))
    return _with_unit(texts[unit], unit)


def _plain(number: Fraction) -> str | None:
    """Return a fraction as the exact decimal it is, or None where it has none of fewer than 60 digits."""
    with localcontext() as context:
        context.prec = 60
        context.Emax, context.Emin = 9999, -9999
        decimal = (Decimal(number.numerator) / Decimal(number.denominator)).normalize()
        if context.flags[Inexact]:
            return None
    text = f"{decimal:f}"
    return text if len(text) <= 20 else str(decimal)


def _with_unit(number: str, unit: str) -> str:
    if unit.startswith("USD"):
        sign, size = ("-", number[1:]) if number.startswith("-") else ("", number)
        return f"{sign}${size}{unit[3:]}"
    return f"{number} {unit}" if unit else number


def _rounded(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if not -5 <= size < 16:
        return f"{value:.{digits}g}"
    text = f"{value:.{max(0, digits - 1 - size)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def quote(text: str, longest: int = 60) -> str:
    """Return foreign text in quotes, safe to print: cut, and with unprintable characters escaped."""
    shown = text if len(text) <= longest else text[: longest - 3] + "..."
    return "'" + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown) + "'"
