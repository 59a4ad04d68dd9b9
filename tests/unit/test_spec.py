"""The spec: ways in that give one spec, defaults, budgets, the echo, the schema, the commands."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knowledge_base import units
from knowledge_base.errors import BadInput
from knowledge_base.metrics import METRICS
from knowledge_base.registry import engines, techniques
from knowledge_base.types import Budget, Workload
from planner import _yaml, spec
from planner._kinds import UNSET, Choice, Entry, FilePath, Key, ListOf, Number, Quantity, Section, Text, Whole
from planner._owning import Bought
from planner.cli import main
from planner.data import bundled

ROOT = Path(__file__).resolve().parents[2]
FULL = """\
version: 1
name: full.spec-1
goal: serve
model: {source: models/tiny, revision: 0123456789abcdef0123456789abcdef01234567}
hardware: local
workload: {prompt_tokens: {p50: 512, p95: 2048}, output_tokens: 128, concurrency: 4, arrival_rate: 2 requests/s}
budgets:
  ttft_p95: {max: 200 ms}
  tpot: 50 ms
  latency_mean: {max: 0.8x baseline}
  throughput: {min: 30 tokens/s, max: 900 tokens/s}
  peak_memory: {max: 2 GiB}
  artefact_size: {max: 600 MB, level: warn}
  energy: {max: 0.3 J/token, level: warn, source: any}
  carbon: {max: 50 gCO2e/1M tokens, level: off}
  cost: {max: $0.10/1M tokens, at: $0.35/h}
  network: {max: 1 GiB/start}
  agreement: 95 %
  quality_loss: {metric: perplexity, max: 2 %, data: data/heldout.txt}
