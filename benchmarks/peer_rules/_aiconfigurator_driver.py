"""Answers questions to aiconfigurator, in its own environment: a line of JSON in, a line of JSON out.

A question names models to try (`candidates`: id, type of its matrices, of its experts), the system, backend and version
of the engine, devices and load; an answer has `ttft_s` and `tpot_s`, or `why` there are none. What the library prints
goes to the standard error. Nothing of Leanplan is imported: this environment does not have it.
"""

import csv
import json
import logging
import os
import re
import sys
from functools import lru_cache
from pathlib import Path

import aiconfigurator_core
from aiconfigurator.cli.api import cli_estimate
from aiconfigurator.sdk.perf_database import get_latest_database_version

HERE = Path(aiconfigurator_core.__file__).parent
latest = lru_cache(maxsize=None)(get_latest_database_version)  # reads hundreds of files each time it is asked


def main() -> None:
    logging.disable(logging.WARNING)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=replies, flush=True)


def answer(question: dict) -> dict:
    known = [
        c for c in question["candidates"] if (HERE / f"model_configs/{c[0].replace('/', '--')}_config.json").is_file()
    ]
    if not known:
        return {"why": "has no config of the model"}
    failure = ""
    for experts in layouts(question):
        try:
            return estimated(question, known[0], experts)
        except Exception as error:  # whatever it raises is its answer; told, never hidden
            failure = failure or reason(error)
    return {"why": failure}


def estimated(question: dict, candidate: list, experts: dict) -> dict:
    model, matrices, expert_matrices = candidate
    system, backend, devices = question["system"], question["backend"], question["devices"]
    version = latest(system=system, backend=backend)
    if version is None:
        return {"why": "has no tables of the engine on the device"}
    found = cli_estimate(
        model, system, mode="agg", backend_name=backend, backend_version=version, isl=question["prompt_tokens"],
        osl=question["output_tokens"], batch_size=question["batch"], tp_size=devices, gemm_quant_mode=matrices,
        moe_quant_mode=expert_matrices if experts else None, **experts,
    )  # fmt: skip
    return {"ttft_s": found.ttft / 1e3, "tpot_s": found.tpot / 1e3}


def layouts(question: dict) -> list:
    """Return how the experts may lie on the devices, the published layout first."""
    if not question["experts"]:
        return [{}]
    devices = question["devices"]
    tried = [published().get(key(question)), (devices, 1), (1, devices)]
    return [{"moe_tp_size": tp, "moe_ep_size": ep} for tp, ep in dict.fromkeys(t for t in tried if t)]


def key(question: dict) -> tuple:
    load = (question["prompt_tokens"], question["output_tokens"], question["batch"], question["devices"])
    return (question["model"], question["system"], question["backend"], question["version"], *load)


@lru_cache(maxsize=1)
def published() -> dict:
    """Return the layouts of the measured rows the package ships, which the rows asked about come from."""
    with (HERE / "systems/silicon_sample.csv").open(encoding="utf-8", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["mode"] == "agg" and r["attention_dp_size"] in ("", "1")]
    return {
        (r["model_path"], r["system"], r["backend"], r["backend_version"], int(r["isl"]), int(r["osl"]), int(r["batch_size"]), int(r["tp_size"])):
        (int(r["moe_tp_size"]), int(r["moe_ep_size"]))
        for r in rows if r["moe_tp_size"] not in ("", "0") and r["moe_ep_size"] not in ("", "0")
    }  # fmt: skip


def reason(error: Exception) -> str:
    """Return an error in short: its kind and what it says before names, numbers and paths."""
    if "OOM" in str(error):
        return "says the load does not fit the memory"
    said = re.split(r" for |[{(/'\"]|[\d.]{3,}", str(error).strip().partition("\n")[0])[0]
    return f"{type(error).__name__}: {said.strip(' :,=')}"[:120]


if __name__ == "__main__":
    main()
