"""`leanplan serve` on the shipped model, by both engines: its answers, its queue, and every way it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from served import Served, artefact, events, is_free, serving
from worlds import leanplan

from knowledge_base.errors import ExitCode
from knowledge_base.registry import engines
from planner.isolation import Servers

pytestmark = pytest.mark.timeout(600)
RUNTIME: dict[str, dict[str, int]] = {name: {"threads": 1} for name in engines.names()} | {
    "llama_cpp": {"threads": 1, "batch": 2},
    "openvino": {"threads": 1, "batch": 2},
    "transformers": {"threads": 1, "batch": 2},
}
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
LONG: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 1000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module", params=sorted(RUNTIME))
def engine(request: pytest.FixtureRequest) -> str:
    if why := engines.get(request.param).find():
        pytest.skip(why)
    return request.param


@pytest.fixture(scope="module")
def served(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One service for all tests that leave it as it was."""
    with serving(artefact(engine, **RUNTIME[engine]), "--waiting", "3", cwd=tmp_path_factory.mktemp("place")) as one:
        yield one


@pytest.fixture(params=["llama_cpp"])
def own(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Start a service of the test's own."""
    if why := engines.get(request.param).find():
        pytest.skip(why)
    with ExitStack() as stack:
        folder = artefact(request.param, **RUNTIME[request.param])
        yield lambda *flags: stack.enter_context(serving(folder, *flags, cwd=tmp_path))


both = pytest.mark.parametrize("own", ["llama_cpp", "transformers"], indirect=True)


def until(true: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(engine: str) -> SimpleNamespace:
    """What the engine generates by itself, without a service."""
    from tokenizers import Tokenizer

    folder = artefact(engine, **RUNTIME[engine])
    running = engines.get(engine).open_artefact(folder, RUNTIME[engine])
    tokens = running.generate([PROMPT], 24).tokens[0]
    running.close()
    return SimpleNamespace(text=Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens))


# ---------------------------------------------------------------- answers


def test_an_answer_is_what_the_engine_generates(served: Served, alone: SimpleNamespace) -> None:
    answer = served.answer({"prompt": PROMPT, "max_tokens": 24, "ignore_eos": True})
    assert answer["choices"][0]["text"] == alone.text
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 8, "completion_tokens": 24, "total_tokens": 32}


def test_a_stream_is_the_answer_in_pieces(served: Served, alone: SimpleNamespace) -> None:
    body = {"prompt": PROMPT, "max_tokens": 24, "ignore_eos": True, "stream": True}
    response = served.ask({**body, "stream_options": {"include_usage": True}})
    assert response.headers["Content-Type"].startswith("text/event-stream")
    *pieces, usage, done = events(response)
    assert done == "[DONE]"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 24
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == alone.text
    assert len(pieces) > 12  # token by token, not all at once
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert all("usage" not in event for event in list(events(served.ask(body)))[:-1])


def test_clients_side_by_side_get_what_they_get_alone(served: Served, alone: SimpleNamespace) -> None:
    body = {"prompt": PROMPT, "max_tokens": 24, "ignore_eos": True}
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(served.answer, [body] * 4))
    assert {answer["choices"][0]["text"] for answer in answers} == {alone.text}


def test_a_chat_is_rendered_by_the_models_template(served: Served) -> None:
    said = [{"role": "user", "content": "def main():"}]
    answer = served.answer({"messages": said, "max_tokens": 8}, "/v1/chat/completions")
    same = served.answer({"prompt": "user: def main():\nassistant:", "max_tokens": 8})
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": same["choices"][0]["text"]}
    assert answer["usage"]["prompt_tokens"] == same["usage"]["prompt_tokens"]
    *deltas, end, _ = events(served.ask({"messages": said, "max_tokens": 8, "stream": True}, "/v1/chat/completions"))
    text = "".join(delta["choices"][0]["delta"].get("content", "") for delta in deltas)
    assert text == same["choices"][0]["text"]
    assert end["object"] == "chat.completion.chunk" and end["choices"][0]["finish_reason"] == "length"


@pytest.mark.slow
def test_an_answer_without_a_number_is_as_long_as_is_usual(served: Served) -> None:
    assert served.answer({"prompt": PROMPT, "ignore_eos": True})["usage"]["completion_tokens"] == 16
    assert served.answer({"prompt": PROMPT * 127 + PROMPT[:4], "ignore_eos": True})["usage"]["completion_tokens"] == 4
    said = [{"role": "user", "content": "x " * 450}]
    used = served.answer({"messages": said, "ignore_eos": True}, "/v1/chat/completions")["usage"]
    assert used["total_tokens"] == 1024