objectives: [tpot, peak_memory, quality_loss]
calibration: {data: data/calib.txt, samples: 128}
engines: [llama_cpp]
techniques: {only: [weight_int8, weight_gguf], without: [torch_compile]}
search: {effort: quick, time_limit: 30 min, max_measured: 12, seed: 7, solver: optuna_tpe}
limits: {memory: 8 GiB, time_per_candidate: 10 min, disk: 20 GiB}
check: {regression: 3 %, runs: 11, against: locks/leanplan.lock}
prices: {electricity: $0.12/kWh, carbon: 380 gCO2e/kWh, pue: 1.2}
"""
MAPPING: dict[str, Any] = {
    "version": 1, "name": "full.spec-1", "goal": "serve",
    "model": {"source": "models/tiny", "revision": "0123456789abcdef0123456789abcdef01234567"}, "hardware": "local",
    "workload": {"prompt_tokens": {"p50": 512, "p95": 2048}, "output_tokens": 128, "concurrency": 4,
    "arrival_rate": "2 requests/s"},
    "budgets": {
        "ttft_p95": {"max": "200 ms"}, "tpot": "50 ms", "latency_mean": {"max": "0.8x baseline"},
        "throughput": {"min": "30 tokens/s", "max": "900 tokens/s"}, "peak_memory": {"max": "2 GiB"},
        "artefact_size": {"max": "600 MB", "level": "warn"},
        "energy": {"max": "0.3 J/token", "level": "warn", "source": "any"},
        "carbon": {"max": "50 gCO2e/1M tokens", "level": "off"}, "cost": {"max": "$0.10/1M tokens", "at": "$0.35/h"},
        "network": {"max": "1 GiB/start"}, "agreement": 0.95,
        "quality_loss": {"metric": "perplexity", "max": "2 %", "data": "data/heldout.txt"},
    },
    "objectives": ["tpot", "peak_memory", "quality_loss"],
    "calibration": {"data": Path("data/calib.txt"), "samples": 128},
    "engines": ("llama_cpp",), "techniques": {"only": ["weight_int8", "weight_gguf"], "without": ["torch_compile"]},
    "search": {"effort": "quick", "time_limit": "1800 s", "max_measured": 12, "seed": 7, "solver": "optuna_tpe"},
    "limits": {"memory": "8 GiB", "time_per_candidate": "600 s", "disk": "20 GiB"},
    "check": {"regression": 0.03, "runs": 11, "against": "locks/leanplan.lock"},
    "prices": {"electricity": "$0.12/kWh", "carbon": "380 gCO2e/kWh", "pue": 1.2},
}  # fmt: skip


def toml(data: dict[str, Any]) -> str:
    """Return a mapping as TOML: values in order, inline tables within."""

    def value(item: Any) -> str:
        if isinstance(item, dict):
            return "{" + ", ".join(f"{k} = {value(v)}" for k, v in item.items()) + "}"
        if isinstance(item, list | tuple):
            return f"[{', '.join(value(v) for v in item)}]"
        return json.dumps(str(item) if isinstance(item, Path) else item)

    return "".join(f"{key} = {value(item)}\n" for key, item in data.items())


def read(text: str, folder: Path = Path("/specs")) -> spec.Spec:
    return spec.spec_of(_yaml.parse_yaml(text, "leanplan.yaml"), folder)


# ---------------------------------------------------------------- ways in


def test_every_way_in_gives_the_same_spec(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(FULL)
    (tmp_path / "crlf.yaml").write_bytes(b"\xef\xbb\xbf" + FULL.replace("\n", "\r\n").encode())
    (tmp_path / "a.toml").write_text(toml(MAPPING))
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\n' + "[tool.leanplan]\n" + toml(MAPPING))
    api = spec.from_mapping(MAPPING, tmp_path)
    for name in ("a.yaml", "crlf.yaml", "a.toml", "pyproject.toml"):
        assert spec.load(tmp_path / name) == api, name
    assert spec.load(tmp_path / "a.yaml").budgets[0].text == "200 ms"


def test_stdin_is_told_from_the_current_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    read_in = spec.load("-", stdin=io.BytesIO(FULL.encode()))
    assert read_in == spec.from_mapping(MAPPING)
    assert read_in.quality.data == tmp_path / "data/heldout.txt"


def test_a_whole_spec() -> None:
    s = read(FULL)
    by = {(b.label, b.bound): b for b in s.budgets}
    assert by["ttft_p95", "max"].value == 0.2 and by["ttft_p95", "max"].line == 8
    assert by["tpot_p50", "max"].text == "50 ms"
    assert by["latency_mean", "max"].relative and by["latency_mean", "max"].value == 0.8
    assert (by["throughput_p50", "min"].value, by["throughput_p50", "max"].value) == (30, 900)
    assert by["agreement", "min"].value == 0.95  # alone, a value limits the bad side
    assert by["carbon", "max"].level == "off"
    assert by["energy", "max"].source == "any"
    assert s.prices.usd_per_h == 0.35  # given beside the cost budget
    assert s.quality.data == Path("/specs/data/heldout.txt")
    assert s.objectives == ("tpot_p50", "peak_memory", "quality_loss")
    assert s.workload == Workload(
        prompt_tokens=512, prompt_tokens_p95=2048, output_tokens=128, concurrency=4, requests_per_s=2
    )
    assert s.limits.memory_bytes == 8 * 2**30 and isinstance(s.limits.memory_bytes, int)
    assert s.check.against == Path("locks/leanplan.lock")


def test_a_model_and_one_budget_are_enough() -> None:
    s = read("model: models/tiny\nbudgets: {peak_memory: 2 GiB}")
    assert s.objectives == spec.DEFAULT_OBJECTIVES
    assert s.quality.data is None and s.calibration is None and s.engines is None and s.hardware == "local"
    assert (s.search.effort, s.search.time_limit_s, s.search.max_measured) == ("normal", 1800.0, 16)
    assert (
        read("model: models/tiny\nbudgets: {peak_memory: 2 GiB}\nsearch: {effort: quick}").search.time_limit_s == 360.0
    )


def test_empty_sections_are_their_defaults() -> None:
    assert read("model: m\nbudgets: {ttft: 1 s}\nsearch:\nlimits: {}\nquality: {data: }\ncalibration:\n") == read(
        "model: m\nbudgets: {ttft: 1 s}"
    )


def test_values_are_read_as_written() -> None:
    s = read(
        "model: 'no'\nbudgets: {ttft: {max: 012 ms, level: off}}\nobjectives: [ttft]\nworkload: {prompt_tokens: 1e3}"
    )
    assert s.model.source == "no"
    assert s.budgets[0].value == 0.012 and s.budgets[0].level == "off"
    assert s.workload.prompt_tokens == 1000


def test_budgets_compare_by_meaning_not_by_text() -> None:
    assert (
        read("model: m\n\n\nbudgets: {ttft: 500 ms}").budgets == read("model: m\nbudgets: {ttft: {max: 0.5 s}}").budgets
    )


# ---------------------------------------------------------------- the echo


def test_the_echo_of_a_whole_spec_is_the_same_spec() -> None:
    s = read(FULL)
    assert read(spec.as_yaml(s)) == s
    assert spec.from_mapping(spec.as_mapping(s), s.folder) == s


METRIC = st.sampled_from(sorted(METRICS.values(), key=lambda m: m.name))
SIZE = st.floats(min_value=1e-9, max_value=1e12)
TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=30).filter(
    lambda t: t.strip() == t and not t.startswith("-")
)


@st.composite
def budgets(draw: st.DrawFn) -> tuple[Budget, ...]:
    made = {}
    for metric in draw(st.lists(METRIC, min_size=1, max_size=5)):
        statistic = draw(st.sampled_from(("p50", "p95", "mean"))) if metric.sampled else "mean"
        relative = draw(st.booleans()) and metric.label not in ("quality_loss", "agreement", "kl_divergence")
        budget = Budget(
            metric=metric.name, statistic=statistic, bound=draw(st.sampled_from(("max", "min"))), value=draw(SIZE),
            relative=relative,
            level=draw(st.sampled_from(("error", "warn"))), source=draw(st.sampled_from(("measured", "any"))),
        )  # fmt: skip
        made[metric.name, statistic] = budget
    return tuple(made.values())


@st.composite
def specs(draw: st.DrawFn) -> spec.Spec:
    optional = lambda kind: st.none() | kind  # noqa: E731
    p50 = draw(st.integers(1, 10**6))
    text = TEXT.filter(lambda t: t not in (".", ".."))
    folder = Path("/specs")
    return spec.Spec(
        name=draw(optional(st.from_regex(r"\A[a-z0-9_]{1,5}([.-][a-z]{5,9})?\Z"))),
        model=spec.ModelRef(source=draw(TEXT.filter(lambda t: "://" not in t)),
            revision=draw(optional(st.from_regex(r"\A[0-9a-f]{40}\Z")))),
        hardware=draw(TEXT),
        workload=Workload(
            prompt_tokens=p50, prompt_tokens_p95=draw(optional(st.integers(p50, 2 * 10**6))),
            output_tokens=draw(st.integers(1, 10**6)),
            concurrency=draw(st.integers(1, 4096)), requests_per_s=draw(optional(SIZE)),
        ),
        budgets=draw(budgets()),
        objectives=tuple(draw(st.lists(st.sampled_from(("ttft_p95", "tpot_p50", "peak_memory", "cost")), min_size=1,
            max_size=3, unique=True))),
        quality=spec.TextData(data=draw(optional(text.map(lambda t: folder / t)))),
        calibration=draw(optional(st.builds(spec.TextData, data=text.map(lambda t: folder / t),
            samples=optional(st.integers(1, 10**5))))),
        engines=draw(optional(st.just(("llama_cpp",)))),
        techniques=spec.TechniqueFilter(without=tuple(draw(st.lists(st.sampled_from(techniques.names()), max_size=3,
            unique=True)))),
        search=spec.SearchEffort(
            effort=draw(st.sampled_from(("quick", "normal", "thorough"))), time_limit_s=draw(optional(SIZE)),
                seed=draw(st.integers(0, 2**31 - 1))
        ),
        limits=spec.Limits(memory_bytes=draw(optional(st.integers(1, 2**50))), time_per_candidate_s=draw(SIZE)),
        check=spec.Check(regression_ratio=draw(st.floats(0, 2)), runs=draw(st.integers(1, 10_000))),
        prices=spec.Prices(
            usd_per_h=draw(optional(st.floats(0, 1e3))), pue=draw(optional(st.floats(1, 10))),
            bought=draw(optional(st.builds(Bought, usd=st.floats(0, 1e6), years=st.floats(1, 9), used_share=st.floats(0.1, 1)))),
        ),
        folder=folder,
    )  # fmt: skip


@given(specs())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_echo_of_any_spec_is_the_same_spec(s: spec.Spec) -> None:
    assert read(spec.as_yaml(s)) == s


# ---------------------------------------------------------------- schema and parser agree

GOOD: dict[str, Any] = {"model": "m", "objectives": ["ttft"]}
JUNK: tuple[Any, ...] = (
    {}, [], {"zzz": 1}, [[]], "", "nonsense!\x01", -1, 0, 1.5, True, "50 lightyears", "5 ms", "2 GiB", "0.5x baseline",
    "50 %", 3,
)  # fmt: skip


def keys(section: Section, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Section, Key]]:
    for key in section.keys:
        yield (*above, key.name), section, key
        if isinstance(key.kind, Section):
            yield from keys(key.kind, (*above, key.name))


def with_value(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Return the smallest good spec with one key set."""
    data = json.loads(json.dumps(GOOD))
    at = data
    for step in path[:-1]:
        at[step] = {"source": "m"} if step == "model" else {"data": "c.txt"} if step == "calibration" else {}
        at = at[step]
    at[path[-1]] = value
    return data


