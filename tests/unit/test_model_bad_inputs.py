"""Models nobody should plan: each refused with what, where and what to do, and nothing else happens."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import pickle
import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from knowledge_base.errors import BadInput, EnvironmentProblem, ExitCode, LeanplanError
from planner import hub
from planner.reading import check_complete, check_finite, read_model
from planner.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny", layers=2)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


def refused(source: Any, *parts: str, code: ExitCode = ExitCode.BAD_INPUT, **settings: Any) -> LeanplanError:
    """Read a model that must be refused; check exit code, hint, the parts of the message, and that nothing was written."""
    place = source.parent if isinstance(source, Path) else Path()
    before = sorted(place.rglob("*")) if isinstance(source, Path) else None
    with pytest.raises(LeanplanError) as caught:
        read_model(source, **settings)
    error = caught.value
    assert before is None or sorted(place.rglob("*")) == before
    assert error.exit_code == code
    assert error.hint
    for part in parts:
        assert part in str(error), str(error)
    return error


def change_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config |= changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


# ---------------------------------------------------------------- 20: links


@pytest.mark.row(20)
def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        refused(folder, "refusing to follow a link out of", name)
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)
    read_model(folder)


@pytest.mark.row(20)
def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    os.mkfifo(folder / "tokenizer_config.json")
    refused(folder, "not a regular file")


# ---------------------------------------------------------------- 21: not a model


@pytest.mark.row(21)
def test_not_a_model(tmp_path: Path, folder: Path) -> None:
    refused(tmp_path / "model" / "nothing here", "is not a model folder or a model id")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "no config.json in", "a model folder has config.json, *.safetensors")
    (empty / "adapter_config.json").write_text("{}")
    refused(empty, "an adapter, not a whole model", "merge the adapter")
    (folder / "model.safetensors").rename(folder / "model.gguf")
    refused(folder, "no model.safetensors", "GGUF", "--predict")
    assert read_model(folder, weights="optional").folder is None


@pytest.mark.row(21, 29)
@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": NaN}', "{}", '{"model_type": 3}', '{"model_type": "../x"}', "[" * 5000]
)
def test_config_that_is_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")


@pytest.mark.row(29)
def test_config_of_other_encodings(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + config.encode())
    read_model(folder)
    (folder / "config.json").write_bytes(config.encode("utf-16"))
    refused(folder, "not UTF-8 at byte 0")
    (folder / "config.json").write_text(config + " " * 2**20)
    refused(folder, "bytes, more than")


# ---------------------------------------------------------------- 22 to 24: the hub


@pytest.mark.row(23)
@pytest.mark.parametrize(
    "source", ["http://169.254.169.254/", "https://huggingface.co/gpt2", "-x", "a/b/c", "../x", "a//b", "", " ",
        "a\0b", "a b", "ä/b", "x" * 300, "a..b", "file:x"]
)  # fmt: skip
def test_bad_ids_touch_no_network(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def guard(*_: Any, **__: Any) -> None:
        raise AssertionError("network used")

    monkeypatch.setattr(socket.socket, "connect", guard)
    monkeypatch.setattr(socket, "getaddrinfo", guard)
    refused(source, "is not a model folder or a model id", "org/name")


@pytest.mark.row(23)
def test_bad_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("network used"))
    refused("org/name", "is not a revision", revision="../../x")


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub on this machine that answers every request with a status and headers of the test's choice."""
    from huggingface_hub import constants

    answer: dict[str, Any] = {"status": 200, "headers": {}, "wait_s": 0.0}
    seen: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            time.sleep(answer["wait_s"])
            self.send_response(answer["status"])
            for name, value in answer["headers"].items():
                self.send_header(name, value)
            self.send_header("Content-Length", "2")
            with contextlib.suppress(BrokenPipeError):  # who asked may have given up waiting
                self.end_headers()
                self.wfile.write(b"{}")

        def log_message(self, *_: Any) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    answer["seen"] = seen
    yield answer
    server.shutdown()
    server.server_close()


