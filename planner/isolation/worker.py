"""The candidate's side of the protocol: one JSON line a request, progress lines, one JSON line a reply.

    {"id": 3, "op": "block", "payload": {...}}
        -> {"progress": ["gptq layer 12", 0.5]}             any number of these
        -> {"id": 3, "ok": {...}}                           or {"id": 3, "error": {"kind": ..., "message": ...}}

An operation is a function (state, payload, progress) -> reply; `state` is a dict that lives as long as the candidate.
Nothing here imports torch: an engine that needs none is measured without it.
"""

from __future__ import annotations

import errno
import inspect
import json
import math
import resource
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from knowledge_base import registry
from knowledge_base.build_memory import loads_weights
from knowledge_base.errors import CandidateFailed, LeanplanError
from knowledge_base.serde import plain, restore, write_json
from knowledge_base.types import Model, Plan, Step
from planner import retrieval, step_losses

Progress = Callable[[str, float], None]
MAX_REPLY_BYTES = 1 << 20
OPTIONS = "options.json"  # in the candidate's folder: too long for a reply where matrices are many
RESUME = "resume"  # in the candidate's folder: what a build that is cut off can go on from; techniques write here too
SNAPSHOT = "after-step"  # in RESUME: the model as the last snapshot found it
SESSION_FACTS = ("runtime", "storage", "notes")
SNAPSHOT_BYTES_PER_S, SNAPSHOT_WORTH = 200e6, 10.0  # taken of work that took so many times as long
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
    kinds = dict.fromkeys(("build", "options", "allocated", "try_step"), "build_error")
    kinds |= dict.fromkeys(("open", "open_steps"), "load_error")
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

    Payload: model_folder, model, plan, allocation, calibration (.npy of token windows, or None), seed, out, and key, which
    tells this build from any other.

    A step that executes an allocation and is given none is not begun: the reply is {"waits_for": its number}. `options`
    then measures what it can choose from, on the model as it is, and `allocated` goes on with what was chosen.
    """
    began = time.monotonic()
    session = _session(payload, progress)
    session.allocation = payload.get("allocation")
    seconds = {"load": time.monotonic() - began}
    given = range(len(payload["plan"]["steps"])) if session.allocation else ()
    done = _resume(session, payload, seconds, progress)
    state["build"] = {
        "session": session, "payload": payload, "done": done, "given": set(given), "step_s": seconds, "unsaved_s": 0.0,
    }  # fmt: skip
    return _go_on(state, progress)


def options(state: dict[str, Any], payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Measure what the step that is waited for can choose from, and write it to OPTIONS. Payload: time_limit_s."""
    building = state["build"]
    step = restore(Plan, building["payload"]["plan"]).steps[building["done"]]
    began = time.monotonic()
    measured = registry.techniques.get(step.technique).options(
        building["session"], time_limit_s=payload["time_limit_s"], **asked_of(step)
    )
    write_json(Path(OPTIONS), measured)
    building["step_s"][f"{step.technique}.options"] = time.monotonic() - began
    return {}


def asked_of(step: Step) -> dict[str, Any]:
    """Return the knobs that tell what a step measures; whatever its others say is chosen from the same figures."""
    taken = inspect.signature(registry.techniques.get(step.technique).options).parameters
    return {knob: value for knob, value in step.knobs.items() if knob in taken}


