"""`leanplan load` of a real service, and a plan whose workload is arriving requests, as a person runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from worlds import leanplan

from planner.tiny_models import make_tiny_model

pytest.importorskip("aiohttp", reason="services are driven through aiohttp")
pytest.importorskip("uvicorn", reason="services need uvicorn")
pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path, machine: Path) -> Path:
    make_tiny_model(tmp_path / "model")
    shutil.copytree(machine, tmp_path / ".leanplan")
    return tmp_path


def test_a_plan_is_served_and_put_under_load(place: Path) -> None:
    from planner.reading import read_model
    from planner.recipe import Recipe, write_recipe

    (place / "day.csv").write_text("timestamp,prompt_tokens,output_tokens\n" + "".join(f"{i / 5},{4 + i % 9},{2 + i % 3}\n" for i in range(30)))  # fmt: skip
    digest = read_model(str(place / "model")).model.digest
    from knowledge_base.types import Plan

    write_recipe(
        place, Recipe(plan=Plan(model_digest=digest, engine="transformers"), model="model", model_digest=digest)
    )
    done = leanplan(
        "load", "plan.json", "--trace", "day.csv", "--warm-up", "1s", "--ttft-p50", "100s", "--json", cwd=place
    )
    assert done.returncode in (0, 5), done.stderr  # 5: a crowded machine may fall behind
    told = json.loads(done.stdout)
    assert told["seen"]["scenario"] == "trace" and told["workload"]["trace"]["requests"] == 30
    asked = told["seen"]["requests"]
    assert asked["answered"] == asked["counted"] > 20
    assert told["seen"]["figures"]["peak_memory_bytes"]["value"] > 50e6
    assert told["seen"]["verdicts"][0]["outcome"] in ("met", "inconclusive")


def test_a_plan_for_arriving_requests_is_measured_by_serving_it(place: Path) -> None:
    (place / "spec.yaml").write_text(
        "model: model\n"
        "workload: {prompt_tokens: {p50: 8, p95: 12}, output_tokens: 4, arrival_rate: 3 requests/s}\n"
        "budgets: {ttft_p95: 1 h, goodput: 0.001 requests/s}\n"
        "objectives: [ttft_p50, peak_memory]\n"
        "engines: [transformers]\ntechniques: {only: [weight_int8]}\n"
        "search: {effort: quick, max_measured: 2, time_limit: 5 min}\n"
    )
    done = leanplan("plan", "spec.yaml", "--json", cwd=place)
    assert done.returncode in (0, 5), done.stderr
    answer = json.loads(done.stdout)
    measured = [r["measurement"] for r in answer["results"] if r["measurement"]]
    assert measured
    for found in measured:
        assert not found["failure"]
        assert found["protocol"]["load"]["scenario"] == "arrivals"
        assert found["protocol"]["load"]["requests"]["answered"] > 10
        assert {"goodput_requests_per_s", "itl_s", "ttft_s"} <= set(found["figures"])
        assert found["alone"]["ttft_s"]["value"] != found["figures"]["ttft_s"]["value"]
    assert answer["workload"]["requests_per_s"] == 3.0
