"""Ours against the reference libraries: the same models, calibration windows and settings, judged by one scorer.

    python benchmarks/compression.py --install     # once: an environment for each library, 0.5 GB in .leanplan/compression
    python benchmarks/compression.py               # what is not measured yet; writes compression.json and README.md's table
    python benchmarks/compression.py --large       # and a model of 117 million random weights: time, memory, bytes
    python benchmarks/compression.py --again       # everything anew
    python benchmarks/compression.py --reference hqq --case "4 bits" --model models/tiny-lm    # some of it

Every build runs in a process of its own, its library's environment or ours, and is measured by the same driver
(`compression_references/_driver.py`): seconds without imports, loading and saving, and the highest resident memory above the
loaded model. All of them get the same 64 windows of 256 calibration tokens. Perplexity is of 16,384 held-out tokens in float32, on the
dense matrices that each library's quantised ones stand for, over that of the unchanged model; where activations are rounded as
well, the library's own forward is scored by the same function. Rows measured once are kept; a library that is not
installed or cannot do it is told with its reason. Run it alone: about half an hour on two idle cores, and as long again with --large.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.compression_references._reference import ROOT, Reference
from benchmarks.readme_tables import figures, keep_figures, placed, plain

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "compression.json", HERE / "README.md"
REFERENCES = HERE / "compression_references"
FOLDER = ROOT / ".leanplan/compression"
SHIPPED = ROOT / "models/tiny-lm"
OURS = "Leanplan"
LARGE = "llama-110m"  # random weights: time, memory and bytes only
WINDOWS, TOKENS = 64, 256  # of calibration text
HELDOUT_WINDOWS, HELDOUT_TOKENS = 32, 512
LARGE_WINDOWS = 16
WIDER = "the same in groups of 64"
TIME_LIMIT_S = 1800
SAME = 0.0005  # of the perplexity: half a thousandth is no difference on so many tokens

Steps = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Build:
    """One way to do it. `how` tells what is special in it; `setting` is what the library's file understands."""

    how: str
    method: str
    setting: Mapping[str, Any]
    by: str = OURS


@dataclass(frozen=True, slots=True)
class Case:
    """A method at a strength, done by us and by others."""

    name: str
    builds: tuple[Build, ...]
    large: bool = False  # also on the large model


def ours(*steps: tuple[str, dict[str, Any]], how: str = "") -> Build:
    """Return a build of our techniques, in their order."""
    return Build(how, "+".join(name for name, _ in steps), {"steps": list(steps)})


def theirs(by: str, method: str, how: str = "", **setting: Any) -> Build:
    """Return a build of a library."""
    return Build(how, method, setting, by)


def _gptq(bits: int, group_size: int) -> Case:
    both = {"bits": bits, "group_size": group_size}
    builds = [ours(("weight_gptq", both), how="asymmetric, fitted scales, act-order")]
    if group_size == 32:  # our zeros take 16 bits, theirs none or a few: at this size bits are equal or fewer
        builds.append(ours(("weight_gptq", {**both, "group_size": 64}), how=WIDER))
    for symmetric in (True, False):
        word = "symmetric" if symmetric else "asymmetric"
        builds.append(theirs("llm_compressor", "gptq", f"{word}, act-order", **both, symmetric=symmetric))
        builds.append(theirs("gptqmodel", "gptq", word, **both, sym=symmetric))
    builds.append(theirs("gptqmodel", "gptq", "asymmetric, searched scales", **both, sym=False, mse=2.4))
    return Case(f"GPTQ, {bits} bits, groups of {group_size}", tuple(builds), large=bits == 4 and group_size == 128)


def _hqq(bits: int) -> Case:
    both = {"bits": bits, "group_size": 64}
    return Case(
        f"HQQ, {bits} bits, groups of 64",
        (
            ours(("weight_hqq", both), how="scales fitted as well"),
            theirs("hqq", "hqq", "groups along the inputs", **both, axis=1),
            theirs("hqq", "hqq", "groups along the outputs", **both, axis=0),
        ),
        large=bits == 4,
    )


