"""Tiny models with random weights in several architectures, made in seconds: for tests, examples and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from knowledge_base.errors import BadInput

HEAD_SIZE = 32  # blocks of 32 fit quantised caches and weights
WINDOW_TOKENS = 64
END = "<|end|>"  # token 0: begins and ends a text

# What the tokenizer's merges are learnt from; any text would do, a fixed one makes the same tokenizer everywhere.
_TEXT = """
The planner reads a model, asks the machine what it can do, and looks for plans that stay within every budget.
A plan is a short list of steps: choose a data type, remove weights that matter little, repair what was lost,
store numbers in fewer bits, keep a smaller cache, draft several tokens and verify them together. Each step saves
one resource and spends another. Nothing is believed until it was measured: build the artefact, load it back,
warm up, repeat, compare with the unchanged model on text that nobody has seen before. Memory holds weights,
activations and a cache of keys and values that grows with every token. Reading them once for each new token takes
longer than multiplying, so bytes decide the speed of decoding, and arithmetic decides how soon the first word comes.
def measure(plan, prompts, repeats=9): return [run(plan, prompt) for prompt in prompts for _ in range(repeats)]
for layer in model.layers: hidden = hidden + layer.attention(layer.norm(hidden)); total += layer.weight.numel()
if latency_s <= 0.05 and memory_bytes < 2 ** 31 and quality >= 0.99: print("every budget is met", plan.words)
"""

ARCHITECTURES = ("llama", "llama_untied", "gpt2", "qwen2", "mistral", "mixtral", "mamba")


def make_tiny_model(
    folder: str | Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "float32",
    vocab_size: int = 512,
    hidden_size: int = 128,
    layers: int = 4,
    context_tokens: int = 256,
) -> Path:
    """Write a causal language model with random weights and a byte-level BPE tokenizer; return its folder.

    Deterministic: equal arguments give equal files. Attention has heads of 32 numbers and, but for gpt2, two query
    heads for each key-value head; every weight matrix has sides that are multiples of 32. `hidden_size=256` makes
    them multiples of 256, as GGUF k-quants need. Weights are drawn so that activations keep about unit variance;
    the model has learnt nothing.

    Args:
        architecture: "llama" (tied embeddings), "llama_untied", "gpt2", "qwen2" (sliding window in the upper half of
            the layers), "mistral" (sliding window everywhere), "mixtral" (4 experts, 2 active), "mamba" (no attention).
        dtype: of the stored weights, "float32", "bfloat16" or "float16".

    Raises:
        BadInput: an unknown architecture, or sizes that do not divide.
    """
    if architecture not in ARCHITECTURES:
        raise BadInput(f"unknown tiny architecture `{architecture}`", hint=f"one of {', '.join(ARCHITECTURES)}")
    if hidden_size % (2 * HEAD_SIZE) or vocab_size < 257:
        raise BadInput(
            f"hidden_size {hidden_size}, vocab_size {vocab_size}",
            hint=f"hidden_size must be a multiple of {2 * HEAD_SIZE}, vocab_size at least 257",
        )
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = _settings(architecture, hidden_size, layers, context_tokens)
    config = AutoConfig.for_model(
        architecture.removesuffix("_untied"),
        vocab_size=vocab_size,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    folder = Path(folder)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    _tokenizer(vocab_size, context_tokens).save_pretrained(folder)
    return folder


def _settings(architecture: str, hidden_size: int, layers: int, context_tokens: int) -> dict[str, Any]:
    spread = hidden_size**-0.5
    if architecture == "mamba":
        return {
            "hidden_size": hidden_size, "num_hidden_layers": layers, "state_size": 16, "expand": 2, "conv_kernel": 4,
            "initializer_range": spread,
        }  # fmt: skip
    heads = hidden_size // HEAD_SIZE
    if architecture == "gpt2":
        return {
            "n_embd": hidden_size, "n_layer": layers, "n_head": heads, "n_positions": context_tokens,
            "initializer_range": spread,
        }  # fmt: skip
    settings: dict[str, Any] = {
        "hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads // 2, "head_dim": HEAD_SIZE, "intermediate_size": 2 * hidden_size,
        "max_position_embeddings": context_tokens, "initializer_range": spread,
        "tie_word_embeddings": architecture in ("llama", "qwen2"),
    }  # fmt: skip
    if architecture == "qwen2":
        settings |= {"use_sliding_window": True, "sliding_window": WINDOW_TOKENS, "max_window_layers": layers // 2}
    elif architecture == "mistral":
        settings["sliding_window"] = WINDOW_TOKENS
    elif architecture == "mixtral":
        settings |= {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return settings


def _tokenizer(vocab_size: int, context_tokens: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=context_tokens
    )
