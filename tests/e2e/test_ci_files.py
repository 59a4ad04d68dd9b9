"""The files that put leanplan into CI: read as a forge reads them, their scripts run as a runner runs them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from check_situations import SMALL, SPEC, check, figures, hostile, lock, make_place, situations

from knowledge_base.types import Plan
from planner.cli import build_parser, main
from planner.cli.init import CI, TEMPLATES
from planner.reports import check as formats

ROOT = Path(__file__).resolve().parents[2]
CHECK, COMMENT = (TEMPLATES / name for name in ("github_check.yml", "github_comment.yml"))
ACTION, HOOKS = ROOT / "action.yml", ROOT / ".pre-commit-hooks.yaml"
WORKFLOWS = (CHECK, COMMENT, ACTION)
SHA = "a" * 40


def read(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(path: Path) -> list[dict[str, Any]]:
    data = read(path)
    return [s for job in data.get("jobs", {"": data.get("runs")}).values() for s in job["steps"]]


# ---------------------------------------------------------------- what they say


@pytest.mark.rule("ci")
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_every_action_is_pinned_to_a_commit_and_says_its_version(path: Path) -> None:
    used = re.findall(r"uses: (\S+)(.*)", path.read_text(encoding="utf-8"))
    assert len(used) == sum("uses" in step for step in steps(path)) > 0
    for name, comment in used:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", name)
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment)


def test_one_action_has_one_pin() -> None:
    pins: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for step in steps(path):
            if "uses" in step:
                pins.setdefault(step["uses"].split("@")[0], set()).add(step["uses"])
    assert all(len(found) == 1 for found in pins.values())


@pytest.mark.rule("ci")
def test_permissions_are_the_least_that_does() -> None:
    one, two = read(CHECK), read(COMMENT)
    assert one["permissions"] == {"contents": "read"}
    assert all("permissions" not in job for job in one["jobs"].values())
    assert two["permissions"] == {}
    (job,) = two["jobs"].values()
    assert job["permissions"] == {"actions": "read", "pull-requests": "write"}


@pytest.mark.rule("ci")
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_nothing_a_stranger_wrote_becomes_part_of_a_script(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "pull_request_target" not in text
    assert "secrets." not in text
    for step in steps(path):
        assert "${{" not in step.get("run", "")
        assert "${{" not in step.get("with", {}).get("script", "")


@pytest.mark.rule("ci")
def test_only_the_workflow_without_rights_runs_the_pull_request() -> None:
    # yaml reads the key `on` as the boolean it is in YAML 1.1
    assert read(CHECK)[True] == "pull_request"
    assert read(COMMENT)[True] == {"workflow_run": {"workflows": [read(CHECK)["name"]], "types": ["completed"]}}
    used = [step.get("uses", "run").split("@")[0] for step in steps(COMMENT)]
    assert used == ["actions/download-artifact", "actions/github-script"]
    (checkout,) = (s for s in steps(CHECK) if "checkout" in s.get("uses", ""))
    assert checkout["with"]["persist-credentials"] is False
    for path in (CHECK, COMMENT):
        assert all(0 < job["timeout-minutes"] <= 60 for job in read(path)["jobs"].values())


def test_what_one_workflow_leaves_the_other_takes() -> None:
    left = {s["with"]["name"] for path in (CHECK, ACTION) for s in steps(path) if "upload" in s.get("uses", "")}
    (taken,) = (s["with"]["name"] for s in steps(COMMENT) if "download" in s.get("uses", ""))
    assert left == {taken}


@pytest.mark.parametrize("name", sorted({name for files in CI.values() for name in files}))
def test_every_leanplan_command_in_a_template_is_one(name: str) -> None:
    lines = re.findall(
        r"^\s*(?:- )?(?:run: )?leanplan (.+)$", (TEMPLATES / name).read_text(encoding="utf-8"), re.MULTILINE
    )
    for line in lines:
        build_parser().parse_args(shlex.split(re.sub(r"\$\{[^}]*\}", "", line)))
    assert lines or name == "github_comment.yml"


# ---------------------------------------------------------------- init


@pytest.mark.parametrize("ci", CI)
def test_init_writes_them_and_overwrites_nothing(ci: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(tmp_path), "--ci", ci]) == 0
    for name, target in CI[ci].items():
        written = (tmp_path / target).read_text(encoding="utf-8")
        assert written.replace(f"leanplan=={version('leanplan')}", "leanplan") == (TEMPLATES / name).read_text("utf-8")
    assert any("pip install leanplan==" in (tmp_path / target).read_text("utf-8") for target in CI[ci].values())
    (tmp_path / "leanplan.yaml").unlink()
    first = tmp_path / next(iter(CI[ci].values()))
    first.write_text("mine")
    assert main(["init", str(tmp_path), "--ci", ci]) == 2
    assert first.read_text() == "mine"
    assert not (tmp_path / "leanplan.yaml").exists()


def test_the_wheel_carries_the_templates() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = settings["package-data"]["planner.cli"]
    carried = {p.name for pattern in patterns for p in TEMPLATES.parent.glob(pattern)}
    assert carried == {name for files in CI.values() for name in files}


# ---------------------------------------------------------------- their scripts


def bash(script: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a step's script as GitHub's runner does: bash, stopping at the first error."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("GITHUB_", "CI_"))}
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script], cwd=cwd, capture_output=True, text=True,
        env={**inherited, "PATH": path, "PYTHONPATH": str(ROOT), "RUNNER_TEMP": str(cwd), **environment}, timeout=200,
    )  # fmt: skip


def git(cwd: Path, *argv: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *who, *argv], cwd=cwd, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository whose last commit changed the lock: before it the unchanged model, now 8-bit weights."""
    folder = tmp_path / "repository"
    folder.mkdir()
    make_place(folder, lock(Plan(model_digest="x", engine="transformers")))
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "main")
    now = replace_lock(folder)
    assert now.steps
    git(folder, "commit", "--quiet", "-am", "pull request")
    return folder


