"""Leave a share of the layers' weights out of memory, and read them each time their part of a layer runs.

A model larger than memory runs, as fast as the disk is read, or beside an accelerator the host's memory: each pass brings
every such weight in once, for the whole batch. The share that stays is the knob, and any budget of memory finds the
gentlest that meets it. Which parts of layers are left out is spread evenly over the model, so that the time resident parts
compute is time to read in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from knowledge_base.build_memory import SHAPES
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

PLACES = 2  # parts in memory that are not resident: one that computes, one that is read

TECHNIQUE = Technique(
    summary="weights on disk, or on the host beside an accelerator, and read layer by layer",
    stage="serve",
    family="offloading",
    implements=("offloading",),
    knobs={"resident": Choice(options=(0.0, 0.5), default=0.5)},
    saves=("weights_bytes", "peak_memory_bytes"),
    spends=("ttft_s", "tpot_s", "latency_s", "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token",
            "cost_usd_per_token"),
    needs=frozenset({"offload"}),
    provides=frozenset({"offloaded"}),
    lossless=True,
    memory=SHAPES,
    sources=("arXiv:2303.06865", "arXiv:2104.07857", "https://huggingface.co/docs/accelerate/usage_guides/big_modeling"),
)  # fmt: skip

# Any share can stay: the search adds the largest that meets a budget of memory.
RANGE = dict.fromkeys(TECHNIQUE.saves, ("resident", tuple(share / 20 for share in range(19, -1, -1))))

_FLEXGEN = "https://github.com/FMInference/FlexGen"
_ZERO_INFERENCE = "https://github.com/deepspeedai/DeepSpeed/blob/master/docs/_posts/2022-09-10-zero-inference.md"
EVIDENCE = (
    Evidence(model="OPT-175B", setting="FlexGen against Accelerate, T4 of 16 GB, 208 GB of memory, SSD of 1.5 TB", quantity="tokens/s",
             baseline=0.01, value=0.69, source=_FLEXGEN),
    Evidence(model="OPT-30B", setting="FlexGen against Accelerate, T4 of 16 GB, 208 GB of memory", quantity="tokens/s",
             baseline=0.62, value=7.32, source=_FLEXGEN),
    Evidence(model="OPT-30B", setting="all weights on the host, V100", quantity="tokens/s", baseline=None, value=43, source=_ZERO_INFERENCE),
    Evidence(model="OPT-30B", setting="all weights on an NVMe disk, V100", quantity="tokens/s", baseline=None, value=30, source=_ZERO_INFERENCE),
    Evidence(model="BLOOM-176B", setting="next layer read while one computes, NVMe disk", quantity="speed-up", baseline=1.0, value=1.21,
             source=_ZERO_INFERENCE),
)  # fmt: skip


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model on that machine, or None."""
    if model.kind != "decoder":
        return f"the layers of {model.architecture} are of two kinds, and only those of a decoder are brought in"
    if "unified" in hardware.device.features:
        return f"{hardware.name} has one memory for its host and its accelerator: there is no other to leave weights in"
    gpu = hardware.device.kind == "gpu"
    if (hardware.host_link_bytes_per_s if gpu else hardware.disk_bytes_per_s) is None:
        where = "the link to its accelerator" if gpu else "its disk"
        return f"how fast {hardware.name} reads from {where} is not known (leanplan probe --refresh)"
    return None


def legal(knobs: Mapping[str, float], model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why leaving so little out saves nothing, or None."""
    left, transit = _shares(model, float(model.layers), knobs["resident"])
    if left <= transit:
        return f"{PLACES} parts of the {model.layers} layers are in memory while they are read, which is no less than is left out"
    return None


def rewrite(demand: Demand, *, resident: float) -> Demand:
    """Return the demand with what stays in memory, and what each pass brings in."""
    left, transit = _shares(demand.model, demand.layers, resident)
    return demand.but(
        offloaded_share=left,
        transit_bytes=transit * demand.linear_bytes,
        because=(*demand.because, f"{left:.0%} of the layers' weights are not in memory: each pass brings them in"),
    )


def _shares(model: Model, layers: float, resident: float) -> tuple[float, float]:
    """Return what of the layers' weights is left out, and what is in memory while it is brought in, as shares of all."""
    sizes = list(layer_parts(model).values()) * max(1, round(layers))
    left = spread(sizes, resident)
    whole = sum(sizes)
    return sum(sizes[i] for i in left) / whole, PLACES * max((sizes[i] for i in left), default=0.0) / whole


def layer_parts(model: Model) -> dict[str, float]:
    """Return the parts of one layer and their shares of its weights; a layer without attention, or with nothing else, is one."""
    attention = 2 * model.hidden_size * model.head_size * (model.heads + model.kv_heads)
    share = attention * model.layers / model.linear_params
    return {"attention": share, "feed-forward": 1 - share} if 0 < share < 1 else {"layer": 1.0}


def spread(sizes: Sequence[float], resident: float) -> list[int]:
    """Return the numbers of the parts that are left out, evenly over all: never less than that share, nor a part more.

    >>> spread([1, 1, 1, 1], 0.5), spread([1, 2, 1, 2], 0.7), spread([1, 2], 1.0)
    ([0, 2], [0, 3], [])
    """
    left: list[int] = []
    passed = out = 0.0
    for number, size in enumerate(sizes):
        passed += size
        if out < (1 - resident) * passed * (1 - 1e-9):
            left.append(number)
            out += size
    return left


def execute(session: Session, *, resident: float) -> None:
    """Name the parts that the engine is to bring in when they run.

    Raises:
        CandidateFailed: "unsupported", the model's layers are not found, or their weights are held in a form of their own.
    """
    from knowledge_base.engines._torch_offload import parts_of

    parts = parts_of(session.model)
    names, sizes = list(parts), list(parts.values())
    left = spread(sizes, resident)
    session.runtime["offload"] = [names[i] for i in left]
    session.notes["offload.bytes"] = sum(sizes[i] for i in left)