@pytest.mark.row(24)
def test_gated_private_and_unknown_models(endpoint: dict[str, Any]) -> None:
    for status, reason in ((401, None), (403, "GatedRepo"), (401, "GatedRepo"), (401, "RepoNotFound")):
        endpoint |= {"status": status, "headers": {"X-Error-Code": reason} if reason else {}}
        error = refused("org/name", "needs access", "hf auth login", code=ExitCode.ENVIRONMENT)
        assert "hf_" not in str(error)
    endpoint |= {"status": 404, "headers": {"X-Error-Code": "RepoNotFound"}}
    refused("org/name", "the hub has no model org/name")
    endpoint |= {"status": 404, "headers": {"X-Error-Code": "RevisionNotFound"}}
    refused("org/name", "no revision `nope`", revision="nope")
    assert endpoint["seen"]


@pytest.mark.row(22)
def test_an_unreachable_hub_is_told_within_the_limit(endpoint: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.TIMEOUT_S <= 10
    monkeypatch.setattr(hub, "TIMEOUT_S", 1)
    endpoint |= {"wait_s": 5}
    start = time.monotonic()
    refused(
        "org/name",
        "could not reach huggingface.co",
        "not in the cache",
        "give a local folder",
        code=ExitCode.ENVIRONMENT,
    )
    assert time.monotonic() - start < 4
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("org/name", "could not reach huggingface.co", code=ExitCode.ENVIRONMENT)
    endpoint |= {"wait_s": 0, "status": 503}


@pytest.mark.row(22)
@pytest.mark.promise("P13")
def test_offline_asks_nobody(endpoint: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    refused(
        "org/name",
        "network access is switched off; not in the cache",
        "--offline",
        code=ExitCode.ENVIRONMENT,
        offline=True,
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("org/name", "network access is switched off", code=ExitCode.ENVIRONMENT)
    assert endpoint["seen"] == []


# ---------------------------------------------------------------- 25 and 26: safetensors


@pytest.mark.row(25)
def test_damaged_files(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    refused(folder, "model.safetensors: damaged (file shorter than its header says by 5 bytes)", "download")
    path.write_bytes(data + b"1234567")
    refused(folder, "file longer than its header says by 7 bytes")
    path.write_bytes(data[:6])
    refused(folder, "damaged", "only 6 bytes")
    path.write_bytes(b"")
    refused(folder, "damaged")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    refused(folder, "a Git LFS pointer", "git lfs pull")
    path.write_bytes(b"<!DOCTYPE html><html>404</html>" * 9)
    refused(folder, "a web page, not weights")
    path.write_bytes(pickle.dumps({"a": 1}))
    refused(folder, "pickle")


def safetensors_file(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(shape: list[Any], begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "overlaps another"),
    "gap": ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, 20, "leaves a gap"),
    "overflow": ({"a": entry([2**62, 4], 0, 8)}, 8, "does not take 8 bytes"),
    "overflow to zero": ({"a": entry([2**32, 2**32], 0, 0)}, 0, "does not take 0 bytes"),
    "negative": ({"a": entry([-2], 0, 8)}, 8, "impossible numbers"),
    "backwards": ({"a": entry([2], 8, 0)}, 8, "does not take -8 bytes"),
    "float size": ({"a": entry([2.0], 0, 8)}, 8, "impossible numbers"),
    "true": ({"a": entry([True], 0, 4)}, 4, "impossible numbers"),
    "dtype": ({"a": entry([2], 0, 8, "F33")}, 8, "unknown dtype"),
    "list dtype": ({"a": {"dtype": [1], "shape": [2], "data_offsets": [0, 8]}}, 8, "unknown dtype"),
    "not an object": ([1, 2], 0, "not a JSON object"),
    "not a tensor": ({"a": 5}, 0, "lacks dtype"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, 8, "lacks dtype"),
    "twice": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        4, "names an entry twice",
    ),
    "not JSON": (b"{" * 300, 0, "not JSON"),
    "deep": (b'{"a":' + b"[" * 100_000, 0, "not JSON"),
    "many objects": (b"{" * 100_000, 0, "100000 tensors"),
    "not UTF-8": (b'{"\xff": 1}', 0, "not JSON"),
    "dimensions": ({"a": entry([1] * 9, 0, 4)}, 4, "impossible numbers"),
    "many entries": ({f"t{i}": entry([0], 0, 0) for i in range(100_000)}, 0, "100001 tensors in one file"),
}  # fmt: skip


@pytest.mark.row(26)
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_at_once(folder: Path, case: str) -> None:
    header, data_bytes, message = HOSTILE[case]
    safetensors_file(folder / "model.safetensors", header, bytes(data_bytes))
    start = time.process_time()
    refused(folder, "model.safetensors: damaged", message)
    assert time.process_time() - start < 1


@pytest.mark.row(26)
def test_a_header_of_endless_length(folder: Path) -> None:
    for claimed in (2**62, 2**64 - 1, 10**9):
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", claimed) + b"{}" * 50)
        refused(folder, f"its header claims {claimed} bytes")


@pytest.mark.row(26)
def test_a_sparse_file_with_a_huge_header_is_not_read(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2**33))
        file.truncate(2**34)
    start = time.process_time()
    refused(folder, "its header claims 8589934592 bytes")
    assert time.process_time() - start < 1


@pytest.mark.row(26)
def test_index_that_points_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    refused(folder, "is not the name of a weight file")
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    refused(folder, "model-1.safetensors: named by model.safetensors.index.json, but missing")
    index.write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    refused(folder, "1 weight missing from the shards (a)")
    index.write_text("{}")
    refused(folder, "no weight_map")


# ---------------------------------------------------------------- 27 and 28: weights


@pytest.mark.row(27)
def test_non_finite_weights_are_named_and_counted(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name].flat[7] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=f"tensor `{name}` has 1 non-finite value") as caught:
        check_finite(folder)
    assert caught.value.hint


