"""NVIDIA's aiconfigurator (ai-dynamo/aiconfigurator, Apache-2.0): the real package, in an environment of its own.

It answers from tables of kernels measured on ten kinds of GPU, for three engines, in its mode for requests that come
and go (`agg`). Its tables are of the engines' current versions, whichever version a row was measured with. An
environment made by `peers.py --install` is asked; without one, its recorded answers in data/peers_aiconfigurator.csv
are read. `batch` of a row is how many requests run at once or, in a closed loop, how many clients there are.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peer_rules._asked import Answer, Asked, Peer
from benchmarks.public_rows import DATA

VERSION = "0.12.0"
RECORD = DATA / "peers_aiconfigurator.csv"
DRIVER = Path(__file__).with_name("_aiconfigurator_driver.py")
BACKENDS = {"tensorrt_llm": "trtllm", "vllm": "vllm", "sglang": "sglang"}
SYSTEMS = {
    "h100-sxm": "h100_sxm", "h100-pcie": "h100_pcie", "h200-sxm": "h200_sxm", "b200-sxm": "b200_sxm", "b300-sxm": "b300_sxm", "gb200-sxm": "gb200",
    "a100-sxm": "a100_sxm", "a100-pcie": "a100_pcie", "l40s": "l40s", "rtx-pro-6000-blackwell-server": "rtx_pro_6000_server",
}  # fmt: skip
MODELS = {  # its name of a shape, where it does not have the published checkpoint
    "llama-3-8b": "meta-llama/Meta-Llama-3.1-8B", "llama-3-70b": "meta-llama/Meta-Llama-3.1-70B", "llama-3.1-405b": "meta-llama/Meta-Llama-3.1-405B",
    "llama-4-scout": "meta-llama/Llama-4-Scout-17B-16E-Instruct", "llama-4-maverick": "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B", "qwen3-1.7b": "Qwen/Qwen3-1.7B", "qwen3-8b": "Qwen/Qwen3-8B", "qwen3-32b": "Qwen/Qwen3-32B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B", "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B", "qwen3-coder-480b-a35b": "Qwen/Qwen3-Coder-480B-A35B-Instruct",
    "qwen3.5-27b": "Qwen/Qwen3.5-27B", "qwen3.5-35b-a3b": "Qwen/Qwen3.5-35B-A3B", "qwen3.5-397b-a17b": "Qwen/Qwen3.5-397B-A17B",
    "gpt-oss-20b": "openai/gpt-oss-20b", "gpt-oss-120b": "openai/gpt-oss-120b", "deepseek-v3": "deepseek-ai/DeepSeek-V3", "glm-5": "zai-org/GLM-5",
    "kimi-k2": "moonshotai/Kimi-K2.5", "minimax-m2": "MiniMaxAI/MiniMax-M2.5", "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-v0.1",
}  # fmt: skip
FP8_MODELS = {name: f"{MODELS[name]}-FP8" for name in ("qwen3-32b", "qwen3-30b-a3b", "qwen3-235b-a22b")}
OWN_TYPE = ("gpt-oss-20b", "gpt-oss-120b", "deepseek-v3")  # checkpoints that come narrow: their config tells the types
TYPES = {"16": None, "fp8": "fp8", "8": "int8_wo", "4": "int4_wo"}
BLOCK_FP8 = ("qwen3-coder-480b-a35b",)  # its fp8 checkpoint scales blocks of weights


def question(asked: Asked) -> dict[str, Any] | str:
    """Return a row as the driver's question, or why it cannot be asked."""
    row = asked.row
    if row.metric not in ("tpot", "ttft"):
        return (
            "says nothing of this quantity"
            if row.metric != "memory"
            else "no row is of memory its engines fill on demand"
        )
    if row.family not in BACKENDS:
        return "has no tables of the engine" if row.family != "vllm_v0" else "its vLLM is of another generation"
    if row.device not in SYSTEMS:
        return "has no tables of the device"
    if row.shape.name not in MODELS:
        return "has no config of the model"
    return {
        "candidates": _candidates(asked), "model": asked.record["model"], "system": SYSTEMS[row.device], "backend": BACKENDS[row.family],
        "version": asked.record["engine"].partition(" ")[2], "devices": row.devices, "experts": bool(row.shape.experts),
        "prompt_tokens": round(row.prompt_tokens), "output_tokens": round(row.output_tokens), "batch": max(round(row.batch), 1),
    }  # fmt: skip


