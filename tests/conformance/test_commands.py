"""Laws every command keeps: with --json it prints what its published schema says, it talks on stderr, it never asks."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import check_situations
import jsonschema
import pytest
import synthetic_answers
from worlds import house_with, leanplan

from knowledge_base.errors import EXIT_CODE_MEANING, ExitCode
from knowledge_base.types import Plan, Step
from planner import schemas
from planner.cli import GLOBAL_FLAGS, build_parser, commands, main
from planner.cli.ls import LISTS

ROOT = Path(__file__).resolve().parents[2]
RUN = synthetic_answers.answer().run_id
# Every command, in every way that prints another kind of data; in a folder as `place` makes it.
CASES: dict[str, tuple[str, ...]] = {
    "advise": ("advise shape --on h100-sxm",),
    "build": ("build plan.json -o built",),
    "calibrate": ("calibrate --time-limit 5s --engine llama_cpp", "calibrate --forget"),
    "check": ("check --predict",),
    "clean": ("clean", "clean runs store --keep 0"),
    "compare": ("compare baseline recommended", "compare leanplan.lock recommended"),
    "doctor": ("doctor",),
    "estimate": (
        "estimate shape --on h100-sxm --step weight_int8",
        "estimate shape --on h200-sxm --step weight_int8 --compare weight_int4 --compare-on h100-sxm",
        "estimate shape --on h100-sxm --step weight_int4 --sweep batch=1..512",
        "estimate shape --on h100-sxm --step weight_int4 --roofline",
        "estimate shape --on '4x h100-sxm' --engine vllm --weights fp8 --concurrency 32",
        "estimate shape --on '4x h100-sxm' --engine vllm --sweep requests_per_s=0.5..1000",
        "estimate shape --on '2x h100-sxm' --finetune qlora",
        "estimate shape --on h100-sxm --finetune lora --compare full",
        "estimate shape --on h100-sxm --finetune lora --sweep rank=1..16",
    ),
    "explain": (
        "explain",
        "explain baseline",
        "explain --why-not weight_int8",
        "explain --budget ttft",
        "explain gptq",
    ),
    "export": tuple(f"export artefact --to {target} -o exported" for target in ("compose", "systemd", "vllm")),
    "graph": ("graph", "graph --about resource:memory"),
    "help": ("help", "help exit-codes", "help plan"),
    "init": ("init started --force", "init started --force --ci github"),
    "load": (
        "load artefact --duration 1s --warm-up 0.5s --time-limit 20s --requests-per-s 4 --output-tokens 4 --ttft-p50 20s --goodput 0.01",
    ),
    "ls": tuple(f"ls {kind}" for kind in LISTS),
    "matrix": ("matrix",),
    "papers": ("papers --year 2023",),
    "plan": ("plan --predict", "plan local.yaml --forecast"),
    "probe": ("probe",),
    "replan": (f"replan {RUN} --budget 'tpot<=9 ms'",),
    "report": ("report", "report --format md"),
    "schema": tuple(f"schema --of {name}" for name in schemas.names()),
    "serve": ("serve artefact --port 0 --check",),
    "show": (f"show {RUN}", "show recommended", "show weight_int8", "show llama_cpp", "show h100-sxm", "show ttft"),
    "validate": ("validate", "validate box.yaml"),
    "verify": ("verify artefact",),
}
every_command = pytest.mark.parametrize("name", commands.names())
every_case = pytest.mark.parametrize(
    "line",
    [pytest.param(line, marks=pytest.mark.slow if "--time-limit" in line else ()) for lines in CASES.values() for line in lines],
)  # fmt: skip
runs_every_command = pytest.mark.parametrize(  # of which one measures for a minute
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in ("calibrate", "load") else ()) for name in commands.names()],
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, machine: Path) -> Path:
    """A folder with a spec that is predicted only, a lock, a finished run, a recipe, what was built of it, and a store."""
    from planner.reading import read_model
    from planner.recipe import Recipe, write_recipe
    from planner.tiny_models import make_tiny_model

    folder = tmp_path_factory.mktemp("place")
    locked = Plan(model_digest="toy", engine="transformers", steps=(Step("weight_int8"),))
    check_situations.make_place(folder, check_situations.lock(locked))
    run = folder / "runs" / RUN
    replace(synthetic_answers.answer(), folder=f"runs/{RUN}").save(run)
    (run / "run.json").write_text(json.dumps({"schema": 1, "fingerprint": "0", "title": "serve-toy"}))
    (run / "spec.yaml").write_text(
        "model: toy\nworkload: {prompt_tokens: 128, output_tokens: 64, concurrency: 4}\nobjectives: [tpot_p50]\n"
    )
    make_tiny_model(folder / "model")
    (folder / "box.yaml").write_text("devices: [{like: rtx-4090, count: 2}]\n")
    (folder / "local.yaml").write_text(
        "model: model\nworkload: {prompt_tokens: 16, output_tokens: 4}\nobjectives: [tpot_p50]\n"
    )
    digest = read_model(str(folder / "model")).model.digest
    plan = Plan(model_digest=digest, engine="transformers")
    write_recipe(folder, Recipe(plan=plan, model="model", model_digest=digest))
    shutil.copytree(machine, folder / ".leanplan")
    built = leanplan("build", "plan.json", "-o", "artefact", cwd=folder)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture
def place(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(prepared)
    for made in ("built", "exported"):
        shutil.rmtree(prepared / made, ignore_errors=True)
    return prepared


def one_document(text: str) -> Any:
    """Return the JSON document a text is: exactly one, as the standard has it (Python also reads NaN)."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def problems(name: str, data: Any) -> list[str]:
    """Return what a published schema has against data."""
    return [e.message for e in jsonschema.Draft202012Validator(schemas.schema(name)).iter_errors(data)]