def _zeros(method: str, technique: str, pattern: str, sparsity: float, large: bool, **knobs: Any) -> Case:
    name = {"sparsegpt": "SparseGPT", "wanda": "Wanda"}[method]
    given = {"sparsity": sparsity, "pattern": pattern}
    builds = [
        ours((technique, given | knobs)),
        theirs("llm_compressor", method, sparsity=sparsity, pattern="0:0" if pattern == "unstructured" else pattern),
    ]
    if pattern == "unstructured" and knobs:
        builds.insert(1, ours((technique, given | {"allocation": "layerwise"}), how="shares by layer"))
    return Case(f"{name}, {pattern if pattern != 'unstructured' else f'{sparsity:.0%} zeros'}", tuple(builds), large)


_INT4 = {"bits": 4, "group_size": 32}
CASES = (
    _gptq(4, 128),
    _gptq(4, 32),
    _gptq(3, 32),
    _gptq(2, 32),
    _zeros("sparsegpt", "prune_sparsegpt", "unstructured", 0.5, False, allocation="uniform"),
    _zeros("sparsegpt", "prune_sparsegpt", "2:4", 0.5, True, allocation="uniform"),
    _zeros("wanda", "prune_wanda", "unstructured", 0.5, False),
    _zeros("wanda", "prune_wanda", "2:4", 0.5, True),
    Case(
        "SmoothQuant, W8A8",
        (
            ours(("smooth_quant", {}), ("activation_int8", {}), how="to nearest"),
            theirs("llm_compressor", "smoothquant", "to nearest", strength=0.5, gptq=False),
            theirs("llm_compressor", "smoothquant", "GPTQ", strength=0.5, gptq=True),
        ),
    ),
    Case(
        "AWQ, 4 bits, groups of 128",
        (
            ours(("scale_awq", {"bits": 4}), ("weight_int4", {"group_size": 128})),
            theirs("gptqmodel", "awq", "asymmetric", bits=4, group_size=128, sym=False),
            theirs("nncf", "awq", "with estimated scales", bits=4, group_size=128, calibrated=True),
        ),
    ),
    *(_hqq(bits) for bits in (4, 3, 2)),
    Case(
        "to nearest, 8 bits, by row",
        (ours(("weight_int8", {})), theirs("torchao", "rtn", bits=8)),
        large=True,
    ),
    Case(
        "to nearest, 4 bits, groups of 32",
        (
            ours(("weight_int4", {"group_size": 32}), how="asymmetric"),
            ours(("weight_hqq", _INT4), how="scales and zeros fitted (HQQ)"),
            theirs("torchao", "rtn", "asymmetric", **_INT4, symmetric=False),
            theirs("torchao", "rtn", "symmetric", **_INT4, symmetric=True),
            theirs("torchao", "rtn", "half-quadratic scales", **_INT4, symmetric=False, hqq=True),
            theirs("nncf", "rtn", "asymmetric", **_INT4, calibrated=False),
        ),
    ),
    Case(
        "feed-forward channels, a quarter removed",
        (
            ours(("prune_width", {"keep": 0.75})),
            theirs("torch_pruning", "channels", "by group magnitude", keep=0.75, importance="magnitude"),
            theirs("torch_pruning", "channels", "by group Taylor", keep=0.75, importance="taylor"),
        ),
    ),
)


# ---------------------------------------------------------------- what is due


def references() -> dict[str, Reference]:
    """Return the libraries by the name of their file."""
    names = sorted(path.stem for path in REFERENCES.glob("[!_]*.py"))
    return {name: importlib.import_module(f"benchmarks.compression_references.{name}").REFERENCE for name in names}


def key(model: str, case: Case, build: Build) -> tuple[str, str, str, str]:
    """Return what names a row."""
    return model, case.name, build.by, build.how


def due(
    model: str, kept: Iterable[Mapping[str, Any]], chosen: set[str], *, again: bool, named: str = ""
) -> list[tuple[Case, Build]]:
    """Return the builds of a model to be measured: by the chosen libraries (and us), of cases so named, that no kept row tells."""
    there = set() if again else {(row["model"], row["case"], row["by"], row["how"]) for row in kept}
    cases = [case for case in CASES if (case.large or model != LARGE) and named.lower() in case.name.lower()]
    return [
        (case, build)
        for case in cases
        for build in case.builds
        if build.by in {OURS, *chosen} and key(model, case, build) not in there
    ]


