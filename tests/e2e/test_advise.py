"""`leanplan advise`: what binds, what helps, what conflicts; predicted, without torch, on machines that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY, BIG = ROOT / "models" / "tiny-lm", ROOT / "examples" / "llama-70b-shape"


def advise(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "planner", "advise", *argv], cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def as_json(*argv: str, cwd: Path) -> dict:
    done = advise(*argv, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_says_what_binds_what_helps_and_what_conflicts(tmp_path: Path) -> None:
    done = advise(str(TINY), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in (
        "What binds: ",
        "What helps",
        "What conflicts:",
        "What was left out:",
        "Best predicted plans:",
        "predicted, nothing was run",
    ):
        assert words in done.stdout
    assert "leanplan probe" in done.stdout, "a machine that was not probed is named as such"
    assert not (tmp_path / ".leanplan").exists(), "advice leaves nothing behind"


def test_it_is_data_too(tmp_path: Path) -> None:
    found = as_json(str(TINY), cwd=tmp_path)
    assert {b["resource"] for b in found["bounds"]} >= {"memory bandwidth", "arithmetic", "engine overhead"}
    assert found["binding"] in {b["resource"] for b in found["bounds"]} | {"memory"}
    saved = [b["saved"] for b in found["bounds"]]
    assert saved == sorted(saved, reverse=True)
    assert all(-1e-9 <= share < 0.51 for share in saved), "twice as much of one thing saves half at most"
    for helper in found["helpers"]:
        assert min(change for metric, change in helper["effects"].items() if metric != "quality_loss_ratio") <= -0.03
        assert helper["because"]
        assert helper["source"]
    best = found["best"]["recommended"]
    assert best["estimate"]["values"]["quality_loss_ratio"]["mid"] <= 0.05


def test_a_model_too_large_for_the_machine_is_bound_by_memory(tmp_path: Path) -> None:
    found = as_json(str(BIG), "--on", "h100-sxm", cwd=tmp_path)
    assert found["binding"] == "memory"
    assert found["needed_bytes"] > found["memory_bytes"]
    for result in found["best"].values():
        assert result["estimate"]["values"]["peak_memory_bytes"]["mid"] <= found["memory_bytes"]


def test_long_prompts_cost_arithmetic_and_long_answers_bandwidth(tmp_path: Path) -> None:
    def saved(resource: str, *argv: str) -> float:
        return {b["resource"]: b["saved"] for b in as_json(*argv, cwd=tmp_path)["bounds"]}[resource]

    prompt = ("--prompt-tokens", "900", "--output-tokens", "2")
    answer = ("--prompt-tokens", "16", "--output-tokens", "256")
    on_gpu = (str(BIG), "--on", "h100-sxm")
    assert saved("arithmetic", *on_gpu, *prompt) > saved("arithmetic", *on_gpu, *answer)
    assert saved("memory bandwidth and engine overhead", *on_gpu, *answer) > 0.3, "neither alone saves anything here"


def shape(folder: Path) -> tuple[str, ...]:
    """Return the flags that name a Llama-3-8B shape, from its config.json alone, on a catalogued GPU."""
    sizes = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 8192, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    return ("--model", str(folder / "config.json"), "--hardware", "RTX 4090")


def test_a_budget_that_is_broken_is_what_binds_and_what_relieves_it_is_ranked(tmp_path: Path) -> None:
    found = as_json(*shape(tmp_path), "--budget", "peak_memory<=9 GiB", "--budget", "tpot <= 40 ms", cwd=tmp_path)
    assert found["binding"] == "memory"
    assert found["target"] == "peak_memory_bytes"
    worst = found["excesses"][0]
    assert worst["times"] == pytest.approx(found["needed_bytes"] / (9 * 2**30), rel=1e-6)
    assert [e["times"] for e in found["excesses"]] == sorted((e["times"] for e in found["excesses"]), reverse=True)
    remedies = found["remedies"]
    assert remedies
    fits = [not remedy["unmet"] for remedy in remedies]
    assert fits == sorted(fits, reverse=True), "plans within every limit come first"
    for remedy in remedies:
        assert len(remedy["plan"]["steps"]) <= 3
        assert remedy["effects"]["peak_memory_bytes"] <= -0.03
        assert [c["technique"] for c in remedy["evidence"]] == [s["technique"] for s in remedy["plan"]["steps"]]
        if not remedy["unmet"]:
            assert remedy["value"] <= 9 * 2**30
    assert any(c["figures"] > 0 and c["example"] and c["source"] for r in remedies for c in r["evidence"])


def test_methods_nobody_executes_here_are_told_with_what_was_published(tmp_path: Path) -> None:
    found = as_json(*shape(tmp_path), "--budget", "peak_memory<=9 GiB", cwd=tmp_path)
    assert found["known"]
    for method in found["known"]:
        assert method["summary"]
        assert method["strength"] in ("direct", "indirect", "")
        if method["published"]:
            assert method["published"]["factor"] < 1, "a method whose figures do not save is not offered"
    assert "cannot execute yet" in advise(*shape(tmp_path), "--budget", "peak_memory<=9 GiB", cwd=tmp_path).stdout


def test_what_shares_a_machine_is_for_many_requests(tmp_path: Path) -> None:
    def known(*argv: str) -> set[str]:
        return {method["id"] for method in as_json(*shape(tmp_path), *argv, cwd=tmp_path)["known"]}

    alone, many = known(), known("--concurrency", "32", "--budget", "throughput>=3000 tokens/s")
    assert "continuous_batching" in many - alone
    assert "flexgen" not in alone | many


def test_a_least_value_is_asked_for_and_limits_nobody_wrote_are_told(tmp_path: Path) -> None:
    told = advise(*shape(tmp_path), "--budget", "throughput>=3000 tokens/s", cwd=tmp_path).stdout
    assert "limits: quality_loss <= 5 %, throughput_p50 >= 3000 tokens/s" in told
    assert "the unchanged model reaches" in told
    assert "the budget asks for 3000 tokens/s" in told


def test_a_figure_that_speaks_for_a_step_is_of_its_own_setting(tmp_path: Path) -> None:
    told = advise(*shape(tmp_path), cwd=tmp_path).stdout
    cited = {line.strip().partition(":")[0]: line for line in told.splitlines() if "published figures, e.g." in line}
    assert "e.g. 4 bits, torchao int4wo-hqq, Llama-3-8B-Instruct" in cited["weight_hqq"]
    assert "e.g. 4 bits, groups of 128, Llama-2-7B" in cited["weight_gptq"], "its own settings, the nearest size"
    assert "needs calibration" in told and "none:" not in told, "what is needed, not that nothing is"


def test_what_hides_behind_another_is_told_with_it(tmp_path: Path) -> None:
    saved = {b["resource"]: b["saved"] for b in as_json(*shape(tmp_path), cwd=tmp_path)["bounds"]}
    both = saved["memory bandwidth and engine overhead"]
    assert both >= 2 * max(saved["memory bandwidth"], saved["engine overhead"])
    assert "arithmetic and engine overhead" not in saved, "it adds nothing to engine overhead alone"


def test_json_is_asked_for_in_either_way(tmp_path: Path) -> None:
    assert json.loads(advise(str(BIG), "--on", "h100-sxm", "--format", "json", cwd=tmp_path).stdout) == as_json(
        str(BIG), "--on", "h100-sxm", cwd=tmp_path
    )


def test_where_nothing_fits_the_tightest_limits_are_told(tmp_path: Path) -> None:
    found = as_json(*shape(tmp_path), "--budget", "peak_memory<=256 MiB", cwd=tmp_path)
    assert found["best"] == {}
    assert "peak_memory" in found["tightest"]
    assert all(remedy["unmet"] for remedy in found["remedies"])
    told = advise(*shape(tmp_path), "--budget", "peak_memory<=256 MiB", cwd=tmp_path).stdout
    assert f"peak_memory could be {found['tightest']['peak_memory']} at best" in told
    kept = as_json(*shape(tmp_path), "--budget", f"peak_memory<={found['tightest']['peak_memory']}", cwd=tmp_path)
    assert kept["best"], "the limit that was offered can be kept"


@pytest.mark.parametrize(
    ("argv", "code", "told"),
    [
        ((), 2, "name one model"),
        ((str(TINY), "--model", str(BIG)), 2, "name one model"),
        ((str(TINY), "--budget", "peak_memory=8 GiB"), 2, "is not a budget"),
        ((str(TINY), "--budget", "peak_memory<=8"), 2, "peak_memory"),
        ((str(TINY), "--budget", "peek_memory<=8 GiB"), 2, "did you mean"),
        ((str(TINY), "--budget", "tpot<=1 s", "--budget", "tpot<=2 s"), 2, "two budgets on tpot"),
        ((str(TINY), "--budget", "throughput<=30 tokens/s"), 2, "write throughput>="),
        ((str(TINY), "--budget", "quality_loss>=5 %"), 2, "write quality_loss<="),
        (("nowhere",), 4, "hub"),
        ((str(TINY), "--on", "h100-sx"), 2, "did you mean"),
        ((str(TINY), "--prompt-tokens", "0"), 2, "prompt_tokens"),
        ((str(TINY), "--prompt-tokens", "100000"), 2, "context"),
        ((str(TINY), "--on", "no.json"), 2, "not found"),
    ],
)
def test_what_cannot_be_advised_on_is_told_with_a_next_step(
    tmp_path: Path, argv: tuple[str, ...], code: int, told: str
) -> None:
    done = advise(*argv, "--offline", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert "hint: " in done.stderr
    assert done.stdout == ""


def test_it_loads_no_heavy_library(tmp_path: Path) -> None:
    script = (
        "import sys; from planner.cli import main; main(['advise', sys.argv[1], '-q', '--output-file', 'advice.txt']); "
        "print(sorted({'torch', 'transformers', 'optuna', 'sklearn', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(TINY)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "[]", done.stderr
    assert "What binds" in (tmp_path / "advice.txt").read_text(encoding="utf-8")


def test_another_attention_is_told_where_the_prompt_is_long_enough_for_it_to_save(tmp_path: Path) -> None:
    long = as_json(*shape(tmp_path), "--prompt-tokens", "8000", cwd=tmp_path)["attention"]
    assert {"attention_free", "recurrent_architecture"} <= {other["id"] for other in long}
    assert all(0 < other["prefill_flop_ratio"] <= 0.97 for other in long)
    assert as_json(*shape(tmp_path), "--prompt-tokens", "200", cwd=tmp_path)["attention"] == []