def good_values(section: Section, key: Key) -> list[Any]:
    kind = key.kind
    default = section.default(key)
    values = [] if default in (UNSET, None, ()) or isinstance(kind, Section) else [kind.write(default)]
    if isinstance(kind, Quantity):
        values += list(units.DIMENSIONS[kind.dimension].examples)
    elif isinstance(kind, Choice):
        values += list(kind.options)
    elif isinstance(kind, Entry):
        values += list(kind.names())
    elif isinstance(kind, ListOf) and isinstance(kind.kind, Entry):
        values += [[kind.kind.names()[0]]]
    elif isinstance(kind, Whole | Number):
        values += [kind.least, kind.most]
    elif isinstance(kind, FilePath):
        values += ["a.txt", "b/c.txt"]
    elif isinstance(kind, Text) and key.example:
        values += [key.example]
    elif isinstance(kind, Section) and kind.shorthand:
        values += ["some/where"]
    return values


LIMITS = [
    (("budgets", name), value)
    for name, (metric, _) in spec.labels().items()
    for value in (
        spec.example_limit(metric),
        {"max": spec.example_limit(metric), "level": "warn"},
        {"max": "5"},
        {"level": "warn"},
        {},
        "9 zz",
    )
]
CASES = [
    *((path, value) for path, section, key in keys(spec.SPEC) for value in good_values(section, key)),
    *((path, value) for path, _, _ in keys(spec.SPEC) for value in JUNK),
    *((path, None) for path, _, _ in keys(spec.SPEC)),
    *(((*path[:-1], path[-1] + "x"), 1) for path, _, _ in keys(spec.SPEC)),
    *LIMITS,
]
VALIDATOR = jsonschema.Draft202012Validator(spec.schema())
# What no schema sees: an empty budget map is fine beside objectives; a path that leaves; sizes; clashes of two keys.
ONLY_THE_PARSER = (
    "leaves the spec's folder",
    "is not below",
    "nothing to decide",
    "finite",
    "not a model folder",
    "unit missing",
)


