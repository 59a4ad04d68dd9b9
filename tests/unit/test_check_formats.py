"""What each rendering of a check promises to whoever reads it: a forge, a parser, a person."""

from __future__ import annotations

import argparse
import json
import re
import xml.etree.ElementTree as tree
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from check_situations import BUDGETS, HOSTILE, SMALL, SPEC, check, figures, hostile, lock, make_place, situations

from knowledge_base.errors import ExitCode
from knowledge_base.types import Budget, Plan, Step
from planner import schemas
from planner.checking import CheckResult, changes
from planner.cli import main
from planner.cli._talk import emit, write_crash_report
from planner.lock import read_lock
from planner.reports import check as formats
from planner.reports.check import json as as_json
from planner.reports.check.markdown import worth_telling
from planner.reports.markdown import escape
from planner.results import Verdict

SITUATIONS = situations()
CODES = {
    "met": 0, "not_met": 1, "worse": 1, "inconclusive": 5, "infeasible": 1, "other_machine": 0, "slower_machine": 0, "first_run": 0,
    "predicted": 1, "hostile": 1,
}  # fmt: skip
every = pytest.mark.parametrize("situation", SITUATIONS)

GITLAB = {
    "type": "array",
    "items": {
        "type": "object", "required": ["description", "check_name", "fingerprint", "severity", "location"],
        "properties": {
            "description": {"type": "string", "minLength": 1}, "check_name": {"type": "string"},
            "fingerprint": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
            "severity": {"enum": ["info", "minor", "major", "critical", "blocker"]},
            "location": {
                "type": "object", "required": ["path", "lines"],
                "properties": {"path": {"type": "string"}, "lines": {"properties": {"begin": {"type": "integer", "minimum": 1}}, "required": ["begin"]}},
            },
        },
    },
}  # fmt: skip
# The part of the OASIS schema that a reader needs: one run, one driver, results that point at rules and lines.
TEXT = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string", "minLength": 1}}}
PLACE = {
    "type": "object", "required": ["artifactLocation", "region"],
    "properties": {
        "artifactLocation": {"required": ["uri"], "properties": {"uri": {"type": "string", "pattern": "^[A-Za-z0-9._~/%-]+$"}}},
        "region": {"required": ["startLine"], "properties": {"startLine": {"type": "integer", "minimum": 1}}},
    },
}  # fmt: skip
SARIF = {
    "type": "object", "required": ["version", "runs"],
    "properties": {
        "version": {"const": "2.1.0"},
        "runs": {
            "type": "array", "minItems": 1, "maxItems": 1,
            "items": {
                "required": ["tool", "results", "invocations"],
                "properties": {
                    "tool": {"required": ["driver"], "properties": {"driver": {"required": ["name", "rules"]}}},
                    "invocations": {"items": {"required": ["executionSuccessful"]}},
                    "results": {
                        "type": "array", "maxItems": 5000,
                        "items": {
                            "required": ["ruleId", "ruleIndex", "level", "message", "locations", "partialFingerprints"],
                            "properties": {
                                "level": {"enum": ["none", "note", "warning", "error"]}, "message": TEXT,
                                "locations": {"minItems": 1, "items": {"required": ["physicalLocation"], "properties": {"physicalLocation": PLACE}}},
                            },
                        },
                    },
                },
            },
        },
    },
}  # fmt: skip


def test_every_situation_is_here() -> None:
    assert set(CODES) == set(SITUATIONS)
    assert {"concise", "full", "github", "gitlab", "json", "json-lines", "junit", "markdown", "sarif"} == set(
        formats.names()
    )


@every
def test_the_exit_code_is_that_of_the_verdict(situation: str) -> None:
    assert SITUATIONS[situation].exit_code == CODES[situation]


# ---------------------------------------------------------------- for parsers


@every
def test_json_is_as_its_published_schema_says(situation: str) -> None:
    jsonschema.validate(json.loads(formats.render("json", SITUATIONS[situation])), schemas.schema("check"))


