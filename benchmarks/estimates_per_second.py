"""Plan estimates per CPU second on one core, all cost terms, with and without a calibration. Target: 20,000.

    OMP_NUM_THREADS=1 python benchmarks/estimates_per_second.py [--plans 20000] [--repeats 5]

Prices legal plans of Llama-3-70B's shapes on an H200: `listed` in the order the exhaustive solver lists them,
`drawn` a fixed random sample of long plans, as a sampler's first generations are (few share their first steps).
`cold` starts from an empty memo of rewrites; `warm` prices the same plans again, as each round of a search does.
CPU seconds, so that other work on the machine disturbs less; medians over repeats.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cost_models import calibrate
from cost_models.catalogue import find_machine
from cost_models.demand import chains
from cost_models.predict import estimate, estimate_many
from knowledge_base.registry import engines
from knowledge_base.types import Figure, Measurement, Model, Plan, Workload
from search.space import Space, build_space

LAYER = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
MODEL = Model(
    name="Llama-3-70B", source="shapes", digest="70b", architecture="llama", layers=80, hidden_size=8192, heads=64, kv_heads=8,
    head_size=128, ffn_size=28672, vocab_size=128256, max_context_tokens=8192, params_total=70_553_706_496,
    params_active=70_553_706_496, linear_params=80 * LAYER, embedding_params=128256 * 8192, tied_embeddings=False,
    attention_layers=80, weight_dtype="bfloat16", weight_bytes=141_107_412_992,
)  # fmt: skip
WORKLOAD = Workload(prompt_tokens=512, output_tokens=128, concurrency=8)


def draw_plans(space: Space, count: int, seed: int = 0) -> list[Plan]:
    """Return `count` different legal plans with a random step of each family, always the same ones."""
    draw = random.Random(seed)
    plans: dict[Plan, None] = {}
    while len(plans) < count:
        engine = draw.choice(list(space.options))
        steps = [s for options in space.options[engine].values() if (s := draw.choice([None, *options])) is not None]
        if (plan := space.plan(engine, steps)) is not None:
            plans[plan] = None
    return list(plans)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    machine = find_machine("h200-sxm")
    space = build_space(MODEL, WORKLOAD, machine, engine_names=engines.names(), executable=False)
    kinds = {
        "listed": list(itertools.islice(space.each(), options.plans)),
        "drawn": draw_plans(space, min(options.plans, space.count() // 20)),
    }
    measured = []
    for i, plan in enumerate(kinds["drawn"][:12]):
        values = estimate(plan, MODEL, WORKLOAD, machine).values
        figures = {
            k: Figure(value=v.mid * 1.3 + 1e-12, low=v.low, high=v.high, n=5) for k, v in values.items() if v.mid > 0
        }
        measured.append(Measurement(plan=plan, key=str(i), hardware_fingerprint=machine.fingerprint, figures=figures))
    began = time.process_time()
    calibration = calibrate.fit(measured, MODEL, WORKLOAD, machine)
    print(
        f"calibration from {len(measured)} measurements: {time.process_time() - began:.2f} s, scikit-learn's import included"
    )
    for (order, plans), (name, learned) in itertools.product(
        kinds.items(), (("prior", None), ("calibrated", calibration))
    ):
        for memo in ("cold", "warm"):
            rates = []
            for _ in range(options.repeats):
                if memo == "cold":
                    chains.cache_clear()
                began = time.process_time()
                estimate_many(plans, MODEL, WORKLOAD, machine, learned)
                rates.append(len(plans) / (time.process_time() - began))
            steps = statistics.mean(len(p.steps) for p in plans)
            median = statistics.median(rates)
            print(
                f"{order} ({len(plans):,} plans, {steps:.1f} steps) {name:10} {memo}: {median:9,.0f} plans/s, best {max(rates):,.0f}"
            )


if __name__ == "__main__":
    main()
