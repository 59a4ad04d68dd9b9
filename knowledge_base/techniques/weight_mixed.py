"""Store each matrix in its own way, as the planner allocated from measured sensitivities: in few bits, in part, or not at all.

The allocation is the answer of a multiple-choice knapsack (search/allocation.py): the least loss of quality, measured one
matrix at a time on the model as the earlier steps leave it, within budgets of bytes, of memory, and of seconds:

    average_bits  for each weight in the artefact, scales included
    choose        "bits": 2, 3, 4, 8 or those a matrix came with; "everything": also half of its weights in 4 bits, two thin
                  factors in 8, or a part of a layer removed
    speedup       a decode step is at least so many times as fast as it is, by times measured on this machine; 0: as it comes

The planner stops the build before this step to measure and to solve. What rounding costs is made up for, as GPTQ does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from knowledge_base.techniques import _speed, _weights
from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

GROUP_SIZE = 64
BITS, EVERYTHING = "bits", "everything"
EVERYTHING_BITS = 3.5  # above that, everything gives what bits give (benchmarks/allocation.py)

TECHNIQUE = Technique(
    summary="bits, zeros, ranks or removal for each matrix, allocated from measured sensitivities; errors compensated",
    stage="quantise",
    family="weights",
    implements=("mixed_bits",),
    knobs={
        "average_bits": Choice(options=(3.5, 4.5, 5.5), default=4.5),
        "choose": Choice(options=(BITS, EVERYTHING), default=BITS),
        "speedup": Choice(options=(0.0, 1.0), default=0.0),
    },
    saves=_weights.UNPACKED_SAVES,
    # Matrices at 2 and 3 bits are unpacked at every step, so below 4.5 bits for each weight time is spent.
    spends=_weights.UNPACKED_SPENDS,
    needs=frozenset({"packed:int8", "packed:int4", "packed:int3", "packed:int2", "packed:sparse"}),
    provides=frozenset({"quantised"}),
    needs_calibration=True,
    modules=("torchao",),
    sources=("arXiv:1911.03852", "https://github.com/ggml-org/llama.cpp"),
)

# Any average and any speed can be allocated: the search adds the gentlest that meet the budgets.
RANGE = dict.fromkeys(_weights.UNPACKED_SAVES, ("average_bits", tuple(bits / 20 for bits in range(160, 52, -1)))) | (
    dict.fromkeys(_speed.TIMES, ("speedup", tuple(share / 20 for share in range(20, 81))))
)

_LLAMA_CPP = "https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/README.md"
EVIDENCE = (
    Evidence(model="Llama-2-7B", setting="q4_K_M, 4.9 bits: some matrices at 6 bits", quantity="perplexity ratio",
             baseline=1.0, value=1.014242, source=_LLAMA_CPP),
    Evidence(model="Llama-3-8B", setting="q4_K_S, 4.7 bits", quantity="WikiText-2 perplexity",
             baseline=6.233160, value=6.500529, source=_LLAMA_CPP),
    Evidence(model="Llama-3-8B", setting="q4_K_M, 4.9 bits: some matrices at 6 bits", quantity="WikiText-2 perplexity",
             baseline=6.233160, value=6.407115, source=_LLAMA_CPP),
    Evidence(model="Llama-3-8B", setting="q5_K_M, 5.7 bits: some matrices at 6 bits", quantity="WikiText-2 perplexity",
             baseline=6.233160, value=6.288607, source=_LLAMA_CPP),
)  # fmt: skip


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _weights.why_not_again(model)


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why the groups do not fit that model, or what is gained by other settings, or None."""
    if knobs["choose"] == EVERYTHING and knobs["average_bits"] > EVERYTHING_BITS:
        return f"above {EVERYTHING_BITS} bits for each weight nothing better than bits is chosen from everything"
    if knobs["choose"] == BITS and knobs["speedup"] and knobs["average_bits"] < _weights.int4_bits(GROUP_SIZE):
        return "bits below 4 are unpacked at every step, which takes longer than reading more of them"
    return _weights.why_not_groups(model, GROUP_SIZE)