@pytest.mark.row(28)
def test_layers_missing_and_left_over(folder: Path) -> None:
    change_config(folder, num_hidden_layers=3)
    refused(folder, "9 weights missing (model.layers.2.", "config and weights disagree")
    with pytest.raises(BadInput, match="9 weights missing"):
        check_complete(folder)
    change_config(folder, num_hidden_layers=1)
    refused(folder, "9 weights left over (model.layers.1.")


@pytest.mark.row(28)
def test_shapes_that_disagree(folder: Path) -> None:
    change_config(folder, intermediate_size=128)
    refused(folder, "config.json says", "config and weights disagree")


@pytest.mark.slow
@pytest.mark.row(28)
def test_families_outside_the_table_are_compared_too(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "starcoder2",
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    check_complete(tmp_path)
    change_config(tmp_path, num_hidden_layers=3)
    with pytest.raises(BadInput, match="16 weights missing"):
        check_complete(tmp_path)


# ---------------------------------------------------------------- 29 and 30: config


SILLY: dict[str, tuple[dict[str, Any], str]] = {
    "negative layers": ({"num_hidden_layers": -3}, "num_hidden_layers must be ≥ 1, got -3"),
    "endless layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers must be ≤ 4096, got 1000000000"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads must be ≥ 1, got 0"),
    "huge vocabulary": ({"vocab_size": 10**12}, "vocab_size must be ≤ 4000000"),
    "text": ({"hidden_size": "16"}, "hidden_size must be a whole number, got '16'"),
    "true": ({"hidden_size": True}, "hidden_size must be a whole number, got True"),
    "fraction": ({"hidden_size": 128.0}, "hidden_size must be a whole number"),
    "object": ({"num_hidden_layers": {"a": 1}}, "num_hidden_layers must be a whole number"),
    "kv heads": ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
    "more kv heads": ({"num_key_value_heads": 8}, "4 attention heads cannot share 8 key-value heads"),
    "head size": ({"head_dim": ..., "hidden_size": 130}, "hidden_size 130 is not a multiple of 4 heads"),
    "layer types": ({"layer_types": ["full_attention"] * 7}, "layer_types must name 2 layers"),
    "experts": ({"num_local_experts": 4000, "num_hidden_layers": 4000}, "4000 layers of 4000 experts"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "already quantised (gptq)"),
    "encoder-decoder": ({"is_encoder_decoder": True}, "not a causal language model"),
}  # fmt: skip


@pytest.mark.row(29)
@pytest.mark.parametrize("case", SILLY)
def test_silly_config(folder: Path, case: str) -> None:
    changes, message = SILLY[case]
    refused(change_config(folder, **changes), message)


@pytest.mark.row(29)
def test_family_keys_that_make_no_model(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 100,
        "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
        "decoder_sparse_step": 0,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "sizes that make no model", weights="optional")


@pytest.mark.row(30)
def test_unknown_architecture(folder: Path) -> None:
    refused(
        change_config(folder, model_type="zzz"),
        "architecture `zzz` is not a causal language model transformers 5",
        "knows",
    )
    refused(change_config(folder, model_type="lama"), "did you mean", "`llama`")
    refused(change_config(folder, model_type="bert-like-encoder"), "is not a causal language model")


# ---------------------------------------------------------------- 31 and 32: code and pickles


@pytest.mark.row(31)
def test_code_of_its_own_is_refused_and_never_run(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (folder / "modeling.py").write_text(f"open({str(canary)!r}, 'w')\n")
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    error = refused(folder, "runs its own code (auto_map)", "--trust-remote-code model@")
    assert "transformers knows `llama` itself" in error.hint
    flag = error.hint.rpartition(" ")[2]
    for wrong in (flag[:-1] + ("0" if flag[-1] != "0" else "1"), flag.replace("model@", "other@")):
        refused(folder, "runs its own code", trust_remote_code=wrong)
    refused(folder, "does not name one version", trust_remote_code="true")
    assert read_model(folder, trust_remote_code=flag).model.layers == 2
    (folder / "modeling.py").write_text("print('another version')\n")
    refused(folder, "runs its own code", trust_remote_code=flag)
    assert not canary.exists()


@pytest.mark.row(31)
def test_code_named_elsewhere(folder: Path) -> None:
    refused(change_config(folder, model_file="x.py"), "model_file")
    change_config(folder, model_file=...)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["t.T", None]}}))
    refused(folder, "auto_map of tokenizer_config.json")


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


