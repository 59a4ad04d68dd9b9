"""Bad specs, through the real command: what is said, where, exit code 2, and that nothing else happened."""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import shutil
import socket
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from planner.cli import main

HEAD = "model: org/name\n"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Write a spec, validate it, check that it was refused and nothing else happened; return what stderr says."""
    monkeypatch.chdir(tmp_path)

    def run(content: str | bytes | None, name: str = "leanplan.yaml") -> str:
        if content is not None:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        before = tree(tmp_path), set(tmp_path.parent.iterdir())
        code = main(["validate", name])
        said = capsys.readouterr()
        assert code == 2, said.err
        assert said.out == ""
        assert "Traceback" not in said.err
        assert "hint: " in said.err
        assert (tree(tmp_path), set(tmp_path.parent.iterdir())) == before
        return said.err

    return run


# ---------------------------------------------------------------- rows 1 to 3: the file


@pytest.mark.row(1)
def test_01_missing_folder_and_special_files(refused: Any, tmp_path: Path) -> None:
    said = refused(None)
    assert said.startswith("leanplan.yaml: error: not found") and "leanplan init" in said
    (tmp_path / "folder").mkdir()
    assert "folder: error: a folder, not a spec file" in refused(None, "folder")
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(None, "pipe")
    assert "not found" in refused(None, "leanplan.yaml/below")
    assert "not a path" in refused(None, "a\0b")


def _as_nobody(path: str, said: Any) -> None:
    from knowledge_base.errors import BadInput
    from planner import spec

    if os.getuid() == 0:
        os.setuid(65534)
    try:
        spec.load(path)
    except BadInput as error:
        said.send((str(error), int(error.exit_code)))


@pytest.mark.row(1)
def test_01_unreadable() -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        path = folder / "leanplan.yaml"
        path.write_text(HEAD)
        path.chmod(0)
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=_as_nobody, args=(str(path), theirs))
        process.start()
        process.join(20)
        assert ours.poll()
        said, code = ours.recv()
        assert "leanplan.yaml: cannot be read: Permission denied" in said and code == 2
    finally:
        shutil.rmtree(folder)


@pytest.mark.row(2)
def test_02_malformed(refused: Any) -> None:
    said = refused("model: m\nbudgets: {ttft: 5 ms")
    assert "leanplan.yaml:2:21: error: malformed YAML: expected ',' or '}'" in said
    assert "    2 | budgets: {ttft: 5 ms\n" in said and said.count("^") == 1
    assert "without `>=`" in refused(HEAD + "budgets: {throughput: {min: 1 tokens/s}}\nsearch:\n  max_measured: >= 5\n")
    assert "indent with spaces" in refused(HEAD + "budgets:\n\tttft: 5 ms\n")
    assert "leanplan.toml:2:19: error: malformed TOML" in refused('model = "m"\nbudgets = {ttft = }', "leanplan.toml")


@pytest.mark.row(3)
@pytest.mark.parametrize("content", ["", "# only a comment\n", "- 1\n", "just text", "---\n"], ids=repr)
def test_03_not_a_mapping(refused: Any, content: str) -> None:
    said = refused(content)
    assert "error: the spec must be a mapping with version, name, goal, model" in said and "leanplan.yaml:" in said


@pytest.mark.row(3)
def test_03_two_documents(refused: Any) -> None:
    assert "leanplan.yaml:3:1: error: a second document" in refused(HEAD + "objectives: [ttft]\n---\nmodel: other\n")


# ---------------------------------------------------------------- rows 4 and 5: keys


@pytest.mark.row(4)
def test_04_unknown_key(refused: Any) -> None:
    said = refused(HEAD + "budegts: {ttft: 5 ms}\n")
    assert "leanplan.yaml:2:1: error: unknown key 'budegts'; did you mean 'budgets'?" in said and "^^^^^^^" in said
    assert "unknown key 'tme_limit' in search; did you mean 'time_limit'?" in refused(
        HEAD + "objectives: [ttft]\nsearch: {tme_limit: 5 s}"
    )
    assert "unknown metric 'ttft_p85'; did you mean 'ttft_p95'?" in refused(HEAD + "budgets: {ttft_p85: 5 ms}")
    assert "peak_memory is one number, it has no p95" in refused(HEAD + "budgets: {peak_memory_p95: 5 GiB}")
    assert "unknown technique 'wieght_int8'; did you mean 'weight_int8'" in refused(
        HEAD + "objectives: [ttft]\ntechniques: {only: [wieght_int8]}"
    )
    assert "missing key 'model'" in refused("objectives: [ttft]")


@pytest.mark.row(5)
def test_05_duplicate_key(refused: Any) -> None:
    said = refused(HEAD + "budgets:\n  ttft_p95:\n    max: 5 ms\n    max: 4 ms\n")
    assert "leanplan.yaml:5:5: error: 'max' already given on line 4" in said
    assert "ttft_p50 is the same as ttft, given on line 3" in refused(
        HEAD + "budgets:\n  ttft: 5 ms\n  ttft_p50: 6 ms\n"
    )


# ---------------------------------------------------------------- rows 6 to 13: values


@pytest.mark.row(6, 7, 8, 9, 10, 11, 12, 13)
@pytest.mark.parametrize(
    ("row", "budgets", "says"),
    [
        (6, "{ttft_p95: {max: 50 lightyears}}",
            "unknown unit 'lightyears' for ttft_p95 (a time): use ns, us, ms, s, min, h, d"),
        (7, "{peak_memory: 50 ms}", "'50 ms' is a time; peak_memory needs bytes (B, KiB, MiB, GiB, TiB, KB, MB, GB, TB)"),
        (7, "{ttft: 50 %}", "'50 %' of what? ttft needs a time"),
        (8, "{ttft_p95: {max: 50}}", "unit missing for ttft_p95: 50 ms? 50 s?"),
        (8, "{quality_loss: 2}", "unit missing for quality_loss: 2 %, or 2 times?"),
        (9, "{peak_memory: 2 gb}", "bits? write GB (10^9 bytes) or GiB (2^30 bytes)"),
        (9, "{peak_memory: 2 Gb}", "bits? write GB (10^9 bytes) or GiB (2^30 bytes)"),
        (9, "{ttft: 50 Ms}", "did you mean ms?"),
        (10, "{ttft: .nan}", "must be a finite positive number, got '.nan'"),
        (10, "{ttft: .inf}", "must be a finite positive number, got '.inf'"),
        (10, "{ttft: -5 ms}", "must be a finite positive number, got '-5 ms'"),
        (10, "{ttft: 0 ms}", "must be a finite positive number, got '0 ms'"),
        (10, "{ttft: 1e400 s}", "must be a finite positive number, got '1e400 s'"),
        (11, "{ttft: {max: 1,5 ms}}", "a comma inside a number splits it here; write 1.5 ms"),
        (11, "{ttft: 1,5 ms}", "a comma inside a number splits it here; write 1.5 ms"),
        (11, "\n  ttft: 1,5 ms", "write 1.5 ms"),
        (11, "{ttft: 1_000 ms}", "write 1000 ms"),
        (12, "{ttft: 12:30}", "'12:30' is not a duration: 12 min 30 s?"),
        (12, "{ttft: no}", "ttft needs a time, got 'no'"),
        (12, "{ttft: {max: 5 ms, level: of}}", "must be error, warn or off, got 'of'; did you mean 'off'?"),
        (13, "{throughput: {min: 5 tokens/s, max: 1 tokens/s}}", "throughput: min is above max"),
        (13, "{ttft: {min: 2x baseline, max: 1x baseline}}", "ttft: min is above max"),
        (0, "{quality_loss: 0.5x baseline}", "quality_loss is told against the unchanged model already"),
        (0, "{ttft: half of the baseline}", "is not a share of the baseline"),
        (0, "{ttft: {level: warn}}", "ttft has neither max nor min"),
        (0, "{ttft: {max: 5 ms, at: $1/h}}", "unknown key 'at' in budgets.ttft"),
        (0, "{ttft: }", "ttft needs a limit, got nothing"),
        (0, "{ttft: [5 ms]}", "ttft needs a limit, got a list"),
        (0, "[ttft]", "budgets must be a mapping from metrics to limits"),
    ],
)  # fmt: skip
def test_06_to_13_budgets(refused: Any, row: int, budgets: str, says: str) -> None:
    said = refused(HEAD + f"budgets: {budgets}\n")
    assert says in said
    assert re.match(r"leanplan\.yaml:[23]:\d+: error: ", said)
    assert "^" in said  # the line is shown, with its fault


def test_the_error_shape(refused: Any) -> None:
    assert refused(HEAD + "budgets:\n  ttft_p95: {max: 50 lightyears}\n") == (
        "leanplan.yaml:3:19: error: unknown unit 'lightyears' for ttft_p95 (a time): use ns, us, ms, s, min, h, d\n"
        "    3 |   ttft_p95: {max: 50 lightyears}\n"
        "                          ^^^^^^^^^^^^^\n"
        "hint: expected a time, e.g. 50 ms, 0.2 s; see: leanplan help units\n"
    )


def test_toml_errors_have_lines_too(refused: Any) -> None:
    said = refused('model = "org/name"\n[budgets]\nttft = {max = 50}\n', "leanplan.toml")
    assert "leanplan.toml:3:9: error: unit missing for ttft: 50 ms? 50 s?" in said and "^^^^^^^^" in said
    said = refused('[project]\nname = "x"\n[tool.leanplan]\nmodel = "org/name"\nbudegts = 1\n', "pyproject.toml")
    assert "pyproject.toml:5:1: error: unknown key 'budegts'; did you mean 'budgets'?" in said
    assert "no table [tool.leanplan]" in refused('[project]\nname = "x"\n', "pyproject.toml")


@pytest.mark.row(16)
@pytest.mark.parametrize(
    "text", ["", "budgets: {}\n", "budgets:\n", "budgets: {ttft: {max: 5 ms, level: off}}\n"], ids=repr
)
def test_16_nothing_to_decide(refused: Any, text: str) -> None:
    said = refused(HEAD + text)
    assert "nothing to decide: the spec has no budgets and no objectives" in said and "give at least one" in said


@pytest.mark.rule("spec names no code")
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("goal: finetune", "goal: finetune is planned, but not available yet"),
        ("goal: pretrain", "goal: pretrain is planned, but not available yet"),
        ("version: 2", "version 2 of the spec format is not known here"),
        ("workload: {prompt_tokens: 1_000}", "must be a whole number"),
        ("workload: {prompt_tokens: '128'}", "without quotes"),
        ("workload: {output_tokens: 0}", "must be a whole number, at least 1"),
        ("workload: {prompt_tokens: {p50: 9, p95: 3}}", "p95 (3) is below p50 (9)"),
        ("workload: {prompt_tokens: {p50: 9}}", "needs both p50 and p95"),
        ("techniques: {only: [weight_int8], without: [weight_int8]}", "weight_int8: both in only and in without"),
        ("engines: []", "engines is an empty list"),
        ("search: {time_limit: 12:30}", "'12:30' is not a duration"),
        ("search: {seed: -1}", "must be a whole number, at least 0"),
        ("prices: {pue: 0.5}", "must be a number from 1 to 10"),
        ("prices: {machine: $1/h}\nbudgets: {cost: {max: $1/1M tokens, at: $2/h}}",
            "another hourly price than prices.machine"),
        ("prices: {bought: {years: 3}}", "missing key 'usd'"),
        ("prices: {bought: {usd: 3, used_share: 2}}", "must be a number from 0.001 to 1"),
        ("quality: {data: a}\nbudgets: {quality_loss: {max: 1 %, data: b}}", "another held-out text than quality.data"),
        ("calibration: {samples: 5}", "missing key 'data' in calibration"),
        ("trust_remote_code: true", "unknown key 'trust_remote_code'"),
        ("quality: {data: nowhere.txt}", "nowhere.txt' not found"),
        ("calibration: {data: .}", "is a folder"),
        ("hardware: no-such-machine", "no-such-machine"),
        ("objectives_: []", "did you mean 'objectives'?"),
    ],
)  # fmt: skip
def test_other_keys(refused: Any, text: str, says: str) -> None:
    objectives = "" if "budgets" in text else "objectives: [ttft]\n"
    assert says in refused(HEAD + objectives + text + "\n")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[ttft, tpot, cost, energy]", "objectives has 4 entries, at most 3 are allowed"),
        ("[ttft, ttft_p50]", "'ttft_p50' is given twice in objectives"),
        ("[tfft]", "unknown metric 'tfft'; did you mean 'ttft'?"),
        ("ttft", "objectives must be a list"),
    ],
)
def test_objectives(refused: Any, text: str, says: str) -> None:
    assert says in refused(HEAD + f"objectives: {text}\n")


# ---------------------------------------------------------------- rows 17 to 19, 21, 23: hostile files


@pytest.mark.row(17)
def test_17_encodings(refused: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "leanplan.yaml: error: not UTF-8 at byte 0 (counted from 0, line 1)" in refused(b"\xff\xfea\0")
    assert "not UTF-8 at byte 8 (counted from 0, line 2)" in refused(b"model: m\n"[:7] + b"\n\xe9\n")
    assert "leanplan.yaml:2: error: NUL byte in the text" in refused(HEAD + "bud\0gets: {}\n")
    assert "control character U+001B" in refused(HEAD + "# \x1b[2J\n")
    (tmp_path / "good.yaml").write_bytes(
        b"\xef\xbb\xbf" + (HEAD + "objectives: [ttft]\n").replace("\n", "\r\n").encode()
    )
    assert main(["validate", "good.yaml"]) == 0


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.row(18)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("model: !!python/object/apply:os.system ['touch canary']\n", "tags are not allowed"),
        ("model: !x y\n", "tags are not allowed"),
        (BOMB, "aliases and anchors are not allowed"),
        ("model: *m\n", "aliases and anchors are not allowed"),
        ("model: " + "[" * 3000, "nested deeper than 20 levels, which is not allowed"),
        ("".join(" " * i + "a:\n" for i in range(60)), "nested deeper than 20 levels, which is not allowed"),
        ("model: [" + "1," * 100_000 + "]", "more than 2000 values, which is not allowed"),
        ("#" * 10_000_000, "larger than 256 KiB, which is not allowed"),
    ],
    ids=["python tag", "own tag", "alias bomb", "alias", "brackets", "blocks", "values", "10 MB"],
)
def test_18_hostile_yaml(refused: Any, content: str, says: str, tmp_path: Path) -> None:
    started = time.process_time()
    assert says in refused(content)
    assert time.process_time() - started < 10  # an alias bomb or a quadratic parser takes minutes
    tracemalloc.start()
    try:
        refused(None)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 16 * 2**20
    assert not (tmp_path / "canary").exists()


@pytest.mark.row(18)
@pytest.mark.parametrize(
    "content",
    ["a = " + "[" * 3000, "a" + ".a" * 3000 + " = 1", "a = " + "9" * 5000],
    ids=["brackets", "dots", "digits"],
)
def test_18_hostile_toml(refused: Any, content: str) -> None:
    assert "leanplan.toml" in refused(content, "leanplan.toml")


@pytest.mark.row(19)
@pytest.mark.parametrize(
    "name",
    ["../../etc/x", "/etc/x", "a\\0b", "CON", "con.txt", "lpt1", "x" * 300, "😀", ".hidden", "-rf", "a/b", "trailing."],
)
def test_19_names(refused: Any, name: str) -> None:
    said = refused(f'{HEAD}objectives: [ttft]\nname: "{name}"\n')
    assert "name must be letters, digits, . _ - (at most 64" in said
    assert "leanplan.yaml:3:7: error" in said


@pytest.mark.row(19)
@pytest.mark.parametrize("path", ["../x.lock", "/etc/x", "a/../../x", "..\\\\x"])
def test_19_the_lock_file_stays_near_the_spec(refused: Any, path: str) -> None:
    assert "leaves the spec's folder" in refused(f'{HEAD}objectives: [ttft]\ncheck: {{against: "{path}"}}\n')


@pytest.mark.row(21, 23)
def test_21_and_23_models(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = refused("model: empty\nobjectives: [ttft]\n")
    assert "leanplan.yaml:1:8: error: no config.json in 'empty'" in said and "*.safetensors" in said
    for bad in ("http://169.254.169.254/", "-x", "a/b/c", "../nowhere", "file:///etc/passwd", "a\\\\b"):
        assert "is not a" in refused(f'model: "{bad}"\nobjectives: [ttft]\n')


def test_escapes_in_values_are_shown_not_obeyed(refused: Any) -> None:
    said = refused(HEAD + 'objectives: ["\\e[2J\\u202e"]\n')
    assert "\x1b" not in said and "\u202e" not in said


def test_stdin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"model: org/name\nbudegts: {}\n")))
    assert main(["validate", "-"]) == 2
    assert "<stdin>:2:1: error: unknown key 'budegts'" in capsys.readouterr().err


def test_python_errors_name_the_key() -> None:
    from knowledge_base.errors import BadInput
    from planner.spec import from_mapping

    with pytest.raises(BadInput, match=r"budgets\.ttft_p95\.max: unit missing for ttft_p95: 50 ms\? 50 s\?"):
        from_mapping({"model": "m", "budgets": {"ttft_p95": {"max": 50}}})
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(BadInput, match="nested deeper than 20"):
        from_mapping({"model": "m", "engines": loop})
    with pytest.raises(BadInput, match="cannot be 'object'"):
        from_mapping({"model": "m", "name": object()})
    with pytest.raises(BadInput, match="a key must be text"):
        from_mapping({"model": "m", 5: 1})
