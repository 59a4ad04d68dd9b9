"""Training and inference over several devices: memory of a rank, bytes over the links, time, pipelines of unequal machines.

    layout = Layout(data=8, zero_stage=3)
    rank_memory(model, setup, layout)                      the rank that needs most
    step_traffic(model, setup, layout, cluster)            bytes a rank sends and seconds, for each kind of parallelism
    distributed_cost(model, setup, hardware, layout, cluster, tokens=1e9)

Ranks are numbered with tensor parallelism innermost, then sequence, then data (experts lie within it), then pipeline, so
the groups that talk most share a machine. `setup.batch` is what one data rank takes at once, and
`setup.gradient_accumulation` counts micro-batches.

links.py holds the collectives, ranks.py layouts and memory, traffic.py, pipelines.py and cost.py the rest.
"""

from cost_models.distributed.cost import distributed_cost, distributed_time
from cost_models.distributed.links import Cluster, Link, Traffic, all_gather, all_reduce, all_to_all, reduce_scatter
from cost_models.distributed.pipelines import bubble_ratio, pipeline_s, place_layers, unequal_pipeline
from cost_models.distributed.ranks import GATHERED_LAYERS, Layout, check_layout, moved_bytes, rank_memory
from cost_models.distributed.traffic import decode_traffic, step_traffic

__all__ = [
    "GATHERED_LAYERS",
    "Cluster",
    "Layout",
    "Link",
    "Traffic",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "bubble_ratio",
    "check_layout",
    "decode_traffic",
    "distributed_cost",
    "distributed_time",
    "moved_bytes",
    "pipeline_s",
    "place_layers",
    "rank_memory",
    "reduce_scatter",
    "step_traffic",
    "unequal_pipeline",
]
