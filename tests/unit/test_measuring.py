"""Building, opening and measuring real artefacts of a tiny model, in both engines; and what is not believed."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import threading
from dataclasses import replace

import numpy
import pytest

from knowledge_base import registry
from knowledge_base.errors import CandidateFailed
from knowledge_base.types import Device, Figure, Hardware, Model, Plan, Step, Workload
from planner import building, energy, fidelity, measuring
from planner.isolation import Limits, Servers
from planner.isolation.worker import compare, rounded
from planner.locks import measurement_lock
from planner.tiny_models import make_tiny_model

LIMITS = Limits(memory_bytes=6 << 30, time_s=240, disk_bytes=1 << 30)
WORKLOAD = Workload(prompt_tokens=16, output_tokens=6)
SHORT = measuring.Protocol(requests=10, least_s=0.05, most_s=2.0, blocks=4, block_s=0.05, blocks_s=20.0)
ONE_THREAD = Step("thread_count", {"count": 1})  # threads that outnumber the free cores wait for each other
HARDWARE = Hardware(
    name="here",
    devices=(Device(name="cpu", kind="cpu", memory_bytes=8 << 30, memory_bytes_per_s=2e10, flop_per_s={}, cores=os.cpu_count()),),
    host_memory_bytes=8 << 30,
    memory_limit_bytes=8 << 30,
    price_usd_per_h=0.1,
    grid_gco2e_per_kwh=400.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def servers():
    with Servers() as servers:
        yield servers


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A tiny llama, its facts, prompts and held-out windows."""
    root = tmp_path_factory.mktemp("model")
    folder = make_tiny_model(root / "llama", "llama")
    config = json.loads((folder / "config.json").read_text())
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    model = Model(
        name="tiny", source=str(folder), digest="d" * 64, architecture="llama", layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"], heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"],
        head_size=head_size, ffn_size=config["intermediate_size"], vocab_size=config["vocab_size"],
        max_context_tokens=config["max_position_embeddings"], params_total=1, params_active=1, linear_params=1,
        embedding_params=1, tied_embeddings=bool(config.get("tie_word_embeddings")),
        attention_layers=config["num_hidden_layers"], weight_dtype="float32",
        weight_bytes=(folder / "model.safetensors").stat().st_size,
    )  # fmt: skip
    rng = numpy.random.default_rng(0)
    numpy.save(root / "prompts.npy", rng.integers(1, model.vocab_size, (32, 16)).astype(numpy.int32))
    numpy.save(root / "windows.npy", rng.integers(1, model.vocab_size, (8, 32)).astype(numpy.int32))
    return root, folder, model


@pytest.fixture(scope="module")
def artefacts(servers, given):
    """Build each plan once."""
    root, folder, model = given
    made: dict[Plan, building.BuildResult] = {}

    def build(engine: str, *steps: Step) -> building.BuildResult:
        plan = Plan(model_digest=model.digest, engine=engine, steps=steps)
        if plan not in made:
            made[plan] = building.build(
                servers, plan, model, model_folder=folder, out=root / "artefacts" / plan.id, limits=LIMITS,
                workspace=root / "work" / plan.id, log=root / "logs" / f"{plan.id}.txt",
            )  # fmt: skip
        return made[plan]

    return build


