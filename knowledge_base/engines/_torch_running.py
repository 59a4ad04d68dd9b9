"""A torch model that generates greedily, with the cache, drafts and compilation its artefact asks for."""

from __future__ import annotations

import gc
import inspect
import shutil
import time
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from knowledge_base.engines._running import Generation
from knowledge_base.engines._torch_cache import cache_bytes, quantised_cache
from knowledge_base.errors import BadInput, CandidateFailed, EnvironmentProblem

CACHE_NAMES = ("past_key_values", "cache_params")  # what transformers' causal models call their cache argument


class TorchRunning:
    """An opened artefact (see `_running.Running`). Sets torch's thread count for the process while open."""

    def __init__(
        self, model: Any, *, threads: int | None, kv_bits: int | None, lookup_tokens: int | None, compiled: bool
    ) -> None:
        parameters = inspect.signature(model.forward).parameters
        cache_name = next((name for name in CACHE_NAMES if name in parameters), None)
        if cache_name is None:
            raise CandidateFailed(
                "unsupported",
                f"`{model.config.model_type}` takes no cache argument ({' or '.join(CACHE_NAMES)})",
                hint="use another engine for this architecture",
            )
        self._model = model
        self._device = next(model.parameters()).device
        self._cache_name = cache_name
        self._last_logits = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._kv_bits = kv_bits
        self._lookup_tokens = lookup_tokens
        self._step = _compile(model) if compiled else model
        self._compiled = compiled
        self._static: tuple[tuple[int, int], Cache] | None = None  # (batch, capacity) and its cache
        self._kv_bytes = 0
        self._threads_before = torch.get_num_threads()
        if kv_bits:
            quantised_cache(model.config, kv_bits)  # refuses here what has no such cache
        if lookup_tokens and any(DynamicCache(config=model.config).is_linear):
            raise CandidateFailed(
                "unsupported",
                f"prompt lookup takes drafts back, which the recurrent state of `{model.config.model_type}` cannot",
                hint="plan without prompt_lookup",
            )
        if threads:
            torch.set_num_threads(threads)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        """Continue equal-length prompts greedily as one batch; see `Running.generate`."""
        start = time.perf_counter()
        if new_tokens < 1:
            raise BadInput(f"{new_tokens} output tokens asked for", hint="ask for at least one")
        self._check(prompts, new_tokens)
        with torch.inference_mode():
            if self._lookup_tokens:
                return self._generate_with_drafts(list(prompts[0]), new_tokens, start)
            return self._generate_plainly(prompts, new_tokens, start)

    def log_probs(self, tokens: Sequence[int]) -> numpy.ndarray:
        """Return float32 (len(tokens), vocabulary) log-softmax rows; see `Running.log_probs`."""
        self._check([tokens], 0)
        with torch.inference_mode():
            # A quantised cache changes what attention sees, so scoring goes through it.
            cache = quantised_cache(self._model.config, self._kv_bits) if self._kv_bits else None
            logits = self._forward(self._tensor([tokens]), cache)[0]
            return torch.log_softmax(logits.float(), dim=-1).cpu().numpy()

    def memory(self) -> dict[str, int]:
        """Return exact `weights_bytes` and the last generate's `kv_cache_bytes`."""
        self._check_open()
        tensors = (*self._model.parameters(), *self._model.buffers())
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return {"weights_bytes": sum(storages.values()), "kv_cache_bytes": self._kv_bytes}

    def close(self) -> None:
        """Free the model and its caches and give torch its former thread count back."""
        if self._model is None:
            return
        self._model = self._step = self._static = None
        torch.set_num_threads(self._threads_before)
        if self._compiled:
            torch.compiler.reset()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _generate_plainly(self, prompts: Sequence[Sequence[int]], new_tokens: int, start: float) -> Generation:
        cache = self._empty_cache(len(prompts), len(prompts[0]) + new_tokens)
        token = self._choose(self._forward(self._tensor(prompts), cache, **self._last_logits))
        columns = [token.tolist()]  # on the host: the user has the token
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            token = self._choose(self._forward(token, cache, self._step))
            columns.append(token.tolist())
        end = time.perf_counter()
        self._kv_bytes = cache_bytes(cache)
        tokens = [[column[row][0] for column in columns] for row in range(len(prompts))]
        return Generation(tokens=tokens, ttft_s=first - start, total_s=end - start, steps=new_tokens - 1)

    def _generate_with_drafts(self, prompt: list[int], new_tokens: int, start: float) -> Generation:
        """Greedy decoding that checks several drafted tokens in one pass.

        A token is kept only where it is the model's own first choice, so the output is plain greedy's, up to ties
        closer than the rounding differences between one- and many-token matrix products.
        """
        assert self._lookup_tokens is not None
        cache = self._empty_cache(1, len(prompt) + new_tokens)
        cache.activate_past_recording()
        chosen = self._choose(self._forward(self._tensor([prompt]), cache, **self._last_logits)).tolist()[0]
        first = time.perf_counter()
        cache.crop(0)  # let go of what left a sliding window
        seen = Drafter(prompt)
        seen.append(chosen)
        new, steps = list(chosen), 0
        while len(new) < new_tokens:
            draft = seen.draft(min(self._lookup_tokens, new_tokens - len(new) - 1))
            logits = self._forward(self._tensor([[new[-1], *draft]]), cache)
            chosen = logits.argmax(dim=-1).tolist()[0]
            kept = next((i for i, (a, b) in enumerate(zip(draft, chosen)) if a != b), len(draft))
            cache.crop(kept - len(draft))
            seen.append(chosen[: kept + 1])
            new += chosen[: kept + 1]
            steps += 1
        end = time.perf_counter()
        self._kv_bytes = cache_bytes(cache)
        return Generation(tokens=[new], ttft_s=first - start, total_s=end - start, steps=steps)

    def _forward(self, ids: torch.Tensor, cache: Cache | None, model: Any = None, **settings: Any) -> torch.Tensor:
        if cache is not None:
            settings |= {self._cache_name: cache, "use_cache": True}
        else:
            settings |= {"use_cache": False}
        return (self._model if model is None else model)(input_ids=ids, **settings).logits

    def _empty_cache(self, batch: int, capacity: int) -> Cache:
        config = self._model.config
        if self._kv_bits:
            return quantised_cache(config, self._kv_bits)
        if not self._compiled:
            return DynamicCache(config=config)
        # Compiled code is made for one shape and holds the cache's addresses: the same shape gets the same tensors
        # again. Another shape starts afresh, or torch would make slower code for any shape and keep using that.
        if self._static is None or self._static[0] != (batch, capacity):
            torch.compiler.reset()
            self._static = ((batch, capacity), StaticCache(config=config, max_cache_len=capacity))
        self._static[1].reset()
        return self._static[1]

    def _tensor(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(tokens, dtype=torch.long, device=self._device)

    @staticmethod
    def _choose(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1].argmax(dim=-1, keepdim=True)  # (batch, 1)

    def _check_open(self) -> None:
        if self._model is None:
            raise RuntimeError("this artefact was closed")

    def _check(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        self._check_open()
        lengths = {len(prompt) for prompt in prompts}
        if len(lengths) != 1 or 0 in lengths:
            raise BadInput(
                f"prompts of {sorted(lengths)} tokens cannot be run as one batch",
                hint="give at least one prompt, all of one length of at least one token",
            )
        if self._lookup_tokens and len(prompts) > 1:
            raise BadInput("prompt lookup runs one prompt at a time", hint="give one prompt")
        config = self._model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None)
        total = lengths.pop() + new_tokens
        if limit and total > limit:
            raise BadInput(
                f"{total} tokens exceed the model's context of {limit}", hint="shorten the prompt or the output"
            )


class Drafter:
    """Guesses what comes next: what followed the latest earlier occurrence of the last tokens.

    Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding), with the text
    so far indexed by its n-grams, so that a guess costs the same in a long text.
    """

    def __init__(self, tokens: Sequence[int], longest: int = 3, shortest: int = 2) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> position after its latest occurrence
        self.append(tokens)

    def append(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text."""
        for token in tokens:
            end = len(self._tokens)
            for size in self._sizes:
                if end >= size:
                    self._next[tuple(self._tokens[end - size :])] = end
            self._tokens.append(token)

    def draft(self, tokens: int) -> list[int]:
        """Return that many likely next tokens, or none where the last tokens are new.

        Where the earlier occurrence is nearer than that, the text is taken to go on repeating itself.
        """
        for size in self._sizes:
            follows = self._next.get(tuple(self._tokens[-size:]))
            if follows is not None:
                period = len(self._tokens) - follows
                return [self._tokens[follows + i % period] for i in range(tokens)]
        return []


def _compile(model: Any) -> Any:
    """Return the model with its forward pass compiled for fixed shapes.

    Raises:
        CandidateFailed: "unsupported", the architecture has no compilable form.
        EnvironmentProblem: no C++ compiler, which CPU code generation needs.
    """
    if not getattr(model, "_can_compile_fullgraph", False):
        raise CandidateFailed(
            "unsupported",
            f"transformers marks `{model.config.model_type}` as not compilable in one graph",
            hint="plan without torch_compile",
        )
    on_gpu = next(model.parameters()).is_cuda
    if not on_gpu and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        raise EnvironmentProblem("torch.compile needs a C++ compiler, none found", hint="install g++")
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead" if on_gpu else None)

    def step(**inputs: Any) -> Any:
        try:
            return compiled(**inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise CandidateFailed(
                "build_error", f"torch.compile failed: {reason}", hint="plan without torch_compile"
            ) from error

    return step
