"""What is told of a model that reads its text in one pass: no tokens, no cache, texts each second."""

from __future__ import annotations

import json

import pytest
from public_configs import ROWS, transformers_asked_here

from planner.cli import main

CONFIG = next(row["config"] for row in ROWS if row["name"] == "bert-base-uncased")


@pytest.fixture
def told(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def estimate(*flags: str) -> dict:
        with transformers_asked_here():
            code = main(["estimate", str(tmp_path / "config.json"), "--on", "rtx-4090", "--json", *flags])
        assert code == 0
        return json.loads(capsys.readouterr().out)

    return estimate


def test_an_encoder_writes_no_tokens(told):
    facts = told()
    assert {"tpot_s", "kv_cache_bytes"} <= facts["not_predicted"].keys()
    assert "one pass" in facts["not_predicted"]["tpot_s"]
    assert facts["predicted"]["values"]["latency_s"]["mid"] == facts["predicted"]["values"]["ttft_s"]["mid"]
    assert facts["predicted"]["values"]["requests_per_s"]["mid"] == pytest.approx(
        1 / facts["predicted"]["values"]["ttft_s"]["mid"]
    )
    memory = facts["waterfall"]["memory"]
    assert sum(part["memory_bytes"] for part in memory) == pytest.approx(
        facts["predicted"]["values"]["peak_memory_bytes"]["mid"]
    )
    assert not {"KV cache", "logits"} & {part["name"] for part in memory}
    assert facts["waterfall"]["decode"] == []


@pytest.mark.parametrize("load", [(), ("--requests-per-s", "40"), ("--concurrency", "16")])
def test_figures_for_each_token_are_of_those_it_reads(told, load):
    values = {
        name: value["mid"] for name, value in told("--prompt-tokens", "200", *load)["predicted"]["values"].items()
    }
    assert values["throughput_tokens_per_s"] == pytest.approx(200 * values["requests_per_s"])
    watts = values["energy_j_per_token"] * values["throughput_tokens_per_s"]
    assert 50 < watts <= 450 and values["cost_usd_per_token"] > 0 and values["carbon_gco2e_per_token"] > 0


def test_its_answer_takes_no_room_in_the_context(told):
    assert told("--prompt-tokens", "512")["workload"]["prompt_tokens"] == 512


def test_texts_that_arrive_wait(told):
    alone, arriving = told(), told("--requests-per-s", "40")
    assert arriving["predicted"]["values"]["latency_s"]["mid"] > alone["predicted"]["values"]["latency_s"]["mid"]
    assert arriving["predicted"]["values"]["requests_per_s"]["mid"] == pytest.approx(40)


def test_its_roofline_has_no_operator_that_reads_nothing(told):
    assert all(point["flop_per_byte"] < 1e6 for point in told("--roofline")["operators"])


@pytest.mark.parametrize("load", [("--requests-per-s", "40"), ("--concurrency", "16")])
def test_texts_in_batches_are_answered_a_batch_at_a_time(told, load):
    one, batch = (told(*step, *load)["predicted"]["values"] for step in ((), ("--step", "batch_size:count=8")))
    assert batch["latency_s"]["mid"] == pytest.approx(batch["ttft_s"]["mid"])
    assert batch["requests_per_s"]["mid"] >= one["requests_per_s"]["mid"] * (1 - 1e-9)