@pytest.fixture
def opened(servers, given, tmp_path):
    """Open an artefact in a candidate; all are stopped at the end."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def open_(built, **changes):
            engine = building.read_manifest(built.folder)["engine"]
            preload = registry.engines.get(engine).ENGINE.preload
            name = built.folder.name
            candidate = servers.start(preload, folder=tmp_path / name, limits=LIMITS, log=tmp_path / f"{name}.txt")
            stack.enter_context(candidate)
            return measuring.open_artefact(candidate, built.folder, WORKLOAD, given[0] / "prompts.npy", **changes)

        yield open_


def heldout(given, tmp_path):
    root, _, model = given
    return fidelity.Heldout(
        windows=root / "windows.npy", count=8, positions=20, vocabulary=model.vocab_size, reference=tmp_path / "ref.npy"
    )


# ---------------------------------------------------------------- artefacts


def test_an_artefact_is_whole_and_known_by_its_digest(artefacts, given):
    built = artefacts("transformers")
    assert building.verify(built.folder) == []
    manifest = building.read_manifest(built.folder)
    assert manifest["digest"] == built.digest == building.artefact_digest(manifest)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(manifest["files"])
    assert built.bytes == sum(p.stat().st_size for p in built.folder.iterdir() if p.name != building.MANIFEST)
    assert built.peak_bytes > 1 << 20
    assert not (given[0] / "work" / built.folder.name).exists()


@pytest.mark.slow
def test_building_again_gives_the_same_digest(artefacts, servers, given, tmp_path):
    _, folder, model = given
    step = Step("weight_dtype", {"dtype": "bfloat16"})
    first = artefacts("transformers", step)
    plan = Plan(model_digest=model.digest, engine="transformers", steps=(step,))
    again = building.build(
        servers, plan, model, model_folder=folder, out=tmp_path / "again", limits=LIMITS,
        workspace=tmp_path / "work", log=tmp_path / "log.txt",
    )  # fmt: skip
    assert again.digest == first.digest != artefacts("transformers").digest
    assert 0.4 < first.bytes / artefacts("transformers").bytes < 0.8


def tamper_byte(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


def edit_manifest(folder, **changes):
    path = folder / building.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.row(20)
@pytest.mark.promise("P10")
@pytest.mark.rule("paths")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (tamper_byte, "model.safetensors: its SHA-256 is not the manifest's"),
        (lambda f: os.truncate(f / "model.safetensors", 100), "model.safetensors: 100 bytes"),
        (lambda f: (f / "config.json").unlink(), "config.json: missing"),
        (lambda f: (f / "extra.py").write_text("x"), "extra.py: not in the manifest"),
        (lambda f: ((f / "config.json").rename(f.parent / "c"), (f / "config.json").symlink_to(f.parent / "c")), "config.json: a link"),
        (lambda f: os.link(f / "config.json", f.parent / "hard"), "config.json: shares its content"),
        (lambda f: os.mkfifo(f / "pipe"), "pipe: not a plain file"),
        (lambda f: edit_manifest(f, runtime={"threads": 99}), "its digest does not match"),
        (lambda f: edit_manifest(f, files=None), "leanplan.json is damaged"),
        (lambda f: (f / "leanplan.json").write_text("{"), "leanplan.json is damaged"),
        (lambda f: (f / "leanplan.json").unlink(), "no leanplan.json"),
        (lambda f: shutil.rmtree(f), "not a folder"),
    ],
)  # fmt: skip
def test_a_changed_artefact_is_noticed(artefacts, tmp_path, damage, words):
    copy = shutil.copytree(artefacts("transformers").folder, tmp_path / "copy")
    assert building.verify(copy) == []
    damage(copy)
    assert any(words in problem for problem in building.verify(copy))


@pytest.mark.promise("P3")
def test_a_build_that_fails_leaves_nothing(servers, given, tmp_path):
    _, folder, model = given
    with pytest.raises(CandidateFailed) as caught:
        building.build(
            servers, Plan(model_digest=model.digest, engine="transformers", steps=(Step("weight_dtype", {"dtype": "int3"}),)),
            model, model_folder=folder, out=tmp_path / "out", limits=LIMITS, workspace=tmp_path / "work", log=tmp_path / "log.txt",
        )  # fmt: skip
    assert caught.value.kind == "build_error"
    assert "int3" in caught.value.message
    assert not (tmp_path / "out").exists() and not (tmp_path / "work").exists()
    assert "Traceback" in (tmp_path / "log.txt").read_text()


@pytest.mark.row(20)
@pytest.mark.rule("paths")
def test_an_artefact_is_never_written_through_a_link(servers, given, tmp_path):
    """The folder artefacts are moved into was swapped for a link while the run went on."""
    _, folder, model = given
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "artefacts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CandidateFailed, match="refusing to follow a link out of the run folder"):
        building.build(
            servers, Plan(model_digest=model.digest, engine="transformers"), model, model_folder=folder,
            out=tmp_path / "artefacts" / "id", limits=LIMITS, workspace=tmp_path / "work", log=tmp_path / "log.txt",
        )  # fmt: skip
    assert list((tmp_path / "elsewhere").iterdir()) == []


# ---------------------------------------------------------------- measuring


@pytest.mark.parametrize("engine", ["transformers", "llama_cpp"])
def test_screening_gives_every_figure(artefacts, opened, engine):
    built = artefacts(engine, ONE_THREAD)
    job = opened(built)
    seen = measuring.screen(job, SHORT, HARDWARE)
    assert {
        "ttft_s", "tpot_s", "latency_s", "throughput_tokens_per_s", "peak_memory_bytes", "weights_bytes", "kv_cache_bytes",
        "artefact_bytes", "network_bytes_per_start", "energy_j_per_token", "carbon_gco2e_per_token", "cost_usd_per_token",
    } <= set(seen.figures)  # fmt: skip
    for name, figure in seen.figures.items():
        assert 0 < figure.low <= figure.value <= figure.high, name
    ttft, latency = seen.figures["ttft_s"], seen.figures["latency_s"]
    assert ttft.value < latency.value
    assert latency.n == seen.protocol["counted"] >= 3
    assert seen.figures["artefact_bytes"].value == built.bytes
    assert seen.figures["weights_bytes"].value < seen.figures["peak_memory_bytes"].value
    assert seen.figures["cost_usd_per_token"].source == "measured"
    measured = "measured" if energy.Counters().names else "modelled"
    assert seen.figures["energy_j_per_token"].source == seen.figures["carbon_gco2e_per_token"].source == measured
    json.dumps(dict(seen.protocol), allow_nan=False)


@pytest.mark.promise("P4")
def test_waiting_for_another_measurement_is_not_the_candidate_s_time(artefacts, servers, given, tmp_path):
    """The machine's lock is held elsewhere for longer than the candidate may live."""
    built = artefacts("llama_cpp", ONE_THREAD)
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with measurement_lock():
            held.set()
            free.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    limits, log = replace(LIMITS, time_s=5.0), tmp_path / "log.txt"
    preload = registry.engines.get("llama_cpp").ENGINE.preload
    with servers.start(preload, folder=tmp_path / "work", limits=limits, log=log) as candidate:
        job = measuring.open_artefact(candidate, built.folder, WORKLOAD, given[0] / "prompts.npy")
        threading.Timer(6.0, free.set).start()
        seen = measuring.screen(job, SHORT, HARDWARE)
    other.join()
    assert seen.protocol["lock_wait_s"] > 5
    assert seen.figures["tpot_s"].n >= 3