def replace_lock(folder: Path) -> Plan:
    from knowledge_base.types import Step
    from planner.lock import write_lock

    plan = Plan(model_digest="x", engine="transformers", steps=(Step("weight_int8"),))
    write_lock(folder / "leanplan.lock", lock(plan))
    return plan


def test_the_workflow_compares_with_the_main_branch(repository: Path) -> None:
    (script,) = (s["run"] for s in steps(CHECK) if s.get("name") == "leanplan check")
    done = bash(script, repository, GITHUB_STEP_SUMMARY=str(repository / "summary"))
    assert done.returncode == 0, done.stderr
    comment = (repository / "leanplan-comment/comment.md").read_text(encoding="utf-8")
    assert "changed: with weight\\_int8" in comment
    assert (repository / "summary").read_text(encoding="utf-8") == comment


def test_the_workflow_works_before_there_is_a_lock(repository: Path) -> None:
    git(repository, "rm", "--quiet", "leanplan.lock")
    git(repository, "commit", "--quiet", "-m", "no lock")
    git(repository, "commit", "--quiet", "--allow-empty", "-m", "pull request")
    (script,) = (s["run"] for s in steps(CHECK) if s.get("name") == "leanplan check")
    done = bash(script, repository)
    assert done.returncode == 0, done.stderr
    assert "no lock to compare with" in (repository / "leanplan-comment/comment.md").read_text(encoding="utf-8")


def test_the_action_checks_and_passes_its_inputs_as_data(repository: Path) -> None:
    (repository / "a b; touch owned.yaml").write_text(SPEC)
    (script,) = (s["run"] for s in steps(ACTION) if "leanplan check" in s.get("run", ""))
    given = {"SPEC": "a b; touch owned.yaml", "ARGS": "--predict --comment-when always"}
    done = bash(script, repository, COMMENT="true", **given)
    assert done.returncode == 0, done.stderr
    assert not (repository / "owned.yaml").exists()
    assert (repository / "leanplan-comment/comment.md").is_file()
    shutil.rmtree(repository / "leanplan-comment")
    assert bash(script, repository, COMMENT="false", **given).returncode == 0
    assert not (repository / "leanplan-comment").exists()


def test_the_hook_validates_every_spec_it_is_given(repository: Path) -> None:
    (hook,) = yaml.safe_load(HOOKS.read_text(encoding="utf-8"))
    chosen = [
        path for path in ("leanplan.yaml", "ci/leanplan-small.yml", ".github/workflows/leanplan.yml", "other.yaml")
        if re.search(hook["files"], path) and not re.search(hook["exclude"], path)
    ]  # fmt: skip
    assert chosen == ["leanplan.yaml", "ci/leanplan-small.yml"]
    good, bad = "leanplan.yaml", "leanplan-bad.yaml"
    (repository / bad).write_text("version: 1\n")
    for specs, code in (([good, good], 0), ([bad, good], 2), ([good, bad], 2)):
        done = bash(f"{hook['entry']} {shlex.join(specs)}", repository)
        assert done.returncode == code, done.stderr
        assert not done.stdout


