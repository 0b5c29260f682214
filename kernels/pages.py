"""Where a batch's keys and values lie: the metadata that paged attention reads. Shared by all layers of a step.

A cache is (slots, KV heads, D); slot = page · block_size + offset. A sequence's rows are contiguous in the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Decodes are attended to together, padded to the longest of their bucket; a bucket holds contexts up to a power of two
# from this on, so that one long context does not make every short one pay for it.
SMALLEST_BUCKET = 256

# Rows of a prompt that one entry of `PagePlan.tiles` stands for. The fused prefill cuts it further by its own block.
TILE = 128


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
class PagePlan:
    """All sequences of a batch: for the reference `decodes` and `prefills`, for the fused kernels the flat tables."""

    decodes: tuple[Decode, ...]
    prefills: tuple[Prefill, ...]
    write_slots: Tensor
    """(T,) int64: where each row's own key and value go."""
    start: Tensor
    """(B + 1,) int32 row borders of the sequences."""
    length: Tensor
    """(B,) int32 context lengths, this step's tokens included."""
    tables: Tensor
    """(B, pages) int32 page numbers, 0 past a sequence's end."""
    block_size: int
    singles: Tensor
    """(D,) int32: the sequences of one row, which the fused kernel decodes."""
    tiles: Tensor
    """(N, 2) int32, sequence and first of TILE of its rows, of all the others."""
    memo: dict[tuple[object, ...], Tensor] = field(default_factory=dict)
    """Indices and masks derived once per step and reused by every layer."""

    @staticmethod
    def build(
        spans: Sequence[tuple[int, int, int]], tables: Sequence[Sequence[int]], block_size: int, device: torch.device
    ) -> "PagePlan":
        """`spans` has (first row, rows, context length) of each sequence, in row order; `tables` their pages."""
        width = max(-(-length // block_size) for _, _, length in spans)
        padded = [list(t[:width]) + [0] * (width - len(t)) for t in tables]
        pages = torch.tensor(padded, dtype=torch.int64)
        slots = (pages.unsqueeze(2) * block_size + torch.arange(block_size)).flatten(1)
        buckets: dict[int, list[int]] = {}
        prefills = []
        writes = []
        for i, (first, count, length) in enumerate(spans):
            writes.append(slots[i, length - count : length])
            if count == 1:
                buckets.setdefault(max(length, SMALLEST_BUCKET).bit_length(), []).append(i)
            else:
                prefills.append(Prefill(first, first + count, slots[i, :length].to(device)))
        decodes = []
        for members in buckets.values():
            lengths = torch.tensor([spans[i][2] for i in members])
            # Past its end a sequence repeats its own last slot: never another's, whose values (a NaN, say) would reach
            # it through the zeros that the softmax gives to masked keys.
            column = torch.minimum(torch.arange(int(lengths.max())), lengths[:, None] - 1)
            decodes.append(
                Decode(
                    rows=torch.tensor([spans[i][0] for i in members]).to(device),
                    slots=slots[members].gather(1, column).to(device),
                    length=lengths.to(device),
                )
            )
        borders = [first for first, _, _ in spans] + [spans[-1][0] + spans[-1][1]]
        return PagePlan(
            decodes=tuple(decodes),
            prefills=tuple(prefills),
            write_slots=torch.cat(writes).to(device),
            start=torch.tensor(borders, dtype=torch.int32).to(device),
            length=torch.tensor([length for _, _, length in spans], dtype=torch.int32).to(device),
            tables=pages.to(device, torch.int32),
            block_size=block_size,
            singles=torch.tensor([i for i, s in enumerate(spans) if s[1] == 1], dtype=torch.int32).to(device),
            tiles=torch.tensor(
                [[i, j] for i, (_, count, _) in enumerate(spans) if count > 1 for j in range(0, count, TILE)],
                dtype=torch.int32,
            )
            .view(-1, 2)
            .to(device),
        )
