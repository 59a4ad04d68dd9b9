"""Quantities as people write them: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import pytest

from knowledge_base import units
from knowledge_base.errors import BadInput, ExitCode
from knowledge_base.metrics import METRICS


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("8 GiB", "bytes", 8 * 2**30), ("8GB", "bytes", 8e9), ("1 kB", "bytes", 1000), ("1 KB", "bytes", 1000),
        ("50 ms", "time", 0.05), ("0.2 s", "time", 0.2), ("30 min", "time", 1800), ("1.5 h", "time", 5400),
            ("7us", "time", 7e-6),
        (" 20 tokens/s ", "rate", 20), ("20 token / s", "rate", 20), ("120 tokens/min", "rate", 2),
        ("0.3 J/token", "energy", 0.3), ("90 Wh/1M tokens", "energy", 0.324), ("300 mJ/token", "energy", 0.3),
        ("$0.10/1M tokens", "money", 1e-7), ("0.10 USD/1M tokens", "money", 1e-7), ("$ 1 / 1k tokens", "money", 1e-3),
        ("2 %", "ratio", 0.02), ("2%", "ratio", 0.02), ("0.02", "ratio", 0.02), ("0 %", "ratio", 0),
            ("150 %", "ratio", 1.5),
        ("12.5", "number", 12.5), ("1e3", "number", 1000), ("012", "number", 12), (".5", "number", 0.5),
            ("+5", "number", 5),
        ("1 GiB/start", "network", 2**30), ("50 gCO2e/1M tokens", "carbon", 5e-5), ("2 requests/s", "requests", 2),
        ("$0.35/h", "price_per_hour", 0.35), ("$0/h", "price_per_hour", 0), ("$24/d", "price_per_hour", 1),
        ("$0.12/kWh", "price_per_kwh", 0.12), ("$120/MWh", "price_per_kwh", 0.12),
            ("380 gCO2e/kWh", "carbon_per_kwh", 380),
    ],
)  # fmt: skip
def test_reads(text: str, dimension: str, value: float) -> None:
    assert units.parse(text, dimension, field="x") == value


def test_same_quantity_same_float() -> None:
    assert units.parse("500 ms", "time", field="x") == units.parse("0.5 s", "time", field="x")
    assert units.parse("0.3 s", "time", field="x") == units.parse("300 ms", "time", field="x") == 0.3


@pytest.mark.parametrize(
    ("text", "dimension", "says"),
    [
        ("50 lightyears", "time", "unknown unit 'lightyears' for ttft (a time): use ns, us, ms, s, min, h, d"),
        ("50 ms", "bytes", "'50 ms' is a time; ttft needs bytes (B, KiB, MiB, GiB, TiB, KB, MB, GB, TB)"),
        ("1 GiB", "time", "'1 GiB' is bytes; ttft needs a time"),
        ("50 %", "time", "'50 %' is a share; ttft needs a time"),
        ("50", "time", "unit missing for ttft: 50 ms? 50 s?"),
        ("2", "ratio", "unit missing for ttft: 2 %, or 2 times?"),
        ("2 Gb", "bytes", "bits? write GB (10^9 bytes) or GiB (2^30 bytes)"),
        ("2 gb", "bytes", "bits? write GB (10^9 bytes) or GiB (2^30 bytes)"),
        ("2 Kib", "bytes", "bits? write KB (10^3 bytes) or KiB (2^10 bytes)"),
        ("50 Ms", "time", "did you mean ms?"),
        ("50 m s", "time", "unknown unit 'm s'"),
        ("0.3 J", "energy", "'0.3 J' does not say per what; write 0.3 J/token"),
        ("$5", "money", "'$5' does not say per what; write $5/1M tokens"),
        ("€5/h", "price_per_hour", "prices are in US dollars"),
        ("nan", "time", "must be a finite positive number, got 'nan'"),
        (".inf", "time", "must be a finite positive number, got '.inf'"),
        ("-inf ms", "time", "must be a finite positive number"),
        ("-5 ms", "time", "must be a finite positive number, got '-5 ms'"),
        ("0 ms", "time", "must be a finite positive number, got '0 ms'"),
        ("1e400 ms", "time", "must be a finite positive number, got '1e400 ms'"),
        ("1e308 d", "time", "must be a finite positive number"),
        ("1e-400 ms", "time", "must be a finite positive number"),
        ("-1 %", "ratio", "must be finite and not negative, got '-1 %'"),
        ("1,5 ms", "time", "write 1.5 ms"),
        ("1_000 ms", "time", "write 1000 ms"),
        ("1,000 MiB", "bytes", "write 1000 or 1.000"),
        ("1,000,000 B", "bytes", "write 1000000 B"),
        ("12:30", "time", "'12:30' is not a duration: 12 min 30 s?"),
        (">= 5 ms", "time", "limits are written with max and min"),
        ("no", "time", "ttft needs a time, got 'no'"),
        ("", "time", "ttft needs a time, got nothing"),
        ("٣ ms", "time", "ttft needs a time"),
        ("5 ms", "number", "'5 ms' is a time; ttft needs a plain number"),
        ("9" * 200, "time", "200 characters"),
    ],
)  # fmt: skip
def test_refuses(text: str, dimension: str, says: str) -> None:
    with pytest.raises(BadInput) as caught:
        units.parse(text, dimension, field="ttft")
    assert says in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == ExitCode.BAD_INPUT


def test_foreign_text_is_escaped() -> None:
    with pytest.raises(BadInput) as caught:
        units.parse("\x1b[2J\u202e", "time", field="x")
    assert caught.value.message.isprintable()


def test_every_metric_has_units() -> None:
    assert {m.dimension for m in METRICS.values()} <= set(units.DIMENSIONS)


def test_formats_for_people() -> None:
    assert units.format(0.0501, "time") == "50.1 ms"
    assert units.format(0.9999996, "time") == "1 s"
    assert units.format(90, "time") == "1.5 min"
    assert units.format(2.36 * 2**30, "bytes") == "2.36 GiB"
    assert units.format(1234.4, "rate") == "1234 tokens/s"
    assert units.format(-0.0131, "ratio") == "-1.31 %"
    assert units.format(0, "bytes") == "0 B"
    assert units.format(1e-7, "money") == "$0.1/1M tokens"
    assert units.format(-1e-7, "money") == "-$0.1/1M tokens"
    assert units.format(float("nan"), "time") == "nan"
