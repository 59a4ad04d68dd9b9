"""Every table of machines, prices and what engines reach can be changed from a person's own folder, and only sanely."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cost_models.catalogue import electricity_price, find_machine, grid_carbon
from cost_models.efficiency import efficiency, overhead
from knowledge_base.errors import BadInput
from knowledge_base.field import overlay
from knowledge_base.field.overlay import DATA, TABLES, table
from knowledge_base.field.records import REPLACES

ENGINES = {"composition_rules.csv", "engine_laws.csv"}  # rules are laid over elsewhere; the laws of engines are fitted
NONE: frozenset[str] = frozenset()


@pytest.fixture
def lay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, list[dict[str, str]]], Path]]:
    """Return a function that puts a table of rows into a folder and lays it over ours."""

    def write(name: str, rows: list[dict[str, str]]) -> Path:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        (tmp_path / name).write_text(text.getvalue(), encoding="utf-8")
        monkeypatch.setenv(overlay.VARIABLE, str(tmp_path))
        overlay._folders.cache_clear()
        return tmp_path / name

    yield write
    monkeypatch.undo()
    overlay._folders.cache_clear()


def test_no_table_of_ours_is_out_of_reach() -> None:
    assert {path.name for path in DATA.glob("*.csv")} == set(TABLES) | ENGINES


@pytest.mark.parametrize("name", TABLES)
def test_every_row_can_be_replaced_and_a_new_one_added(name: str, lay: Callable[..., Path]) -> None:
    ours = table(name)
    keys = list(ours[0])[: TABLES[name]]
    assert len({tuple(row[key] for key in keys) for row in ours}) == len(ours), "the key columns name a row"
    lay(
        name,
        [{**row, "source": "mine", REPLACES: "yes"} for row in ours] + [{**ours[-1], keys[0]: "new", REPLACES: ""}],
    )
    theirs = table(name)
    assert len(theirs) == len(ours) + 1
    assert {row["source"] for row in theirs[: len(ours)]} == {"mine"}


@pytest.mark.parametrize("name", TABLES)
def test_a_row_of_ours_is_not_replaced_unasked(name: str, lay: Callable[..., Path]) -> None:
    lay(name, [table(name)[0]])
    with pytest.raises(BadInput, match="is there twice"):
        table(name)


@pytest.mark.parametrize(
    ("name", "column", "value", "said"),
    [
        ("devices.csv", "memory_bytes_per_s", "0", "`memory_bytes_per_s` is 0"),
        ("devices.csv", "memory_bytes_per_s", "-1e12", "`memory_bytes_per_s` is -1e"),
        ("devices.csv", "memory_bytes_per_s", "fast", "must be a number"),
        ("devices.csv", "float16_flop_per_s", "nan", "must be a number"),
        ("devices.csv", "tdp_w", "-5", "`tdp_w` is -5"),
        ("devices.csv", "price_usd_per_h", "-0.1", "`price_usd_per_h` is -0.1"),
        ("electricity_prices.csv", "usd_per_kwh", "-0.2", "`usd_per_kwh` is -0.2"),
        ("grid_carbon.csv", "gco2e_per_kwh", "-3", "`gco2e_per_kwh` is -3"),
        ("efficiencies.csv", "read_ratio", "0", "`read_ratio` is 0"),
        ("efficiencies.csv", "log_sd", "-0.1", "`log_sd` is -0.1"),
        ("engine_overheads.csv", "runtime_bytes", "-1", "`runtime_bytes` is -1"),
        ("engine_overheads.csv", "kernel_s", "-1e-6", "`kernel_s` is -1e-06"),
    ],
)
def test_figures_that_cannot_be_are_refused_with_their_line(
    name: str, column: str, value: str, said: str, lay: Callable[..., Path]
) -> None:
    path = lay(name, [{**table(name)[1], column: value, REPLACES: "yes"}])
    with pytest.raises(BadInput) as caught:
        table(name)
    assert said in caught.value.message and caught.value.where == f"{path}:2"


def test_what_was_laid_over_is_what_predictions_use(lay: Callable[..., Path]) -> None:
    row = next(
        r
        for r in table("efficiencies.csv")
        if (r["engine"], r["device"], r["weight_format"]) == ("llama_cpp", "gpu", "q4_k")
    )
    before = efficiency("llama_cpp", "q4_k", False, "gpu", NONE).read_ratio
    lay("efficiencies.csv", [{**row, "read_ratio": "0.123", REPLACES: "yes"}])
    assert efficiency("llama_cpp", "q4_k", False, "gpu", NONE).read_ratio == 0.123 != before
    cost = next(r for r in table("engine_overheads.csv") if (r["engine"], r["device"]) == ("transformers", "gpu"))
    lay("engine_overheads.csv", [{**cost, "device": "rocm", "runtime_bytes": "5e8"}])
    assert overhead("transformers", "gpu", frozenset({"rocm"})).runtime_bytes == 5e8
    assert overhead("transformers", "gpu", NONE).runtime_bytes == float(cost["runtime_bytes"])
    lay(
        "devices.csv", [{**table("devices.csv")[0], "name": "my-box", "memory_bytes": "8e9", "link_bytes_per_s": "1e9"}]
    )
    assert find_machine("2x my-box").devices[1].link_bytes_per_s == 1e9
    lay("grid_carbon.csv", [{"region": "my-roof", "gco2e_per_kwh": "0", "year": "2026", "source": "my panels"}])
    assert grid_carbon("my-roof") == (0, "my panels, 2026")
    lay("electricity_prices.csv", [{"region": "my-roof", "usd_per_kwh": "0", "period": "2026", "source": "my meter"}])
    assert electricity_price("my-roof") == (0, "my meter, 2026")


def test_a_kind_of_device_that_does_not_exist_is_refused(lay: Callable[..., Path]) -> None:
    lay("devices.csv", [{**table("devices.csv")[0], "name": "my-box", "kind": "tpu"}])
    with pytest.raises(BadInput, match="`my-box` is of kind 'tpu'"):
        find_machine("my-box")
