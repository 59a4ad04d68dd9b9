"""A small knowledge of the field that obeys every law, to be edited by tests that break one."""

from __future__ import annotations

from pathlib import Path

from knowledge_base.field import Field, load

FILES = {
    "taxonomy.csv": """\
id,parent,name,section,lifecycle,computation,memory,energy,money,network,uncertain,note,origin
inference,,Inference,§6,inference,,,,,,,,003 figure 1
quantisation,inference,Quantisation,§6.2,inference,direct,direct,indirect,,,energy,"bold, by the prose",003 table 2
weight_only,quantisation,Weight-only,§6.2.1,inference,,,,,,,,003 figure 1
pruning,inference,Pruning,§6.1,inference,,direct,,,,,,003 table 2
""",
    "methods/compression.yaml": """\
gptq:
  name: GPTQ
  summary: >-
    Rounds the weights of a layer one column at a time, e.g. to four bits.
    The columns that are left make up for the error.
  topic: weight_only
  lifecycle: inference
  stage: quantise
  family: weights
  provides: [quantised]
  knobs: {bits: [2, 3, 4, 8], group_size: [32, 128], act_order: ["yes"]}
  requires: {data: calibration text, hardware: [gpu]}
  saves: {memory: table 2, computation: evidence}
  spends: {quality: evidence, money: "arXiv:2210.17323 https://example.org/price"}
  risks: [worse on rare languages]
  sources: [arXiv:2210.17323, "https://github.com/IST-DASLab/gptq"]
wanda:
  name: Wanda
  summary: Removes small weights that meet small activations. It needs no training!
  topic: pruning
  lifecycle: inference
  knobs: {sparsity: [0.5], pattern: ["2:4", "4:8"]}
  sources: [arXiv:2306.11695]
""",
    "evidence.csv": """\
steps,model,params_b,family,task,metric,baseline,value,setting,hardware,title,source,seed_reference,note
"gptq(bits=4, group_size=128)",OPT-13B,13,opt,WikiText-2,perplexity,10.13,10.31,"4-bit, g128",,GPTQ,https://arxiv.org/abs/2210.17323,yes,
gptq(bits=4),OPT-13B,13,opt,generation,speedup_x,1,3.2,4-bit,A100,GPTQ,https://arxiv.org/abs/2210.17323,yes,"two lines
of note"
wanda(pattern=2:4) + gptq(bits=4),OPT-13B,,opt,WikiText-2,perplexity,,12,joint,,Wanda,arXiv:2306.11695,no,
""",
    "evidence_metrics.csv": """\
metric,unit,better,resource,meaning
perplexity,perplexity,lower,quality,exp of the mean loss
speedup_x,ratio,higher,computation,times faster
""",
    "papers.csv": """\
id,title,year,venue,links,seeds,about,not_yet
gptq,GPTQ: Accurate Quantization,2023,ICLR,https://arxiv.org/abs/2210.17323 | https://example.org/gptq,003 §6.2 [7],gptq | quantisation,
wanda,A Simple Pruning Approach,2024,,arXiv:2306.11695,003 §6.1 [9] | 001 pruning,wanda,
other,On Language,,,,003 §1 [1],,not about efficiency
""",
    "metrics.yaml": """\
latency: {name: Latency, section: §9.1, unit: s, better: lower, resource: computation, how: a clock, leanplan: [latency_s]}
dynascore: {name: Dynascore, section: §9.1, unit: points, better: higher, resource: quality, how: a sum, leanplan: not yet}
""",
    "benchmarks.yaml": """\
glue: {name: GLUE, section: §9.2, what: nine tasks, measures: [accuracy], leanplan: not used, sources: ["https://gluebenchmark.com"]}
""",
    "challenges.yaml": """\
trade_offs: {name: Trade-offs, section: §10, question: Which?, answer: The front., where: [search/pareto.py], left: Much.}
""",
    "attention.csv": """\
id,name,time,memory,symbols,reference,source
full,Transformer,T^2*d,T^2,,003 [11],arXiv:1706.03762
""",
}  # fmt: skip


def write(folder: Path, **edits: tuple[str, str]) -> Path:
    """Write the files to a folder; an edit is named like its file without suffix, and replaces one text by another."""
    for name, text in FILES.items():
        old, new = edits.pop(Path(name).stem, ("", ""))
        assert old in text, f"{old!r} is not in {name}"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(old, new, 1) if old else text, encoding="utf-8")
    assert not edits, f"no such file: {edits}"
    return folder


def read(folder: Path, **edits: tuple[str, str]) -> Field:
    """Return what lies in a folder after these edits, checked."""
    return load.__wrapped__((write(folder, **edits),))