def test_schema_and_parser_agree_on_every_key() -> None:
    assert len(CASES) > 700
    taken = 0
    for path, value in CASES:
        data = with_value(path, value)
        by_schema = VALIDATOR.is_valid(data)
        try:
            spec.from_mapping(data)
        except BadInput as error:
            assert not by_schema or any(t in error.message for t in ONLY_THE_PARSER), (
                f"only the parser refuses {path} = {value!r}: {error.message}"
            )
        else:
            taken += 1
            assert by_schema, f"only the schema refuses {path} = {value!r}"
    assert taken > 200


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(spec.schema())
    assert VALIDATOR.is_valid(spec.as_mapping(read(FULL)))
    for name in ("engines", "techniques"):
        assert json.dumps(list({"engines": engines, "techniques": techniques}[name].names())) in json.dumps(
            spec.schema()[("properties")][name]
        )


# ---------------------------------------------------------------- fuzz: nothing but BadInput

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 10**30), st.floats(), st.text(max_size=8),
    st.sampled_from(["50 ms", "2 GiB", "0.8x baseline", "2 %", "serve", "off", "1,5 ms", "m", "ttft_p95"]),
)  # fmt: skip
NAMES = st.one_of(
    st.sampled_from(
        sorted({step for path, _, _ in keys(spec.SPEC) for step in path} | {"ttft_p95", "max", "min", "level", "at"})
    ),
    st.text(max_size=4),
)
TREES = st.recursive(
    LEAVES, lambda t: st.one_of(st.lists(t, max_size=3), st.dictionaries(NAMES, t, max_size=5)), max_leaves=20
)