@pytest.mark.row(32)
def test_pickles_are_refused_unread(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(canary))))
    refused(folder, "no safetensors, only pytorch_model.bin", "save_pretrained", "--allow-pickle")
    allowed = read_model(folder, allow_pickle=True)
    assert allowed.folder == folder
    check_complete(folder)
    check_finite(folder)
    assert not canary.exists()


# ---------------------------------------------------------------- 34: tokenizers


def test_tokenizers_that_do_not_fit(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"extra{i}": 512 + i for i in range(88)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(folder, "the tokenizer has 600 tokens, embeddings 512")
    tokenizer["model"]["vocab"] = {"a": "0"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(folder, "token ids are not whole numbers")
    (folder / "tokenizer.json").write_text("[]")
    refused(folder, "tokenizer.json")
    (folder / "tokenizer.json").unlink()
    refused(folder, "no tokenizer")
    assert read_model(folder, weights="optional").folder == folder


def test_a_tokenizer_far_too_small_is_told(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {t: i for t, i in tokenizer["model"]["vocab"].items() if i < 100}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "the tokenizer uses 100 of 512 embeddings: is it this model's?" in read_model(folder).notes


# ---------------------------------------------------------------- the description process


def test_transformers_is_asked_without_secrets_and_refusals_keep_their_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from planner.describing import describe

    monkeypatch.setenv("HF_TOKEN", "hf_thismustnotbeseen1234")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "starcoder2", "hidden_size": 65, "num_attention_heads": 4, "hidden_act": "nope"})
    )
    with pytest.raises(BadInput, match="transformers cannot build this model: KeyError"):
        describe(tmp_path, weights=False)


def test_errors_name_the_environment_where_it_is_at_fault() -> None:
    assert EnvironmentProblem.exit_code == 4
    assert BadInput.exit_code == 2
