"""Trace files: as public traces write them, hostile ones, and as a spec's workload."""

from __future__ import annotations

from pathlib import Path

import pytest

from knowledge_base.errors import BadInput
from knowledge_base.serde import digest, plain, restore
from knowledge_base.types import Trace, Workload
from planner import spec
from planner.cli import main
from planner.load.trace import Row, content_of, read_trace

TWO = ((0.0, 10, 5), (1.5, 20, 7))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ours.csv", "timestamp,prompt_tokens,output_tokens\n100,10,5\n101.5,20,7\n"),
        ("later.csv", "timestamp,prompt_tokens,output_tokens\r\n1.5,20,7\r\n\r\n0,10,5\r\n"),
        ("azure.csv", "\ufeffTIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,10,5\n2023-11-16 18:15:48.1805900,20,7\n"),
        ("burst.csv", 'Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,10,5,15,"API, log"\n6.5,GPT-4,20,7,27,x\n'),
        ("mooncake.jsonl", '{"timestamp_ms": 0, "input_length": 10, "output_length": 5, "hash_ids": [46]}\n\n{"timestamp_ms": 1500, "input_length": 20, "output_length": 7}\n'),
        ("zoned.jsonl", '{"time": "2026-01-01T00:00:00Z", "prompt_tokens": 10, "completion_tokens": 5}\n{"time": "2026-01-01T01:00:01.5+01:00", "prompt_tokens": 20, "completion_tokens": 7}'),
    ],
)  # fmt: skip
def test_traces_are_read_as_they_are_written(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    rows = read_trace(tmp_path / name)
    assert [(round(r.at_s or 0.0, 6), r.prompt_tokens, r.output_tokens) for r in rows] == list(TWO)
    assert content_of(rows) == content_of([Row(9, *row) for row in TWO]) or name == "azure.csv"


def test_a_trace_may_have_no_times(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("prompt_tokens,output_tokens\n10,5\n20,7\n")
    assert [r.at_s for r in read_trace(tmp_path / "t.csv")] == [None, None]


HEAD = b"timestamp,prompt_tokens,output_tokens\n"
HOSTILE = [
    (b"", "no column", 1),
    (HEAD, "no requests", None),
    (b"a,b\n1,2\n", "no column prompt_tokens and output_tokens", 1),
    (HEAD + b"0,10,5\n1,ten,5\n2,-1,5\n", "prompt_tokens must be a whole number of tokens, at least 1, got 'ten'; 2 of 3", 3),
    (HEAD + b"0,10,0\n", "output_tokens must be", 2),
    (HEAD + b"0,10,5.5\n", "output_tokens must be", 2),
    (HEAD + b"0,10,99999999999\n", "output_tokens must be", 2),
    (HEAD + b"0,10,\n", "no output_tokens", 2),
    (HEAD + b"soon,10,5\n", "timestamp must be seconds or a date, got 'soon'", 2),
    (HEAD + b"nan,10,5\n", "must be finite", 2),
    (HEAD + b"inf,10,5\n", "must be finite", 2),
    (HEAD + b"0,10,5\n,10,5\n", "no timestamp, and other rows have one", 3),
    (HEAD + b"0,10,5\n1,10\n", "2 cells, the heading has 3", 3),
    (HEAD + b"0,10,5\n99999999999,10,5\n", "more than a year apart", None),
    (HEAD + b'0,"10,5\n', "not CSV", None),
    (HEAD + b"0,1\x000,5\n", "", 2),
    (HEAD + b"0,\xff\xfe,5\n", "prompt_tokens must be", 2),
    (HEAD + b"0,\x1b[2J,5\n", "got '\\x1b[2J'", 2),
    (b'{"timestamp": 0, "prompt_tokens": 1, "output_tokens": 1}\n[1]\n', "not a JSON object", 2),
    (b'{"timestamp": 0, "prompt_tokens": true, "output_tokens": 1}\n', "prompt_tokens must be", 1),
    (b'{"timestamp": 0, "prompt_tokens": 1.0, "output_tokens": 1}\n', "prompt_tokens must be", 1),
    (b'{"timestamp": [0], "prompt_tokens": 1, "output_tokens": 1}\n', "timestamp must be", 1),
    (b'{"timestamp": true, "prompt_tokens": 1, "output_tokens": 1}\n', "timestamp must be", 1),
    (b'{"timestamp": 1e999, "prompt_tokens": 1, "output_tokens": 1}\n', "must be finite", 1),
    (b'{"prompt_tokens": 1, "output_tokens": 1}\n{"a": ' + b"[" * 100_000, "not JSON", 2),
    (b'{"prompt_tokens": ' + b"9" * 5000 + b', "output_tokens": 1}\n', "not JSON", 1),
]  # fmt: skip


@pytest.mark.parametrize(("data", "told", "line"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_bad_row_is_told_with_its_place(data: bytes, told: str, line: int | None, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(data)
    with pytest.raises(BadInput) as raised:
        read_trace(path)
    assert told in raised.value.message
    assert raised.value.where is not None
    assert raised.value.where.startswith(str(path)) if line is None else raised.value.where == f"{path}:{line}"
    assert raised.value.message.isprintable() and len(raised.value.message) < 200


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.csv", Path("/dev/null")):
        with pytest.raises(BadInput):
            read_trace(path)


# ---------------------------------------------------------------- in a spec


def test_digests_from_before_these_fields_hold() -> None:
    old = {
        "concurrency": 1,
        "output_tokens": 128,
        "prompt_tokens": 512,
        "prompt_tokens_p95": None,
        "requests_per_s": None,
    }
    workload = Workload(prompt_tokens=512, output_tokens=128)
    assert digest(workload) == digest(old)
    assert restore(Workload, old) == workload
    grown = Workload(prompt_tokens=512, output_tokens=128, turns=2, trace=Trace(file="t"))
    assert restore(Workload, plain(grown)) == grown and digest(grown) != digest(workload)


def read(text: str, folder: Path) -> spec.Spec:
    (folder / "s.yaml").write_text(f"model: m\nbudgets: {{ttft: 1 s}}\nworkload:\n  {text}\n")
    return spec.load(folder / "s.yaml")


def test_a_workload_as_users_have_it(tmp_path: Path) -> None:
    s = read(
        "{prompt_tokens: {p50: 100, p95: 400}, output_tokens: {p50: 20, p95: 60}, turns: 3, shared_prefix: 50}",
        tmp_path,
    )
    assert s.workload == Workload(
        prompt_tokens=100,
        prompt_tokens_p95=400,
        output_tokens=20,
        output_tokens_p95=60,
        turns=3,
        shared_prefix_tokens=50,
    )
    assert s.workload.longest_tokens == 400 + 60 + 2 * (350 + 60)
    assert spec.from_mapping(spec.as_mapping(s), s.folder) == s


def test_a_trace_in_a_spec_says_lengths_and_rate(tmp_path: Path) -> None:
    rows = "".join(f"{i / 2},{100 + i},{10 + i}\n" for i in range(21))
    (tmp_path / "day.csv").write_text("timestamp,prompt_tokens,output_tokens\n" + rows)
    s = read("trace: day.csv", tmp_path)
    trace = s.workload.trace
    assert trace and trace.requests == 21 and trace.replayed and len(trace.digest) == 64
    assert (s.workload.prompt_tokens, s.workload.prompt_tokens_p95, s.workload.output_tokens) == (110, 119, 20)
    assert s.workload.requests_per_s == pytest.approx(2.0)
    assert spec.as_mapping(s)["workload"] == {"concurrency": 1, "trace": "day.csv"}
    assert spec.from_mapping(spec.as_mapping(s), s.folder) == s
    poisson = read("{trace: day.csv, arrival_rate: 9 requests/s}", tmp_path)
    assert poisson.workload.trace and not poisson.workload.trace.replayed and poisson.workload.requests_per_s == 9
    assert spec.from_mapping(spec.as_mapping(poisson), s.folder) == poisson
    (tmp_path / "day.csv").write_text("timestamp,prompt_tokens,output_tokens\n" + rows.replace("100,", "101,"))
    assert read("trace: day.csv", tmp_path).workload != s.workload


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("trace: day.csv", "s.yaml:4:10: workload.trace: 'day.csv' is not a file"),
        ("{trace: bad.csv}", "bad.csv:3: prompt_tokens must be"),
        ("{trace: bad.csv, turns: 2}", "s.yaml:4:27: workload.turns beside a trace"),
        ("{trace: bad.csv, prompt_tokens: 2}", "workload.prompt_tokens beside a trace"),
        ("{prompt_tokens: 50, shared_prefix: 50}", "s.yaml:4:38: workload.shared_prefix (50) is not below"),
        ("{turns: 0}", "workload.turns must be a whole number, at least 1"),
        ("{output_tokens: {p50: 9, p95: 3}}", "p95 (3) is below p50 (9)"),
        ("{trace: [a]}", "workload.trace must be the path of a trace"),
    ],
)
def test_a_workload_that_cannot_be_is_told_with_its_place(
    text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.csv").write_text("timestamp,prompt_tokens,output_tokens\n0,1,1\n0,x,1\n")
    Path("s.yaml").write_text(f"model: m\nbudgets: {{ttft: 1 s}}\nworkload:\n  {text}\n")
    assert main(["validate", "s.yaml"]) == 2
    assert told in capsys.readouterr().err.replace("error: ", "")