def test_llama_cpp_is_measured_without_torch(artefacts, opened):
    job = opened(artefacts("llama_cpp", ONE_THREAD))
    folder = str(job.folder.resolve())
    reply = job.candidate.call("open", {"folder": folder, "engine": "llama_cpp", "runtime": {}}, timeout_s=60)
    assert reply["torch_loaded"] is False


@pytest.mark.rule("measured in turns")
def test_interleaving_gives_paired_ratios(artefacts, opened):
    jobs = {"base": opened(artefacts("transformers", ONE_THREAD)), "other": opened(artefacts("llama_cpp", ONE_THREAD))}
    seen = measuring.interleave(jobs, "base", SHORT, HARDWARE)
    assert seen["base"].ratios == {}
    ratio = seen["other"].ratios["latency_s"]
    assert ratio.n == 4 and "too few to claim" in ratio.note
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.value == pytest.approx(statistics.geometric_mean(ratio.samples))
    assert {"ttft_s", "tpot_s", "latency_s", "throughput_tokens_per_s"} <= set(seen["other"].ratios)
    assert seen["base"].protocol["interleaved_blocks"] == 4
    assert all(s.figures["latency_s"].n >= 4 for s in seen.values())


def test_fidelity_of_the_same_weights_in_another_engine(artefacts, opened, given, tmp_path):
    held = heldout(given, tmp_path)
    baseline = fidelity.write_reference(opened(artefacts("transformers", ONE_THREAD)).candidate, held)
    assert baseline["agreement_ratio"].value == 1.0
    job = opened(artefacts("llama_cpp", ONE_THREAD))
    seen = fidelity.observe(job.candidate, held, baseline["perplexity"])
    assert seen.failure is None
    assert seen.figures["agreement_ratio"].value > 0.9
    assert abs(seen.figures["quality_loss_ratio"].value) < 0.02
    assert 0 <= seen.figures["kl_divergence_nats"].value < 0.01