def _candidates(asked: Asked) -> list[tuple[str, str | None, str | None]]:
    """Return models to try: (id, type of matrices, of experts), None where the model's config tells it."""
    row, dtype = asked.row, asked.record["weight_dtype"]
    name, published = row.shape.name, asked.record["model"]
    if name in OWN_TYPE:
        return [(published, None, None), (MODELS[name], None, None)]
    if "/moe " in dtype:  # told in its own words
        matrices, experts = dtype.split("/moe ")
        return [(published, matrices, experts), (MODELS[name], matrices, experts)]
    if row.weight_class == "fp8" and name in FP8_MODELS:
        return [(published, None, None), (FP8_MODELS[name], None, None)]
    kind = "fp8_block" if row.weight_class == "fp8" and name in BLOCK_FP8 else TYPES.get(row.weight_class)
    return [(published, None, None), (MODELS[name], kind, kind)]


def answers(asked: Sequence[Asked], folder: Path) -> Iterator[Answer]:
    """Yield the answer to each row: asked where the environment is there, else as recorded."""
    reply_to = _Recorded() if recorded(folder) else _Live(folder)
    with reply_to as replies:
        for one in asked:
            to_ask = question(one)
            if isinstance(to_ask, str):
                yield to_ask
            else:
                reply = replies(to_ask)
                yield reply["why"] if "why" in reply else float(reply[f"{one.row.metric}_s"])


def recorded(folder: Path) -> bool:
    """Return whether a folder lacks the environment, so that answers come from the record."""
    return not python(folder).is_file()


def python(folder: Path) -> Path:
    """Return the interpreter of aiconfigurator's environment in a folder."""
    return folder / "aiconfigurator/bin/python"


def install(folder: Path) -> None:
    """Make the environment: about 850 MB.

    Raises:
        subprocess.CalledProcessError: pip could not.
    """
    home = folder / "aiconfigurator"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    subprocess.run([str(python(folder)), "-m", "pip", "install", "--quiet", f"aiconfigurator=={VERSION}"], check=True)


class _Live:
    """The driver as a child process; its answers are written to the record when it was left without an error."""

    def __init__(self, folder: Path) -> None:
        self.python = python(folder)
        self.replies = _read()

    def __enter__(self) -> _Live:
        self.told = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.child = subprocess.Popen(
            # -P: the driver's folder holds a file of the library's name
            [str(self.python), "-P", str(DRIVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.told, text=True, encoding="utf-8",
        )  # fmt: skip
        return self

    def __call__(self, to_ask: dict[str, Any]) -> dict[str, Any]:
        assert self.child.stdin is not None and self.child.stdout is not None
        try:
            self.child.stdin.write(json.dumps(to_ask) + "\n")
            self.child.stdin.flush()
            line = self.child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.told.seek(0)
            raise RuntimeError(f"aiconfigurator's driver ended: {self.told.read().strip()[-500:]}")
        self.replies[_key(to_ask)] = json.loads(line)
        return self.replies[_key(to_ask)]

    def __exit__(self, kind: object, *_: object) -> None:
        self.child.kill() if kind else self.child.communicate()
        self.told.close()
        if kind is None:
            _write(self.replies)


class _Recorded:
    """Answers as they were recorded."""

    def __enter__(self) -> _Recorded:
        self.replies = _read()
        return self

    def __call__(self, to_ask: dict[str, Any]) -> dict[str, Any]:
        return self.replies.get(_key(to_ask), {"why": "not installed, and no answer recorded"})

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""


COLUMNS = ("model", "types", "system", "backend", "version", "devices", "prompt_tokens", "output_tokens", "batch", "ttft_s", "tpot_s", "why")  # fmt: skip


def _key(to_ask: dict[str, Any]) -> tuple[str, ...]:
    _, *types = to_ask["candidates"][-1]
    told = {**to_ask, "types": "/".join(str(t) for t in types if t)}
    return tuple(str(told[column]) for column in COLUMNS[:-3])


def _read() -> dict[tuple[str, ...], dict[str, Any]]:
    if not RECORD.is_file():
        return {}
    with RECORD.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {tuple(r[c] for c in COLUMNS[:-3]): {c: r[c] for c in COLUMNS[-3:] if r[c]} for r in rows}


def _write(replies: dict[tuple[str, ...], dict[str, Any]]) -> None:
    with RECORD.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for key in sorted(replies):
            times = (f"{float(replies[key][c]):.6g}" if c in replies[key] else "" for c in ("ttft_s", "tpot_s"))
            writer.writerow([*key, *times, replies[key].get("why", "")])


PEER = Peer(
    name="aiconfigurator",
    how=f"the package {VERSION}, in its own environment",
    source="https://github.com/ai-dynamo/aiconfigurator",
    answers=answers,
    recorded=recorded,
)
