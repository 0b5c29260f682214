"""The choice of a step's tokens once more, by top-k, top-p and min-p, as a graph of its own.

A bucket's graph chooses by temperature alone, which is all that most batches need. Where a row asks for a filter this
runs behind it, over the same logits, and puts its tokens in place of those: all rows', for without a filter they are
the same. It knows no adapter, so that one for each size of batch is enough.
"""

from collections.abc import Sequence as Rows

import torch

from tucka_runtime.engine.capture import Shared, capture
from tucka_runtime.engine.graph_fields import Fields
from tucka_runtime.engine.sampler import draws, filters
from tucka_runtime.engine.sequence import Sequence


class FilteredChoice:
    """The graph of one size of batch."""

    def __init__(self, shared: Shared, rows: int):
        self.shared, self.rows = shared, rows
        i64, f32 = torch.int64, torch.float32
        self.fields = Fields(
            {
                "seed": (i64, (rows,)),
                "place": (i64, (rows,)),
                "top_k": (i64, (rows,)),
                "temperature": (f32, (rows,)),
                "top_p": (f32, (rows,)),
                "min_p": (f32, (rows,)),
            },
            shared.device,
        )
        self._fill([])
        self._graph = capture(shared, self._step)

    def run(self, seqs: Rows[Sequence]) -> None:
        """Chooses the tokens of the sequences whose logits the last bucket made."""
        self._fill(seqs)
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def _fill(self, seqs: Rows[Sequence]) -> None:
        at, vocab = self.fields.on_host, self.shared.logits.shape[1]
        for name, off in (("temperature", 0), ("top_k", vocab), ("top_p", 1), ("min_p", 0)):
            at[name][len(seqs) :].fill_(off)
        names = ("temperature", "seed", "place", "top_k", "top_p", "min_p")
        for name, value in zip(names, (*draws(seqs), *filters(seqs, vocab)), strict=True):
            at[name][: len(seqs)].copy_(value)
        self.fields.send()

    def _step(self) -> None:
        shared, on, ops = self.shared, self.fields.on_device, self.shared.model.ops
        hot = on["temperature"] > 0
        heated = shared.logits[: self.rows] / torch.where(hot, on["temperature"], 1.0)[:, None]
        kept = ops.filter_logits(heated, on["top_k"], on["top_p"], on["min_p"])
        # What was divided by its temperature is drawn from at 1, and a greedy row's best is at 0 as it is.
        shared.chosen.tokens[: self.rows].copy_(ops.sample(kept, hot.float(), on["seed"], on["place"]))
