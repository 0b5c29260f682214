"""What an engine does before anybody waits for it: compiles kernels, captures graphs, times its longest step."""

import logging
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING

import torch

from tucka_runtime.engine.adapters.folded import FoldedAdapter
from tucka_runtime.kernels.tables.segments import SMALL_BATCH
from tucka_runtime.messages import AdapterKey, Request, SamplingParams

if TYPE_CHECKING:
    from tucka_runtime.engine.engine import Engine

logger = logging.getLogger(__name__)

REHEARSED = "warm-up"
"""Id of the requests that only compile and time."""


class Rehearsal:
    """The rehearsals of one engine, which runs them as requests of its own."""

    def __init__(self, engine: "Engine"):
        self.engine = engine
        self.known: set[object] = set()
        """Shapes of adapters whose kernels are compiled."""
        self.postponed: frozenset[AdapterKey] | None = None
        """The loaded adapters when there was no memory to prepare anything for them."""

    def warm_up(self) -> None:
        """Compiles the kernels and captures the graphs, so that no request waits for it."""
        self.engine.runner.warm_up()
        self._run_prompts(None)
        self.engine.blocks.forget_all()

    def prepare(self) -> bool:
        """Does a part of what loaded adapters will need and nobody waits for yet: captures a graph (under a second), or
        compiles what prompts take (seconds, the first time on a machine). False once all is done, or where the device
        has no memory for more: then not until other adapters are loaded. For idle moments."""
        engine = self.engine
        serving = engine.adapters.serving()
        keys = frozenset(folded.key for folded in serving)
        if not engine.overlap or keys == self.postponed:
            return False
        try:
            return self._prepare(serving)
        except torch.OutOfMemoryError:
            logger.warning(
                "no memory is left to prepare for the loaded adapters: their first batches may take a second longer. "
                "Unload one, or restart with a smaller --kv-cache-tokens."
            )
            engine.abort(REHEARSED)
            self.postponed = keys
            return False

    def _prepare(self, serving: Rows[FoldedAdapter]) -> bool:
        if self.engine.runner.prepare(serving):
            return True
        for folded in serving:
            if folded.shape not in self.known:
                self._run_prompts(folded.key)
                self.known.add(folded.shape)
                return True
        return False

    def time_longest_step(self) -> float:
        """Runs a prompt that fills a step, so that no request pays for what is made at its first use. Returns the
        seconds that its longest step took. The memory that it took is kept from adapters (memory.AdapterMemory)."""
        with self.engine.runner.memory.measuring():
            seconds = self._run_prompt(self.engine.scheduler.max_tokens, None, None)
        self.engine.blocks.forget_all()
        return seconds

    def _run_prompts(self, adapter: AdapterKey | None) -> None:
        """Runs prompts of lengths that between them take every kernel that prompts take. They are scored, which no
        graph does: what runs without one has kernels of its own."""
        for length in (32, SMALL_BATCH + 1, self.engine.scheduler.max_tokens):
            self._run_prompt(length, adapter, 0)

    def _run_prompt(self, length: int, adapter: AdapterKey | None, scored: int | None) -> float:
        """Runs a prompt, cut to the context, and two tokens; `scored` as in SamplingParams.prompt_logprobs. Returns the
        seconds of the longest step."""
        engine = self.engine
        sampling = SamplingParams(max_tokens=2, temperature=1.0, seed=0, ignore_eos=True, prompt_logprobs=scored)
        length = min(length, engine.info.max_model_len - sampling.max_tokens)
        engine.add(Request(REHEARSED, ((0,) * length,), sampling, adapter=adapter))
        seconds = 0.0
        while engine.busy:
            _, stats = engine.step()
            seconds = max(seconds, stats.seconds if stats is not None else 0.0)
        return seconds
