"""A torch model that generates greedily, with the cache, drafts and compilation its artefact asks for.

Plain generation is here; drafts and early exits, which take fewer passes, are in _torch_drafting.py.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import itertools
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache

from knowledge_base.engines._running import GREEDY, Generation, Sampling, require
from knowledge_base.engines._sampling import Sampler
from knowledge_base.engines._torch_cache import cache_bytes, quantised_cache
from knowledge_base.engines._torch_drafting import Decoding
from knowledge_base.engines._torch_eviction import BLOCK, LEAST
from knowledge_base.engines._torch_ffn import PromptNeurons
from knowledge_base.engines._torch_offload import Offloaded
from knowledge_base.engines._torch_pruning import Pruning
from knowledge_base.errors import BadInput, CandidateFailed, EnvironmentProblem

STATIC_CELLS = 512  # the size of a compiled stream's cache is a multiple of this
CACHE_NAMES = ("past_key_values", "cache_params")  # what transformers' causal models call their cache argument


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """Return the likeliest next token (batch, 1) after logits (batch, tokens, vocabulary)."""
    return logits[:, -1].argmax(dim=-1, keepdim=True)


class TorchRunning:
    """An opened artefact (see `_running.Running`). Sets torch's thread count for the process while open."""

    def __init__(
        self,
        model: Any,
        *,
        threads: int | None,
        kv_bits: int | None,
        decoding: Decoding | None,
        ffn_keep: float | None,
        compiled: bool,
        pruning: Pruning | None = None,
        offloaded: Offloaded | None = None,
    ) -> None:
        parameters = inspect.signature(model.forward).parameters
        self._inputs = parameters.keys()
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
        self._decoding = decoding
        self._pruning = pruning
        self._offloaded = offloaded
        self._neurons = PromptNeurons(model, ffn_keep) if ffn_keep else None
        self._step = _compile(model) if compiled else model
        self._compiled = compiled
        self._static: tuple[tuple[int, int], Cache] | None = None  # (batch, capacity) and its cache
        self._kv_bytes = 0
        self._threads_before = torch.get_num_threads()
        if kv_bits:
            quantised_cache(model.config, kv_bits)  # refuses here what has no such cache
        if decoding and any(DynamicCache(config=model.config).is_linear):
            raise CandidateFailed(
                "unsupported",
                f"drafts are taken back, which the recurrent state of `{model.config.model_type}` cannot be",
                hint="plan without drafts",
            )
        if decoding and pruning:
            raise CandidateFailed(
                "unsupported", "drafts are taken back, which a prompt or cache kept in part cannot be", hint="plan without drafts"
            )  # fmt: skip
        if threads:
            torch.set_num_threads(threads)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        """Continue equal-length prompts greedily as one batch; see `Running.generate`."""
        start = time.perf_counter()
        self._check(prompts, new_tokens)
        tokens: list[list[int]] = [[] for _ in prompts]
        times = []
        for added in self._passes(prompts, new_tokens):
            times.append(time.perf_counter())  # the tokens are on the host: the user has them
            for row, new in zip(tokens, added, strict=True):
                row += new
        return Generation(tokens=tokens, ttft_s=times[0] - start, total_s=times[-1] - start, steps=len(times) - 1)

    @property
    def context_tokens(self) -> int | None:
        """See `Running.context_tokens`."""
        self._check_open()
        return getattr(self._model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def stream(
        self, prompt: Sequence[int], new_tokens: int, *, sampling: Sampling = GREEDY, stop: Collection[int] = ()
    ) -> Iterator[int]:
        """Continue one prompt token by token; see `Running.stream`. Only greedy answers are drafted."""
        self._check([prompt], new_tokens)
        return self._streamed(prompt, new_tokens, sampling, frozenset(stop))

    def _streamed(
        self, prompt: Sequence[int], new_tokens: int, sampling: Sampling, stop: frozenset[int]
    ) -> Iterator[int]:
        choose = greedy if sampling.temperature == 0 else self._drawing(sampling)
        room = new_tokens
        if self._compiled:  # for each shape of the cache code is made anew: few shapes, and room left in them
            length = len(prompt) + new_tokens
            room = min(-(-length // STATIC_CELLS) * STATIC_CELLS, self.context_tokens or sys.maxsize) - len(prompt)
        left = new_tokens
        for added in self._passes([prompt], room, choose):
            for token in added[0][:left]:
                left -= 1
                yield token
                if token in stop or not left:
                    return

    def _drawing(self, sampling: Sampling) -> Callable[[torch.Tensor], torch.Tensor]:
        sampler = Sampler(sampling)
        return lambda logits: self._tensor([[sampler.draw(logits[0, -1].float().cpu().numpy())]])

    @property
    def vocabulary(self) -> int:
        """Tokens the model knows."""
        self._check_open()
        return int(self._model.config.get_text_config(decoder=True).vocab_size)

    def why_no_padding(self, context_tokens: int) -> str | None:
        """Return why sequences of different lengths, up to a context, cannot be read together by `last_logits`, or None."""
        layers = DynamicCache(config=self._model.config).layers
        if not {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
            return "its model keeps more of a text than keys and values"
        windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
        if windows and min(windows) < context_tokens:
            return f"layers see only the last {min(windows)} tokens, and padding would keep them all"
        own = any(hasattr(module, "create_position_ids_from_input_ids") for module in self._model.modules())
        if own or not {"attention_mask", "position_ids"} <= self._inputs:
            return "its model takes no positions"
        if rope := _by_the_longest(self._model.config.get_text_config(decoder=True)):
            return f"`{rope}` turns all sequences by the length of the longest"
        return None

    def last_logits(self, tokens: Sequence[Sequence[int]], cache: Cache, **inputs: torch.Tensor) -> torch.Tensor:
        """Return logits (rows, vocabulary) after tokens that follow what the cache has read.

        Args:
            inputs: where rows are of different lengths, padded on the left: `attention_mask` (rows, tokens read and to
                read) of zeros and ones, and `position_ids` (rows, tokens to read).
        """
        given = {name: value.to(self._device) for name, value in inputs.items()}
        return self._forward(self._tensor(tokens), cache, **given, **self._last_logits)[:, -1]

    def log_probs(self, tokens: Sequence[int]) -> numpy.ndarray:
        """Return float32 (len(tokens), vocabulary) log-softmax rows; see `Running.log_probs`."""
        self._check([tokens], 0, least=0)
        with torch.inference_mode():
            if self._neurons and len(tokens) > 1:
                return torch.log_softmax(self._decoded_logits(tokens).float(), dim=-1).cpu().numpy()
            if self._pruning and len(tokens) > 1:
                return torch.log_softmax(self._pruned_logits(tokens).float(), dim=-1).cpu().numpy()
            # A quantised cache changes what attention sees, so scoring goes through it.
            ids = self._tensor([tokens])
            caches = (quantised_cache(self._model.config, self._kv_bits) if self._kv_bits else None for _ in "ab")
            logits = self._forward(ids, next(caches))[0]
            if self._decoding:
                logits = self._decoding.scored(ids, logits, next(caches))
            return torch.log_softmax(logits.float(), dim=-1).cpu().numpy()

    def _decoded_logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return logits (len(tokens), vocabulary) as if every token were decoded after a prompt that chose the neurons.

        Each half is scored with the neurons the other half chose, so none is scored by the whole model, and none by
        neurons it chose itself.
        """
        assert self._neurons is not None
        half = len(tokens) // 2
        start, end = self._tensor([tokens[:half]]), self._tensor([tokens[half:]])
        with self._neurons.reading(first=half):
            self._forward(torch.cat([start, end], dim=1), self._empty_cache(1, len(tokens)), **self._last_logits)
        first = self._forward(start, self._empty_cache(1, len(tokens)))[0]
        cache = self._empty_cache(1, len(tokens))
        with self._neurons.reading():
            self._forward(start, cache, **self._last_logits)
        return torch.cat([first, self._forward(end, cache)[0]])

    @property
    def prunes(self) -> bool:
        """Whether prompts or cache are kept in part, so that what was read may be forgotten."""
        return self._pruning is not None

    def log_probs_after(self, prompt: Sequence[int], tokens: Sequence[int], *, whole: bool = False) -> numpy.ndarray:
        """Return float32 (1 + len(tokens), vocabulary): what comes after the prompt, then after each token, as decoded.

        Args:
            whole: nothing of prompt or cache is left out.
        """
        self._check([[*prompt, *tokens]], 0, least=0)
        with torch.inference_mode(), self._unpruned() if whole else contextlib.nullcontext():
            return torch.log_softmax(self._logits_after(prompt, tokens).float(), dim=-1).cpu().numpy()

    def _unpruned(self) -> contextlib.AbstractContextManager[None]:
        return self._pruning.off() if self._pruning else contextlib.nullcontext()

    def _logits_after(self, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        cache = self._empty_cache(1, len(prompt) + len(tokens))
        rows = [self._prefill([prompt], cache)[0, -1:]]
        rows += [self._read(tokens[i : i + BLOCK], cache) for i in range(0, len(tokens), BLOCK)]
        return torch.cat(rows)

    def _pruned_logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return logits (len(tokens), vocabulary) as if each token were decoded after a prompt that was kept in part.

        Half of the text is scored after the other half, half of that after its first half, and so on to what is too
        short to leave anything out: so none but the first few is scored by all that comes before it.
        """
        halves = [len(tokens)]
        while halves[0] // 2 > LEAST:
            halves.insert(0, halves[0] // 2)
        with self._unpruned():
            rows = [self._forward(self._tensor([tokens[: halves[0]]]), self._empty_cache(1, halves[0]))[0]]
        for half, end in itertools.pairwise(halves):
            rows[-1] = rows[-1][:-1]  # what the prompt's last token gives is told by what is read in part
            rows.append(self._logits_after(tokens[:half], tokens[half:end]))
        return torch.cat(rows)

    def memory(self) -> dict[str, int]:
        """Return exact `weights_bytes` and the last generate's `kv_cache_bytes`."""
        self._check_open()
        tensors = [*self._model.parameters(), *self._model.buffers()]
        if self._decoding:
            tensors += self._decoding.tensors()
        if self._offloaded:
            tensors = [t for t in tensors if not t.is_meta] + self._offloaded.tensors()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return {"weights_bytes": sum(storages.values()), "kv_cache_bytes": self._kv_bytes}

    def close(self) -> None:
        """Free the model and its caches and give torch its former thread count back."""
        if self._model is None:
            return
        if self._offloaded:
            self._offloaded.close()
        self._model = self._step = self._static = self._decoding = self._pruning = None
        torch.set_num_threads(self._threads_before)
        if self._compiled:
            torch.compiler.reset()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _passes(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, choose: Callable[[torch.Tensor], torch.Tensor] = greedy
    ) -> Iterator[list[list[int]]]:
        """Yield the tokens each pass adds to each prompt: one, or where drafts were right several; the prefill's first.

        Drafts are checked against greedy choices, so another `choose`, logits (batch, tokens, vocabulary) to (batch, 1), goes
        without.
        """
        cache = self._empty_cache(len(prompts), len(prompts[0]) + new_tokens)
        token = choose(self._prefill(prompts, cache))
        yield token.tolist()
        if self._decoding and choose is greedy:
            for added in self._decoding.passes(self._read, cache, prompts[0], int(token), new_tokens - 1):
                yield [added]
        else:
            for _ in range(new_tokens - 1):
                token = choose(self._forward(token, cache, self._step))
                yield token.tolist()
        self._kv_bytes = cache_bytes(cache) + (self._decoding.cache_bytes() if self._decoding else 0)

    def _read(self, tokens: Sequence[int], cache: Cache) -> torch.Tensor:
        """Return logits (tokens, vocabulary) of tokens that follow what the cache has read."""
        return self._forward(self._tensor([tokens]), cache)[0]

    def _prefill(self, prompts: Sequence[Sequence[int]], cache: Cache) -> torch.Tensor:
        part: Any = self._neurons or self._pruning
        ids = self._tensor(prompts)
        with part.reading() if part else contextlib.nullcontext():
            return self._forward(self._pruning.shortened(ids) if self._pruning else ids, cache, **self._last_logits)

    def _forward(self, ids: torch.Tensor, cache: Cache | None, model: Any = None, **settings: Any) -> torch.Tensor:
        if cache is not None:
            settings |= {self._cache_name: cache, "use_cache": True}
        else:
            settings |= {"use_cache": False}
        return (self._model if model is None else model)(input_ids=ids, **settings).logits

    def _empty_cache(self, batch: int, capacity: int) -> Cache:
        config = self._model.config
        if self._pruning and (pruned := self._pruning.empty_cache()):
            return pruned
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

    def _check_open(self) -> None:
        if self._model is None:
            raise RuntimeError("this artefact was closed")

    def _check(self, prompts: Sequence[Sequence[int]], new_tokens: int, *, least: int = 1) -> None:
        self._check_open()
        require(prompts, new_tokens, context=self.context_tokens, vocabulary=self.vocabulary, least=least)
        if self._decoding and len(prompts) > 1:
            raise BadInput("with drafts one prompt runs at a time", hint="give one prompt")
        if self._neurons and len(prompts) > 1:
            raise BadInput("each prompt chooses neurons of its own, so one runs at a time", hint="give one prompt")


def _by_the_longest(config: Any) -> str | None:
    """Return the kind of rotary positions whose angles depend on the longest sequence of a batch, or None."""
    rope = getattr(config, "rope_parameters", None) or {}
    each = rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]
    kinds = (str(kind.get("rope_type")) for kind in each if kind)
    return next((kind for kind in kinds if kind == "longrope" or "dynamic" in kind), None)


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
