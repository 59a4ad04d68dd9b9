"""What transformers itself says of a model folder, asked in a process of its own: nothing is loaded, no tensor is read.

For families planner/architectures.py does not know, and to settle a disagreement. The process sees no credentials, no
network and no code of the model's own; the weights live on torch's "meta" device, which holds shapes only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowledge_base.errors import BadInput, EnvironmentProblem
from knowledge_base.serde import restore, write_json

TIME_LIMIT_S = 180
MEMORY_LIMIT_BYTES = 8 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What transformers makes of a folder. `missing` and the like compare its weights; empty without weights."""

    config: dict[str, Any]  # config.json with every default filled in
    parameters: dict[str, list[int]]  # name -> shape; tied weights once
    tied: bool
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()


def describe(folder: Path, *, weights: bool) -> Description:
    """Return transformers' description of a folder's config.json, compared with its weights if asked.

    Raises:
        BadInput: transformers cannot build the model; EnvironmentProblem: it is not installed or took too long.
    """
    from planner.isolation.environment import clean_environment

    with tempfile.TemporaryDirectory(prefix="leanplan-") as name:
        home = Path(name)
        root = Path(__file__).resolve().parent.parent
        environment = {**clean_environment(home), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            "-P",
            "-m",
            "planner.describing",
            str(folder.resolve()),
            str(int(weights)),
            "answer.json",
        ]
        try:
            done = subprocess.run(
                command, cwd=home, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIME_LIMIT_S
            )
        except subprocess.TimeoutExpired as error:
            raise EnvironmentProblem(
                f"transformers took over {TIME_LIMIT_S} s to describe the model",
                hint="try again when the machine is less busy",
                where=str(folder),
            ) from error  # fmt: skip
        answer = home / "answer.json"
        if not answer.is_file():
            last = done.stderr.decode("utf-8", errors="replace").strip().splitlines()[-1:] or ["it gave no reason"]
            raise EnvironmentProblem(
                f"transformers could not be asked: {last[0]}", hint="leanplan doctor", where=str(folder)
            )
        facts = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in facts:
        raise BadInput(
            f"transformers cannot build this model: {facts['error']}",
            hint="check config.json, or use a model that this release of transformers knows", where=str(folder),
        )  # fmt: skip
    return restore(Description, facts)


def _answer(folder: Path, weights: bool) -> dict[str, Any]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    compared: dict[str, Any] = {}
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if weights:
        # transformers' own loader knows how names of older files map to its modules, so it decides what is missing.
        model, compared = transformers.AutoModelForCausalLM.from_pretrained(
            folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True,
            trust_remote_code=False, local_files_only=True,
        )  # type: ignore[misc]  # fmt: skip
    else:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    parameters = {name: list(p.shape) for name, p in model.named_parameters()}
    head = model.get_output_embeddings()
    return {
        "config": json.loads(config.to_json_string(use_diff=False)),
        "parameters": parameters,
        "tied": head is not None and head.weight is model.get_input_embeddings().weight,
        "missing": sorted(compared.get("missing_keys", ())),
        "unexpected": sorted(compared.get("unexpected_keys", ())),
        "mismatched": sorted(_mismatch(m) for m in compared.get("mismatched_keys", ())),
    }


def _mismatch(entry: Any) -> str:
    if isinstance(entry, tuple) and len(entry) == 3:
        return f"{entry[0]} is {tuple(entry[1])}, config.json says {tuple(entry[2])}"
    return str(entry)


if __name__ == "__main__":
    import resource

    # A config.json can ask for more modules than fit into memory even without weights.
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    try:
        facts = _answer(Path(sys.argv[1]), sys.argv[2] == "1")
    except Exception as error:  # whatever transformers raises is the answer: the folder cannot be built
        facts = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    write_json(Path(sys.argv[3]), facts)
