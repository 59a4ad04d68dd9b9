"""`leanplan estimate`: figures, reasons and refusals, as a person meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.cli import main

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path / "config.json")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["estimate", *argv])
    out, talk = capsys.readouterr()
    return code, out, talk


def test_figures_of_a_plan(capsys: pytest.CaptureFixture[str], config: str) -> None:
    code, out, _ = run(
        capsys, config, "--on", "rtx-4090", "--engine", "llama_cpp", "--step", "weight_gguf:type=q4_k", "--json"
    )
    facts = json.loads(out)
    assert code == 0
    assert facts["words"] == "llama_cpp: weight_gguf(type=q4_k)"
    assert facts["fits"]
    tpot = facts["predicted"]["values"]["tpot_s"]
    # 4.7 GB of weights over 1.01 TB/s is 4.7 ms; published figures of this card are near 6.6 ms
    assert 0.0047 < tpot["low"] < tpot["mid"] < tpot["high"] < 0.012
    assert tpot["source"] == "analytic" and "weights" in tpot["because"]


def test_text_shows_interval_reason_and_a_plan_that_does_not_fit(
    capsys: pytest.CaptureFixture[str], config: str
) -> None:
    code, out, _ = run(capsys, config, "--on", "rtx-4060")
    assert code == 0
    assert "intervals hold 80 %" in out and "% weights" in out
    assert "does not fit: peak memory" in out and "of 8 GiB" in out


def test_unknown_power_is_told(capsys: pytest.CaptureFixture[str], config: str) -> None:
    _, out, _ = run(capsys, config, "--on", "gh200-sxm", "--json")
    assert "power of `gh200-sxm` is not known" in json.loads(out)["not_predicted"]["energy_j_per_token"]
    assert "energy_j_per_token" not in json.loads(out)["predicted"]["values"]


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--on", "rtx-4091"], 2, "did you mean `rtx-4090`"),
        (["--on", "t4"], 4, "`t4` has no known bfloat16 rate"),
        (["--on", "rtx-4090", "--step", "weight_int4:group_size=2"], 2, "`group_size` of `weight_int4` cannot be `2`"),
        (["--on", "rtx-4090", "--step", "weight_int4:group"], 2, "has no setting `group`"),
        (["--on", "rtx-4090", "--step", "weight_int5"], 2, "unknown technique `weight_int5`"),
        (["--on", "rtx-4090", "--step", "weight_gguf"], 2, "needs an engine that offers gguf"),
        (["--on", "rtx-4090", "--step", "batch_size:count=4"], 2, "does not apply"),
        (["--on", "rtx-4090", "--step", "weight_int8", "--step", "weight_int4"], 2, "do not go together"),
        (["--on", "rtx-4090", "--engine", "lama_cpp"], 2, "Did you mean `llama_cpp`"),
        (["--on", "rtx-4090", "--prompt-tokens", "0"], 2, "must be at least 1"),
        (["--on", "rtx-4090", "--prompt-tokens", "8192"], 2, "more than the model's 8192"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refusals(capsys: pytest.CaptureFixture[str], config: str, argv: list[str], code: int, words: str) -> None:
    found, out, talk = run(capsys, config, *argv)
    assert found == code
    assert words in talk and "hint: " in talk
    assert not out
