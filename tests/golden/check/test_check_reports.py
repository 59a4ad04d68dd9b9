"""Every situation of a check in every format, character for character. `make accept` rewrites the files."""

from __future__ import annotations

from pathlib import Path

import pytest
from check_situations import SMALL, lock, make_place, situations
from goldens import accepted

from knowledge_base.errors import ExitCode
from planner.cli import main
from planner.reports import check as formats

HERE = Path(__file__).parent
SUFFIX = {
    "full": "txt", "concise": "txt", "json": "json", "json-lines": "jsonl", "github": "txt", "junit": "xml", "markdown": "md",
    "gitlab": "json", "sarif": "json",
}  # fmt: skip
PRINTED = ("full", "concise")  # formats in which what stopped a check is no report: it is printed as an error
ERRORS = {"tampered_lock": ExitCode.BAD_INPUT, "engine_missing": ExitCode.ENVIRONMENT, "bad_spec": ExitCode.BAD_INPUT}
ALL = [(situation, name) for situation in situations() for name in SUFFIX]
STOPPED = [(situation, name) for situation in ERRORS for name in SUFFIX if name not in PRINTED]


def test_every_format_has_its_files() -> None:
    assert set(SUFFIX) == set(formats.names())


@pytest.mark.row(72)
@pytest.mark.parametrize(("situation", "name"), ALL, ids=map(".".join, ALL))
def test_report_is_as_accepted(situation: str, name: str) -> None:
    text = formats.render(name, situations()[situation])
    assert text == accepted(HERE / f"{situation}.{name}.{SUFFIX[name]}", text)


@pytest.mark.row(74)
@pytest.mark.parametrize(("situation", "name"), STOPPED, ids=map(".".join, STOPPED))
def test_what_stopped_a_check_is_reported(
    situation: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("GITHUB_WORKSPACE", "CI_PROJECT_DIR", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    make_place(tmp_path, lock(SMALL))  # a plan of llama_cpp, which the spec does not allow
    if situation == "tampered_lock":
        text = Path("leanplan.lock").read_text(encoding="utf-8")
        Path("leanplan.lock").write_text(text.replace("0.0294", "0.9"), encoding="utf-8")
    if situation == "bad_spec":
        text = Path("leanplan.yaml").read_text(encoding="utf-8")
        Path("leanplan.yaml").write_text(text.replace("400 GiB", "400 lightyears"), encoding="utf-8")
    code = main(["check", "--predict", "--format", name, "--comment", "comment.md", "--quiet"])
    out, err = capsys.readouterr()
    out = out.replace(f"{tmp_path}/", "")
    assert code == ERRORS[situation]
    assert ("error:" in err and "hint:" in err) or name == "json"
    assert out == accepted(HERE / f"{situation}.{name}.{SUFFIX[name]}", out)
    comment = Path("comment.md").read_text(encoding="utf-8")
    assert comment == accepted(HERE / f"{situation}.markdown.md", comment)