@given(st.dictionaries(NAMES, TREES, max_size=8))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_mapping_is_read_or_refused(data: dict[str, Any]) -> None:
    try:
        s = spec.from_mapping({**GOOD, **data}, "/specs")
    except BadInput as error:
        assert error.message and error.hint and error.where
    else:
        assert spec.from_mapping(spec.as_mapping(s), "/specs") == s


@given(
    st.one_of(st.binary(max_size=80), st.text(max_size=80).map(lambda t: t.encode("utf-8", "surrogatepass"))),
    st.sampled_from(("yaml", "toml")),
)
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_or_refused(data: bytes, form: str) -> None:
    try:
        text = _yaml.decode(data, "x")
        spec.spec_of(_yaml.parse_toml(text, "x") if form == "toml" else _yaml.parse_yaml(text, "x"), Path("/specs"))
    except BadInput as error:
        assert error.message and error.hint and error.where


@given(
    st.integers(0, len(FULL) - 1),
    st.integers(0, 12),
    st.sampled_from(["", "[", "{", "}", ":", " ", "\n", "&a ", "*a", "!!x ", "'", '"', "\t", "- ", "#", ",", "%", "|"]),
)
@settings(max_examples=200, deadline=None)
def test_a_damaged_spec_is_read_or_refused(start: int, length: int, put: str) -> None:
    try:
        read(FULL[:start] + put + FULL[start + length :])
    except BadInput as error:
        assert error.hint and error.where and error.where.startswith("leanplan.yaml")


# ---------------------------------------------------------------- commands


def test_init_writes_a_spec_that_validates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new"
    (folder / "models/a b").mkdir(parents=True)
    (folder / "models/a b/config.json").write_text("{}")
    (folder / ".gitignore").write_text("*.pyc")
    assert main(["init", str(folder), "--ci", "github"]) == 0
    assert main(["validate", str(folder / "leanplan.yaml")]) == 0
    assert "source: models/a b" in capsys.readouterr().out
    assert (folder / ".gitignore").read_text() == "*.pyc\n.leanplan/\nruns/\n"
    assert json.loads((folder / ".leanplan/spec.schema.json").read_text()) == spec.schema()
    workflow = _yaml.parse_yaml((folder / ".github/workflows/leanplan.yml").read_text(), "leanplan.yml")
    assert "pull_request_target" not in (folder / ".github/workflows/leanplan.yml").read_text()
    assert workflow.content["jobs"].content["check"].type == "mapping"