def test_a_stop_text_ends_an_answer_before_it(served: Served, alone: SimpleNamespace) -> None:
    stop = alone.text[10:13]
    answer = served.answer({"prompt": PROMPT, "max_tokens": 24, "ignore_eos": True, "stop": stop})
    assert answer["choices"][0]["text"] == alone.text[: alone.text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_seed_makes_an_answer_again(served: Served) -> None:
    def text(seed: int) -> str:
        body = {"prompt": PROMPT, "max_tokens": 24, "ignore_eos": True, "temperature": 1.0, "seed": seed}
        return served.answer(body)["choices"][0]["text"]

    assert text(1) == text(1) != text(2)


def test_what_it_tells_of_itself(served: Served, engine: str) -> None:
    status, told = served.get("/v1/models")
    (model,) = json.loads(told)["data"]
    assert (status, model["id"], model["max_model_len"]) == (200, served.ready["model"], 1024)
    assert served.get(f"/v1/models/{model['id']}")[0] == 200
    assert served.get("/health") == (200, '{"status":"ok"}')
    before = served.count("leanplan_output_tokens_total"), served.count("leanplan_ttft_seconds_count")
    served.answer({"prompt": PROMPT, "max_tokens": 5, "ignore_eos": True})
    after = served.count("leanplan_output_tokens_total"), served.count("leanplan_ttft_seconds_count")
    assert after == (before[0] + 5, before[1] + 1)
    assert served.ready["engine"] == engine
    assert served.ready["slots"] == RUNTIME[engine].get("batch", 1)


# ---------------------------------------------------------------- what is not served


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, None),
        (b"\xff\xfe", 400, None),
        (b"[" * 100_000, 400, None),
        ({"prompt": [5] * 1020, "max_tokens": 5}, 400, "context_length_exceeded"),
        ({"prompt": [5] * 5000}, 400, "context_length_exceeded"),
        ({"prompt": [5], "max_tokens": 1024}, 400, "context_length_exceeded"),
        ({"prompt": [2**30]}, 400, None),
        ({"prompt": "x", "model": "another"}, 404, "model_not_found"),
        ({"prompt": "x" * (5 << 20)}, 413, None),
    ],
    ids=["cut off", "not UTF-8", "nested", "prompt and output", "prompt", "output", "token", "model", "body"],
)
def test_what_cannot_be_served_is_refused_as_openai_does(
    served: Served, body: object, status: int, code: str | None
) -> None:
    try:
        response = served.ask(body)
    except (BrokenPipeError, ConnectionResetError):  # it does not read a body to its end that is too large
        assert status == 413
    else:
        error = json.loads(response.read())["error"]
        assert (response.status, error["code"]) == (status, code)
        assert error["message"] and error["type"] == "invalid_request_error"
    assert served.answer({"prompt": PROMPT, "max_tokens": 2})  # and it stands


def test_another_name_of_the_address_is_not_answered(served: Served) -> None:
    """A page of another site may give this address a name of its own (DNS rebinding)."""
    with socket.create_connection(tuple(served.host.split(":"))) as connection:  # type: ignore[arg-type]
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400")


def test_places_and_methods_that_are_not_there(served: Served) -> None:
    assert served.get("/v1/nothing")[0] == 404
    assert served.get("/v1/completions")[0] == 405


def test_who_leaves_makes_room(served: Served) -> None:
    before = served.count('leanplan_requests_total{outcome="cancelled"}')
    made = served.count("leanplan_output_tokens_total")
    response = served.ask(LONG)
    for _ in range(3):
        next(events(response))
    response.close()
    until(lambda: served.count('leanplan_requests_total{outcome="cancelled"}') == before + 1)
    until(lambda: served.count("leanplan_requests_running") == 0)
    assert served.count("leanplan_output_tokens_total") < made + LONG["max_tokens"]  # the engine stopped


def test_a_full_queue_says_when_to_come_back(served: Served) -> None:
    slots = served.ready["slots"]
    taken = [served.ask(LONG) for _ in range(slots + 3)]
    until(lambda: served.count("leanplan_requests_waiting") == 3)
    response = served.ask(LONG)
    assert response.status == 429
    assert int(response.headers["Retry-After"]) >= 1
    assert json.loads(response.read())["error"]["code"] == "rate_limit_exceeded"
    for each in taken:
        each.close()
    until(lambda: served.count("leanplan_requests_running") + served.count("leanplan_requests_waiting") == 0)
    assert served.answer({"prompt": PROMPT, "max_tokens": 2})


# ---------------------------------------------------------------- ends


