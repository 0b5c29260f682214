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

NEW = 2
"""Tokens of an answer: a prompt's, and one that is decoded."""

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
                self._run_prompts(folded)
                self.known.add(folded.shape)
                return True
        return False

    def time_longest_step(self) -> float:
        """Runs prompts that fill a step, so that no request pays for what is made at its first use. Returns the seconds
        that the longest step took. The memory that it took is kept from adapters (memory.AdapterMemory)."""
        engine, most = self.engine, self.engine.scheduler.max_tokens
        length = self._fitting(most)
        room = engine.runner.num_blocks // -(-(length + NEW) // engine.runner.block_size)
        count = max(1, min(-(-most // length), engine.config.max_num_seqs, room))
        with engine.runner.memory.measuring():
            seconds = self._run([(i % engine.info.vocab_size,) * length for i in range(count)], None, None)
        engine.blocks.forget_all()
        return seconds

    def _run_prompts(self, adapter: FoldedAdapter | None) -> None:
        """Runs prompts of lengths that between them take every kernel that prompts take. They are scored, which no
        graph does: what runs without one has kernels of its own."""
        for length in (32, SMALL_BATCH + 1, self.engine.scheduler.max_tokens):
            self._run([(0,) * self._fitting(length)], adapter, 0)

    def _fitting(self, length: int) -> int:
        """A prompt's length, cut so that NEW tokens have room behind it in the context, where that has so many."""
        return min(length, max(1, self.engine.info.max_model_len - NEW))

    def _run(self, prompts: Rows[tuple[int, ...]], adapter: FoldedAdapter | None, scored: int | None) -> float:
        """Runs prompts of one length, and NEW tokens of each; `scored` as in SamplingParams.prompt_logprobs, a bank by
        its first member. Returns the seconds of the longest step."""
        engine = self.engine
        new = min(NEW, engine.info.max_model_len - len(prompts[0]))
        sampling = SamplingParams(max_tokens=new, temperature=1.0, seed=0, ignore_eos=True, prompt_logprobs=scored)
        key, member = (None, None) if adapter is None else (adapter.key, None if adapter.bank is None else 0)
        engine.add(Request(REHEARSED, tuple(prompts), sampling, adapter=key, member=member))
        seconds = 0.0
        while engine.busy:
            _, stats = engine.step()
            seconds = max(seconds, stats.seconds if stats is not None else 0.0)
        return seconds
