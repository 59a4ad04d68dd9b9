"""The candidate's side of the protocol: one JSON line a request, progress lines, one JSON line a reply.

    {"id": 3, "op": "block", "payload": {...}}
        -> {"progress": ["gptq layer 12", 0.5]}             any number of these
        -> {"id": 3, "ok": {...}}                           or {"id": 3, "error": {"kind": ..., "message": ...}}

An operation is a function (state, payload, progress) -> reply; `state` is a dict that lives as long as the candidate.
Nothing here imports torch: an engine that needs none is measured without it.
"""

from __future__ import annotations

import errno
import json
import math
import resource
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from knowledge_base import registry
from knowledge_base.errors import CandidateFailed, LeanplanError
from knowledge_base.serde import restore
from knowledge_base.types import Model, Plan

Progress = Callable[[str, float], None]
MAX_REPLY_BYTES = 1 << 20
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def serve(control: socket.socket, operations: Mapping[str, Callable[..., dict]]) -> int:
    """Answer requests until the socket ends; return the exit status."""
    state: dict[str, Any] = {}
    requests = control.makefile("rb")
    write(control, {"ready": True})
    for line in requests:
        request = json.loads(line)
        try:
            reply = {"ok": operations[request["op"]](state, request["payload"], Announcer(control))}
            encoded(reply)
        except Exception as error:
            traceback.print_exc()
            kind, message = cause(error, request["op"])
            reply = {"error": {"kind": kind, "message": message[:4000]}}
        write(control, {"id": request["id"], **reply})
    return 0


def encoded(reply: Mapping[str, Any]) -> bytes:
    """Return a reply as one line.

    Raises:
        CandidateFailed: it holds a number that is not finite, or is too long.
    """
    try:
        line = json.dumps(reply, allow_nan=False).encode() + b"\n"
    except (ValueError, TypeError) as error:
        raise CandidateFailed("invalid_result", f"the result has no JSON form: {error}") from error
    if len(line) > MAX_REPLY_BYTES:
        raise CandidateFailed("invalid_result", f"the result is {len(line)} bytes long, {MAX_REPLY_BYTES} are allowed")
    return line


def write(control: socket.socket, reply: Mapping[str, Any]) -> None:
    control.sendall(encoded(reply))


class Announcer:
    """Sends progress lines, at most ten a second, so that a fast loop does not drown in them."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._last: tuple[str, float] = ("", 0.0)

    def __call__(self, stage: str, done: float) -> None:
        now = time.monotonic()
        if stage != self._last[0] or now - self._last[1] >= 0.1:
            self._last = (stage, now)
            write(self._control, {"progress": [str(stage)[:200], float(done) if math.isfinite(done) else 0.0]})


def cause(error: BaseException, op: str) -> tuple[str, str]:
    """Return (failure kind, message) of an exception; the first cause is the headline, not what followed from it."""
    chain: list[BaseException] = [error]
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) is not None and earlier not in chain:
        chain.append(earlier)
    for link in reversed(chain):
        if kind := resource_kind(link):
            return kind, describe(link)
        if isinstance(link, CandidateFailed):
            return link.kind, link.message
    root = error
    while root.__cause__ is not None and not isinstance(root, LeanplanError):
        root = root.__cause__
    kinds = {"build": "build_error", "sensitivities": "build_error", "open": "load_error"}
    if isinstance(root, ImportError):  # missing, or present and broken: either way the machine's fault, not the plan's
        return "engine_missing", describe(root)
    return kinds.get(op, "crashed"), describe(root)


def resource_kind(error: BaseException) -> str | None:
    """Return the failure kind of an exhausted resource, or None for any other error."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "CUDA out of memory" in text:
        return "oom_device"
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "Cannot allocate memory" in text:
        return "oom_host"  # torch's allocator raises RuntimeError, not MemoryError
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or "No space left on device" in text:  # safetensors raises an error of its own
        return "disk_full"
    return None


def describe(error: BaseException) -> str:
    if isinstance(error, LeanplanError):
        return error.message
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# ---------------------------------------------------------------- build