@pytest.mark.slow
@both
def test_asked_to_stop_it_finishes_what_it_began(own: Callable[..., Served]) -> None:
    served = own()
    response = served.ask(LONG)
    told = events(response)
    next(told)
    served.process.send_signal(signal.SIGTERM)
    until(lambda: served.get("/health")[0] == 503)
    refused = served.ask({"prompt": PROMPT})
    assert refused.status == 503 and int(refused.headers["Retry-After"]) >= 1
    *_, end, done = told
    assert (end["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
    code, said = served.end()
    assert code == ExitCode.DONE, said
    assert "every request was answered" in said and "Traceback" not in said
    assert served.left() == []
    assert is_free(int(served.host.rpartition(":")[2]))


def test_at_the_end_of_the_drain_what_is_left_is_cut_off(own: Callable[..., Served]) -> None:
    served = own("--drain", "100 ms")
    told = events(served.ask(LONG))
    next(told)
    served.process.send_signal(signal.SIGTERM)
    *_, error, done = told
    assert (error["error"]["code"], done) == ("stopping", "[DONE]")
    code, said = served.end()
    assert code == ExitCode.TERMINATED, said
    assert "1 requests are cut off" in said
    assert served.left() == []


def test_a_second_signal_does_not_wait(own: Callable[..., Served]) -> None:
    served = own("--drain", "10 min")
    taken = [served.ask(LONG) for _ in range(20)]  # half a minute's work
    next(events(taken[0]))
    served.process.send_signal(signal.SIGINT)
    until(lambda: served.get("/health")[0] == 503)
    served.process.send_signal(signal.SIGINT)
    code, said = served.end()
    assert code == ExitCode.INTERRUPTED, said
    assert "stopped at once" in said
    assert served.left() == []


@both
def test_the_engines_death_is_told_in_a_line(own: Callable[..., Served]) -> None:
    served = own()
    response = served.ask(LONG)
    next(events(response))
    os.kill(served.ready["pid"], signal.SIGKILL)
    code, said = served.end()
    assert code == ExitCode.ENVIRONMENT
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "while serving requests" in errors[0]
    assert "Traceback" not in said
    assert served.left() == []
    assert is_free(int(served.host.rpartition(":")[2]))


def test_the_engine_dies_with_whoever_started_it(own: Callable[..., Served]) -> None:
    served = own()
    served.process.kill()
    served.process.wait()
    left = [each for each in served.left() if each.startswith("psutil")]
    assert left == []
    assert is_free(int(served.host.rpartition(":")[2]))


def test_a_taken_port_is_one_clear_line(own: Callable[..., Served], tmp_path: Path) -> None:
    served = own()
    port = served.host.rpartition(":")[2]
    done = leanplan("serve", served.ready["folder"], "--port", port, cwd=tmp_path)
    assert done.returncode == ExitCode.ENVIRONMENT
    assert f"error: cannot listen on 127.0.0.1:{port}: the port is taken" in done.stderr
    assert done.stdout == ""
    assert served.get("/health")[0] == 200


# ---------------------------------------------------------------- what is served


@pytest.mark.slow
def test_a_plan_is_built_once_and_then_served(tmp_path: Path) -> None:
    from knowledge_base.types import Plan
    from planner.reading import read_model
    from planner.recipe import Recipe, write_recipe
    from planner.tiny_models import make_tiny_model

    make_tiny_model(tmp_path / "model")
    digest = read_model(str(tmp_path / "model")).model.digest
    plan = Plan(model_digest=digest, engine="llama_cpp")
    write_recipe(tmp_path, Recipe(plan=plan, model="model", model_digest=digest))
    made = []
    for _ in range(2):
        done = leanplan("serve", "plan.json", "--port", "0", "--check", "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        ready = json.loads(done.stdout)
        assert (ready["model"], ready["plan"]) == ("model", plan.id)
        made.append((tmp_path / ready["folder"] / "leanplan.json").stat().st_mtime_ns)
    assert made[0] == made[1]
    damaged = tmp_path / ready["folder"] / "model.gguf"
    damaged.chmod(0o600)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    done = leanplan("serve", "plan.json", "--port", "0", "--check", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = leanplan("serve", str(damaged.parent), "--port", "0", "--check", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    damaged.write_bytes(b"")
    done = leanplan("serve", str(damaged.parent), "--port", "0", cwd=tmp_path)
    assert done.returncode == ExitCode.BAD_INPUT
    assert "model.gguf: 0 bytes, the manifest says" in done.stderr


# ---------------------------------------------------------------- from Python


def test_a_service_is_limited_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    from knowledge_base.errors import CandidateFailed
    from planner.isolation import Limits
    from planner.serving import OPERATIONS, Settings, started

    if why := engines.get("llama_cpp").find():
        pytest.skip(why)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = artefact("llama_cpp", threads=1, batch=2)
    roomy = Limits(memory_bytes=2 << 30, time_s=300, disk_bytes=1 << 30)
    with Servers(extra_ops=OPERATIONS) as servers:
        settings = Settings(context_tokens=256, waiting=0)
        with started(folder, runtime={"batch": 3}, limits=roomy, settings=settings, servers=servers) as service:
            assert (service.slots, service.context_tokens) == (3, 256)
            service.ask(60)
            assert 0 < service.peak_bytes < roomy.memory_bytes
            first = service.pid
        with started(folder, limits=roomy, servers=servers) as service:
            assert service.pid != first and service.slots == 2
        tight = Limits(memory_bytes=20 << 20, time_s=300, disk_bytes=1 << 30)
        with pytest.raises(CandidateFailed, match="of the 20 MiB limit") as failed:
            with started(folder, limits=tight, servers=servers):
                pass
        assert failed.value.kind == "oom_host"
        with pytest.raises(CandidateFailed, match="warp"), started(folder, runtime={"warp": 9}, servers=servers):
            pass
    assert list(tmp_path.iterdir()) == []
