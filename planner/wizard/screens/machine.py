"""Screen 3: which machine, and what running it costs."""

from __future__ import annotations

import re
from pathlib import Path

from knowledge_base import units
from knowledge_base.errors import BadInput
from planner import spec as specs
from planner.forecast import Forecast
from planner.machine_file import SUFFIXES
from planner.wizard.answers import Answers
from planner.wizard.screens._screen import Grid, Screen, Tell, View
from planner.wizard.screens._typed import changed, is_file, path_of, setting_rows

KEYS = {"price": "prices.machine", "electricity": "prices.electricity", "carbon": "prices.carbon"}
EXAMPLES = ("h100-sxm", "l4", "rtx-4090")


def _grid(view: View) -> Grid:
    hardware = view.answers.parsed.hardware
    rows = [
        ("local", "this machine: plans are measured"),
        ("probe", "measure this machine now: half a minute, once"),
        ("NAME", f"a machine of the catalogue, e.g. {', '.join(EXAMPLES)}"),
        ("FILE", "a machine described in YAML or JSON, or what `leanplan probe --json` wrote there"),
    ]
    if hardware != "local":
        rows.append((hardware, "a machine's file" if hardware.endswith(SUFFIXES) else "a machine of the catalogue"))
    chosen = 0 if hardware == "local" else len(rows) - 1
    prices = [(word, value if given else default) for word, value, default, given in _prices(view)]
    return Grid(rows=[*rows, *prices], chosen=frozenset({chosen}))


def _prices(view: View) -> list[tuple[str, str, str, bool]]:
    """Return (word, value, the default with its source, whether the person gave the value)."""
    from cost_models.catalogue import electricity_price, find_machine, grid_carbon

    hardware = view.answers.parsed.hardware
    (electricity, its_source), (carbon, carbon_source) = electricity_price(), grid_carbon()
    listed = None if hardware == "local" or hardware.endswith(SUFFIXES) else find_machine(hardware).price_usd_per_h
    defaults = {
        "price": "none: only electricity is counted" if listed is None else f"${listed:g}/h, of the catalogue",
        "electricity": f"{units.format(electricity, 'price_per_kwh')}, {_short(its_source)}",
        "carbon": f"{units.format(carbon, 'carbon_per_kwh')}, world average: {_short(carbon_source)}",
    }
    given = specs.as_mapping(view.answers.parsed).get("prices", {})
    return [
        (word, value, defaults[word], KEYS[word].partition(".")[2] in given)
        for word, value, _ in setting_rows(view, KEYS)
    ]


def _short(source: str) -> str:
    """Return a source with addresses cut to the host: that and the year are enough beside a figure."""
    return re.sub(r"https?://(?:www\.)?([^/ ,]+)[^ ,]*", r"\1", source).replace(" for businesses", "")


def _change(view: View, text: str) -> Answers:
    word, _, rest = text.partition(" ")
    if word in KEYS:
        return changed(view, text, KEYS)
    name = rest.strip() if word == "machine" and rest else text
    if name.endswith(SUFFIXES):
        name = str(path_of(name))
        if not is_file(Path(name)):
            raise BadInput(
                f"no file {units.quote(name)}",
                hint="make one there: leanplan probe --json > machine.json; or write one: leanplan help machine",
            )
    elif name != "local":
        from cost_models.catalogue import find_machine

        find_machine(name)
    return view.answers.with_key("hardware", name)


def _probe(forecast: Forecast, tell: Tell) -> str:
    """Measure this machine, so that everything after is priced with its own rates."""
    found = forecast.probe(tell)
    return "\n".join(["this machine is measured; its profile is kept", *found.problems])


def _remarks(view: View) -> list[str]:
    if view.outlook is None:
        return []
    hardware = view.outlook.hardware
    device, glanced = hardware.device, view.outlook.machine_notes  # which say where the rates come from
    cores = f", {device.cores} cores" if device.cores else ""
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in device.flop_per_s.items())
    lines = [
        f"{device.name}{cores}, {units.format(view.outlook.memory_bytes, 'bytes')} of memory read at "
        f"{device.memory_bytes_per_s / 1e9:,.0f} GB/s{'' if glanced else f' ({_short(device.source)})'}",
        f"Gflop/s: {rates}",
        f"energy counters: {', '.join(hardware.energy_counters) or 'none, so energy is modelled'}",
    ]
    if view.outlook.spec.hardware != "local":
        lines.append("not this machine: plans are predicted, none is measured")
    return [*lines, *(note.replace("leanplan probe", "`probe`") for note in glanced)]


SCREEN = Screen(
    name="machine",
    title="Which machine will it run on?",
    why="Memory, bandwidth and arithmetic decide what is fast there.",
    ask="`local`, `probe`, a name such as h100-sxm, a profile, or e.g. `price $0.35/h`",
    grid=_grid,
    change=_change,
    remarks=_remarks,
    words=("local", "probe", *KEYS),
    deeds={"probe": _probe},
    more="On this machine plans are measured; on any other they are predicted. `probe` measures memory, disk and matrix "
    "products of this machine, so that predictions rest on more than a glance; a run does it anyway. Prices turn time "
    "and energy into money and carbon: with a price per hour that is what counts, without one the electricity; e.g. "
    "`electricity $0.30/kWh`, `carbon 50 g/kWh`, `price none`.",
)