# ---------------------------------------------------------------- data


def test_every_command_is_run_here() -> None:
    assert set(CASES) == set(commands.names()), "say in CASES how to run a command cheaply"


@every_case
def test_what_is_printed_is_as_published(line: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = shlex.split(line)
    main([*argv, "--json"])
    data = one_document(capsys.readouterr().out)
    assert not problems(argv[0], data)
    assert problems("error", data)
    if isinstance(data, dict) and argv[0] != "schema":  # a schema may say more than its dialect asks
        assert problems(argv[0], {**data, "one more": 1})


@runs_every_command
def test_every_kind_of_data_a_schema_allows_is_printed(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = schemas.schema(name)
    kinds = [{**whole, "anyOf": [kind]} for kind in whole.get("anyOf", [])]
    printed = []
    for line in CASES[name] if kinds else ():
        main([*shlex.split(line), "--json"])
        printed.append(one_document(capsys.readouterr().out))
    for kind in kinds:
        valid = [data for data in printed if jsonschema.Draft202012Validator(kind).is_valid(data)]
        assert any(valid), f"nothing in CASES prints {kind['anyOf']}"


@every_command
def test_a_command_that_fails_prints_why_as_data(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--no-such-flag", "--json"]) == ExitCode.BAD_INPUT
    said = capsys.readouterr()
    data = one_document(said.out)
    assert not problems("error", data)
    assert data["error"]["hint"] and data["error"]["exit_code"] == ExitCode.BAD_INPUT
    assert "error: " in said.err and "hint: " in said.err


def test_a_line_that_cannot_be_read_is_told_as_the_environment_asks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LEANPLAN_JSON", "1")
    assert main(["nonsense"]) == ExitCode.BAD_INPUT
    assert not problems("error", one_document(capsys.readouterr().out))


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ("plan missing.yaml", "missing.yaml"),
        ("check missing.yaml", "missing.yaml"),
        ("validate missing.yaml", "missing.yaml"),
        ("verify runs", "runs"),
        ("estimate shape --on h100-sxm --step weight_int8:bits=9", "--step weight_int8:bits=9"),
        ("help nonsense", None),
    ],
)
def test_an_error_names_the_place(
    line: str, where: str | None, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([*shlex.split(line), "--json"])
    data = one_document(capsys.readouterr().out)
    assert not problems("error", data)
    assert data["error"]["where"] == where
    assert data["error"]["exit_code"] == code == ExitCode.BAD_INPUT


BUG = '''
"""A command with a bug."""
HELP = "fail"


def add_arguments(parser): ...
def output(): return dict[str, int]
def run(options): return 1 / 0
'''


def test_a_bug_is_told_as_data_too(tmp_path: Path) -> None:
    house = house_with(tmp_path)
    (house / "planner" / "cli" / "broken.py").write_text(BUG, encoding="utf-8")
    done = leanplan("broken", "--json", house=house, cwd=tmp_path)
    assert done.returncode == ExitCode.BUG
    data = one_document(done.stdout)
    assert not problems("error", data)
    assert data["error"]["message"] == "ZeroDivisionError: division by zero"
    report = Path(data["error"]["hint"].rpartition(" ")[2])
    assert "ZeroDivisionError" in report.read_text(encoding="utf-8")
    report.unlink()


def test_a_command_without_a_schema_is_refused(tmp_path: Path) -> None:
    house = house_with(tmp_path)
    (house / "planner" / "cli" / "hasty.py").write_text(BUG.replace("def output", "def out"), encoding="utf-8")
    done = leanplan("--help", house=house, cwd=tmp_path)
    assert done.returncode == ExitCode.BAD_INPUT
    assert "command `hasty` does not define output" in done.stderr


# ---------------------------------------------------------------- talk


@pytest.mark.slow
@every_case
def test_quiet_says_nothing_but_data(line: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main([*shlex.split(line), "--quiet"])
    said = capsys.readouterr()
    assert said.out
    if code == ExitCode.DONE:
        assert said.err == ""


@pytest.mark.parametrize("line", ["plan --predict", "clean runs --keep 0", "init started --force"])
def test_talk_and_progress_are_on_stderr(line: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if line.startswith("init"):
        main(shlex.split(line))  # what is there already is told otherwise
        capsys.readouterr()
    main(shlex.split(line))
    talking = capsys.readouterr()
    assert talking.err
    main([*shlex.split(line), "--quiet"])
    assert capsys.readouterr().out == talking.out
    main([*shlex.split(line), "--output-file", "there"])
    assert capsys.readouterr().out == ""
    assert Path("there").read_text(encoding="utf-8")


# ---------------------------------------------------------------- questions


def test_only_the_wizard_asks() -> None:
    """And it starts only at a terminal without --no-input: tests/e2e/test_wizard_pty.py."""
    asking = {"input", "getpass", "getpass.getpass", "Prompt.ask", "IntPrompt.ask", "FloatPrompt.ask", "Confirm.ask"}
    found = set()
    for path in sorted((ROOT / "planner").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("rich.prompt.") in asking:
                found.add(path.relative_to(ROOT / "planner").parts[0])
    assert found == {"wizard"}


@runs_every_command
def test_without_arguments_nothing_is_asked_and_what_is_missing_is_named(
    name: str, machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an empty folder. Under pytest whoever reads from stdin fails, so nothing here can have asked."""
    monkeypatch.chdir(tmp_path)
    actions = [a for a in build_parser().verbs[name]._actions if a.required and a.nargs != "*"]
    needed = ["/".join(a.option_strings) or str(a.metavar or a.dest) for a in actions]
    code = main([name, "--no-input", "--json", "--store", str(shutil.copytree(machine, tmp_path / "store"))])
    data = one_document(capsys.readouterr().out)
    assert code != ExitCode.BUG
    if needed or code == ExitCode.BAD_INPUT:
        assert not problems("error", data)
        assert not [argument for argument in needed if argument not in data["error"]["message"]]
    else:
        assert not problems(name, data)


def test_without_a_command_nothing_is_asked_and_the_next_step_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--no-input", "--json"]) == ExitCode.BAD_INPUT
    said = capsys.readouterr()
    data = one_document(said.out)
    assert not problems("error", data)
    assert "COMMAND" in data["error"]["message"] and "leanplan init" in data["error"]["hint"]
    assert "usage: leanplan" in said.err


# ---------------------------------------------------------------- one source


@every_command
def test_every_command_takes_every_global_flag(name: str) -> None:
    flags = {flag for action in build_parser().verbs[name]._actions for flag in action.option_strings}
    assert {flag for flag, _ in GLOBAL_FLAGS} <= flags


def test_exit_codes_are_told_from_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    from tools.reference import command_line

    codes = [int(code) for code in ExitCode]
    assert list(EXIT_CODE_MEANING) == codes
    assert schemas.schema("error")["$defs"]["Fault"]["properties"]["exit_code"]["enum"] == codes
    assert main(["help", "exit-codes"]) == ExitCode.DONE
    told = capsys.readouterr().out
    page, epilog = command_line.exit_codes(), str(build_parser().epilog)
    for code, meaning in EXIT_CODE_MEANING.items():
        assert re.search(rf"^{int(code)} +{re.escape(meaning.split()[0])}", told, re.MULTILINE)
        assert f"| `{int(code)}` | `{code.name}` | {meaning}" in page
        assert f"{int(code)} {meaning.split(';')[0]}" in epilog


def test_the_schema_command_and_the_reference_know_every_schema() -> None:
    from tools.reference import interfaces

    (of,) = [a for a in build_parser().verbs["schema"]._actions if a.dest == "of"]
    assert tuple(of.choices or ()) == schemas.names() == (*schemas.WRITTEN, *commands.names())
    page = interfaces.files()
    for name in schemas.names():
        assert f"### {name}\n" in page
        for part in schemas.schema(name).get("$defs", {}):
            assert f"### {part} part\n" in page


def hints() -> Iterator[tuple[str, str]]:
    """Yield (place, text) of every hint in the code; what is filled in when it is shown is an X."""
    for package in ("knowledge_base", "cost_models", "search", "planner"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.keyword) and node.arg == "hint":
                    parts = [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
                    yield (
                        f"{path.relative_to(ROOT)}:{node.value.lineno}",
                        "X".join(p for p in parts if isinstance(p, str)),
                    )


def test_every_command_in_a_hint_exists_with_its_flags() -> None:
    verbs, seen = build_parser().verbs, set()
    for place, hint in hints():
        for verb, rest in re.findall(r"\bleanplan ([a-z]+)([^;:,.()`]*)", hint):
            if verb not in verbs and verb in ("may", "alone"):  # prose: what leanplan may use
                continue
            assert verb in verbs, f"{place}: leanplan {verb}"
            flags = {flag for action in verbs[verb]._actions for flag in action.option_strings}
            assert set(re.findall(r"(?<=\s)--?[a-z-]+", rest)) <= flags, f"{place}: leanplan {verb}{rest}"
            if verb in ("ls", "help") and (word := re.match(r" ([a-z-]+)", rest)):
                choices = LISTS if verb == "ls" else _topics()
                assert word[1] in choices, f"{place}: leanplan {verb}{rest}"
            seen.add(verb)
    assert len(seen) > 8


def _topics() -> set[str]:
    from planner.cli._topics import TOPICS

    return {*TOPICS, *commands.names()}


# ---------------------------------------------------------------- schemas


def objects(schema: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what a schema says of objects with known fields, each with its place; a schema inside it speaks for itself."""
    if isinstance(schema, list):
        for inner in schema:
            yield from objects(inner, place)
    elif isinstance(schema, dict) and ("." not in place or not isinstance(schema.get("title"), str)):
        if "properties" in schema and schema.get("type") == "object":
            yield place, schema
        for key, inner in schema.items():
            yield from objects(inner, f"{place}.{key}")


@pytest.mark.parametrize("name", schemas.names())
def test_a_schema_is_closed_and_says_what_it_is_of(name: str) -> None:
    schema = schemas.schema(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == schemas.DIALECT
    for part, inner in schema.get("$defs", {}).items():
        assert inner["description"] and not inner["description"].startswith(f"{part}("), f"{part} has no docstring"
    assert not [place for place, inner in objects(schema, name) if inner["additionalProperties"] is not False]


OF_A_METRIC = {
    "Budget",
    "Evidence",
    "EvidenceRow",
    "Figure",
    "Loss",
    "Value",
}  # numbers in the unit of what they are of
NO_UNIT = {"factor", "knobs", "pue"}  # and the name says what they are


@pytest.mark.parametrize("name", [name for name in schemas.names() if name != "spec"])  # it has text with units
def test_a_schema_says_what_its_numbers_are_in(name: str) -> None:
    """In the comment beside the field, by a unit in its name, or by naming it in the docstring of its class."""
    for place, inner in objects(schemas.schema(name), name):
        for field, kind in inner["properties"].items():
            if "'number'" in str(kind) and "title" not in kind and place.rpartition(".")[2] not in OF_A_METRIC:
                told = "description" in kind or f"`{field}`" in inner.get("description", "") or field in NO_UNIT
                assert told, f"{place}: in what unit is {field}?"


def test_a_part_is_the_same_in_every_schema() -> None:
    known: dict[str, Any] = {}
    for name in schemas.names():
        for part, inner in schemas.schema(name).get("$defs", {}).items():
            assert known.setdefault(part, inner) == inner, f"two types are called {part}"


def test_what_a_schema_says_of_a_field_is_in_the_code() -> None:
    device = schemas.schema("result")["$defs"]["Device"]["properties"]
    assert device["memory_bytes_per_s"]["description"] == "in bytes/s"
    assert device["flop_per_s"]["description"] == "in flop/s; by dtype; multiply and add counted as two"
    assert "description" not in device["name"]