def build(state: dict[str, Any], payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Execute a plan's steps on the loaded model, in order, and let the engine export the artefact into `out`.

    Payload: model_folder, model, plan, allocation, calibration (.npy of token windows, or None), seed, out.
    """
    plan = restore(Plan, payload["plan"])
    engine = registry.engines.get(plan.engine)
    out = Path(payload["out"])
    began = time.monotonic()
    session = _session(payload, progress)
    session.allocation = payload.get("allocation")
    seconds = {"load": time.monotonic() - began}
    for number, step in enumerate(plan.steps):
        began = time.monotonic()
        progress(f"{step.technique}", number / max(1, len(plan.steps)))
        registry.techniques.get(step.technique).execute(session, **step.knobs)
        name = step.technique if step.technique not in seconds else f"{step.technique}.{number}"
        seconds[name] = time.monotonic() - began
    progress("checking that every weight is finite", 1.0)
    _require_finite(session)
    progress("writing the artefact", 1.0)
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    engine.export(session, out)
    for name in TOKENIZER_FILES:
        source = Path(payload["model_folder"], name)
        if source.is_file() and not (out / name).exists():
            (out / name).write_bytes(source.read_bytes())
    seconds["export"] = time.monotonic() - began
    return {
        "runtime": dict(session.runtime),
        "storage": dict(session.storage),
        "notes": dict(session.notes),
        "step_s": seconds,
        "versions": dict(engine.versions()),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def sensitivities(state: dict[str, Any], payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Measure how much each module's weights matter at each precision, for the planner's allocation of bits."""
    from knowledge_base.techniques import _sensitivity

    session = _session(payload, progress)
    return {"sensitivities": _sensitivity.measure_sensitivities(session, **payload.get("options", {}))}


def _session(payload: Mapping[str, Any], progress: Progress) -> Any:
    from knowledge_base.techniques import _loading

    progress("loading the model", 0.0)
    calibration = payload.get("calibration")
    if calibration is not None:
        import numpy
        import torch

        calibration = torch.from_numpy(numpy.load(calibration, allow_pickle=False).astype("int64"))
    session = _loading.load_session(
        Path(payload["model_folder"]),
        restore(Model, payload["model"]),
        calibration=calibration,
        seed=payload["seed"],
        allow_pickle=bool(payload.get("allow_pickle")),
        workspace=Path.cwd(),
    )
    session.progress = progress
    return session


def _require_finite(session: Any) -> None:
    import torch

    for name, tensor in session.model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise CandidateFailed("non_finite", f"{name} has {bad} values that are not finite after the last step")


# ---------------------------------------------------------------- measure


def open_artefact(state: dict[str, Any], payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Open an artefact in its engine. Payload: folder, engine, runtime.

    Returns framework_bytes (resident before loading), load_s and the engine's memory().
    """
    engine = registry.engines.get(payload["engine"])
    if why := engine.find():
        raise CandidateFailed("engine_missing", why)
    progress("loading the artefact", 0.0)
    before = resident_bytes()
    began = time.perf_counter()
    state["running"] = engine.open_artefact(Path(payload["folder"]), payload["runtime"])
    return {
        "framework_bytes": before,
        "load_s": time.perf_counter() - began,
        "memory": dict(state["running"].memory()),
        "versions": dict(engine.versions()),
        "torch_loaded": "torch" in sys.modules,
    }


def block(state: dict[str, Any], payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Serve `repetitions` batches of requests one after another, and time each.

    Payload: prompts (.npy of int32 token windows), prompt_tokens, new_tokens, batch, first, repetitions. Batch r takes
    rows first + r x batch onwards, wrapping round, so that consecutive requests differ and no cache can answer them.
    """
    import numpy

    prompts = numpy.load(payload["prompts"], mmap_mode="r", allow_pickle=False)
    batch, length, new_tokens = payload["batch"], payload["prompt_tokens"], payload["new_tokens"]
    samples = []
    for repetition in range(payload["repetitions"]):
        rows = [(payload["first"] + repetition * batch + j) % len(prompts) for j in range(batch)]
        tokens = [prompts[row, :length].tolist() for row in rows]
        made = state["running"].generate(tokens, new_tokens)
        samples.append(
            {
                "ttft_s": made.ttft_s,
                "total_s": made.total_s,
                "steps": made.steps,
                "tokens": [len(row) for row in made.tokens],
            }
        )
    return {"samples": samples}


def tokens(state: dict[str, Any], payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Return the greedy continuation of the first prompts. Payload: prompts, prompt_tokens, new_tokens, count."""
    import numpy

    prompts = numpy.load(payload["prompts"], mmap_mode="r", allow_pickle=False)
    rows = [prompts[row, : payload["prompt_tokens"]].tolist() for row in range(min(payload["count"], len(prompts)))]
    return {"tokens": [state["running"].generate([row], payload["new_tokens"]).tokens[0] for row in rows]}


def fidelity(state: dict[str, Any], payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Score held-out windows, and compare each next-token distribution with the unchanged model's.

    Payload: windows (.npy, int32 (windows, tokens)), first, count, reference (.npy) and write (bool). `reference` is a
    float16 memory map (windows, positions, vocabulary) of the unchanged model's log-probabilities: written by the
    baseline, read by the others; its positions are the last of each window. float16 rounds a log-probability by at
    most 2^-11 of itself; rows are normalised again after reading, so that no divergence comes out negative.

    Returns for each window: the mean loss in nats for each predicted token, how many of the compared positions agree
    on the most likely token, and the sum over them of KL(unchanged || this) in nats.
    """
    import numpy

    windows = numpy.load(payload["windows"], mmap_mode="r", allow_pickle=False)
    reference = numpy.load(payload["reference"], mmap_mode="r+" if payload["write"] else "r", allow_pickle=False)
    positions, vocabulary = reference.shape[1:]
    chosen = range(payload["first"], payload["first"] + payload["count"])
    result: dict[str, list[float]] = {"loss": [], "agreements": [], "kl_sum": []}
    for row in chosen:
        progress(f"scoring held-out window {row + 1} of {len(windows)}", row / len(windows))
        ids = windows[row].tolist()
        # row i of log_probs predicts token i + 1, so the last row predicts nothing we know
        predicted = numpy.asarray(state["running"].log_probs(ids), dtype=numpy.float32)[:-1]
        if predicted.shape != (len(ids) - 1, vocabulary):
            raise CandidateFailed(
                "invalid_result", f"log-probabilities have shape {predicted.shape}, not {(len(ids) - 1, vocabulary)}"
            )
        loss = -predicted[numpy.arange(len(ids) - 1), ids[1:]].mean(dtype=numpy.float64)
        if not math.isfinite(loss):
            raise CandidateFailed("non_finite", f"the loss of held-out window {row + 1} is {loss}")
        result["loss"].append(float(loss))
        compared = predicted[-positions:]
        if payload["write"]:
            reference[row] = rounded(compared)
        else:
            agreements, kl_sum = compare(numpy.asarray(reference[row], dtype=numpy.float32), compared)
            result["agreements"].append(agreements)
            result["kl_sum"].append(kl_sum)
    if payload["write"]:
        reference.flush()
    return {**result, "positions": int(positions)}


def rounded(log_probs: Any) -> Any:
    """Return log-probabilities (positions, vocabulary) as float16, each row's most likely token the same and single."""
    import numpy

    rows, best = numpy.arange(len(log_probs)), log_probs.argmax(axis=1)
    small = numpy.maximum(log_probs, -60000.0).astype(numpy.float16)
    top = small[rows, best][:, None]
    ties = small >= top
    ties[rows, best] = False
    return numpy.where(ties, numpy.nextafter(top, numpy.float16(-numpy.inf)), small)


def compare(theirs: Any, ours: Any) -> tuple[int, float]:
    """Return (positions whose most likely token is the same, sum of KL(theirs || ours) in nats).

    Both are log-probabilities, (positions, vocabulary); `theirs` is normalised again because it was rounded.
    """
    import numpy

    top = theirs.max(axis=1, keepdims=True)
    theirs = theirs - (top + numpy.log(numpy.exp(theirs - top).sum(axis=1, keepdims=True)))
    weights = numpy.exp(theirs)
    terms = numpy.where(weights > 0, weights * (theirs - numpy.maximum(ours, -60000.0)), 0.0)
    agreements = int((theirs.argmax(axis=1) == ours.argmax(axis=1)).sum())
    return agreements, float(terms.sum(dtype=numpy.float64))


def memory(state: dict[str, Any], payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Return the engine's own account: weights_bytes, and kv_cache_bytes of the last generation at its full length."""
    return {"memory": dict(state["running"].memory())}


def close(state: dict[str, Any], payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Close the artefact."""
    if running := state.pop("running", None):
        running.close()
    return {}


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


OPS: dict[str, Callable[..., dict]] = {
    "build": build,
    "sensitivities": sensitivities,
    "open": open_artefact,
    "block": block,
    "tokens": tokens,
    "fidelity": fidelity,
    "memory": memory,
    "close": close,
}
