"""Engines in environments of their own: made by the real venv and pip, from wheels made here; run in a real candidate."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from worlds import ROOT, command, environment

from knowledge_base.engines import _environment
from knowledge_base.errors import BadInput, CandidateFailed, EnvironmentProblem
from knowledge_base.registry import engines
from knowledge_base.types import Environment
from planner import environments
from planner.isolation import Limits, Servers
from planner.isolation.environment import clean_environment

LIMITS = Limits(memory_bytes=1 << 30, time_s=120, disk_bytes=64 << 20)
# An engine whose library is only where it lives: it gives what the library says of where it was found.
ENGINE = '''
"""An engine that lives apart."""
from knowledge_base.engines import _environment
from knowledge_base.types import Engine, Environment

ENGINE = Engine(
    summary="lives apart", offers=frozenset({"batch"}), preload=("apart_library",), modules=("apart_library",),
    environment=Environment(requirements=("apart-library==1.0",), disk_bytes=10_000_000),
)

def find():
    return _environment.problem("apart", ENGINE)

def versions():
    return _environment.versions("apart", ("apart-library",))

def accepts(model):
    return None

def export(session, folder):
    raise NotImplementedError

def open_artefact(folder, runtime):
    import apart_library
    return apart_library.Running()
'''
LIBRARY = """
import importlib.util, sys

class Running:
    def memory(self):
        ours = sum(importlib.util.find_spec(name) is not None for name in ("torch", "transformers", "optuna", "rich"))
        return {"weights_bytes": 4711, "kv_cache_bytes": ours, "prefix": sys.prefix, "path": sys.path}

    def close(self):
        pass
"""


def wheel(folder: Path, name: str, version: str, code: str = "", *needs: str) -> None:
    """Write a wheel with one module, as pip installs it."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    requires = "".join(f"Requires-Dist: {need}\n" for need in needs)
    files = {
        f"{module}.py": code, f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }  # fmt: skip
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheels, and a folder of knowledge with the engine."""
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "known" / "engines").mkdir(parents=True)
    (folder / "known" / "engines" / "apart.py").write_text(ENGINE, encoding="utf-8")
    wheel(folder, "apart-library", "1.0", LIBRARY)
    wheel(folder, "apart-early", "1.0", "", "apart-helper")
    wheel(folder, "apart-helper", "1.0a1")
    wheel(folder, "apart-plain", "2.5")
    return folder


@pytest.fixture
def world(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of environments, in a world that knows the engine and installs from the shelf alone."""
    for name, value in variables(shelf, tmp_path / "homes").items():
        monkeypatch.setenv(name, value)
    return tmp_path / "homes"


