"""The load generator against a service whose delays are known, and against services that misbehave."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import jsonschema
import pytest
from timed_service import Timed, timed_service

from knowledge_base.errors import BadInput, EnvironmentProblem, ExitCode
from knowledge_base.types import Budget, Workload
from planner.cli import main
from planner.load import client, telling
from planner.load.driving import Driven, Protocol, drive
from planner.load.requests import Words
from planner.load.telling import seen

pytest.importorskip("aiohttp", reason="services are driven through aiohttp")
SHORT = Workload(prompt_tokens=12, output_tokens=5)
BRIEF = Protocol(least_s=0.5, least_requests=5, warm_up_s=0.0, most_s=30.0)


def driven(timed: Timed, workload: Workload = SHORT, protocol: Protocol = BRIEF, **more: object) -> Driven:
    endpoint = client.Endpoint(url=timed.url, model="timed")
    return drive(endpoint, workload, protocol, Words(seed=0), **more)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what it measures


def test_times_are_those_of_the_service() -> None:
    with timed_service(Timed(first_s=0.2, each_s=0.05)) as timed:
        run = driven(timed)
    for answer in run.counted:
        assert answer.answered and answer.tokens == 5
        assert answer.ttft_s >= 0.199  # a busy machine makes it later, never earlier
        assert answer.latency_s >= 0.2 + 4 * 0.05 - 0.001
        assert answer.latency_s == pytest.approx(answer.ttft_s + 4 * (answer.tpot_s or 0))
        assert sum(answer.gaps_s) == pytest.approx(answer.latency_s - answer.ttft_s)
    told = seen(run, BRIEF)
    assert told.percentiles["ttft_s"]["p50"].value == told.figures["ttft_s"].value >= 0.199  # type: ignore[operator]
    assert told.figures["throughput_tokens_per_s"].value <= 5 / 0.4 + 5 / 0.5  # one client, cut at the ends


@pytest.mark.slow
def test_a_slow_answer_delays_no_arrival() -> None:
    with timed_service(Timed(first_s=3.0)) as timed:
        run = driven(timed, Workload(prompt_tokens=4, output_tokens=1, requests_per_s=30))
        came = sorted(timed.came_s)[3:]  # after the warm-up's
    due = sorted(a.due_s for a in run.answers)
    assert due[-1] < 3.0 < came[-1] - came[0] + 3.0
    assert came[-1] - came[0] < 3.0, "the last came before the first was answered"
    assert all(a.answered and a.sent_s >= a.due_s for a in run.answers)
    assert len(run.late_s) == len(run.answers) and min(run.late_s) >= 0


def test_latency_counts_from_when_a_request_was_due() -> None:
    answer = client.Answer(due_s=1.0, prompt_tokens=1, asked_tokens=2, sent_s=1.5, token_s=[2.0, 2.25], tokens=2)
    assert (answer.ttft_s, answer.latency_s, answer.tpot_s, answer.gaps_s) == (1.0, 1.25, 0.25, [0.25])


def test_clients_wait_for_their_last_answer() -> None:
    with timed_service(Timed(first_s=0.05)) as timed:
        run = driven(timed, Workload(prompt_tokens=4, output_tokens=2, concurrency=3))
    assert timed.busiest == 3
    assert run.scenario == "clients" and len(run.counted) >= 5


@pytest.mark.slow
def test_all_at_once_are_all_there_at_once() -> None:
    with timed_service(Timed(first_s=3.0)) as timed:
        run = driven(timed, protocol=Protocol(all_at_once=12, warm_up_s=0.0, most_s=30.0))
    assert timed.busiest == 12 and len(run.counted) == 12
    assert seen(run, BRIEF).steady


def test_what_is_due_in_the_warm_up_is_sent_and_not_counted() -> None:
    with timed_service(Timed(first_s=0.0)) as timed:
        run = driven(timed, Workload(prompt_tokens=4, output_tokens=1, requests_per_s=20), Protocol(least_s=0.5, least_requests=5, warm_up_s=0.5, most_s=30.0))  # fmt: skip
    early = [a for a in run.answers if a.due_s < 0.5]
    assert early and not [a for a in run.counted if a.due_s < 0.5]
    assert len(run.counted) >= 5


def test_the_load_goes_on_until_there_are_enough_requests() -> None:
    with timed_service(Timed(first_s=0.0, each_s=0.0)) as timed:
        run = driven(timed, protocol=Protocol(least_s=0.01, least_requests=40, warm_up_s=0.0, most_s=60.0))
    assert len([a for a in run.counted if a.answered]) >= 40


def test_a_conversation_grows_by_what_was_said_and_all_prompts_share_their_start() -> None:
    with timed_service(Timed(first_s=0.0, each_s=0.0)) as timed:
        driven(timed, Workload(prompt_tokens=10, output_tokens=3, turns=3, shared_prefix_tokens=4))
    prompts = [b["prompt"] for b in timed.bodies[3:9]]  # two conversations, after the warm-up
    assert [len(p) for p in prompts] == [10, 10 + 3 + 6, 19 + 3 + 6] * 2
    assert prompts[1][:10] == prompts[0] and prompts[2][:19] == prompts[1]
    assert prompts[3][:4] == prompts[0][:4] and prompts[3][4:] != prompts[0][4:]


# ---------------------------------------------------------------- what it makes of a bad service


def test_failures_are_counted_and_stand_at_the_far_end() -> None:
    with timed_service(Timed(first_s=0.0, fails_every=4)) as timed:
        run = driven(timed, Workload(prompt_tokens=4, output_tokens=2, requests_per_s=40), Protocol(least_s=0.5, least_requests=20, warm_up_s=0.0, most_s=30.0))  # fmt: skip
    told = seen(run, BRIEF, [Budget(metric="ttft_s", statistic="p95", bound="max", value=60.0)])
    assert 0 < told.requests.failed < told.requests.answered
    assert told.requests.failed + told.requests.answered == told.requests.counted
    assert told.percentiles["latency_s"]["p95"].value is None
    assert told.percentiles["latency_s"]["p50"].value is not None
    assert told.verdicts[0].outcome == "not met"
    assert any("HTTP 500: a fault \\x1b[31m on purpose" in r for r in told.remarks)


def test_refusals_are_told_apart() -> None:
    with timed_service(Timed(first_s=0.2, slots=1, waiting=0)) as timed:
        run = driven(timed, Workload(prompt_tokens=4, output_tokens=2, requests_per_s=40))
    told = seen(run, BRIEF)
    assert told.requests.refused and not told.requests.failed
    assert any("HTTP 429: no room" in r for r in told.remarks)


def test_arrivals_that_outrun_the_service_are_told() -> None:
    with timed_service(Timed(first_s=0.1, each_s=0.0, slots=1)) as timed:
        run = driven(timed, Workload(prompt_tokens=4, output_tokens=1, requests_per_s=40), Protocol(least_s=3.0, least_requests=5, warm_up_s=0.0, most_s=3.0))  # fmt: skip
    told = seen(run, BRIEF, [Budget(metric="tpot_s", statistic="p50", bound="max", value=60.0), Budget(metric="ttft_s", statistic="p50", bound="max", value=1e3)])  # fmt: skip
    assert not told.steady
    assert "arrivals outrun the service" in told.remarks[0]
    assert {v.outcome for v in told.verdicts} <= {"inconclusive", "not judged", "not met"}


def test_answers_that_end_early_are_told() -> None:
    with timed_service(Timed(first_s=0.0, ends_early=2)) as timed:
        told = seen(driven(timed), BRIEF)
    assert told.requests.short == told.requests.answered > 0
    assert any("shorter than asked" in r for r in told.remarks)


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("says", "told"),
    [
        (STREAM + b"data: {not json\n\n", "not of OpenAI's completions"),
        (STREAM + b"data: 7\n\n", "not of OpenAI's completions"),
        (STREAM + b'data: {"choices": [3]}\n\n', "not of OpenAI's completions"),
        (STREAM + b"data: " + b"[" * 100_000 + b"\n\n", "not of OpenAI's completions"),
        (STREAM + b"data: [DONE]\n\n", "an answer without tokens"),
        (STREAM + b'data: {"error": {"message": "out of\\n memory"}}\n\n', "error in the stream: out of memory"),
        (STREAM + b'data: {"choices": [{"text": "a"}]}\n\n' * 500, "goes on beyond the 5 tokens"),
        (STREAM + b'data: {"choices": [{"text": "a"}], "usage": {"completion_tokens": 9}}\n\n', "gave 9 tokens, 5 were asked"),
        (STREAM + b"data: " + b"x" * (4 << 20), "not of OpenAI's completions"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://192.0.2.1/\r\nContent-Length: 0\r\n\r\n", "HTTP 302"),
        (b"no HTTP at all\r\n\r\n", ""),
        (b"", "first request was not served"),
    ],
)  # fmt: skip
def test_a_service_that_speaks_something_else_is_one_clear_error(says: bytes, told: str) -> None:
    with timed_service(Timed(says=says or STREAM[:20])) as timed:
        with pytest.raises(EnvironmentProblem, match="the first request was not served") as raised:
            driven(timed)
    assert told in str(raised.value)
    assert len(raised.value.message) < 400 and "\n" not in raised.value.message


@pytest.mark.slow
def test_a_service_that_dies_under_the_load_ends_it() -> None:
    with timed_service(Timed(first_s=0.0)) as timed:
        endpoint = client.Endpoint(url=timed.url, model="timed")
        kept = Words(seed=0)
        inner = kept.take

        def take(count: int) -> list[int]:  # after ten prompts it answers nothing any more
            if len(timed.bodies) > 10:
                timed.says = b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n"
            return inner(count)

        kept.take = take  # type: ignore[method-assign]
        run = drive(endpoint, SHORT, Protocol(least_s=60.0, warm_up_s=0.0, most_s=120.0), kept)
    assert "requests all failed" in run.stopped
    assert run.until_s < 60
    assert not seen(run, BRIEF).steady


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1:1", "http://192.0.2.7:80", "http://example.org", "ftp://localhost", "http://u:p@localhost",
        "http://localhost:99999", "http://", "http://[::1", "http://127.0.0.1:8080/?a=b", "http://0.0.0.0:80",
    ],
)  # fmt: skip
def test_only_services_of_this_machine_are_driven(url: str) -> None:
    with pytest.raises(BadInput):
        client.base_of(url)


@pytest.mark.parametrize(
    "url", ["http://localhost:80", "http://127.0.0.1/v1/", "http://127.8.9.1:8/v1/completions", "http://[::1]:7"]
)
def test_the_root_of_a_service_is_found(url: str) -> None:
    assert not client.base_of(url).endswith(("/", "/v1", "completions"))


def test_nothing_there_is_one_clear_error() -> None:
    with timed_service(Timed()) as timed:
        url = timed.url
    with pytest.raises(EnvironmentProblem, match="no answer"):
        asyncio.run(client.find(url))


# ---------------------------------------------------------------- the command

FAST = ("--duration", "0.3s", "--warm-up", "0.1s", "--prompt-tokens", "8", "--output-tokens", "3")


def test_the_command_prints_what_its_schema_says(capsys: pytest.CaptureFixture[str]) -> None:
    from planner import schemas

    with timed_service(Timed(first_s=0.0, each_s=0.0)) as timed:
        code = main(["load", timed.url, *FAST, "--ttft-p95", "60s", "--goodput", "0.001", "--json", "--quiet"])
    data = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(schemas.schema("load")).validate(data)
    assert code == ExitCode.DONE
    assert data["workload"] == {"prompt_tokens": 8, "output_tokens": 3, "prompt_tokens_p95": None, "concurrency": 1, "requests_per_s": None}  # fmt: skip
    assert data["seen"]["requests"]["answered"] >= 90  # what a 95th percentile needs
    assert data["seen"]["figures"]["peak_memory_bytes"]["value"] > 1e6  # of this very process, which serves


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (("--ttft-p50", "1ns"), ExitCode.BUDGET_NOT_MET),
        (("--latency-p99", "60s", "--time-limit", "0.4s"), ExitCode.INCONCLUSIVE),  # 459 requests are not to be had
        (("--ttft-p95", "60s"), ExitCode.DONE),
    ],
)
def test_the_exit_code_is_the_verdict(
    limits: tuple[str, ...], code: ExitCode, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling, "CROWDED_CORES", math.inf)  # whatever else runs here
    with timed_service(Timed(first_s=0.01, each_s=0.0)) as timed:
        assert main(["load", timed.url, *FAST, *limits]) == code
    assert limits[0].removeprefix("--").replace("-", "_") in capsys.readouterr().out


def test_a_limit_missed_in_a_crowd_cannot_be_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling, "CROWDED_CORES", -1.0)
    with timed_service(Timed(first_s=0.01, each_s=0.0)) as timed:
        assert main(["load", timed.url, *FAST, "--ttft-p50", "1ns"]) == ExitCode.INCONCLUSIVE
    assert "cores busy meanwhile" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        (("--requests-per-s", "2", "--concurrency", "2"), "--concurrency"),
        (("--requests-per-s", "0"), ""),
        (("--requests-per-s", "nan"), ""),
        (("--prompt-tokens", "5,4"), ""),
        (("--prompt-tokens", "-3"), ""),
        (("--prompt-tokens", "1,2,3"), "--prompt-tokens"),
        (("--prompt-tokens", "8", "--shared-prefix", "8"), ""),
        (("--turns", "0"), ""),
        (("--all-at-once", "0"), "--all-at-once"),
        (("--goodput", "2"), "--goodput"),
        (("--ttft-p95", "200"), ""),
        (("--duration", "2min", "--time-limit", "1min"), "--time-limit"),
        (("--trace", "missing.csv"), ""),
    ],
)
def test_bad_flags_are_told_before_anything_is_sent(
    flags: tuple[str, ...], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["load", "http://127.0.0.1:1", *flags]) == ExitCode.BAD_INPUT
    said = capsys.readouterr().err
    assert "error: " in said and "hint: " in said and where in said
