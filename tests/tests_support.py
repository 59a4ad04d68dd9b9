"""A toy model, workload and machine: facts only, nothing is loaded. For tests of prediction and search."""

from __future__ import annotations

from knowledge_base.types import Device, Hardware, Model, Workload

TOY_MODEL = Model(
    name="toy", source="toy", digest="toy", architecture="llama", layers=8, hidden_size=256, heads=8, kv_heads=4,
    head_size=32, ffn_size=768, vocab_size=4096, max_context_tokens=1024, params_total=7_344_384, params_active=7_344_384,
    linear_params=6_291_456, embedding_params=1_048_576, tied_embeddings=True, attention_layers=8,
    weight_dtype="float32", weight_bytes=29_377_536,
)  # fmt: skip
TOY_WORKLOAD = Workload(prompt_tokens=128, output_tokens=64, concurrency=4)
TOY_MACHINE = Hardware(
    name="toy machine",
    devices=(
        Device(
            name="toy cpu", kind="cpu", memory_bytes=16 * 2**30, memory_bytes_per_s=40e9, cores=2, idle_w=10.0, busy_w=40.0,
            flop_per_s={"float32": 200e9, "bfloat16": 400e9, "float16": 200e9, "int8": 800e9}, source="made up for tests",
        ),
    ),
    host_memory_bytes=16 * 2**30, memory_limit_bytes=16 * 2**30, price_usd_per_h=0.1, electricity_usd_per_kwh=0.15,
    grid_gco2e_per_kwh=400.0, pue=1.1, fingerprint="toy", measured=True, disk_bytes_per_s=2e9,
)  # fmt: skip