def merged(kept: Iterable[Mapping[str, Any]], row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows with a new one in the place of the one of its name; in the order of CASES."""
    order = {case.name: place for place, case in enumerate(CASES)}
    builds = {(case.name, build.by, build.how): place for case in CASES for place, build in enumerate(case.builds)}
    name = (row["model"], row["case"], row["by"], row["how"])
    others = [one for one in kept if (one["model"], one["case"], one["by"], one["how"]) != name]
    models = list(dict.fromkeys(one["model"] for one in [*others, row]))
    return sorted(
        (one for one in [*others, row] if (one["case"], one["by"], one["how"]) in builds),
        key=lambda r: (models.index(r["model"]), order[r["case"]], builds[r["case"], r["by"], r["how"]]),
    )


# ---------------------------------------------------------------- measuring


class Measuring:
    """Measures builds of one model in a folder of its own."""

    def __init__(self, name: str, folder: Path, work: Path, windows: int) -> None:
        from planner.data import bundled, calibration_windows, save_windows

        self.name, self.folder, self.work = name, folder, work
        rows = calibration_windows(bundled("calib"), folder, windows, TOKENS)
        self.calibration = save_windows(work / "calibration.npy", rows)
        rows = calibration_windows(bundled("heldout"), folder, HELDOUT_WINDOWS, HELDOUT_TOKENS)
        self.heldout = save_windows(work / "heldout.npy", rows)
        self._unchanged: float | None = None

    def measure(self, case: Case, build: Build, reference: Reference | None, environments: Path) -> dict[str, Any]:
        """Return the row of a build, or one with `why` it could not be done."""
        out = self.work / "build"
        job = {
            "reference": build.by if reference else "_ours", "model": str(self.folder), "calibration": str(self.calibration),
            "heldout": str(self.heldout), "method": build.method, "setting": build.setting, "out": str(out),
        }  # fmt: skip
        row: dict[str, Any] = {"model": self.name, "case": case.name, "by": build.by, "how": build.how}
        row["version"] = reference.version if reference else ""
        python = reference.python(environments) if reference else Path(sys.executable)
        told = subprocess.run(
            # -P: the driver's folder holds files of the libraries' names
            [str(python), "-P", str(REFERENCES / "_driver.py")],
            input=json.dumps(job), capture_output=True, text=True, errors="replace", timeout=TIME_LIMIT_S,
        )  # fmt: skip
        if told.returncode:
            lines = [line for line in told.stderr.strip().splitlines() if line.strip()]
            return {**row, "why": lines[-1][:300] if lines else f"ended with status {told.returncode}"}
        answer = json.loads(told.stdout)
        loss = answer.pop("loss_nats", None)
        row |= answer | self._ofplain(out / "plain", loss, score=self.name != LARGE)
        _remove(out)
        return row

    def _ofplain(self, plain: Path, loss: float | None, *, score: bool) -> dict[str, Any]:
        """Return the share of zeros, of parameters removed, and the perplexity ratio."""
        from knowledge_base.techniques import _packed

        model, whole = _loaded(plain), _loaded(self.folder)
        matrices = [_packed.matrix_of(module) for module in _packed.linears(model).values()]
        found = {
            "zeros_share": round(sum(int((m == 0).sum()) for m in matrices) / sum(m.numel() for m in matrices), 4),
            "removed_share": round(1 - model.num_parameters() / whole.num_parameters(), 4),
        }
        if not score:
            return {**found, "ppl_ratio": None}
        if self._unchanged is None:
            self._unchanged = self._loss(whole)
        loss = self._loss(model) if loss is None else loss
        return {**found, "ppl_ratio": round(math.exp(loss - self._unchanged), 5)}

    def _loss(self, model: Any) -> float:
        import numpy
        import torch

        from knowledge_base.techniques._blocks import mean_loss

        return mean_loss(model, torch.from_numpy(numpy.load(self.heldout).astype("int64")))


def _loaded(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def make_large(folder: Path) -> Path:
    """Write the large model, random weights in the shape of a Llama of 117 million parameters, unless it is there."""
    if (folder / "model.safetensors").is_file():
        return folder
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from knowledge_base.techniques._loading import TOKENIZER_FILES

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12,
        intermediate_size=3072, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (SHIPPED / name).is_file():
            shutil.copy(SHIPPED / name, folder / name)
    return folder


# ---------------------------------------------------------------- for people


def as_markdown(found: Mapping[str, Any]) -> str:
    """Return the rows as a table, ours bold where nobody is better, and what could not be done."""
    lines = [
        "| model | method | by | bits or zeros | perplexity ratio | build s (processor s) | memory above the model | artefact |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        by = row["by"] + (f" {row['version']}" if row["version"] else "") + (f": {row['how']}" if row["how"] else "")
        ratio = "-" if row["ppl_ratio"] is None else f"{row['ppl_ratio']:.4f}"
        if row["by"] == OURS and row["ppl_ratio"] is not None and row["ppl_ratio"] <= best(found["rows"], row) + SAME:
            ratio = f"**{ratio}**"
        lines.append(
            f"| {row['model']} | {row['case']} | {by} | {_spent(row)} | {ratio} | "
            f"{row['build_s']:.1f} ({row['build_cpu_s']:.1f}) | {row['peak_bytes'] / 1e6:.0f} MB | {row['artefact_bytes'] / 1e6:.2f} MB |"
        )
    if found["left_out"]:
        lines += ["", "Left out:", ""]
        lines += [f"- {one['model']}, {one['case']}, {one['by']}: {plain(one['why'])}" for one in found["left_out"]]
    return "\n".join(lines) + "\n"


def best(rows: Iterable[Mapping[str, Any]], of: Mapping[str, Any]) -> float:
    """Return the lowest perplexity ratio of others in the row's case; infinity where nobody else did it."""
    return min(
        (
            row["ppl_ratio"]
            for row in rows
            if (row["model"], row["case"]) == (of["model"], of["case"])
            and row["by"] != OURS
            and row["ppl_ratio"] is not None
        ),
        default=math.inf,
    )


def _spent(row: Mapping[str, Any]) -> str:
    if row["removed_share"] > 0:
        return f"{row['removed_share']:.1%} of the parameters removed"
    if row["zeros_share"] > 0.2 and (row["bits_per_weight"] or 0) >= 16:
        return f"{row['zeros_share']:.1%} zeros"
    return f"{row['bits_per_weight']:.3g} bits"


def write(found: Mapping[str, Any]) -> None:
    """Write the figures, and the table of README.md."""
    keep_figures(RESULTS, found)
    README.write_text(placed(README.read_text(encoding="utf-8"), "compression", as_markdown(found)), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    known = references()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="make the environments that are missing, and end")
    parser.add_argument("--model", action="append", type=Path, help="a folder; may be repeated (the shipped model)")
    parser.add_argument("--large", action="store_true", help="also a model of random weights: time, memory and bytes")
    parser.add_argument("--reference", action="append", choices=tuple(known), help="only these libraries, beside ours")
    parser.add_argument("--case", default="", help="only methods whose name has this in it")
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where environments are (%(default)s)")
    given = parser.parse_args(arguments)
    chosen = {name: one for name, one in known.items() if not given.reference or name in given.reference}
    if given.install:
        for name, one in chosen.items():
            if not one.installed(given.folder):
                print(f"{name} {one.version} ...", flush=True)
                one.install(given.folder)
        return
    found = {"rows": [], "left_out": []} | figures(RESULTS)
    folders = {folder.name: folder for folder in given.model or [SHIPPED]}
    if given.large:
        folders[LARGE] = make_large(given.folder / LARGE)
    for name, folder in folders.items():
        with tempfile.TemporaryDirectory(prefix="leanplan-compression-") as work:
            measuring = Measuring(name, folder.resolve(), Path(work), LARGE_WINDOWS if name == LARGE else WINDOWS)
            todo = due(name, found["rows"], set(chosen), again=given.again, named=given.case)
            for number, (case, build) in enumerate(todo, 1):
                print(f"[{number}/{len(todo)}] {name} · {case.name} · {build.by} {build.how}", flush=True)
                library = known.get(build.by)
                if library is not None and not library.installed(given.folder):
                    row: Mapping[str, Any] = {
                        "model": name,
                        "case": case.name,
                        "by": build.by,
                        "how": build.how,
                        "why": "not installed",
                    }
                else:
                    row = measuring.measure(case, build, library, given.folder)
                told = (row["model"], row["case"], row["by"], row["how"])
                found["left_out"] = [o for o in found["left_out"] if (o["model"], o["case"], o["by"], o["how"]) != told]
                if "why" in row:
                    found["left_out"].append(row)
                else:
                    found["rows"] = merged(found["rows"], row)
                print(
                    f"    {row.get('why') or {k: row[k] for k in ('ppl_ratio', 'build_s', 'build_cpu_s')}}", flush=True
                )
                write(found)
    print(as_markdown(found))


if __name__ == "__main__":
    main()