def rewrite(demand: Demand, *, average_bits: float, choose: str, speedup: float) -> Demand:
    """Return the demand with `average_bits` for each weight in the layers, scales included; fewer where `speedup` asks for it.

    Measuring the sensitivities is not in it: it is done once for a model, not for a plan.
    """
    bits, gained = average_bits, 0.0
    if speedup:  # a step's time is taken as the bytes it reads
        read = (demand.linear_bytes + demand.head_read_bytes) / speedup - demand.head_read_bytes
        bits = min(bits, max(2.0, 8 * read / demand.linear_params))
    # From everything is as good as 0.05 bits more at 3.5, 0.18 at 3.0, on the shipped model (benchmarks/allocation.json).
    if choose == EVERYTHING:
        gained = 0.05 + 0.26 * (EVERYTHING_BITS - bits)
    # As if every matrix had the average, less the 0.5 bits of scales: bits placed where they matter lose no more.
    demand = loss_after(demand, "gptq", bits=max(1.5, bits - 0.5 + gained), group_size=GROUP_SIZE)
    # Matrices at 2 and 3 bits are unpacked at every step: from 4.5 bits for each weight down there are more and more.
    few = 0.0 if speedup else min(1.0, max(0.0, (5.5 - bits) / 2))
    kernels = few * _weights.UNPACK_KERNELS + (1 - few) * _weights.CAST_KERNELS
    weight_format = "int3" if few > 0.5 else "int4"
    loaded = (bits + _most_loaded(bits, choose, speedup)) / 2
    demand = _weights.packed(demand, bits=loaded, weight_format=weight_format, kernels=kernels)
    inputs = demand.model.hidden_size
    flop = 4 * demand.linear_params * 16_384 + 2 * inputs * demand.linear_params
    flop += 2 * 7 * demand.layers * inputs**2 * 16_384
    return demand.but(disk_share=bits / loaded, build_flop=demand.build_flop + flop)


def _most_loaded(bits: float, choose: str, speedup: float) -> float:
    """Return the bits for each weight that memory may hold where the artefact has `bits`.

    Matrices whose zeros are left out of the artefact are 4-bit matrices once they are loaded: with a kernel, so they are
    what a step that is to be fast chooses.
    """
    if choose == BITS:
        return bits
    return max(bits, _weights.int4_bits(GROUP_SIZE)) if speedup else 1.04 * bits


def options(session: Session, time_limit_s: float, *, choose: str) -> dict[str, Any]:
    """Return what can be chosen on the model as it is now: {"parts": {matrix: {option: what it costs and takes}}, ...}.

    `loss_increase` in nats for each token, `bytes` in the artefact, `memory` once it is loaded, `params`, and `seconds` of
    one decode step here. Beside them "ties" of options that are taken together, and the seconds of a step (_speed.py).

    Raises:
        CandidateFailed: no calibration text, or the model's layers are not found.
    """
    from knowledge_base.techniques import _choices
    from knowledge_base.techniques._blocks import decoder_layers, matrix_of
    from knowledge_base.techniques._latency import decode_step, least_seconds, matrix_seconds
    from knowledge_base.techniques._sensitivity import measure_sensitivities

    can = _choices.EVERYTHING if choose == EVERYTHING else _choices.BITS
    found = measure_sensitivities(session, _choices.PackedWays(can, GROUP_SIZE, compensated=True), time_limit_s)
    weights = {name: matrix_of(session.model.get_submodule(name)) for name in found}
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    layers = len(decoder_layers(session.model))
    seconds = matrix_seconds(session, shapes.values(), can, GROUP_SIZE, layers=layers)
    facts = session.facts
    for name, choices in found.items():
        share = facts.experts_active / facts.experts if facts.experts and ".experts." in name else 1.0
        for option, choice in choices.items():
            choice["seconds"] = share * seconds[shapes[name]][option]
    step_s = least_seconds({"step": decode_step(session)}, session, "timing a step")["step"]
    measured = _speed.of_step(dict.fromkeys(found, _choices.AS_IT_IS), found, step_s)
    return {**measured, "ties": _choices.ties(found)}


def budgets(measured: Mapping[str, Any], *, average_bits: float, choose: str, speedup: float) -> dict[str, float]:
    """Return what all matrices together may take, of what `options` measured.

    Raises:
        NoFeasiblePlan: says how fast a step can get.
    """
    weights = sum(next(iter(choices.values()))["params"] for choices in measured["parts"].values())
    found = {"bytes": weights * average_bits / 8}
    if choose == EVERYTHING:
        found["memory"] = weights * _most_loaded(average_bits, choose, speedup) / 8
    if speedup:
        found["seconds"] = _speed.seconds_for(measured, speedup, "storing matrices in other ways")
    return found