def test_fidelity_of_the_baseline_to_itself_is_exact(artefacts, opened, given, tmp_path):
    held = heldout(given, tmp_path)
    job = opened(artefacts("transformers", ONE_THREAD))
    baseline = fidelity.write_reference(job.candidate, held)
    seen = fidelity.observe(job.candidate, held, baseline["perplexity"])
    assert seen.figures["agreement_ratio"].value == 1.0
    assert seen.figures["quality_loss_ratio"].value == 0.0
    assert seen.figures["kl_divergence_nats"].value < 1e-4
    assert seen.warnings == ()


@pytest.mark.row(54)
def test_collapse_is_a_failure_that_keeps_its_figures(artefacts, opened, given, tmp_path):
    held = heldout(given, tmp_path)
    job = opened(artefacts("transformers", ONE_THREAD))
    baseline = fidelity.write_reference(job.candidate, held)["perplexity"]
    far_better = replace(baseline, value=baseline.value / 20, samples=tuple(x - 3 for x in baseline.samples))
    seen = fidelity.observe(job.candidate, held, far_better)
    assert seen.failure is not None and seen.failure.kind == "quality_collapse"
    assert seen.figures["perplexity"].value > 10 * far_better.value


def test_quality_above_the_unchanged_model_is_scored_again(artefacts, opened, given, tmp_path):
    held = heldout(given, tmp_path)
    job = opened(artefacts("transformers", ONE_THREAD))
    baseline = fidelity.write_reference(job.candidate, held)["perplexity"]
    worse = replace(baseline, samples=tuple(x + 0.1 for x in baseline.samples))
    seen = fidelity.observe(job.candidate, held, worse)
    assert "a second scoring agrees" in seen.warnings[0]


def test_greedy_tokens_are_reproducible(artefacts, opened):
    job = opened(artefacts("transformers", ONE_THREAD))
    first = measuring.greedy_tokens(job, 3)
    assert [len(row) for row in first] == [6, 6, 6]
    assert first == measuring.greedy_tokens(job, 3)


@pytest.mark.row(53)
def test_faster_than_reading_the_weights_once_is_not_believed(artefacts, opened):
    job = opened(artefacts("transformers", ONE_THREAD), read_s=10.0)
    with pytest.raises(
        CandidateFailed, match=r"faster than reading the weights once \(lower bound 10 s\): not believed"
    ) as caught:
        measuring.screen(job, SHORT, HARDWARE)
    assert caught.value.kind == "invalid_result"


GOOD = {"ttft_s": 0.01, "total_s": 0.06, "steps": 5, "tokens": [6]}


@pytest.mark.row(52, 53)
@pytest.mark.parametrize(
    ("claim", "kind", "words"),
    [
        ({"ttft_s": None}, "invalid_result", "`ttft_s` is missing"),
        ({"ttft_s": True}, "invalid_result", "`ttft_s` is missing"),
        ({"total_s": 1e308}, "invalid_result", "outside"),
        ({"total_s": 0.0, "ttft_s": 0.0}, "invalid_result", "outside"),
        ({"ttft_s": 0.07}, "invalid_result", "`ttft_s` is 0.07"),
        ({"total_s": 0.9}, "invalid_result", "claims 900 ms of work"),
        ({"steps": 0}, "invalid_result", "no decode step"),
        ({"tokens": [5]}, "output_too_short", "gave 5 of 6"),
        ({"tokens": [7]}, "invalid_result", "gave 7 tokens"),
        ({"tokens": []}, "invalid_result", "1 counts"),
        ({"tokens": "x"}, "invalid_result", "1 counts"),
        ({"ttft_s": 0.0599999}, "invalid_result", "not believed"),
    ],
)
def test_a_lying_sample_is_refused(given, tmp_path, claim, kind, words):
    job = measuring.Job(
        candidate=None, folder=tmp_path, prompts=tmp_path, prompt_tokens=16, new_tokens=6, batch=1, artefact_bytes=1,
        framework_bytes=1, open_peak_bytes=1, load_s=0.1, read_s=0.001, versions={},
    )  # fmt: skip
    assert measuring._checked(job, [GOOD], 1, wall_s=0.07).latency_s == [0.06]
    with pytest.raises(CandidateFailed) as caught:
        measuring._checked(job, [GOOD | claim], 1, wall_s=0.07)
    assert caught.value.kind == kind
    assert words in caught.value.message
    with pytest.raises(CandidateFailed, match="expected 2 samples"):
        measuring._checked(job, [GOOD], 2, wall_s=0.2)


