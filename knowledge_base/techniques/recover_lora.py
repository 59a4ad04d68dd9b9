"""Train the damaged model back towards the unchanged one with LoRA, then merge the adapters into its weights.

peft's LoRA of rank 16 on every matrix inside the layers; the loss is the KL divergence from the unchanged model's
next-token distribution to the damaged model's on the calibration text. (Next-token loss alone fits the few
calibration documents: on the shipped model it made held-out text worse.) AdamW, cosine schedule, seeded. The last
quarter of the text is kept out of training; the state nearest to the unchanged model there is kept, and if none beats
the model as it was, nothing is changed. Zeros left by unstructured pruning stay zero. While it trains, memory holds
both models.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

RANK = 16
TRAINING_SLOWDOWN = 3.0
TOKENS_PER_STEP = 1024
LEARNING_RATE = 1e-3
CHECKS = 4  # times the held-out part is scored while training

TECHNIQUE = Technique(
    summary="win back quality by distilling from the unchanged model with LoRA, merged into the weights",
    stage="recover",
    family="recovery",
    implements=("recover_lora",),
    knobs={"steps": Choice(options=(20, 60, 200), default=60)},
    saves=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats"),
    spends=("build_s",),
    needs_calibration=True,
    modules=("peft",),
    sources=("arXiv:2106.09685", "https://github.com/horseee/LLM-Pruner", "https://github.com/NVlabs/Minitron"),
)

EVIDENCE: tuple[Evidence, ...] = ()

# Share of the log perplexity ratio that comes back, measured on the shipped model after low_rank and drop_layers.
# No published figure is comparable: data and steps differ by orders of magnitude.
_RECOVERED = {20: 0.25, 60: 0.4, 200: 0.5}


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.attention_layers < model.layers:
        return f"adapters would not be trained: {model.architecture} has layers that use their weights directly"
    return None


def rewrite(demand: Demand, *, steps: int) -> Demand:
    """Return the demand with part of the damage undone: ratio ** (1 - recovered), and the work of training.

    A training token costs a forward pass of both models and a backward pass to the adapters: three forward passes;
    small adapter products and the optimiser keep a processor at about a third of its rate for large ones (own runs,
    2026-11: 60 steps took 84 s where the arithmetic alone is 29 s).
    """
    recovered = _RECOVERED[steps]
    forward_flop = demand.linear_flop_per_token + demand.head_flop_per_token
    tokens = 3 * TOKENS_PER_STEP * steps + (CHECKS + 2) * 4096
    return replace(
        demand,
        perplexity_ratio=demand.perplexity_ratio ** (1 - recovered),
        build_flop=demand.build_flop + TRAINING_SLOWDOWN * forward_flop * tokens,
        because=(*demand.because, f"{steps} LoRA steps bring back about {recovered:.0%} of the loss"),
    )


def execute(session: Session, *, steps: int) -> None:
    """Train and merge. The model's structure and number of parameters are those it had before.

    Raises:
        CandidateFailed: too little calibration text to hold some out, the unchanged model cannot be loaded again, or a
            loss that is not finite.
    """
    import math

    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.functional import kl_div

    from knowledge_base.errors import CandidateFailed
    from knowledge_base.techniques._blocks import decoder_layers, is_matrix

    model, tokens = session.model, session.calibration
    if tokens is None or len(tokens) < 4:
        raise CandidateFailed(
            "build_error", "recovery needs at least 4 rows of calibration text", hint="give more `calibration` samples"
        )
    stored = model.dtype
    if stored == torch.float16:  # its gradients underflow without scaling, and processors compute it slowly
        model.to(torch.float32)
    tokens = tokens.to(next(model.parameters()).device)
    cut = len(tokens) - len(tokens) // 4  # neighbouring rows are of one document, so the split is not interleaved
    train, held_out = tokens[:cut], tokens[cut:]
    teacher = _unchanged(model)
    inside = {id(module) for module in decoder_layers(model).modules() if is_matrix(module)}
    targets = {name: module for name, module in model.named_modules() if id(module) in inside}
    zeros: dict[str, torch.Tensor] = {}
    if "prune_wanda.zeros_ratio" in session.notes:
        zeros = {name: module.weight.data == 0 for name, module in targets.items()}

    def divergence(rows: torch.Tensor) -> torch.Tensor:
        """Return KL(unchanged || damaged) in nats for each token of rows (rows, tokens)."""
        with torch.no_grad():
            wanted = teacher(input_ids=rows, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
        given = model(input_ids=rows, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
        return kl_div(given, wanted, log_target=True, reduction="batchmean")

    @torch.no_grad()
    def score() -> float:
        model.eval()
        return sum(divergence(row[None]).item() for row in held_out) / len(held_out)

    before = score()
    with torch.random.fork_rng():
        torch.manual_seed(session.seed)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=list(targets), bias="none")
        wrapped = get_peft_model(model, config)  # puts the adapters into `model` itself
        adapters = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
        for name, mask in zeros.items():
            model.get_submodule(name).register_forward_hook(partial(_without_zeros, mask))
        optimiser = torch.optim.AdamW(adapters.values(), lr=LEARNING_RATE, weight_decay=0.0)
        batch = max(1, min(len(train), TOKENS_PER_STEP // train.shape[1]))
        order = torch.cat([torch.randperm(len(train)) for _ in range(math.ceil(steps * batch / len(train)))])
        warm_up = max(1, steps // 10)
        best_score, best = before, None
        for step in range(steps):
            done = max(0.0, (step - warm_up) / (steps - warm_up))
            share = (step + 1) / warm_up if step < warm_up else 0.5 + 0.5 * math.cos(math.pi * done)
            optimiser.param_groups[0]["lr"] = LEARNING_RATE * share
            model.train()
            loss = divergence(train[order[step * batch : (step + 1) * batch]])
            if not torch.isfinite(loss):
                raise CandidateFailed("non_finite", f"the training loss is not finite at step {step + 1}")
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(adapters.values(), 1.0)
            optimiser.step()
            session.progress("recover_lora", (step + 1) / steps)
            if (step + 1) % max(1, steps // CHECKS) == 0 and (reached := score()) < best_score:
                best_score, best = reached, {name: p.detach().clone() for name, p in adapters.items()}
    if best is None:
        wrapped.unload()
    else:
        with torch.no_grad():
            for name, parameter in adapters.items():
                parameter.copy_(best[name])
        wrapped.merge_and_unload()
        for name, mask in zeros.items():
            model.get_submodule(name).weight.data[mask] = 0.0
    model.to(stored).eval().requires_grad_(False)
    session.notes["recover_lora.heldout_kl_nats"] = [before, best_score]


def _unchanged(model):
    """Return the model as it came, loaded again from where it was loaded."""
    from transformers import AutoModelForCausalLM

    from knowledge_base.errors import CandidateFailed

    try:
        teacher = AutoModelForCausalLM.from_pretrained(
            model.name_or_path, dtype=model.dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise CandidateFailed(
            "build_error",
            f"recovery needs the unchanged model, which cannot be loaded from `{model.name_or_path}`: {error}",
        ) from error
    return teacher.to(model.device).eval().requires_grad_(False)


def _without_zeros(mask, layer, args, output):
    """Take the adapter's part at pruned weights out of a LoRA layer's output: train what will be merged."""
    import torch

    delta = layer.get_delta_weight("default") * mask  # in the weight's own layout
    if layer.fan_in_fan_out:  # Conv1D stores (in, out)
        delta = delta.T
    return output - torch.nn.functional.linear(args[0].to(delta.dtype), delta).to(output.dtype)