def execute(session: Session, *, average_bits: float, choose: str, speedup: float) -> None:
    """Store each matrix as `session.allocation` says, layer by layer, each on the inputs the layers before give.

    Raises:
        CandidateFailed: "build_error", no allocation or no calibration text; "unsupported", it is of another model or over
            `average_bits`.
    """
    from knowledge_base.errors import CandidateFailed
    from knowledge_base.techniques import _packed
    from knowledge_base.techniques._blocks import Matrix, each_layer, matrix_of
    from knowledge_base.techniques._choices import made, weights_of
    from knowledge_base.techniques._experts_module import split_experts

    if not session.allocation:
        raise CandidateFailed(
            "build_error", "weight_mixed needs an allocation of options to matrices",
            hint="plan with calibration text, so that the planner can measure sensitivities",
        )  # fmt: skip
    split_experts(session.model)
    modules = _packed.linears(session.model)
    options = _options(session.allocation, modules, {name for name, _ in session.model.named_modules()})
    taken = _bits(modules, options)
    if taken > average_bits * 1.0001:
        raise CandidateFailed(
            "unsupported", f"the allocation takes {taken:.2f} bits for each weight, more than {average_bits}",
            hint="allocate anew for this model",
        )  # fmt: skip
    names = {id(module): name for name, module in modules.items()}
    waiting = {name for name in modules if str(options[name]) != "16"}
    stored: dict[str, Any] = {}

    def store(name: str, inputs: Any) -> None:
        waiting.discard(name)
        new = made(modules[name], options[name], GROUP_SIZE, inputs)
        if new is None:
            raise CandidateFailed(
                "unsupported", f"`{name}` cannot be held as `{options[name]}`", hint="allocate anew for this model"
            )
        # The next layers are calibrated on what this one will give.
        matrix_of(modules[name]).copy_(weights_of(new))
        stored[name] = new

    def change(index: int, layer: Any, matrices: list[Matrix]) -> None:
        for matrix in matrices:
            if (name := names.get(id(matrix.module))) in waiting:
                store(name, matrix.inputs)

    each_layer(session, change, full=True, label="weight_mixed")
    for name in sorted(waiting):  # calibration never came through it
        store(name, None)
    for name, new in stored.items():
        session.model.set_submodule(name, new)
    session.notes["weight_mixed.average_bits"] = round(taken, 3)
    for text in sorted({str(option) for option in options.values()}):
        session.notes[f"weight_mixed.matrices.{text}"] = sum(str(option) == text for option in options.values())


def _options(allocation: Mapping[str, Any], modules: Mapping[str, Any], there: set[str]) -> dict[str, Any]:
    """Return the option of each module. `there` are all modules of the model: other steps may have allocations too.

    Raises:
        CandidateFailed: "unsupported", the allocation names other modules, or what is no option.
    """
    from knowledge_base.errors import CandidateFailed
    from knowledge_base.techniques._choices import parse

    options = {name: parse(allocation.get(name)) for name in modules}
    unknown = [name for name, option in options.items() if option is None]
    unused = sorted(set(allocation) - there)
    if unknown or unused:
        what = f"gives no option to `{unknown[0]}`" if unknown else f"names `{unused[0]}`, which the model lacks"
        raise CandidateFailed(
            "unsupported", f"the allocation was made for another model: it {what}", hint="allocate anew for this model"
        )
    return options


def _bits(modules: Mapping[str, Any], options: Mapping[str, Any]) -> float:
    """Return the stored bits for each weight."""
    from knowledge_base.techniques import _packed
    from knowledge_base.techniques._blocks import matrix_of
    from knowledge_base.techniques._choices import sizes

    stored = params = 0
    for name, module in modules.items():
        shape, dense = matrix_of(module).shape, _packed.dense_bytes(module)
        params += shape.numel()
        stored += (sizes(shape, options[name], GROUP_SIZE, dense) or {"bytes": dense})["bytes"]
    return 8 * stored / params
