"""llama.cpp's own server: the GGUF file and the command line that serves it as it was measured."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from planner.serving.exports import Deployment

SUMMARY = "the GGUF file and llama-server's command line"
FILE = "model.gguf"
KNOWN = ("threads", "pinned", "batch", "kv_bits", "prefix_cache", "prefill_chunk")
DRAFTING = ("lookup_tokens", "draft_tokens")  # llama-server has both, by rules of its own
UBATCH = 512  # tokens that llama.cpp computes at once, unless told otherwise
CACHE_TYPES = {8: "q8_0", 4: "q4_1"}


def refuses(deployment: Deployment) -> str | None:
    if FILE not in deployment.manifest["files"]:
        return f"plan {deployment.plan.id} is made for the {deployment.plan.engine} engine and holds no GGUF file"
    if drafting := sorted(deployment.runtime.keys() & set(DRAFTING)):
        return f"llama-server drafts in another way than plan {deployment.plan.id} was measured with (`{drafting[0]}`)"
    other = sorted(deployment.runtime.keys() - set(KNOWN))
    return f"llama-server has no setting for `{other[0]}`" if other else None


def copies(deployment: Deployment) -> Mapping[str, str]:
    return {FILE: FILE}


def files(deployment: Deployment) -> dict[str, str]:
    return {"serve.sh": _script(deployment)}


def _script(deployment: Deployment) -> str:
    from knowledge_base.engines import _pinning
    from knowledge_base.engines._llama_server import ALL_F32, facts_of

    facts = facts_of(deployment.folder / FILE)
    context = min(deployment.context_tokens, facts["context_length"])
    runtime = deployment.runtime
    settings = {
        "model": FILE, "alias": deployment.model, "host": deployment.host, "port": deployment.port,
        "ctx-size": context * deployment.slots, "parallel": deployment.slots,
    }  # fmt: skip
    if threads := runtime.get("threads"):
        settings |= {"threads": threads, "threads-batch": threads}
    if runtime.get("pinned"):
        cores = _pinning.chosen(threads)
        settings |= {"cpu-mask": f"{sum(1 << core for core in cores):x}", "cpu-strict": 1}
    if bits := runtime.get("kv_bits"):
        settings |= {"cache-type-k": CACHE_TYPES[bits], "cache-type-v": CACHE_TYPES[bits], "flash-attn": "on"}
    elif facts["file_type"] == ALL_F32:
        settings |= {"cache-type-k": "f32", "cache-type-v": "f32", "flash-attn": "off"}
    if chunk := runtime.get("prefill_chunk"):
        batch = max(chunk, deployment.slots)
        settings |= {"batch-size": batch, "ubatch-size": min(batch, UBATCH)}
    words = [f"  --{name} {shlex.quote(str(value))}" for name, value in settings.items()]
    words += ["  --cache-prompt" if runtime.get("prefix_cache") else "  --no-cache-prompt", "  --cache-ram 0"]
    about = [*deployment.about[:3], f"llama.cpp as measured: {_version(deployment)}"]
    if runtime.get("pinned"):
        about.append("--cpu-mask names cores of the machine this was written on")
    return (
        "\n".join(
            [
                "#!/bin/sh",
                *(f"# {line}" for line in about),
                'cd "$(dirname "$0")" || exit 1',
                'exec "${LLAMA_SERVER:-llama-server}" \\',
                *(f"{word} \\" for word in words),
                "  --no-mmap --metrics",
            ]
        )
        + "\n"
    )


def _version(deployment: Deployment) -> str:
    versions = deployment.manifest.get("versions", {})
    return f"the build in xllamacpp {versions['xllamacpp']}" if "xllamacpp" in versions else "not noted"
