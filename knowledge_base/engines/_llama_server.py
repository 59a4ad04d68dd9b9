"""llama.cpp's own server, asked in its process: continuous batching, slots side by side, each with a cache it may keep.

xllamacpp starts the server with a listener of its own; that one is a socket in the working folder, and nobody is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knowledge_base.engines import _llama_abi as abi
from knowledge_base.engines._serving import CANCELLED, LENGTH, STOP, Piece, Told, Wanted
from knowledge_base.errors import BadInput, CandidateFailed

SOCKET = "llama.sock"
ALL_F32 = 0  # llama_ftype, as in _llama_running
MOST_SEED = 2**32 - 2  # one more means another seed each time


class LlamaServer:
    """See `_serving.Server`. Cache types, threads and slots are those the artefact was measured with.

    A step computes a token of each running answer, then tokens of prompts, `prefill_chunk` in all. With `prefix_cache` a
    prompt goes to the slot that knows most of its beginning, and only the rest of it is computed.
    """

    def __init__(self, path: Path, runtime: Mapping[str, Any], context_tokens: int) -> None:
        import xllamacpp

        facts = facts_of(path)
        self.slots = int(runtime.get("batch", 1))
        self.context_tokens: int | None = min(context_tokens, facts["context_length"])
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_parallel = self.slots
        params.n_ctx = self.slots * self.context_tokens
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = runtime.get("threads") or abi.cores()
        params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE  # in private memory, as when it was measured
        params.check_tensors = True
        cache, flash = xllamacpp.ggml_type, xllamacpp.llama_flash_attn_type
        if bits := runtime.get("kv_bits"):
            params.cache_type_k = params.cache_type_v = {8: cache.GGML_TYPE_Q8_0, 4: cache.GGML_TYPE_Q4_1}[bits]
            params.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_ENABLED
        elif facts["file_type"] == ALL_F32:
            params.cache_type_k = params.cache_type_v = cache.GGML_TYPE_F32
            params.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_prompt = bool(runtime.get("prefix_cache"))
        params.cache_ram_mib = 0  # prompts stay in their slots only: more would take memory nobody planned
        if chunk := runtime.get("prefill_chunk"):
            params.n_batch = max(chunk, self.slots)  # a step has a token of each running answer at least
            params.n_ubatch = min(params.n_batch, params.n_ubatch)
        params.fit_params = params.ui = params.endpoint_slots = False
        params.hostnames = [SOCKET]
        params.verbosity = 1  # errors
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise CandidateFailed(
                "load_error", f"{path.name}: llama.cpp cannot serve it", hint="build the artefact again"
            ) from error
        # One that is closed before its loop runs never ends: only an answer shows that it does.
        self.answer(Wanted(prompt=(0,), new_tokens=1, ignore_eos=True), lambda piece: True)

    def answer(self, wanted: Wanted, told: Told) -> str:
        """Tell each piece; see `_serving.Server.answer`."""
        sampling = wanted.sampling
        request = {
            "prompt": list(wanted.prompt),
            "max_tokens": wanted.new_tokens,
            "ignore_eos": wanted.ignore_eos,
            "samplers": ["temperature", "top_p"],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": -1 if sampling.seed is None else sampling.seed % MOST_SEED,
            "stream": True,
            "timings_per_token": True,
        }
        known, ended, fault = 0, "", "no reason given"

        def hear(message: Mapping[str, Any]) -> bool:
            """Return whether to stop."""
            nonlocal known, ended, fault
            if "choices" not in message:
                fault = str(message.get("error", message).get("message", fault))
                return True
            (choice,) = message["choices"]
            tokens = message["timings"]["predicted_n"]
            piece, known = Piece(choice["text"], tokens - known), tokens
            if (piece.text or piece.tokens) and not told(piece):
                ended = CANCELLED
            elif choice["finish_reason"]:
                ended = LENGTH if choice["finish_reason"] == "length" else STOP
            return bool(ended)

        self._server.handle_completions(request, hear)
        if not ended and "invalid tokens" in fault:
            raise BadInput("a token of the prompt is not in the vocabulary", hint="check the tokenizer")
        if not ended:
            raise CandidateFailed("crashed", f"llama.cpp gave no answer: {fault}")
        return ended

    def close(self) -> None:
        """Stop the server and free the model."""
        del self._server


def facts_of(path: Path) -> dict[str, int]:
    """Return `context_length` and `file_type` as the file says."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    architecture = fields["general.architecture"].contents()
    return {
        "context_length": int(fields[f"{architecture}.context_length"].contents()),
        "file_type": int(fields["general.file_type"].contents()) if "general.file_type" in fields else -1,
    }
