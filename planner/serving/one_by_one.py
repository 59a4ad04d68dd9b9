"""Any engine as a server: requests one after another, each streamed by the opened artefact."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any, cast

from knowledge_base.engines._serving import Told, Wanted, stops, tell
from knowledge_base.errors import CandidateFailed

if TYPE_CHECKING:
    from knowledge_base.engines._running import Running
    from planner.serving.texts import Texts


class OneByOne:
    """See `knowledge_base.engines._serving.Server`."""

    slots = 1

    def __init__(self, running: Running, texts: Texts, context_tokens: int) -> None:
        if not hasattr(running, "stream"):
            raise CandidateFailed("unsupported", "this engine does not stream", hint="serve a plan of another engine")
        self._running, self._texts = running, texts
        limit = running.context_tokens
        self.context_tokens: int | None = min(context_tokens, limit or context_tokens)

    def answer(self, wanted: Wanted, told: Told) -> str:
        """Tell each token's text; see `Server.answer`. The end-of-text token has none."""
        stop = stops(wanted, self._texts)
        stream = self._running.stream(wanted.prompt, wanted.new_tokens, sampling=wanted.sampling, stop=stop)
        with closing(cast(Any, stream)):
            return tell(stream, wanted, self._texts, told)

    def close(self) -> None:
        """Free the model."""
        self._running.close()