def allocated(state: dict[str, Any], payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Go on building with what was chosen. Payload: allocation."""
    building = state["build"]
    building["session"].allocation = {**(building["session"].allocation or {}), **payload["allocation"]}
    building["given"].add(building["done"])
    return _go_on(state, progress)


def _go_on(state: dict[str, Any], progress: Progress) -> dict[str, Any]:
    from knowledge_base.engines import _torch_artefact

    building = state["build"]
    session, payload, seconds = building["session"], building["payload"], building["step_s"]
    plan = restore(Plan, payload["plan"])
    engine = registry.engines.get(plan.engine)
    for number, step in enumerate(plan.steps[building["done"] :], building["done"]):
        technique = registry.techniques.get(step.technique)
        if hasattr(technique, "options") and number not in building["given"]:
            return {"waits_for": number}
        began = time.monotonic()
        progress(step.technique, 0.0)
        _torch_artefact.lay_out(session.model)
        technique.execute(session, **step.knobs)
        building["done"] = number + 1
        name = step.technique if step.technique not in seconds else f"{step.technique}.{number}"
        seconds[name] = time.monotonic() - began
        building["unsaved_s"] += seconds[name]
        if number + 1 < len(plan.steps) and building["unsaved_s"] > _worth_saving_s(session):
            _save_snapshot(building)
            building["unsaved_s"] = 0.0
    del state["build"]
    progress("checking that every weight is finite", 1.0)
    _require_finite(session)
    progress("writing the artefact", 1.0)
    began = time.monotonic()
    out = Path(payload["out"])
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


def _worth_saving_s(session: Any) -> float:
    stored = sum(tensor.nbytes for tensor in session.model.state_dict().values())
    return SNAPSHOT_WORTH * stored / SNAPSHOT_BYTES_PER_S


def _save_snapshot(building: Mapping[str, Any]) -> None:
    """Write the model and what is known of it beside, in place of the snapshot before; where it has no such form, nothing."""
    from knowledge_base.engines import _torch_artefact

    session, place = building["session"], Path(RESUME, SNAPSHOT)
    partial = place.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _torch_artefact.save(session.model, None, partial)
    except CandidateFailed:
        shutil.rmtree(partial, ignore_errors=True)
        return
    facts = {"key": building["payload"]["key"], "done": building["done"], "step_s": building["step_s"]}
    facts |= {name: getattr(session, name) for name in ("allocation", *SESSION_FACTS)}
    write_json(partial / "state.json", plain(facts))
    shutil.rmtree(place, ignore_errors=True)
    partial.rename(place)


def _resume(session: Any, payload: Mapping[str, Any], seconds: dict[str, float], progress: Progress) -> int:
    """Put a snapshot's model into the session and return how many steps were done; 0 where none is of this very build."""
    place = Path(RESUME, SNAPSHOT)
    for folder in (p for p in place.parent.iterdir() if p.is_dir() and p != place):
        shutil.rmtree(folder)  # an interrupted technique's own passing files
    try:
        facts = json.loads((place / "state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return 0
    if (facts["key"], facts["allocation"]) != (payload["key"], payload.get("allocation")):
        shutil.rmtree(place)
        return 0
    from knowledge_base.engines import _torch_artefact

    progress("loading the model as it was when the build was cut off", 0.0)
    came, session.model = session.model, None
    source, generation, device = came.name_or_path, getattr(came, "generation_config", None), came.device
    del came
    session.model = _torch_artefact.load(place, device, unpack=False)
    session.model.name_or_path = session.model.config._name_or_path = source
    session.model.generation_config = generation
    for name in SESSION_FACTS:
        getattr(session, name).update(facts[name])
    seconds |= {name: taken for name, taken in facts["step_s"].items() if name != "load"}
    session.notes["build.resumed_after_steps"] = facts["done"]
    return int(facts["done"])


def _session(payload: Mapping[str, Any], progress: Progress) -> Any:
    from knowledge_base.techniques import _loading, _shapes

    progress("loading the model", 0.0)
    Path(RESUME).mkdir(exist_ok=True)
    calibration = payload.get("calibration")
    if calibration is not None:
        import numpy
        import torch

        calibration = torch.from_numpy(numpy.load(calibration, allow_pickle=False).astype("int64"))
    folder, facts = Path(payload["model_folder"]), restore(Model, payload["model"])
    given = {"calibration": calibration, "seed": payload["seed"], "workspace": Path(RESUME).resolve()}
    session = None if loads_weights(restore(Plan, payload["plan"])) else _shapes.shapes_session(folder, facts, **given)
    if session is None:
        session = _loading.load_session(folder, facts, allow_pickle=bool(payload.get("allow_pickle")), **given)
    give_back = memory_giver()

    def told(stage: str, done: float) -> None:
        give_back()
        progress(stage, done)

    session.progress = told
    give_back()
    return session


def memory_giver() -> Callable[[], None]:
    """Return a function that hands the system what was freed, at most fifty times a second.

    glibc keeps it for later: matrices replaced layer by layer would fill memory beside those in their place.
    """
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
    last = 0.0

    def give_back() -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= 0.02:
            trim(0)
            last = now

    return give_back


def _require_finite(session: Any) -> None:
    import torch

    for name, tensor in session.model.state_dict().items():
        if not tensor.is_floating_point() or tensor.is_meta:  # what was not loaded is checked as it is copied
            continue
        values = tensor.half() if tensor.dtype.itemsize == 1 else tensor  # 8-bit floats have no such kernel
        if bad := int((~torch.isfinite(values)).sum()):
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
    "options": options,
    "allocated": allocated,
    "open_steps": step_losses.open_steps,
    "try_step": step_losses.try_step,
    "open": open_artefact,
    "block": block,
    "tokens": tokens,
    "fidelity": fidelity,
    "recall": retrieval.recall,
    "memory": memory,
    "close": close,
}