CURL = """#!/bin/sh
printf '%s\\n' "$@" > asked
"""


def test_the_job_that_posts_a_note_in_gitlab_asks_for_what_its_api_takes(tmp_path: Path) -> None:
    page = (ROOT / "docs/how-to/ci.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```text\n(leanplan-note:.*?)^```$", page, re.MULTILINE | re.DOTALL)
    job = yaml.safe_load(text)["leanplan-note"]
    assert job["needs"] == list(read(TEMPLATES / "gitlab.yml"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/curl").write_text(CURL)
    (tmp_path / "bin/curl").chmod(0o755)
    given = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "LEANPLAN_NOTES": "secret", "CI_API_V4_URL": "https://git.example/api/v4",
        "CI_MERGE_REQUEST_PROJECT_ID": "5", "CI_MERGE_REQUEST_IID": "12",
    }  # fmt: skip
    script = "\n".join(job["script"])
    assert subprocess.run(["sh", "-ec", script], cwd=tmp_path, env=given, timeout=60).returncode == 0
    assert not (tmp_path / "asked").exists()  # there was nothing to say
    (tmp_path / "leanplan-comment.md").write_text("text")
    assert subprocess.run(["sh", "-ec", script], cwd=tmp_path, env=given, timeout=60).returncode == 0
    *_, header, _, body, address = (tmp_path / "asked").read_text().splitlines()
    assert (header, body) == ("PRIVATE-TOKEN: secret", "body=<leanplan-comment.md")
    assert address == "https://git.example/api/v4/projects/5/merge_requests/12/notes"


# ---------------------------------------------------------------- the job that posts

RUNNER = """
const fs = require('fs')
const facts = JSON.parse(fs.readFileSync(0, 'utf8'))
const calls = []
const record = name => async given => { calls.push([name, given]); return { data: facts[name] } }
const github = {
  paginate: async (method, given) => (await method(given)).data,
  rest: {
    pulls: { list: record('pulls') },
    actions: { listWorkflowRunArtifacts: record('artifacts') },
    issues: {
      listComments: record('comments'), createComment: record('create'), updateComment: record('update'), deleteComment: record('delete'),
    },
  },
}
const context = { repo: { owner: 'o', repo: 'r' }, payload: { workflow_run: facts.run } }
const core = { info: text => calls.push(['info', text]) }
const AsyncFunction = Object.getPrototypeOf(async () => {}).constructor
new AsyncFunction('github', 'context', 'core', 'require', facts.script)(github, context, core, require)
  .then(() => console.log(JSON.stringify(calls)), error => { console.error(error.message); process.exit(1) })
"""
needs_node = pytest.mark.skipif(
    shutil.which("node") is None, reason="node is not installed: the posting script cannot run"
)


PULL = {"number": 12, "head": {"sha": SHA, "repo": {"id": 7}}}


def post(
    folder: Path, *comments: dict[str, Any], pulls: Sequence[dict[str, Any]] = (PULL,), left: int = 0, **more: Any
) -> list[list[Any]] | str:
    """Run the posting script on what was downloaded; return what it did, or why it refused."""
    (script,) = (s["with"]["script"] for s in steps(COMMENT) if "script" in s.get("with", {}))
    run = {
        "id": 1, "head_sha": SHA, "head_branch": "mine", "head_repository": {"id": 7, "owner": {"login": "stranger"}},
        "conclusion": "success", **more,
    }  # fmt: skip
    facts = {"script": script, "run": run, "pulls": pulls, "comments": comments, "artifacts": {"total_count": left}}
    done = subprocess.run(
        ["node", "-e", RUNNER], input=json.dumps(facts), cwd=folder, capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        return done.stderr.strip()
    asked, *calls = json.loads(done.stdout)
    assert asked[0] == "pulls" and (asked[1]["head"], asked[1]["state"]) == ("stranger:mine", "open")
    return [[name, given] for name, given in calls if name not in ("comments", "artifacts")]


def leave(folder: Path, comment: str) -> None:
    (folder / "leanplan-comment").mkdir(exist_ok=True)
    (folder / "leanplan-comment/comment.md").write_text(comment, encoding="utf-8")


@needs_node
@pytest.mark.row(72)
@pytest.mark.parametrize("situation", situations())
def test_every_comment_leanplan_writes_is_posted(situation: str, tmp_path: Path) -> None:
    text = formats.render("markdown", situations()[situation])
    leave(tmp_path, text)
    assert post(tmp_path) == [["create", {"owner": "o", "repo": "r", "issue_number": 12, "body": text}]]


@needs_node
def test_one_comment_is_kept_up_to_date_and_goes_when_there_is_nothing_to_say(tmp_path: Path) -> None:
    text = formats.render("markdown", check(figures(), lock=lock(SMALL)))
    stranger = {"id": 1, "user": {"login": "someone"}, "body": text}
    mine = {"id": 2, "user": {"login": "github-actions[bot]"}, "body": text.replace("✅", "❌")}
    other = {"id": 3, "user": {"login": "github-actions[bot]"}, "body": "<!-- leanplan:another.yaml -->\n"}
    leave(tmp_path, text)
    assert post(tmp_path, stranger, other, mine) == [
        ["update", {"owner": "o", "repo": "r", "comment_id": 2, "body": text}]
    ]
    assert post(tmp_path, stranger)[0][0] == "create"
    (tmp_path / "leanplan-comment/comment.md").unlink()
    assert post(tmp_path, stranger, mine) == [["delete", {"owner": "o", "repo": "r", "comment_id": 2}]]
    assert post(tmp_path, stranger) == []


@needs_node
@pytest.mark.rule("ci")
def test_only_the_pull_request_of_the_run_is_commented(tmp_path: Path) -> None:
    text = formats.render("markdown", check(figures()))
    leave(tmp_path, text)
    (tmp_path / "leanplan-comment/number").write_text("13\n")  # what is downloaded does not say where to post
    assert [call[1]["issue_number"] for call in post(tmp_path, pulls=[PULL])] == [12]
    pushed_since = PULL | {"head": {"sha": "b" * 40, "repo": {"id": 7}}}
    another_fork = PULL | {"head": {"sha": SHA, "repo": {"id": 8}}}
    deleted_fork = PULL | {"head": {"sha": SHA, "repo": None}}
    for pulls in ([], [pushed_since], [another_fork], [deleted_fork]):
        assert post(tmp_path, pulls=pulls) == [["info", "0 open pull requests are what that run checked"]]
    assert post(tmp_path, pulls=[PULL, PULL | {"number": 13}])[0][0] == "info"


@needs_node
def test_a_comment_stays_when_nobody_knows_better(tmp_path: Path) -> None:
    mine = {"id": 2, "user": {"login": "github-actions[bot]"}, "body": "<!-- leanplan:leanplan.yaml -->\n"}
    failed = post(tmp_path, mine, conclusion="failure")
    assert failed == [["info", "the check did not get far enough to say anything"]]
    assert post(tmp_path, mine, left=1) == "the comment is there and was not downloaded"


TAG = "<!-- leanplan:leanplan.yaml -->\n"


@needs_node
@pytest.mark.rule("ci")
@pytest.mark.parametrize(
    "text",
    [
        "no tag", "<!-- leanplan:../x y -->\n", TAG + "<img src=x>", TAG + "<!-- leanplan:b -->", TAG + "@team", TAG + "[a](b)",
        TAG + "https://evil.example", TAG + "www.evil.example", TAG + "#1", TAG + "[a]: //evil.example", TAG + "&#64;team",
        TAG + "x" * 65_000, TAG + "x" * 260_000, TAG + "<details onclick=x>",
    ],
)  # fmt: skip
def test_what_leanplan_would_not_write_is_not_posted(text: str, tmp_path: Path) -> None:
    leave(tmp_path, text)
    assert str(post(tmp_path)).startswith("comment.md: ")


@needs_node
@pytest.mark.rule("ci")
def test_a_link_to_a_file_of_the_runner_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "leanplan-comment").mkdir()
    (tmp_path / "secret").write_text(formats.render("markdown", hostile()))
    (tmp_path / "leanplan-comment/comment.md").symlink_to(tmp_path / "secret")
    assert str(post(tmp_path)).startswith("comment.md: not a file")