def test_the_schema_of_a_check_is_strict() -> None:
    data = json.loads(formats.render("json", SITUATIONS["met"]))
    for wrong in ({"exit_code": "0"}, {"more": 1}, {"verdicts": [{}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(data | wrong, schemas.schema("check"))


@pytest.mark.parametrize("name", schemas.names())
def test_every_schema_is_one(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schemas.schema(name))


def test_locks_and_results_are_as_their_schemas_say(tmp_path: Path) -> None:
    make_place(tmp_path, lock())
    jsonschema.validate(json.loads((tmp_path / "leanplan.lock").read_text()), schemas.schema("lock"))
    SITUATIONS["not_met"].answer.save(tmp_path)
    jsonschema.validate(json.loads((tmp_path / "result.json").read_text()), schemas.schema("result"))


@every
def test_json_lines_are_one_object_each_and_end_with_the_outcome(situation: str) -> None:
    result = SITUATIONS[situation]
    lines = [json.loads(line) for line in formats.render("json-lines", result).splitlines()]
    assert [line["kind"] for line in lines].count("verdict") == len(result.verdicts)
    assert lines[-1] == {"kind": "check", "headline": result.headline, "exit_code": CODES[situation]}


@every
def test_gitlab_gets_what_its_format_asks_for(situation: str) -> None:
    issues = json.loads(formats.render("gitlab", SITUATIONS[situation]))
    jsonschema.validate(issues, GITLAB)
    assert len({i["fingerprint"] for i in issues}) == len(issues)
    assert bool(issues) == (CODES[situation] != 0)


def test_a_finding_is_known_again_when_lines_and_figures_move() -> None:
    budgets = [replace(b, line=(b.line or 0) + 7) for b in BUDGETS]
    before, after = check(figures(peak=2.4e9)), check(figures(peak=2.6e9), budgets=budgets)
    (first,), (again,) = (json.loads(formats.render("gitlab", c)) for c in (before, after))
    assert first["fingerprint"] == again["fingerprint"]
    assert (first["location"]["lines"], again["location"]["lines"]) == ({"begin": 9}, {"begin": 16})


@every
def test_sarif_has_the_structure_a_reader_needs(situation: str) -> None:
    log = json.loads(formats.render("sarif", SITUATIONS[situation]))
    jsonschema.validate(log, SARIF)
    (run,) = log["runs"]
    for result in run["results"]:
        assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        assert "](" not in result["message"]["text"]  # a viewer would make it a link


@every
def test_junit_counts_what_it_holds(situation: str) -> None:
    suite = tree.fromstring(formats.render("junit", SITUATIONS[situation]))
    cases = suite.findall("testcase")
    assert int(suite.get("tests", "")) == len(cases) >= len(SITUATIONS[situation].verdicts)
    for kind, name in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        assert int(suite.get(name, "")) == len(suite.findall(f"testcase/{kind}"))
    failed = suite.get("failures") != "0"
    assert failed == (CODES[situation] == ExitCode.BUDGET_NOT_MET)


# ---------------------------------------------------------------- for GitHub


def budgets(count: int, outcome: str = "not met", level: str = "error") -> tuple[Verdict, ...]:
    """Verdicts on so many budgets, the later ones further beyond their limit."""
    (verdict,) = (v for v in check(figures(peak=2.4e9)).verdicts if v.outcome == "not met")
    made = []
    for i in range(count):
        budget = replace(verdict.budget, line=i + 1, level=level, value=2**31 / (i + 1))
        made.append(replace(verdict, budget=budget, limit=budget.value, outcome=outcome, sentence=f"number {i}"))
    return tuple(made)


def of(verdicts: tuple[Verdict, ...], **more: object) -> CheckResult:
    result = check(figures())
    return replace(result, result=replace(result.result, verdicts=verdicts), **more)


def commands(result: CheckResult) -> list[re.Match[str] | None]:
    """Return the workflow commands as a runner parses them; None for a line that is not one."""
    lines = formats.render("github", result).split("\n")
    return [re.fullmatch(r"::(error|warning|notice) ([^:]*)::(.*)", line) for line in lines]


def test_annotations_point_at_the_spec_worst_first_and_the_headline_is_text() -> None:
    *found, last = commands(of(budgets(3)))
    assert last is None
    assert [m and m[3] for m in found] == ["number 2", "number 1", "number 0"]
    assert [m and "line=3," in m[2] for m in found] == [True, False, False]


@pytest.mark.parametrize(("count", "shown"), [(9, 9), (10, 10), (11, 10), (40, 10)])
def test_no_more_annotations_of_a_kind_than_github_shows(count: int, shown: int) -> None:
    found = commands(of((*budgets(count), *budgets(count, "inconclusive"), *budgets(count, "inconclusive", "warn"))))
    kinds = [m[1] for m in found if m]
    assert {kind: kinds.count(kind) for kind in ("error", "warning", "notice")} == dict.fromkeys(
        ("error", "warning", "notice"), shown
    )
    rest = [m for m in found if m and " more" in m[2]]
    assert len(rest) == (3 if count > 10 else 0)  # what is not shown is counted, and named
    assert all(f"{count - 9} more" in m[2] for m in rest)


@pytest.mark.row(72)
def test_hostile_text_cannot_become_a_command() -> None:
    for line in formats.render("github", SITUATIONS["hostile"]).split("\n"):
        assert line.startswith(("::error file=a b%2Cc%3A%25d%0A.yaml,line=9,", "leanplan: "))
    for name in ("full", "concise", "junit", "markdown", "json-lines"):
        text = formats.render(name, SITUATIONS["hostile"])
        assert not re.search(r"^\s*(::|##\[)", text, re.MULTILINE), name
        assert "\x1b" not in text, name


# ---------------------------------------------------------------- for people


@every
def test_a_comment_starts_with_its_tag_and_the_verdict(situation: str) -> None:
    first, second, *_ = formats.render("markdown", SITUATIONS[situation]).splitlines()
    assert re.fullmatch(r"<!-- leanplan:[A-Za-z0-9._-]{1,80} -->", first)
    symbol = {0: "✅", 1: "❌", 5: "❔"}[CODES[situation]]
    assert second.startswith(f"### {symbol} leanplan: ")


@every
def test_measured_and_predicted_never_share_a_table(situation: str) -> None:
    text = formats.render("markdown", SITUATIONS[situation])
    for section in re.split(r"\n\n(?=\*\*|<details>)", text):
        assert not ("this PR (measured)" in section and "predicted" in section)
        assert not ("All plans, measured" in section and "All plans, predicted" in section)
    assert ("this PR (predicted)" in text) == (situation == "predicted")


def test_the_machine_is_named_where_it_is_the_cause() -> None:
    assert "- ttft of the unchanged model moved +50% too: the machine" in formats.render(
        "markdown", SITUATIONS["slower_machine"]
    )
    assert "measuring was not quiet: timings vary by 27%" in formats.render("markdown", SITUATIONS["inconclusive"])


def test_a_fix_that_was_only_predicted_says_so() -> None:
    text = formats.render("markdown", SITUATIONS["not_met"])
    assert "**Fix that fits** (predicted, not measured)" in text
    assert "**Fix that fits: none**" in formats.render("markdown", SITUATIONS["infeasible"])
    assert "Fix that fits" not in formats.render("markdown", SITUATIONS["met"])


def test_failures_come_first_and_no_more_than_eight_rows_are_open() -> None:
    verdicts = (*budgets(1, "met"), *budgets(9, "inconclusive"), *budgets(2))
    text = formats.render("markdown", of(verdicts))
    opened, folded = text.split("<details>")[:2]
    statuses = re.findall(r"\| ([✅❌❔][^|]*) \|$", opened, re.MULTILINE)
    assert statuses == ["❌ not met"] * 2 + ["❔ inconclusive"] * 6
    assert "… 4 more: ❔ inconclusive, ✅ met" in folded


def test_a_comment_stays_below_what_github_takes_and_names_what_it_leaves_out() -> None:
    result = SITUATIONS["met"]
    plan = Plan(model_digest="toy", engine="llama_cpp", steps=tuple(Step("_" * 300, {"n": i}) for i in range(9)))
    many = tuple(replace(result.result, plan=replace(plan, engine=f"engine{i}")) for i in range(200))
    text = formats.render("markdown", replace(result, answer=replace(result.answer, results=many)))
    assert len(text) < 60_000
    assert "Left out to stay below 60,000 characters: All plans." in text
    whole = formats.render("markdown", replace(result, notes=tuple("x" * 10**6 for _ in range(3))))
    assert len(whole) < 10_000


@pytest.mark.parametrize(
    "text", [HOSTILE, "a & b", "&lt;b&gt;", "www.evil.example", "GH-12 me@example.org", "$a$ $b$", "\u202eabc\u2028::x"]
)
def test_markdown_shows_foreign_text_and_nothing_else(text: str) -> None:
    shown = escape(text)
    assert not re.search(r"(?<!\\)[|`*_\[\]~]|[<>$\n\x1b\u202e\u2028]|@\w|(?<!&)#\d|://|www\.|GH-\d", shown)
    import html

    literal = html.unescape(re.sub(r"\\([\\|`*_\[\]~])", r"\1", shown)).replace("\u200b", "")
    assert literal == re.sub(r"[\x00-\x1f\u202e\u2028]", " ", text)


def test_when_there_is_something_to_say() -> None:
    told = {
        when: {s for s, c in SITUATIONS.items() if worth_telling(c, when)} for when in ("changed", "failed", "always")
    }
    assert told["always"] == set(SITUATIONS)
    assert told["failed"] == {s for s, code in CODES.items() if code}
    assert told["changed"] == set(SITUATIONS) - {"met", "slower_machine"}  # nothing is new, nothing is wrong


def test_what_changed_since_the_lock_is_named() -> None:
    now = check(figures(), plan=SMALL, lock=lock())
    old = replace(
        lock(replace(SMALL, model_digest="other", steps=(Step("weight_int8"),))), versions={"xllamacpp": "0.9"},
        allocation={"layers.0": "4", "layers.1": "8"}, hardware_fingerprint="elsewhere",
        workload=replace(lock().workload, output_tokens=32),
    )  # fmt: skip
    result = replace(now.result, allocation={"layers.0": "8", "layers.1": "8"})
    assert changes(old, now.answer, result) == (
        "no weight_int8", "with weight_gguf(type=q4_k)", "options of 1 modules: layers.0 from 4 to 8",
        "the model's files (weights, config or tokenizer)", "output_tokens 64, was 32", "xllamacpp 1.0, was 0.9",
        "the machine: toy machine (toy), was toy machine (elsewher)",
    )  # fmt: skip
    assert changes(lock(), now.answer, now.result) == ()


# ---------------------------------------------------------------- the command


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("GITHUB_WORKSPACE", "CI_PROJECT_DIR", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    make_place(tmp_path)
    return tmp_path


def test_the_comment_and_the_step_summary_are_written(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = place / "summary"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert main(["check", "--predict", "--format", "github", "--comment", "out/comment.md"]) == 0
    comment = (place / "out/comment.md").read_text(encoding="utf-8")
    assert comment.startswith("<!-- leanplan:leanplan.yaml -->\n### ✅ leanplan: all 2 budgets met (predicted)")
    assert summary.read_text(encoding="utf-8") == "before\n" + comment
    summary.write_bytes(b"x" * (2**20 - 10))
    assert main(["check", "--predict", "--format", "concise"]) == 0
    assert summary.stat().st_size == 2**20 - 10
    assert "no room" in capsys.readouterr().err


def test_nothing_to_say_leaves_no_comment(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "comment.md").write_text("of an earlier run")
    assert main(["check", "--predict", "--comment", "comment.md", "--comment-when", "failed"]) == 0
    assert not (place / "comment.md").exists()
    assert "nothing to say" in capsys.readouterr().err


def test_a_budget_that_is_predicted_to_fail_comes_with_a_plan_that_fits(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "leanplan.yaml").write_text(SPEC.replace("400 GiB", "78 GiB"))
    assert main(["check", "--predict", "--format", "json"]) == 1
    data = json.loads(capsys.readouterr().out)
    jsonschema.validate(data, schemas.schema("check"))
    assert data["fix"]["plan"]["steps"]
    assert {v["outcome"] for v in data["fix"]["verdicts"]} == {"met"}
    assert main(["check", "--predict", "--format", "github", "--exit-zero"]) == 0
    assert "::error file=leanplan.yaml,line=7," in capsys.readouterr().out


def test_the_lock_of_the_main_branch_is_shown_beside_the_spec_s_own(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from planner.lock import write_lock

    plan = Plan(model_digest="x", engine="transformers", steps=(Step("weight_int8"),))
    write_lock(place / "main.lock", lock(replace(plan, steps=())))
    write_lock(place / "leanplan.lock", lock(plan))
    assert read_lock(place / "leanplan.lock").plan == plan
    assert main(["check", "--predict", "--baseline", "main.lock", "--format", "json"]) in (0, 1)
    data = json.loads(capsys.readouterr().out)
    assert data["plan"]["steps"][0]["technique"] == "weight_int8"
    assert "with weight_int8" in data["changes"]


def test_a_baseline_that_cannot_be_read_does_not_stop_who_replaces_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from planner.lock import write_lock

    (place / "main.lock").write_text('{"schema": 0, "content": ""}')
    argv = ["check", "--predict", "--baseline", "main.lock"]
    assert main(argv) == ExitCode.BAD_INPUT
    write_lock(
        place / "leanplan.lock", lock(Plan(model_digest="x", engine="transformers", steps=(Step("weight_int8"),)))
    )
    assert main(argv) in (ExitCode.DONE, ExitCode.BUDGET_NOT_MET)
    assert "the baseline cannot be read (made by another version (schema 0" in capsys.readouterr().out


@pytest.mark.parametrize("step", [Step("weight_int3"), Step("weight_int8", {"compute": "float"}), Step("weight_gguf")])
def test_a_plan_of_another_version_is_refused(place: Path, step: Step, capsys: pytest.CaptureFixture[str]) -> None:
    from planner.lock import write_lock

    write_lock(place / "leanplan.lock", lock(Plan(model_digest="x", engine="transformers", steps=(step,))))
    assert main(["check", "--predict"]) == ExitCode.BAD_INPUT
    assert f"`{step}` is of another version" in capsys.readouterr().err


def test_errors_as_json_follow_their_schema(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "leanplan.lock").write_text("{}")
    assert main(["check", "--predict", "--format", "json"]) == ExitCode.BAD_INPUT
    jsonschema.validate(json.loads(capsys.readouterr().out), schemas.schema("error"))


def test_a_budget_from_python_has_no_line_and_still_gets_one() -> None:
    budget = Budget(metric="peak_memory_bytes", statistic="mean", bound="max", value=1e9)
    (issue,) = json.loads(formats.render("gitlab", check(figures(), budgets=[budget])))
    assert issue["location"]["lines"]["begin"] == 1
    assert "≤ 954 MiB" in formats.render("markdown", check(figures(), budgets=[budget]))
    assert as_json.summary(check(figures(), budgets=[budget]))["exit_code"] == 1


@pytest.mark.rule("redaction")
@pytest.mark.parametrize("name", formats.names())
def test_a_credential_in_any_text_of_a_check_is_not_printed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "hf_" + "a1B2" * 6
    result = hostile(text=f"see {secret} there")
    emit(argparse.Namespace(), None, formats.render(name, result))
    said = capsys.readouterr().out.replace("\\", "")
    assert "***" in said
    assert secret not in said


@pytest.mark.rule("redaction")
def test_a_credential_in_a_bug_is_in_no_crash_report() -> None:
    secret = "ghp_" + "a1B2" * 6
    try:
        raise ValueError(f"see {secret} there")
    except ValueError as error:
        report = write_crash_report(error)
    text = report.read_text(encoding="utf-8")
    report.unlink()
    assert "ValueError: see *** there" in text
    assert secret not in text


@pytest.mark.rule("redaction")
@pytest.mark.parametrize("name", ["github", "junit", "gitlab", "sarif", "markdown", "json-lines"])
def test_a_credential_in_an_error_reaches_no_report(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "hf_" + "a1B2" * 6
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(place / "summary"))
    (place / "leanplan.yaml").write_text(SPEC.replace("source: shape", f"source: org/{secret}/x"))
    assert main(["check", "--predict", "--format", name, "--comment", "comment.md"]) == ExitCode.BAD_INPUT
    out, err = capsys.readouterr()
    said = [out, err, *((place / f).read_text(encoding="utf-8") for f in ("comment.md", "summary"))]
    said = [text.replace("\\", "") for text in said]  # Markdown's escapes must hide nothing
    assert all("***" in text and secret not in text for text in said)
