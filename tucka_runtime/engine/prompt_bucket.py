"""One step with prompts in it as a CUDA graph.

Launched one by one, such a step takes the host longer than the device while it has up to some hundred rows: 16 launches
and four products a layer. Sequences of several rows lie in tables of fixed size, filled up by a sequence of no rows.
"""

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from tucka_runtime.engine.adapters.segment import Segment
from tucka_runtime.engine.bucket import Bucket
from tucka_runtime.engine.graph_fields import Shapes
from tucka_runtime.kernels.tables.blocks import TILE, AttentionMetadata
from tucka_runtime.kernels.tables.segments import LARGE_TILE, SMALL_BATCH, SMALL_TILE

MOST_ROWS = 512
"""Rows at most. On an H100 a step of 32 + 448 rows of a Llama-3-8B takes 17.1 ms by a graph and 22.3 launched, one of
32 + 32 rows 8.6 and 21.8 (`mixed` of docs/measurements/first-run/engine.py)."""

MOST_PROMPTS = 16
"""Sequences of several rows at most. Attention has programs for as many, most of which find nothing to do."""

MOST_ROUTED = 2048
"""Tokens, together, of the prompts that such a step gives a route of their own."""


class PromptBucket(Bucket):
    """A graph of up to `rows` rows of any sequences, up to MOST_PROMPTS of which have several."""

    def _most_seqs(self) -> int:
        return self.shared.max_seqs

    def _num_tiles(self) -> int:
        # Each adapter's run of rows may end in a tile that is not full, and so may what fills the batch up.
        return self.rows // (SMALL_TILE if self.rows <= SMALL_BATCH else LARGE_TILE) + self.seqs + 1

    def _own_shapes(self) -> Shapes:
        i64, i32 = torch.int64, torch.int32
        return {
            "due_rows": (i64, (self.seqs,)),
            "routed_ids": (i64, (MOST_ROUTED if self.shape.kinds else 0,)),
            "query_start": (i32, (self.seqs + 2,)),
            "singles": (i32, (self.seqs,)),
            "prompt_tiles": (i32, (self.rows // TILE + MOST_PROMPTS, 2)),
        }

    def _attention(self) -> AttentionMetadata:
        on, shared = self.fields.on_device, self.shared
        return AttentionMetadata(
            spans=(),
            longest=shared.max_len,
            block_size=shared.block_size,
            slot_mapping=on["slot_mapping"],
            query_start=on["query_start"],
            seq_lens=on["seq_lens"],
            block_table=shared.blocks.on_device["table"],
            first_block=on["first_block"],
            singles=on["singles"],
            tiles=on["prompt_tiles"],
        )

    def _most_routed(self) -> int:
        return max(self.rows, MOST_ROUTED)

    def _fill_own(self, plan: AttentionMetadata, last_rows: Rows[int]) -> None:
        at, nobody = self.fields.on_host, self.seqs
        at["query_start"].fill_(last_rows[-1] + 1)
        at["singles"].fill_(nobody)
        at["prompt_tiles"].copy_(torch.tensor([nobody, 0]))
        own = {
            "query_start": plan.query_start,
            "singles": plan.singles,
            "prompt_tiles": plan.tiles,
            "due_rows": torch.tensor([last_rows[i] for i in self.due], dtype=torch.int64),
        }
        for name, value in own.items():
            at[name][: len(value)].copy_(value)

    def _place_ids(self, segments: Rows[Segment]) -> None:
        begin = 0
        for part in segments:
            if part.prompt is None:
                part.ids = self.ids[part.first : part.end]
                continue
            own = slice(begin, begin + len(part.prompt))
            self.fields.on_host["routed_ids"][own] = torch.tensor(part.prompt)
            part.ids, begin = self.fields.on_device["routed_ids"][own], own.stop

    def _predicting(self, hidden: Tensor) -> Tensor:
        return hidden.index_select(0, self.fields.on_device["due_rows"])