def variables(shelf: Path, homes: Path) -> dict[str, str]:
    return {
        "LEANPLAN_KNOWLEDGE": str(shelf / "known"), _environment.VARIABLE: str(homes), "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": str(shelf),
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of environments where the engine's is made, as the command does it."""
    homes = tmp_path_factory.mktemp("made")
    done = doctor("--install", "apart", shelf=shelf, homes=homes)
    assert done.returncode == 0, done.stderr
    assert "about 9.54 MiB of disk" in done.stderr and "Installing collected packages: apart-library" in done.stderr
    (engine, place) = json.loads(done.stdout)
    assert (engine["check"], engine["state"], engine["found"]) == ("engine apart", "ok", "apart-library 1.0")
    assert place["found"].startswith("made, ") and "apart-library 1.0" in place["found"]
    return homes


def doctor(*argv: str, shelf: Path, homes: Path) -> subprocess.CompletedProcess[str]:
    world = environment(**variables(shelf, homes))
    return subprocess.run(
        command("doctor", "--json", *argv), env=world, cwd=homes, capture_output=True, text=True, timeout=250
    )


def changed(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
    """Let the engine ask for something else."""
    module = engines.get("apart")
    asked = replace(module.ENGINE.environment, **facts)
    monkeypatch.setattr(module, "ENGINE", replace(module.ENGINE, environment=asked))


# ---------------------------------------------------------------- what engines declare


def test_environments_are_pinned_exactly_and_told_apart_by_what_they_preload() -> None:
    apart = {name: m.ENGINE for name, m in engines.all().items() if m.ENGINE.environment}
    assert "vllm" in apart
    for name, engine in apart.items():
        assert all(re.fullmatch(r"[a-z0-9._-]+==\d+(\.\d+)*", r) for r in engine.environment.requirements), name
        assert engine.environment.disk_bytes > 10**6
        assert "torch" not in engine.preload, "or plans would be built there too"
    every = [m.ENGINE.preload for m in engines.all().values()]
    assert all(every.count(engine.preload) == 1 for engine in apart.values())


def test_only_an_engine_with_an_environment_gets_another_interpreter(world: Path) -> None:
    assert environments.interpreter(("apart_library",)) == world / "apart" / "bin" / "python"
    assert environments.interpreter(engines.get("llama_cpp").ENGINE.preload) == Path(sys.executable)
    assert environments.interpreter(()) == Path(sys.executable)


def test_places_follow_the_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(_environment.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert _environment.root() == tmp_path / "data" / "leanplan" / "environments"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert _environment.root() == Path.home() / ".local" / "share" / "leanplan" / "environments"
    monkeypatch.setenv(_environment.VARIABLE, str(tmp_path / "mine"))
    assert _environment.root() == tmp_path / "mine"
    told = clean_environment(tmp_path / "home")
    assert told["HOME"] == str(tmp_path / "home") and told[_environment.VARIABLE] == str(tmp_path / "mine")


# ---------------------------------------------------------------- making one


def test_a_candidate_runs_there_with_our_packages_and_none_of_our_libraries(
    made: Path, world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(_environment.VARIABLE, str(made))
    assert engines.get("apart").find() is None
    with Servers() as servers:
        with servers.start(
            ("apart_library",), folder=tmp_path / "work", limits=LIMITS, log=tmp_path / "log.txt"
        ) as candidate:
            told = candidate.call("open", {"folder": str(tmp_path), "engine": "apart", "runtime": {}}, timeout_s=60)
            executable = Path(f"/proc/{candidate.pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    assert told["memory"]["weights_bytes"] == 4711
    assert told["memory"]["kv_cache_bytes"] == 0, "torch, transformers, optuna and rich are ours, not its"
    assert told["memory"]["prefix"] == str(made / "apart") and executable.startswith(str(made))
    assert told["versions"] == {"apart-library": "1.0"} and told["torch_loaded"] is False
    here = [p for p in told["memory"]["path"] if "site-packages" in p]
    assert here and all(p.startswith(str(made)) for p in here)


def test_what_is_made_is_not_made_again(made: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_environment.VARIABLE, str(made))
    before = (made / "apart" / _environment.MARK).stat().st_mtime_ns
    assert environments.install("apart", tell=pytest.fail).startswith("apart is installed already")
    assert (made / "apart" / _environment.MARK).stat().st_mtime_ns == before


def test_with_other_pins_it_is_not_taken_for_whole(made: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_environment.VARIABLE, str(made))
    changed(monkeypatch, requirements=("apart-library==1.1",))
    (place,) = (p for p in environments.places() if p.name == "apart")
    assert place.state == "other versions" and place.bytes > 0
    assert "holds other versions than apart-library==1.1; leanplan doctor --install apart" in str(
        engines.get("apart").find()
    )


@pytest.mark.slow
def test_an_interrupted_one_is_half_made_and_the_same_command_goes_on(shelf: Path, tmp_path: Path) -> None:
    homes = tmp_path / "homes"
    world = environment(**variables(shelf, homes))
    line = command("doctor", "--install", "apart")
    process = subprocess.Popen(line, env=world, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (homes / "apart" / "bin").is_dir():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "interrupted" in str(process.communicate()[1])
    (place,) = (p for p in json.loads(doctor(shelf=shelf, homes=homes).stdout) if p["check"] == "environment apart")
    assert (place["state"], place["found"].partition(",")[0]) == ("warn", "half made")
    assert place["fix"] == "leanplan doctor --install apart, or --remove apart"
    again = doctor("--install", "apart", shelf=shelf, homes=homes)
    assert again.returncode == 0, again.stderr
    removed = doctor("--remove", "apart", shelf=shelf, homes=homes)
    assert removed.returncode == 0 and "removed apart: " in removed.stderr
    assert not (homes / "apart").exists()
    assert json.loads(removed.stdout)[1]["found"].startswith("not made")


def test_pips_own_reason_is_told(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, requirements=("apart-library==3.0",))
    with pytest.raises(EnvironmentProblem) as raised:
        environments.install("apart", tell=lambda text: None)
    assert raised.value.message.startswith("apart could not be installed: Could not find a version")
    assert "apart-library==3.0" in raised.value.message and "\n" not in raised.value.message
    assert environments.places()[0].state == "half made"
    wanted = environments.remove("apart")
    assert wanted.startswith("removed apart") and not (world / "apart").exists()


def test_a_pre_release_that_comes_along_is_refused(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_PRE", "1")
    changed(monkeypatch, requirements=("apart-early==1.0",))
    with pytest.raises(EnvironmentProblem, match=r"pre-releases for apart: apart-helper 1\.0a1"):
        environments.install("apart", tell=lambda text: None)
    assert not (world / "apart" / _environment.MARK).exists()


def test_too_little_disk_is_told_before_anything_is_made(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, disk_bytes=10**18)
    told: list[str] = []
    with pytest.raises(EnvironmentProblem, match=r"apart takes about .* is free"):
        environments.install("apart", tell=told.append)
    assert not (world / "apart").exists()
    assert "apart-library==1.0 into" in told[0] and "of disk" in told[0]


def test_two_at_once_are_refused(world: Path) -> None:
    with environments._alone("apart"):
        with pytest.raises(EnvironmentProblem, match="another process installs or removes apart"):
            environments.install("apart", tell=lambda text: None)
        with pytest.raises(EnvironmentProblem):
            world.joinpath("apart").mkdir()
            environments.remove("apart")


def test_without_its_interpreter_a_candidate_says_so(world: Path, tmp_path: Path) -> None:
    with Servers() as servers, pytest.raises(CandidateFailed, match="no interpreter at") as raised:
        servers.start(("apart_library",), folder=tmp_path / "work", limits=LIMITS, log=tmp_path / "log.txt")
    assert raised.value.kind == "engine_missing"


# ---------------------------------------------------------------- names and our own environment


@pytest.mark.parametrize("name", ["warp", "../apart", "", "-r"])
def test_what_cannot_be_installed_is_told_with_what_can(world: Path, name: str) -> None:
    with pytest.raises(BadInput, match="no such engine") as raised:
        environments.install(name, tell=pytest.fail)
    assert "apart" in raised.value.hint and "vllm" in raised.value.hint
    assert raised.value.exit_code == 2
    with pytest.raises(BadInput, match="no environment of its own") as raised:
        environments.remove(name)
    assert "apart" in raised.value.hint


def test_an_engine_of_ours_that_is_here_is_left_alone(world: Path) -> None:
    assert environments.install("llama_cpp", tell=pytest.fail) == "llama_cpp is installed already"


def test_beside_ours_a_package_is_installed_and_nothing_moves(
    made: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours is the made environment here, so that nothing of the one the tests run in changes."""
    home = made / "apart"
    site = next(home.glob("lib/python*/site-packages"))
    real = environments.metadata.distributions
    monkeypatch.setattr(environments.metadata, "distributions", lambda **more: real(path=[str(site)]))
    monkeypatch.setattr(sys, "executable", str(home / "bin" / "python"))
    told: list[str] = []
    environments._install_here(["apart-plain"], told.append)
    assert (site / "apart_plain.py").exists()
    assert "nothing that is installed there changes" in told[0]
    wheel(world.parent, "apart-mover", "1.0", "", "apart-library==1.1")
    monkeypatch.setenv("PIP_FIND_LINKS", f"{os.environ['PIP_FIND_LINKS']} {world.parent}")
    wheel(world.parent, "apart-library", "1.1")
    with pytest.raises(EnvironmentProblem, match=r"Cannot install apart-mover==1\.0"):
        environments._install_here(["apart-mover"], told.append)
    assert not (site / "apart_mover.py").exists(), "it would have moved apart-library 1.0"


def test_the_command_refuses_names_flags_together_and_offline(shelf: Path, tmp_path: Path) -> None:
    for argv, words in (
        (("--install", "warp"), "no such engine"), (("--install", "apart", "--remove", "apart"), "give one of them"),
        (("--install", "apart", "--offline"), "--offline forbids"), (("--remove", "transformers"), "no environment of its own"),
    ):  # fmt: skip
        done = doctor(*argv, shelf=shelf, homes=tmp_path)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
        assert json.loads(done.stdout)["error"]["exit_code"] == 2
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- a real engine apart


LLAMA = """
from dataclasses import replace

from knowledge_base.engines import _environment
from knowledge_base.engines.llama_cpp import ENGINE as OURS
from knowledge_base.engines.llama_cpp import accepts, export, open_artefact
from knowledge_base.types import Environment

ENGINE = replace(OURS, preload=("numpy", "knowledge_base.engines._llama_running", "xllamacpp"), environment=Environment(
    requirements={pins}, disk_bytes=200_000_000))

def find():
    return _environment.problem("llama_apart", ENGINE)

def versions():
    return _environment.versions("llama_apart", ("xllamacpp", "numpy"))
"""


@pytest.mark.slow
def test_llama_cpp_runs_in_an_environment_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real engine, numpy and nothing else installed; the same greedy tokens and losses as where ours are."""
    import numpy

    from knowledge_base.engines import llama_cpp
    from knowledge_base.techniques._loading import load_session
    from planner.reading import read_model

    text = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = tuple(line for line in text if line.partition("==")[0] in ("numpy", "xllamacpp", "gguf"))
    assert len(pins) == 3
    (tmp_path / "known" / "engines").mkdir(parents=True)
    (tmp_path / "known" / "engines" / "llama_apart.py").write_text(LLAMA.format(pins=pins), encoding="utf-8")
    monkeypatch.setenv("LEANPLAN_KNOWLEDGE", str(tmp_path / "known"))
    monkeypatch.setenv(_environment.VARIABLE, str(tmp_path / "homes"))
    fetched = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(tmp_path / "fetched"),
        *pins,
    ]
    if (done := subprocess.run(fetched, capture_output=True, text=True)).returncode:
        pytest.skip(f"pip reaches no registry with {', '.join(pins)}: {done.stderr.strip().splitlines()[-1]}")
    environments.install("llama_apart", tell=lambda line: None)

    source = ROOT / "models" / "tiny-lm"
    facts = read_model(str(source)).model
    session = load_session(source, facts, calibration=None, seed=0, workspace=tmp_path)
    session.storage["gguf_type"] = "q8_0"
    artefact = tmp_path / "artefact"
    llama_cpp.export(session, artefact)
    prompts = numpy.random.default_rng(0).integers(1, 4000, size=(4, 24)).astype(numpy.int32)
    numpy.save(tmp_path / "prompts.npy", prompts)
    numpy.save(tmp_path / "windows.npy", prompts)
    numpy.lib.format.open_memmap(tmp_path / "reference.npy", mode="w+", dtype=numpy.float16, shape=(4, 8, 4096)).flush()
    ours = llama_cpp.open_artefact(artefact, {"threads": 1})
    expected = [ours.generate([row.tolist()], 12).tokens[0] for row in prompts]
    losses = [float(-ours.log_probs(row.tolist())[range(23), row[1:]].mean()) for row in prompts]
    ours.close()

    limits = Limits(memory_bytes=4 << 30, time_s=250, disk_bytes=64 << 20)
    given = {"prompts": str(tmp_path / "prompts.npy"), "prompt_tokens": 24, "new_tokens": 12}
    preload = engines.get("llama_apart").ENGINE.preload
    with Servers() as servers:
        with servers.start(preload, folder=tmp_path / "work", limits=limits, log=tmp_path / "log.txt") as candidate:
            opened = {"folder": str(artefact), "engine": "llama_apart", "runtime": {"threads": 1}}
            told = candidate.call("open", opened, timeout_s=120)
            rows = candidate.call("tokens", given | {"count": 4}, timeout_s=120)["tokens"]
            block = given | {"batch": 2, "first": 0, "repetitions": 2}
            samples = candidate.call("block", block, timeout_s=120)["samples"]
            scored = {
                "windows": str(tmp_path / "windows.npy"), "reference": str(tmp_path / "reference.npy"), "first": 0, "count": 4,
                "write": True,
            }  # fmt: skip
            found = candidate.call("fidelity", scored, timeout_s=120)["loss"]
            maps = Path(f"/proc/{candidate.pid}/maps").read_text(encoding="utf-8")
            candidate.call("close", {}, timeout_s=60)
    assert told["versions"] == {p.partition("==")[0]: p.partition("==")[2] for p in pins if not p.startswith("gguf")}
    assert told["torch_loaded"] is False
    assert rows == expected and found == pytest.approx(losses, abs=1e-4)
    assert all(sample["tokens"] == [12, 12] for sample in samples)
    libraries = {line.rpartition(" ")[2] for line in maps.splitlines() if "site-packages" in line}
    assert libraries and all(path.startswith(str(tmp_path / "homes" / "llama_apart")) for path in libraries)


def test_an_environment_is_data() -> None:
    from knowledge_base.serde import plain, restore

    one = Environment(requirements=("a==1", "b==2"), disk_bytes=3)
    assert restore(Environment, json.loads(json.dumps(plain(one)))) == one
