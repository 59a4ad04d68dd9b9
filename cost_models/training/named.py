"""Ways of training by their names in the knowledge base, as settings: `qlora+gradient_checkpointing`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cost_models.training.setup import MATRICES, TrainingSetup
from knowledge_base.errors import BadInput
from knowledge_base.types import Model

ALL_PARAMETERS = "full_finetune"  # what is meant where no method is named
LONG_NAMES = {"full": ALL_PARAMETERS}
_MIXED: dict[str, Any] = {"master_weights": True, "state_dtype": "float32"}  # arXiv:1710.03740

# Name -> settings. A way of training holds one method.
METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    ALL_PARAMETERS: {"method": "full", **_MIXED},
    "galore": {"method": "galore"},
    "lomo": {"method": "lomo"},
    "mezo": {"method": "mezo"},
    "lora": {"method": "lora"},
    "rslora": {"method": "lora"},  # another factor, the same shapes
    "dora": {"method": "lora", "magnitudes": True},
    "qlora": {"method": "qlora", "base_format": "nf4_double"},
    "loftq": {"method": "qlora", "base_format": "nf4_double"},  # another start, the same shapes
    "qa_lora": {"method": "qlora", "base_format": "int4"},
    "ia3": {"method": "scale", "targets": ("k", "v", "up")},  # down's input is up's product
    "bitfit": {"method": "bias", "targets": MATRICES},
    "ln_tuning": {"method": "norm"},
    "prefix_tuning": {"method": "prompt"},
    "prompt_tuning": {"method": "soft_prompt"},
}
# What goes with a method.
TECHNIQUE_SETTINGS: dict[str, dict[str, Any]] = {
    "gradient_checkpointing": {"checkpointing": True},
    "chunked_cross_entropy": {"chunked_cross_entropy": True},
    "torch_compile": {"compiled": True},
    "fused_optimizer_backward": {"fused_optimiser": True},
    "low_bit_adam": {"optimiser": "adam_8bit"},
    "factored_optimiser": {"optimiser": "adafactor"},
    "optimiser_offloading": {"offload_states": True},
    "activation_offloading": {"offload_activations": True, "checkpointing": True},
    "pure_bf16": {"master_weights": False, "state_dtype": None},
    "mixed_precision": _MIXED,
}
RANKED = ("galore", *(name for name, settings in METHOD_SETTINGS.items() if "lora" in settings["method"]))


def method_of(names: tuple[str, ...]) -> str:
    """Return the method among the names of a way of training.

    Raises:
        BadInput: it names two.
    """
    methods = [name for name in names if name in METHOD_SETTINGS]
    if len(methods) > 1:
        raise BadInput(
            f"{' and '.join(methods)} are both methods", hint="a model is trained by one: leave the others out",
            where="--finetune",
        )  # fmt: skip
    return methods[0] if methods else ALL_PARAMETERS


def setup_of(model: Model, names: tuple[str, ...], **settings: Any) -> TrainingSetup:
    """Return the set-up of a way of training; `settings` are those its names leave open.

    Positions of a soft prompt or prefix are computed and are no tokens of the data: they are counted as padding.

    Raises:
        BadInput: two methods, or settings that cannot go together.
    """
    told = {**settings, **METHOD_SETTINGS[method_of(names)]}
    for name in names:
        told |= TECHNIQUE_SETTINGS.get(name, {})
    if "targets" in told:
        told["targets"] = tuple(t for t in told["targets"] if model.gated_ffn or t != "gate")
    setup = TrainingSetup(**told)
    if setup.method != "soft_prompt":
        return setup
    positions = setup.sequence_tokens + setup.virtual_tokens
    return replace(setup, sequence_tokens=positions, padding_ratio=setup.virtual_tokens / positions)