# ---------------------------------------------------------------- arithmetic of fidelity, energy and money


def test_divergence_is_that_of_the_formula():
    rng = numpy.random.default_rng(4)
    p, q = (x - numpy.log(numpy.exp(x).sum(1, keepdims=True)) for x in rng.normal(0, 2, (2, 50, 30)))
    agreements, total = compare(rounded(p.astype(numpy.float32)).astype(numpy.float32), q.astype(numpy.float32))
    assert agreements == (p.argmax(1) == q.argmax(1)).sum()
    assert total == pytest.approx((numpy.exp(p) * (p - q)).sum(), rel=2e-3)


def test_rounding_keeps_the_most_likely_token_single():
    row = numpy.array([[-3.0001, -3.0, -9.0], [-3.0, -3.0001, -float("inf")]], dtype=numpy.float32)
    small = rounded(row)
    assert small.argmax(axis=1).tolist() == row.argmax(axis=1).tolist()
    assert small[0, 0] < small[0, 1] and numpy.isfinite(small).all()


@pytest.mark.rule("measured energy")
def test_rapl_counters_are_read_and_wrap(tmp_path):
    zone = tmp_path / "intel-rapl:0"
    core = tmp_path / "intel-rapl:0:0"
    for folder, name in ((zone, "package-0"), (core, "core")):
        folder.mkdir()
        (folder / "name").write_text(name + "\n")
        (folder / "max_energy_range_uj").write_text("1000000000\n")
        (folder / "energy_uj").write_text("999000000\n")
    counters = energy.Counters(tmp_path)
    rapl = [name for name in counters.names if name.startswith("rapl")]
    assert rapl == ["rapl:intel-rapl:0:package-0"]  # a core is part of its package
    before = counters.read()
    (zone / "energy_uj").write_text("4000000\n")
    after = {**before, rapl[0]: counters.read()[rapl[0]]}
    assert counters.used_j(before, after) == pytest.approx(5.0)


def test_no_counter_means_no_joules(tmp_path):
    counters = energy.Counters(tmp_path)
    if not counters.names:
        assert counters.used_j(counters.read(), counters.read()) is None


@pytest.mark.rule("measured energy")
def test_modelled_energy_is_labelled_and_wide():
    seconds = Figure(value=0.1, low=0.09, high=0.11, n=10)
    joules = energy.modelled_energy(seconds, HARDWARE, busy_cores=1.0)
    assert joules.source == "modelled" and "assumed" in joules.note
    assert joules.high / joules.low > 4
    carbon = energy.carbon(joules, replace(HARDWARE, pue=1.5))
    assert carbon.source == "modelled"
    assert carbon.value == pytest.approx(joules.value * 1.5 * 400 / 3.6e6)


def test_cost_is_rent_and_electricity():
    seconds, joules = (
        Figure(value=0.1, low=0.1, high=0.1, n=10),
        Figure(value=2.0, low=1.0, high=4.0, n=10, source="modelled"),
    )
    rent = energy.cost(seconds, joules, HARDWARE)
    assert rent.value == pytest.approx(0.1 * 0.1 / 3600) and rent.source == "measured"
    both = energy.cost(seconds, joules, replace(HARDWARE, electricity_usd_per_kwh=0.2))
    assert both.value == pytest.approx(0.1 * 0.1 / 3600 + 2.0 * 0.2 / 3.6e6) and both.source == "modelled"
    world = energy.cost(seconds, joules, replace(HARDWARE, price_usd_per_h=None))
    assert world.source == "modelled" and "world average" in world.note
