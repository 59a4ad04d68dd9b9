"""A machine described by hand: what is read, what is refused and where, what is said of what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.catalogue import find_machine, grid_carbon
from knowledge_base.errors import BadInput
from planner import machine_file
from planner._yaml import parse_yaml
from planner.cli import main
from planner.machine import find, from_file

ROOT = Path(__file__).resolve().parents[2]
GOOD = machine_file.EXAMPLE
DEVICE = "name: d, kind: gpu, memory_bytes: 8 GiB, memory_bytes_per_s: 500 GB/s, flop_per_s: {float16: 50 TFLOP/s}"


def written(tmp_path: Path, text: str, name: str = "box.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def device(**changes: str) -> str:
    """Return a file of one device with some of its keys changed, or left out where the change is nothing."""
    keys = {
        "name": "d", "kind": "gpu", "memory_bytes": "8 GiB", "memory_bytes_per_s": "500 GB/s", "flop_per_s": "{float16: 50 TFLOP/s}",
    } | changes  # fmt: skip
    return "devices:\n  - " + "\n    ".join(f"{key}: {value}" for key, value in keys.items() if value) + "\n"


def test_the_example_of_the_help_is_a_machine(tmp_path: Path) -> None:
    found = from_file(written(tmp_path, GOOD))
    assert found.name == "my-box" and len(found.devices) == 2 and found.devices[0] == found.devices[1]
    first = found.device
    assert first.memory_bytes == 24 * 2**30 == found.memory_limit_bytes
    assert first.memory_bytes_per_s == 1008e9 and first.flop_per_s["int8"] == 660e12
    assert (first.idle_w, first.busy_w, first.features) == (20, 450, {"cuda", "sm_89"})
    assert found.grid_gco2e_per_kwh == grid_carbon("france")[0]
    assert find(str(tmp_path / "box.yaml"), tmp_path) == found


def test_json_and_plain_numbers_mean_the_same(tmp_path: Path) -> None:
    one = from_file(written(tmp_path, device(busy_w="300 W", link_bytes_per_s="50 GB/s"), "a.yaml")).device
    same = {"name": "d", "kind": "gpu", "memory_bytes": 8 * 2**30, "memory_bytes_per_s": 5e11, "flop_per_s": {"float16": 5e13},
            "busy_w": 300, "link_bytes_per_s": 5e10, "source": one.source}  # fmt: skip
    text = json.dumps({"devices": [same]}, indent="\t")
    assert from_file(written(tmp_path, text, "b.json")).device == one


def test_a_known_device_with_some_figures_of_ones_own(tmp_path: Path) -> None:
    text = "devices:\n  - {like: rtx-4090, count: 3, busy_w: 350, flop_per_s: {int4: 1.3 PFLOP/s}}\nprice_usd_per_h: 1.10\nelectricity: $0.30/kWh\n"
    found = from_file(written(tmp_path, text))
    known = find_machine("rtx-4090").device
    assert found.name == "box" and len(found.devices) == 3
    assert found.device.busy_w == 350 and found.device.memory_bytes == known.memory_bytes
    assert found.device.flop_per_s == {**known.flop_per_s, "int4": 1.3e15}
    assert (found.price_usd_per_h, found.electricity_usd_per_kwh) == (1.1, 0.3)


def test_a_machine_that_was_bought_costs_its_price_over_the_hours_it_works(tmp_path: Path) -> None:
    found = from_file(written(tmp_path, device() + "bought: 8766\n"))
    assert found.price_usd_per_h == pytest.approx(0.25) and found.owned and not found.rented
    used = from_file(
        written(tmp_path, device() + "bought: {usd: 8766, years: 2, used_share: 0.5}\nprice_usd_per_h: 0.1\n")
    )
    assert used.price_usd_per_h == pytest.approx(1.1) and used.owned
    rented = from_file(written(tmp_path, device() + "price_usd_per_h: 1\n"))
    assert rented.rented and not from_file(written(tmp_path, device())).rented


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("bought: -1", "must be a number"),
        ("bought: {usd: 1, used_share: 0}", "used_share"),
        ("bought: {years: 3}", "missing key 'usd'"),
        ("bought: {usd: 3, price: 3}", "price"),
    ],
)
def test_what_owning_costs_is_checked(tmp_path: Path, line: str, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        from_file(written(tmp_path, device() + line + "\n"))


def test_a_known_device_takes_its_memory_from_the_name_or_the_key(tmp_path: Path) -> None:
    named = from_file(written(tmp_path, "devices:\n  - like: apple-m3-max:64GB\n"))
    keyed = from_file(written(tmp_path, "devices:\n  - {like: apple-m3-max, memory_bytes: 64 GiB}\n"))
    assert named.device == keyed.device and named.device.memory_bytes == 64 * 2**30


def test_a_processor_beside_an_accelerator(tmp_path: Path) -> None:
    text = f"devices:\n  - {{like: 'epyc-9554:256GB'}}\n  - {{{DEVICE}}}\nhost_memory_bytes: 256 GiB\n"
    found = from_file(written(tmp_path, text))
    assert [d.kind for d in found.devices] == ["cpu", "gpu"]
    assert found.device.name == "d" and found.memory_limit_bytes == 8 * 2**30 and found.host_memory_bytes == 256 * 2**30


def test_published_figures_of_a_processor_are_not_taken_for_measured_ones(tmp_path: Path) -> None:
    published, measured = (
        from_file(written(tmp_path, device(kind="cpu", figures=figures, cores="16"))).device.features
        for figures in ("published", "measured")
    )
    assert published == {"published"} and measured == frozenset()


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (device(memory_bytes_per_s="0 GB/s"), 5, "positive"),
        (device(memory_bytes_per_s="-1 GB/s"), 5, "positive"),
        (device(memory_bytes_per_s="0"), 5, "memory_bytes_per_s is 0 B/s"),
        (device(memory_bytes_per_s="1008"), 5, "a number without a unit is in B/s"),
        (device(memory_bytes_per_s=".inf"), 5, "from 100 MB/s to 100 TB/s"),
        (device(memory_bytes_per_s=".nan"), 5, "from 100 MB/s to 100 TB/s"),
        (device(memory_bytes_per_s="1e999"), 5, "from 100 MB/s to 100 TB/s"),
        (device(memory_bytes_per_s="500000 TB/s"), 5, "from 100 MB/s to 100 TB/s"),
        (device(memory_bytes_per_s="500 Gb/s"), 5, "bits"),
        (device(memory_bytes_per_s="500 GB"), 5, "per what"),
        (device(memory_bytes_per_s="fast"), 5, "bytes for each second"),
        (device(memory_bytes_per_s=""), 2, "missing key 'memory_bytes_per_s'"),
        (device(memory_bytes="24"), 4, "memory_bytes is 24 B"),
        (device(memory_bytes="24 GFLOP/s"), 4, "arithmetic rate"),
        (device(flop_per_s="{float16: 50 GFLOP/s, int8: 50 PFLOP/s}"), 2, "off by a factor"),
        (device(flop_per_s="{}"), 6, "name at least one rate"),
        (device(flop_per_s="{fp16: 50 TFLOP/s}"), 6, "known keys: float32, float16"),
        (device(flop_per_s="50 TFLOP/s"), 6, "must be a mapping"),
        (device(flop_per_s=""), 2, "missing key 'flop_per_s'"),
        (device(flops="{}"), 7, "unknown key 'flops' in devices.0; did you mean 'flop_per_s'"),
        (device(kind="tpu"), 3, "must be cpu or gpu"),
        (device(count="0"), 7, "at least 1"),
        (device(count="100000"), 7, "at most 4,096"),
        (device(idle_w="500", busy_w="300"), 2, "500 W when idle is more than 300 W when busy"),
        (device(features="[CUDA; rm -rf]"), 7, "a word such as"),
        (device() + "grid: atlantis\n", 7, "no row for region 'atlantis'"),
        (device() + "grid: 1e9\n", 7, "from 0 gCO2e/kWh to 5000 gCO2e/kWh"),
        (device() + "pue: 0.5\n", 7, "a number from 1 to 10"),
        (device() + "price: 3\n", 7, "unknown key 'price'; did you mean 'price_usd_per_h'"),
        (device() + "devices: []\n", 7, "'devices' already given on line 1"),
        ("devices: []\n", 1, "empty list"),
        ("devices:\n  - like: rtx-5099\n", 2, "unknown machine 'rtx-5099'"),
        ("devices:\n  - like: apple-m3-max\n", 2, "different memory sizes"),
        (f"devices:\n  - {{{DEVICE}}}\n  - {{{DEVICE}}}\n", 3, "given twice"),
        ("name: x\n", 1, "missing key 'devices' in the machine"),
        ("- 1\n", 1, "the machine must be"),
        ("name: !!python/object:os.system x\n", 1, "tags"),
        ("a: &a [*a]\n", 1, "anchor"),
    ],
)  # fmt: skip
def test_what_no_machine_can_be_is_refused_with_its_place(tmp_path: Path, text: str, line: int, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(BadInput) as caught:
        from_file(path)
    assert said in f"{caught.value.message} {caught.value.hint}"
    assert caught.value.where.startswith(f"{path}:{line}:"), caught.value.where


def test_files_that_are_none(tmp_path: Path) -> None:
    for name, text, said in (("a.yaml", None, "not found"), ("b.json", "{", "malformed"), ("c.yaml", "\0", "NUL")):
        path = tmp_path / name
        if text is not None:
            path.write_text(text)
        with pytest.raises(BadInput, match=said):
            from_file(path)
    with pytest.raises(BadInput, match="folder"):
        from_file(tmp_path)


@given(
    memory=st.floats(1e8, 1e15), bandwidth=st.floats(1e9, 1e14), intensity=st.floats(0.2, 1e4), watts=st.floats(1, 1e4)
)
def test_figures_come_back_as_written(memory: float, bandwidth: float, intensity: float, watts: float) -> None:
    data = {
        "devices": [{
            "name": "d", "kind": "gpu", "memory_bytes": memory, "memory_bytes_per_s": bandwidth,
            "flop_per_s": {"float16": bandwidth * intensity}, "busy_w": watts,
        }]
    }  # fmt: skip
    device = machine_file.machine_of(parse_yaml(json.dumps(data), "box.json", "machine")).device
    assert device.memory_bytes == round(memory) and device.memory_bytes_per_s == bandwidth
    assert device.flop_per_s == {"float16": bandwidth * intensity} and device.busy_w == watts


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    said = " ".join(machine_file.remarks(from_file(written(tmp_path, device()))))
    assert "no rate in float32, bfloat16, int8, fp8, int4: plans are predicted that compute in float16" in said
    assert "no busy_w: energy and carbon are not predicted" in said and "no features" in said


# ---------------------------------------------------------------- the commands


def test_validate_understands_a_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, device())
    assert main(["validate", "--json", str(path)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["machine"]["devices"][0]["memory_bytes_per_s"] == 5e11
    assert any("busy_w" in remark for remark in shown["remarks"])
    assert main(["validate", str(written(tmp_path, device(memory_bytes_per_s="0 GB/s")))]) == 2
    assert "box.yaml:5:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [{}, {"flop_per_s": "{int8: 100 TOPS}"}, {"kind": "cpu", "cores": "8", "flop_per_s": "{float32: 1 TFLOP/s}"}],
)
def test_estimate_on_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str]) -> None:
    path = written(tmp_path, device(**changes))
    argv = ["estimate", str(ROOT / "models/tiny-lm"), "--on", str(path), "--engine", "llama_cpp", "--json"]
    code = main(argv)
    out, err = capsys.readouterr()
    if "int8" in changes.get("flop_per_s", ""):
        assert code != 0 and "no known float16 rate" in err and "Traceback" not in err
    else:
        assert code == 0, err
        assert json.loads(out)


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "machine"]) == 0
    out = capsys.readouterr().out
    for key in (*machine_file.MACHINE.keys, *machine_file.DEVICE.keys):
        assert key.name in out
    assert max(map(len, out.splitlines())) <= 120
