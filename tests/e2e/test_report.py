"""`leanplan report` as a person types it, on stored runs: what is written, what is printed, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic_answers

from planner.reports import junit

ROOT = Path(__file__).resolve().parents[2]
RUN = "2026-11-21T1305Z-serve-toy-0000"


def leanplan(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "LANG": "C.UTF-8"}
    command = [sys.executable, "-m", "planner", *argv]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=150)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with one finished run in it."""
    folder = tmp_path / "runs" / RUN
    replace(synthetic_answers.answer(12), folder=f"runs/{RUN}").save(folder)
    (folder / "run.json").write_text(json.dumps({"schema": 1, "fingerprint": "0", "title": "serve-toy"}))
    return tmp_path


def test_the_newest_run_is_written_beside_its_result_the_same_as_when_it_ended(place: Path) -> None:
    page = place / "runs" / RUN / "report.html"
    when_it_ended = page.read_bytes()
    page.unlink()
    done = leanplan("report", cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"runs/{RUN}/report.html\n"
    assert "next: " in done.stderr
    assert page.read_bytes() == when_it_ended


@pytest.mark.parametrize("asked", [RUN, f"runs/{RUN}", f"runs/{RUN}/result.json"])
def test_a_run_is_found_by_name_folder_or_file(place: Path, asked: str) -> None:
    done = leanplan("report", asked, "--json", "-q", cwd=place)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"written": f"runs/{RUN}/report.html"}
    assert done.stderr == ""


def test_a_run_that_was_moved_is_written_where_it_is_now(place: Path) -> None:
    shutil.move(place / "runs", place / "archive")
    done = leanplan("report", RUN, "--run-dir", "archive", cwd=place)
    assert done.stdout == f"archive/{RUN}/report.html\n", done.stderr
    assert not (place / "runs").exists()


def test_the_page_goes_where_it_is_asked_to(place: Path) -> None:
    done = leanplan("report", "--output-file", "out/page.html", cwd=place)
    assert done.stdout == "out/page.html\n"
    assert (place / "out" / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_other_formats_are_data_on_stdout(place: Path) -> None:
    lines = leanplan("report", "--format", "md", cwd=place).stdout
    assert lines.startswith("## ") and "| id | plan |" in lines
    rows = list(csv.DictReader(io.StringIO(leanplan("report", "--format", "csv", cwd=place).stdout)))
    assert len(rows) == 12
    assert sum(row["recommended"] == "yes" for row in rows) == 1
    assert float(rows[0]["tpot_s"]) > 0
    data = json.loads(leanplan("report", "--format", "json", cwd=place).stdout)
    assert data["run_id"] == RUN
    assert leanplan("report", "--format", "csv", "--json", cwd=place).stdout.startswith("{")


def test_a_predicted_answer_has_a_report_too(tmp_path: Path) -> None:
    model = ROOT / "examples" / "llama-70b.yaml"
    done = leanplan("plan", str(model), "--predict", "--json", "--output-file", "answer.json", cwd=tmp_path)
    assert done.returncode in (0, 1), done.stderr
    done = leanplan("report", "answer.json", cwd=tmp_path)
    assert done.stdout == "answer.html\n", done.stderr
    page = (tmp_path / "answer.html").read_text(encoding="utf-8")
    assert "predicted, nothing was run" in page
    assert '<span class="tag">measured</span>' not in page


@pytest.mark.row(72)
def test_hostile_names_reach_no_terminal_and_no_markup(tmp_path: Path) -> None:
    synthetic_answers.hostile().save(tmp_path / "run")
    done = leanplan("report", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<img" not in page and "\x1b" not in page
    for form in ("md", "csv"):
        assert "\x1b" not in leanplan("report", "run", "--format", form, cwd=tmp_path).stdout


SECRETS = ("hf_" + "a1B2c3D4" * 4, "ghp_" + "a1B2c3D4" * 4, "https://me:hunter22hunter22@example.org/x")


@pytest.mark.rule("redaction")
@pytest.mark.parametrize("secret", SECRETS, ids=("hub", "forge", "password"))
def test_a_secret_in_any_text_of_a_run_is_in_no_report_of_it(tmp_path: Path, secret: str) -> None:
    bare = secret.removeprefix("https://me:").removesuffix("@example.org/x")
    answer = replace(synthetic_answers.hostile(text=f"see {secret} there"), run_id=RUN)
    answer.save(tmp_path / "run")
    saved = ("result.json", "summary.md", "report.html")
    said = {name: (tmp_path / "run" / name).read_text(encoding="utf-8") for name in saved}
    for form in ("html", "md", "json", "csv"):
        said[form] = leanplan("report", "run", "--format", form, cwd=tmp_path).stdout
    said["html"] = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    said |= {
        "notebook": answer._repr_html_(),
        "prompt": repr(answer),
        "junit": junit.render(replace(answer, run_id=f"see {secret}")),
    }
    for name, text in said.items():
        assert len(text) > 500, name
        assert bare not in text.replace("\\", ""), name  # Markdown's escapes must hide nothing


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("report", "nothing-like-it"), "leanplan ls runs"),
        (("report", "damaged.json"), "damaged"),
        (("report", "other.json"), "another schema"),
        (("report", "endless.json"), "Infinity is not a number"),
        (("report", "--format", "docx"), "invalid choice"),
    ],
)
def test_what_cannot_be_reported_is_said_with_a_next_step(place: Path, argv: tuple[str, ...], message: str) -> None:
    (place / "damaged.json").write_text('{"run_id": ')
    whole = (place / "runs" / RUN / "result.json").read_text()
    (place / "endless.json").write_text(whole.replace('"wall_s": 529.0', '"wall_s": Infinity'))
    (place / "other.json").write_text('{"schema": 99}')
    done = leanplan(*argv, cwd=place)
    assert done.returncode == 2
    assert message in done.stderr and "hint: " in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["transformers", "llama_cpp"])
def test_the_commands_the_page_prints_lead_to_an_artefact_that_runs(tmp_path: Path, engine: str) -> None:
    from knowledge_base.types import Plan
    from planner.reading import read_model
    from planner.recipe import Recipe, write_recipe
    from planner.reports.html import answer as part
    from planner.reports.html._view import Row
    from planner.results import PlanResult
    from planner.tiny_models import make_tiny_model

    make_tiny_model(tmp_path / "model")
    digest = read_model(str(tmp_path / "model")).model.digest
    plan = Plan(model_digest=digest, engine=engine)
    write_recipe(tmp_path, Recipe(plan=plan, model="model", model_digest=digest))
    assert leanplan("build", "plan.json", "-o", "artefact", cwd=tmp_path).returncode == 0
    assert leanplan("verify", "artefact", cwd=tmp_path).returncode == 0
    row = Row(result=PlanResult(plan=plan), kind="recommended", points={}, predicted={})
    if engine == "llama_cpp":  # llama.cpp's server is not ours to install; the file it is given is there
        assert part._serve(row) == "llama-server -m artefact/model.gguf"
        assert (tmp_path / "artefact" / "model.gguf").is_file()
        return
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", part._serve(row)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (tokens,) = json.loads(done.stdout)
    assert len(tokens) == 16
