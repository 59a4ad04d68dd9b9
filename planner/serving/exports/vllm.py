"""vLLM: the checkpoint and the command that serves it, where the artefact is one that vLLM reads."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping

from planner.serving.exports import Deployment, step_that_needs

SUMMARY = "the checkpoint and vLLM's command line, if the artefact is a plain checkpoint"
FOLDER = "checkpoint"
ENGINES = ("transformers", "vllm")
# What vLLM does itself, or has a flag for; everything else a plan asks of its engine is in the way.
KNOWN = frozenset({"torch", "threads", "batch", "compile", "lookup", "prefix_cache", "prefill_chunk"})
RUNTIME = ("threads", "batch", "compile", "lookup_tokens", "prefix_cache", "prefill_chunk")


def refuses(deployment: Deployment) -> str | None:
    if deployment.plan.engine not in ENGINES:
        return (
            f"plan {deployment.plan.id} is made for the {deployment.plan.engine} engine, whose files vLLM does not read"
        )
    known = KNOWN | _own(deployment)
    if step := step_that_needs(deployment.plan, known):
        return f"step {step} leaves no plain checkpoint, or serves in a way vLLM has not"
    files = deployment.manifest["files"]
    if "structure.json" in files or "config.json" not in files:
        return "the artefact is no plain checkpoint: its modules are described in structure.json"
    other = sorted(deployment.runtime.keys() - set(RUNTIME))
    return f"vLLM has no setting for `{other[0]}`" if other and deployment.plan.engine != "vllm" else None


def copies(deployment: Deployment) -> Mapping[str, str]:
    return {name: f"{FOLDER}/{name}" for name in deployment.manifest["files"]}


def files(deployment: Deployment) -> dict[str, str]:
    settings = {
        "served-model-name": deployment.model, "host": deployment.host, "port": deployment.port,
        "max-model-len": _context(deployment), "max-num-seqs": deployment.slots,
    }  # fmt: skip
    if tokens := deployment.runtime.get("lookup_tokens"):
        drafts = {"method": "ngram", "num_speculative_tokens": tokens, "prompt_lookup_min": 2, "prompt_lookup_max": 3}
        settings["speculative-config"] = json.dumps(drafts)
    if chunk := deployment.runtime.get("prefill_chunk"):
        settings["max-num-batched-tokens"] = max(chunk, deployment.slots)
    words = [f"  --{name} {shlex.quote(str(value))}" for name, value in settings.items()]
    words += ["  --enable-chunked-prefill"] if chunk else []
    if deployment.runtime.get("prefix_cache"):
        words.append("  --enable-prefix-caching")
    elif deployment.plan.engine == "vllm":  # as it was measured; vLLM keeps prompts unless told otherwise
        words.append("  --no-enable-prefix-caching")
    left = [name for name in ("threads", "compile") if name in deployment.runtime]
    about = [*deployment.about[:3], "vLLM was not measured; its speed and memory are its own"]
    if left:
        about.append(f"{' and '.join(left)} of the plan: vLLM chooses itself")
    script = [
        "#!/bin/sh",
        *(f"# {line}" for line in about),
        'cd "$(dirname "$0")" || exit 1',
        'exec "${VLLM:-vllm}" serve ./' + FOLDER + " \\",
        *(f"{word} \\" for word in words[:-1]),
        words[-1],
    ]
    return {"serve.sh": "\n".join(script) + "\n"}


def _context(deployment: Deployment) -> int:
    """Return the tokens of a request, no more than the model was made for: vLLM would not start."""
    config = json.loads((deployment.folder / "config.json").read_text(encoding="utf-8"))
    return min(deployment.context_tokens, config.get("max_position_embeddings") or deployment.context_tokens)


def _own(deployment: Deployment) -> frozenset[str]:
    """Return what the plan's engine offers where it is vLLM itself."""
    if deployment.plan.engine != "vllm":
        return frozenset()
    from knowledge_base.registry import engines

    return engines.get("vllm").ENGINE.offers
