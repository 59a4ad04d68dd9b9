"""What `leanplan export` writes, character for character, for names that need every kind of quoting."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from goldens import accepted
from served import artefact
from worlds import leanplan

from knowledge_base.engines._pinning import chosen
from knowledge_base.errors import BadInput, ExitCode
from knowledge_base.types import Plan, Step
from planner import building
from planner.serving import exports
from planner.serving.exporting import write

HERE = Path(__file__).parent / "exports"
HOSTILE = 'it\'s "a" $HOME `model` \\ 100% {{x}} #é'
MANIFEST = {
    "digest": "d" * 64, "runtime": {"threads": 2, "batch": 4}, "files": {"config.json": {}, "model.safetensors": {}},
    "versions": {"torch": "2.13.0+cpu", "transformers": "5.23.0", "'; rm -rf /": "1"},
}  # fmt: skip


def deployment(folder: Path, **changes: object) -> exports.Deployment:
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    plain = exports.Deployment(
        folder=folder, out=Path("/srv/my models/tiny"), model="tiny-lm", plan=Plan(model_digest="toy", engine="transformers"),
        manifest=MANIFEST, peak_bytes=400_000_000, host="127.0.0.1", port=8000, drain_s=30.0, context_tokens=4096,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", exports.targets.names())
@pytest.mark.parametrize("kind", ["plain", "hostile"])
def test_files_are_as_accepted(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = exports.targets.get(name)
    monkeypatch.setattr("planner.serving.exports.systemd.program", lambda: ["/opt/lean plan/bin/leanplan"])
    monkeypatch.setattr("planner.serving.exports.compose.PYTHON", "3.11")
    changes: dict[str, object] = {}
    if kind == "hostile":
        changes = {"model": HOSTILE, "out": Path("/srv") / HOSTILE.replace("/", ""), "peak_bytes": None, "host": "::"}
    if name == "llama_cpp":
        changes |= {
            "folder": artefact("llama_cpp", threads=2, batch=4),
            "plan": Plan(model_digest="toy", engine="llama_cpp"),
        }
        changes |= {"manifest": {**MANIFEST, "files": {"model.gguf": {}}, "versions": {"xllamacpp": "2026.10.11549"}}}
    one = replace(deployment(tmp_path), **changes)  # type: ignore[arg-type]
    assert target.refuses(one) is None
    for file, text in target.files(one).items():
        assert text == accepted(HERE / f"{name}.{kind}.{file.replace(one.plan.id, 'ID')}", text)


def test_compose_starts_the_very_words(tmp_path: Path) -> None:
    one = deployment(tmp_path, model=HOSTILE)
    service = yaml.safe_load(exports.targets.get("compose").files(one)["compose.yaml"])["services"]["model"]
    command = [word.replace("$$", "$") for word in service["command"]]  # what Compose makes of it
    assert command[command.index("--name") + 1] == HOSTILE
    assert service["mem_limit"] == "477m"  # 400 MB and a quarter more, in whole MiB
    assert service["user"] != "root" and service["read_only"] and service["cap_drop"] == ["ALL"]


@pytest.mark.parametrize("name", ["llama_cpp", "vllm"])
def test_a_script_starts_the_very_words(name: str, tmp_path: Path) -> None:
    folder = artefact("llama_cpp", threads=2, batch=4) if name == "llama_cpp" else tmp_path
    one = replace(deployment(tmp_path, model=HOSTILE, out=tmp_path / "out"), folder=folder)
    (tmp_path / "show").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "show").chmod(0o755)
    script = tmp_path / "serve.sh"
    script.write_text(exports.targets.get(name).files(one)["serve.sh"])
    done = subprocess.run(
        ["sh", str(script)], capture_output=True, text=True, cwd="/",
        env={"PATH": "/usr/bin:/bin", "LLAMA_SERVER": str(tmp_path / "show"), "VLLM": str(tmp_path / "show")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert HOSTILE in done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("model", ["tiny-lm", HOSTILE])
def test_systemd_finds_no_fault_with_the_unit(model: str, tmp_path: Path) -> None:
    program = tmp_path / "lean plan"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    one = deployment(tmp_path, model=model, out=tmp_path / model.replace("/", ""))
    text = exports.targets.get("systemd").unit(one, program=[str(program)])
    unit = tmp_path / "leanplan-x.service"
    unit.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    unit.write_text(text.replace("MemoryMax=", "MemoryMax=lots"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert "Invalid memory limit" in done.stderr  # it does look


@pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode != 0,
    reason="docker compose is not installed",
)
def test_docker_finds_no_fault_with_the_compose_file(tmp_path: Path) -> None:
    one = deployment(tmp_path, model=HOSTILE)
    (tmp_path / "compose.yaml").write_text(exports.targets.get("compose").files(one)["compose.yaml"])
    (tmp_path / "artefact").mkdir()
    done = subprocess.run(["docker", "compose", "config"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["services"]["model"]["command"][-5:-4] != []


@pytest.mark.parametrize(
    ("to", "plan", "changes", "why"),
    [
        ("vllm", Plan(model_digest="x", engine="llama_cpp"), {}, "made for the llama_cpp engine"),
        ("vllm", Plan(model_digest="x", engine="transformers", steps=(Step("weight_int8", {}),)), {}, "step weight_int8"),
        (
            "vllm", Plan(model_digest="x", engine="transformers", steps=(Step("drop_layers", {}), Step("kv_cache_quantised", {"bits": 8}))),
            {}, "step kv_cache_quantised(bits=8)",
        ),
        ("vllm", Plan(model_digest="x", engine="transformers"), {"files": {"config.json": {}, "structure.json": {}}}, "structure.json"),
        ("vllm", Plan(model_digest="x", engine="transformers"), {"runtime": {"warp": 9}}, "no setting for `warp`"),
        ("llama.cpp", Plan(model_digest="x", engine="transformers"), {}, "holds no GGUF file"),
        ("llama.cpp", Plan(model_digest="x", engine="llama_cpp"), {"files": {"model.gguf": {}}, "runtime": {"warp": 9}}, "`warp`"),
    ],
)  # fmt: skip
def test_what_cannot_be_deployed_there_says_what_is_in_the_way(
    to: str, plan: Plan, changes: dict[str, object], why: str, tmp_path: Path
) -> None:
    said = exports.target(to).refuses(deployment(tmp_path, plan=plan, manifest={**MANIFEST, **changes}))
    assert said is not None and why in said


def test_plans_that_stay_plain_checkpoints_go_to_vllm(tmp_path: Path) -> None:
    steps = (Step("drop_layers", {}), Step("prompt_lookup", {}), Step("batch_size", {}))
    plan = Plan(model_digest="x", engine="transformers", steps=steps)
    one = deployment(tmp_path, plan=plan, manifest={**MANIFEST, "runtime": {"lookup_tokens": 4, "batch": 8}})
    assert exports.target("vllm").refuses(one) is None
    script = exports.target("vllm").files(one)["serve.sh"]
    assert '"num_speculative_tokens": 4' in script and "--max-num-seqs 8" in script and "--max-model-len 2048" in script


def test_choices_of_the_service_become_flags(tmp_path: Path) -> None:
    steps = (Step("prefix_caching", {}), Step("chunked_prefill", {"tokens": 128}), Step("batch_size", {"count": 8}))
    runtime = {"prefix_cache": True, "prefill_chunk": 128, "batch": 8}

    def script(name: str, engine: str, runtime: dict[str, object]) -> list[str]:
        files = {"model.gguf": {}} if name == "llama.cpp" else MANIFEST["files"]
        folder = artefact("llama_cpp", threads=2, batch=4) if name == "llama.cpp" else tmp_path
        plan = Plan(model_digest="x", engine=engine, steps=steps)
        manifest = {**MANIFEST, "runtime": runtime, "files": files}
        one = replace(deployment(tmp_path, plan=plan, manifest=manifest), folder=folder)
        assert exports.target(name).refuses(one) is None
        return exports.target(name).files(one)["serve.sh"].replace("\\\n", "").split()

    told = script("llama.cpp", "llama_cpp", runtime)
    assert {"--cache-prompt", "--batch-size", "--parallel"} <= set(told) and "--no-cache-prompt" not in told
    assert told[told.index("--batch-size") + 1] == told[told.index("--ubatch-size") + 1] == "128"
    plain = script("llama.cpp", "llama_cpp", {"batch": 8})
    assert "--no-cache-prompt" in plain and "--batch-size" not in plain  # as it was measured
    told = script("vllm", "vllm", runtime)
    assert {"--enable-prefix-caching", "--enable-chunked-prefill"} <= set(told)
    assert told[told.index("--max-num-batched-tokens") + 1] == "128" and told[told.index("--max-num-seqs") + 1] == "8"
    assert "--no-enable-prefix-caching" in script("vllm", "vllm", {"batch": 8})
    own = script("vllm", "transformers", {"batch": 8})
    assert not [word for word in own if word.startswith("--") and "prefix" in word]  # vLLM's own choice


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[2J", "\u2028"])
def test_names_that_nothing_can_quote_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="control character"):
        exports.require_plain(name, "the name")
    text = exports.targets.get("compose").files(
        deployment(tmp_path, plan=Plan(model_digest=name, engine="transformers"))
    )
    assert name not in text["compose.yaml"]


def test_a_folder_is_written_whole_and_readable_by_who_serves(tmp_path: Path) -> None:
    from knowledge_base.serde import restore

    folder = artefact("llama_cpp", threads=1, batch=2)
    manifest = building.read_manifest(folder)
    plan = restore(Plan, manifest["plan"])
    one = replace(deployment(tmp_path), folder=folder, out=tmp_path / "out", manifest=manifest, plan=plan)
    written = write(exports.target("compose"), one)
    assert not building.verify(tmp_path / "out" / exports.ARTEFACT)
    there = {path.relative_to(one.out).as_posix(): path.stat() for path in one.out.rglob("*") if path.is_file()}
    assert {name: facts.st_size for name, facts in there.items()} == written
    assert all(facts.st_mode & 0o044 == 0o044 for facts in there.values())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_command(tmp_path: Path) -> None:
    folder = str(artefact("llama_cpp", threads=1, batch=2))
    done = leanplan("export", folder, "--to", "llama.cpp", "-o", "out dir", "--json", cwd=tmp_path)
    assert done.returncode == ExitCode.DONE, done.stderr
    told = json.loads(done.stdout)
    assert told["files"] == ["model.gguf", "serve.sh"] and told["memory_limit_bytes"] is None
    again = leanplan("export", folder, "--to", "llama.cpp", "-o", "out dir", cwd=tmp_path)
    assert again.returncode == ExitCode.BAD_INPUT and "exists and is not empty" in again.stderr
    refused = leanplan("export", folder, "--to", "vllm", "-o", "other", cwd=tmp_path)
    assert refused.returncode == ExitCode.BAD_INPUT and "vllm cannot serve this plan" in refused.stderr
    unknown = leanplan("export", folder, "--to", "llama.cp", "-o", "other", cwd=tmp_path)
    assert unknown.returncode == ExitCode.BAD_INPUT and "Did you mean" in unknown.stderr
    assert not (tmp_path / "other").exists()


def test_a_script_keeps_threads_where_they_were_measured(tmp_path: Path) -> None:
    manifest = {**MANIFEST, "runtime": {"threads": 1, "pinned": True}}
    one = replace(deployment(tmp_path), folder=artefact("llama_cpp", threads=2, batch=4), manifest=manifest)
    script = exports.targets.get("llama_cpp").files(one)["serve.sh"]
    assert f"--cpu-mask {1 << chosen(1)[0]:x} " in script and "--cpu-strict 1 " in script
