"""Where a batch's keys and values lie: the metadata that attention reads. Shared by all layers of a step.

A cache is (slots, KV heads, D); slot = block · block_size + offset. It is in the rows' type, or int8: then behind the
numbers of all heads of a slot lie their fp32 scales, so that whoever holds a block holds its scales. A sequence's rows
are contiguous in the batch.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from tucka_runtime.kernels.tables.transfer import place

# The reference attends to decodes together, padded to the longest of their bucket. The first bucket holds contexts
# under twice this, each further one those under the next power of two, so that a long one does not make every short one
# pay.
SMALLEST_BUCKET = 256

# Rows of a prompt that one entry of `AttentionMetadata.tiles` stands for. The fused prefill cuts it further.
TILE = 128

SCALE_BYTES = 4
"""Of a head of an int8 cache. D is a multiple of it, so that scales are aligned."""


def slot_bytes(kv_heads: int, d: int) -> int:
    """Of an int8 cache: a multiple of 16, which is as much as a GPU's thread reads at once."""
    return -(-kv_heads * (d + SCALE_BYTES) // 16) * 16


def int8_cache(slots: int, kv_heads: int, d: int, device: torch.device) -> Tensor:
    """Zeros (slots, KV, D), and their scales behind them."""
    return with_scales(torch.zeros(slots, slot_bytes(kv_heads, d), dtype=torch.int8, device=device), kv_heads, d)


def with_scales(whole: Tensor, kv_heads: int, d: int) -> Tensor:
    """The numbers (slots, KV, D) of an int8 cache, whose slots `whole` (slots, slot_bytes) has with their scales."""
    return whole.as_strided((len(whole), kv_heads, d), (whole.stride(0), d, 1))


def scales(cache: Tensor) -> Tensor:
    """(slots, KV) fp32 of an int8 cache, where they lie."""
    slots, kv_heads, d = cache.shape
    places = cache.as_strided(
        (slots, kv_heads * SCALE_BYTES), (cache.stride(0), 1), cache.storage_offset() + kv_heads * d
    )
    return places.view(torch.float32)


@dataclass(frozen=True, eq=False)
class Decode:
    """One-token sequences of similar length: `rows` (B,) of the batch, `slots` (B, L), `length` (B,), all int64."""

    rows: Tensor
    slots: Tensor
    length: Tensor


@dataclass(frozen=True, eq=False)
class Prefill:
    """Rows first..end of the batch are the last of `slots` (L,) int64, the context of one sequence."""

    first: int
    end: int
    slots: Tensor


@dataclass(frozen=True, eq=False)
class AttentionMetadata:
    """All sequences of a batch, as flat tables for the fused kernels; `decodes` and `prefills` are the reference's."""

    spans: tuple[tuple[int, int, int], ...]
    """(first row, rows, context length) of each sequence, in row order."""
    longest: int
    """The longest context that there may be: it sizes the fused decode's buffers."""
    block_size: int
    slot_mapping: Tensor
    """(T,) int64: where each row's own key and value go."""
    query_start: Tensor
    """(B + 1,) int32 row borders of the sequences."""
    seq_lens: Tensor
    """(B,) int32 context lengths, this step's tokens included."""
    block_table: Tensor
    """(P,) int32 block numbers, sequence after sequence."""
    first_block: Tensor
    """(B,) int32: where in `block_table` each sequence's begin."""
    singles: Tensor
    """(D,) int32: the sequences of one row, which the fused kernel decodes."""
    tiles: Tensor
    """(N, 2) int32, sequence and first of TILE of its rows, of all the others."""
    memo: dict[tuple[object, ...], Tensor] = field(default_factory=dict)
    """Indices and masks derived once per step and reused by every layer."""

    @staticmethod
    def build(
        spans: Sequence[tuple[int, int, int]], tables: Sequence[Sequence[int]], block_size: int, device: torch.device
    ) -> "AttentionMetadata":
        """`spans` as above; `tables` the blocks of each sequence, at least as many as its context fills."""
        flat, first_block, slots = array("i"), [], array("q")
        for table, (_, count, length) in zip(tables, spans, strict=True):
            first_block.append(len(flat))
            flat.extend(table[: -(-length // block_size)])
            _add_slots(slots, table, length - count, length, block_size)
        blocks = torch.asarray(flat, dtype=torch.int32)
        borders = [first for first, _, _ in spans] + [spans[-1][0] + spans[-1][1]]
        tiles = [[i, j] for i, (_, count, _) in enumerate(spans) if count > 1 for j in range(0, count, TILE)]
        plan = AttentionMetadata(
            spans=tuple(spans),
            longest=max(length for _, _, length in spans),
            block_size=block_size,
            slot_mapping=torch.asarray(slots, dtype=torch.int64),
            query_start=torch.tensor(borders, dtype=torch.int32),
            seq_lens=torch.tensor([length for _, _, length in spans], dtype=torch.int32),
            block_table=blocks,
            first_block=torch.tensor(first_block, dtype=torch.int32),
            singles=torch.tensor([i for i, s in enumerate(spans) if s[1] == 1], dtype=torch.int32),
            tiles=torch.tensor(tiles, dtype=torch.int32).view(-1, 2),
        )
        return place([plan], device)[0]

    @cached_property
    def decodes(self) -> tuple[Decode, ...]:
        device = self.block_table.device
        buckets: dict[int, list[int]] = {}
        for i, (_, count, length) in enumerate(self.spans):
            if count == 1:
                buckets.setdefault(max(length, SMALLEST_BUCKET).bit_length(), []).append(i)
        out = []
        for members in buckets.values():
            lengths = torch.tensor([self.spans[i][2] for i in members]).to(device)
            rows = torch.tensor([self.spans[i][0] for i in members]).to(device)
            # Past its end a sequence repeats its own last slot: never another's, whose values (a NaN, say) would reach
            # it through the zeros that the softmax gives to masked keys.
            longest = max(self.spans[i][2] for i in members)
            token = torch.minimum(torch.arange(longest, device=device), lengths[:, None] - 1)
            first = self.first_block[torch.tensor(members).to(device)].long()
            out.append(Decode(rows, _slots(self.block_table, first[:, None], token, self.block_size), lengths))
        return tuple(out)

    @cached_property
    def prefills(self) -> tuple[Prefill, ...]:
        device = self.block_table.device
        return tuple(
            Prefill(
                first,
                first + count,
                _slots(
                    self.block_table, self.first_block[i].long(), torch.arange(length, device=device), self.block_size
                ),
            )
            for i, (first, count, length) in enumerate(self.spans)
            if count > 1
        )


def _slots(blocks: Tensor, first: Tensor, token: Tensor, block_size: int) -> Tensor:
    """Slots, int64, of the tokens of sequences whose blocks begin at `first`."""
    return blocks[first + token // block_size].long() * block_size + token % block_size


def _add_slots(slots: "array[int]", table: Sequence[int], begin: int, end: int, block_size: int) -> None:
    """Adds the slots of a sequence's tokens begin..end, block by block: in a decode that is one number, for which ten
    calls into torch would take longer."""
    while begin < end:
        block, offset = divmod(begin, block_size)
        until = min(end, begin + block_size - offset)
        first = table[block] * block_size + offset
        slots.extend(range(first, first + until - begin))
        begin = until