def test_every_commented_key_of_the_template_is_right() -> None:
    text = spec.template("models/x")
    lines = [line.removeprefix("# ") for line in text.splitlines()[2:]]
    data = _yaml.parse_yaml("\n".join(lines), "template")
    assert set(data.content) == {key.name for key in spec.SPEC.keys}
    assert {*data.content["budgets"].content} == {f"{m.label}_p50" if m.sampled else m.label for m in METRICS.values()}
    for path, _, _ in keys(spec.SPEC):
        node = data
        for step in path:
            node = node.content[step]
        assert node.type != "null", path
    whole = spec.spec_of(data, Path("/specs"))
    assert whole.calibration and whole.calibration.samples == 64
    assert read(text).budgets == read("model: m\nbudgets: {quality_loss: 5 %}").budgets


def test_init_never_overwrites_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "leanplan.yaml").write_text("mine")
    assert main(["init", str(tmp_path)]) == 2
    assert (tmp_path / "leanplan.yaml").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [tmp_path / "leanplan.yaml"]
    assert "--force" in capsys.readouterr().err
    assert main(["init", str(tmp_path), "--force", "--model", "org/name"]) == 0
    assert main(["init", str(tmp_path), "--force"]) == 0
    assert (tmp_path / ".gitignore").read_text().count("runs/") == 1


def test_init_refuses_a_bad_model_before_writing(tmp_path: Path) -> None:
    assert main(["init", str(tmp_path / "x"), "--model", "http://example.org/m"]) == 2
    assert not (tmp_path / "x").exists()
    assert main(["init", str(ROOT / "pyproject.toml")]) == 2


def test_validate_prints_what_loads_to_the_same_spec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "examples/tiny-lm.yaml"
    assert main(["validate", str(path)]) == 0
    echoed = capsys.readouterr().out
    (tmp_path / "echo.yaml").write_text(echoed)
    assert spec.spec_of(spec.read(tmp_path / "echo.yaml"), path.parent) == spec.load(path)
    assert main(["validate", str(path), "--json"]) == 0
    assert spec.from_mapping(json.loads(capsys.readouterr().out)["spec"], path.parent) == spec.load(path)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_examples_validate(path: Path) -> None:
    assert main(["validate", str(path)]) == 0


def test_schema_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == spec.schema()
    assert main(["schema", "--out", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == spec.schema()


@pytest.mark.parametrize("topic", ["units", "spec", "exit-codes", "environment", "security"])
def test_help_topics(topic: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", topic]) == 0
    out = capsys.readouterr().out
    wanted = {
        "units": [*(units.DIMENSIONS), "0.8x baseline"],
        "spec": [name for name, *_ in spec.rows()] + [m.label for m in METRICS.values()],
        "exit-codes": ["0", "1", "2", "3", "4", "5", "130", "143"],
        "environment": ["LEANPLAN_OFFLINE", "LEANPLAN_STORE"],
        "security": ["--trust-remote-code", "safetensors"],
    }[topic]
    assert all(word in out for word in wanted)
    assert max(map(len, out.splitlines())) <= 120


def test_texts_that_ship_are_named_by_a_word(tmp_path):
    read = spec.from_mapping(
        {"model": "org/model", "objectives": ["tpot_p50"], "quality": {"data": "bundled"}, "calibration": "bundled"},
        folder=tmp_path,
    )
    assert read.quality.data == bundled("heldout")
    assert read.calibration.data == bundled("calib")
    assert spec.as_mapping(read)["calibration"]["data"] == "bundled"
    assert spec.from_mapping(spec.as_mapping(read), folder=tmp_path / "elsewhere").calibration == read.calibration
