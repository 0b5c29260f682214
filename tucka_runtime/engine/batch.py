"""Scheduled chunks as one packed set of device tensors.

Row order: base rows first (and prompts that are only being routed), then adapter by adapter; within one the sequences
that share its route, or member by member of a bank, then those with a route of their own, one segment each.
"""

import itertools
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tucka_runtime.engine.adapters.active import ActiveSet
from tucka_runtime.engine.adapters.delta import AdapterDelta, Settled
from tucka_runtime.engine.adapters.segment import RouteSum, Segment
from tucka_runtime.engine.scheduler import ScheduledChunk
from tucka_runtime.engine.sequence import Sequence
from tucka_runtime.kernels.ops import Ops
from tucka_runtime.kernels.tables.blocks import AttentionMetadata
from tucka_runtime.kernels.tables.transfer import place
from tucka_runtime.messages import AdapterKey


class Chosen:
    """The tokens that the last step chose, where they lie on the device: the next step may start from them before the
    host knows them."""

    def __init__(self, size: int, device: torch.device):
        self.tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self.place: dict[tuple[str, int], int] = {}

    def keep(self, tokens: Tensor, seqs: Rows[Sequence], first: int = 0) -> Tensor:
        """Takes the tokens (N,) of a step's sequences, behind the `first` ones of it that it has; returns their copy on
        the way to the host."""
        if tokens.data_ptr() != self.tokens.data_ptr():
            self.tokens[first : first + len(tokens)].copy_(tokens)
        self.place = (self.place if first else {}) | {seq.key: i for i, seq in enumerate(seqs, first)}
        return tokens.to("cpu", non_blocking=True, copy=True)

    def source(self, seq: Sequence) -> int:
        """Returns where a sequence's last token is, -1 if it is known."""
        return self.place[seq.key] if seq.pending else -1

    def fill_in(self, ids: Tensor, rows: Rows[tuple[int, Sequence]]) -> None:
        """Puts the tokens of those that are `pending` into their rows."""
        pending = [(row, self.place[seq.key]) for row, seq in rows if seq.pending]
        if pending:
            at, source = place(list(torch.tensor(pending).T.contiguous()), ids.device)
            ids.index_copy_(0, at, self.tokens.index_select(0, source))


@dataclass(frozen=True, eq=False)
class Due:
    """The chunks of one vocabulary that bring a token, so many being `first` in others. `rows` (N,) predict one: each
    such chunk's last, and those of its draft behind it."""

    chunks: list[int]
    first: int
    rows: Tensor
    vocab_size: int | None
    """None is the base's."""


@dataclass(eq=False)
class Batch:
    """One forward pass. `chunks` is in row order; `first_rows` has the first row of each, `segment_of` its segment."""

    chunks: list[ScheduledChunk]
    first_rows: list[int]
    segment_of: list[int | None]
    due: list[Due]
    ids: Tensor
    positions: Tensor
    lengths: Tensor | None
    attention: AttentionMetadata
    delta: AdapterDelta


@dataclass(eq=False)
class BatchBuilder:
    """What all batches of an engine are made with. `rope_limit` is the length from which dynamic rotary scaling
    stretches, None where there is none; `dtype` is the cores' type; `route_sums` are those of sequences that are being
    routed."""

    ops: Ops
    block_size: int
    rope_limit: int | None
    dtype: torch.dtype
    device: torch.device
    chosen: Chosen
    route_sums: Mapping[tuple[str, int], RouteSum]
    settled: Settled = field(default_factory=Settled)

    def build(self, chunks: Rows[ScheduledChunk], active: ActiveSet | None) -> Batch:
        """One forward pass of these chunks; `active` has their adapters, if they name any."""
        chunks = sorted(chunks, key=row_order)
        first_rows, rows = [], 0
        for chunk in chunks:
            first_rows.append(rows)
            rows += chunk.count
        due: dict[int | None, list[int]] = {}
        for i, chunk in enumerate(chunks):
            if chunk.due:
                due.setdefault(own_vocab_size(chunk.seq, active), []).append(i)
        lengths = _rope_lengths(chunks, self.rope_limit)
        spans = [(first, c.count, c.start + c.count) for first, c in zip(first_rows, chunks, strict=True)]
        segments, segment_of, sums = segment(chunks, first_rows, self.route_sums)
        tables = [c.seq.block_table for c in chunks]
        parts: list[Any] = [
            torch.tensor([t for c in chunks for t in known_ids(c)]),
            torch.tensor([p for c in chunks for p in range(c.start, c.start + c.count)]),
            *(
                torch.tensor([row for i in own for row in _predicting(chunks[i], first_rows[i])])
                for own in due.values()
            ),
            AttentionMetadata.build(spans, tables, self.block_size, torch.device("cpu")),
            *(torch.tensor(s.prompt) for s in segments if s.prompt is not None),
            *([lengths] if lengths is not None else []),
        ]
        ids, positions, *rest = place(parts, self.device)
        left = iter(rest)
        firsts = itertools.accumulate(map(len, due.values()), initial=0)
        found = [Due(own, first, next(left), size) for (size, own), first in zip(due.items(), firsts, strict=False)]
        attention = next(left)
        self.chosen.fill_in(ids, [(first + c.count - 1, c.seq) for first, c in zip(first_rows, chunks, strict=True)])
        for s in segments:
            if s.prompt is not None:
                s.ids = next(left)
        return Batch(
            chunks=chunks,
            first_rows=first_rows,
            segment_of=segment_of,
            due=found,
            ids=ids,
            positions=positions,
            lengths=next(left, None),
            attention=attention,
            delta=AdapterDelta.build(ids, segments, sums, active, self.ops, self.dtype, self.device, self.settled),
        )


def own_vocab_size(seq: Sequence, active: ActiveSet | None) -> int | None:
    """The size of the vocabulary of a sequence's adapter, if that has one of its own."""
    return None if seq.adapter is None or active is None else active.folded[seq.adapter].vocab_size


def _rope_lengths(chunks: Rows[ScheduledChunk], limit: int | None) -> Tensor | None:
    """The length (T,) that each row's rotary position was or is stretched for (models/rotary.py); None if none is."""
    if limit is None or not any(max(c.seq.num_prompt, c.start + c.count) > limit for c in chunks):
        return None
    return torch.tensor([max(c.seq.num_prompt, p + 1) for c in chunks for p in range(c.start, c.start + c.count)])


def _predicting(chunk: ScheduledChunk, first: int) -> range:
    """The rows of a chunk, whose first is `first`, that predict tokens which are due."""
    end = first + chunk.count
    return range(end - 1 - len(chunk.draft or ()), end)


def known_ids(chunk: ScheduledChunk) -> list[int]:
    """The chunk's tokens; 0 stands for the one that is still on the device."""
    own = chunk.seq.tokens[chunk.start : chunk.start + chunk.count]
    if chunk.draft:
        return [*own, *chunk.draft]
    return own if len(own) == chunk.count else [*own, 0]


def row_order(chunk: ScheduledChunk) -> tuple[bool, str, int, bool, int]:
    """The sorting key of rows. Sorting is stable: within a segment the scheduler's order stays."""
    seq = chunk.seq
    if seq.adapter is None or seq.routing:
        return False, "", 0, False, 0
    return True, seq.adapter.name, seq.adapter.generation, seq.routes_itself, seq.request.member or 0


def segment(
    chunks: Rows[ScheduledChunk], first_rows: Rows[int], route_sums: Mapping[tuple[str, int], RouteSum]
) -> tuple[list[Segment], list[int | None], list[RouteSum]]:
    """The segments of chunks in row order; the segment of each chunk; the prompts that are only being routed."""
    segments: list[Segment] = []
    segment_of: list[int | None] = []
    sums: list[RouteSum] = []
    shared: tuple[AdapterKey, int | None] | None = None  # the adapter and member whose segment is the last one
    for chunk, first in zip(chunks, first_rows, strict=True):
        seq, end = chunk.seq, first + chunk.count
        if seq.adapter is None:
            segment_of.append(None)
        elif seq.routing:
            part = route_sums[seq.key]
            if chunk.start == 0:  # the first chunk, or once more after a preemption
                part.restart()
            part.first, part.end = first, end
            sums.append(part)
            segment_of.append(None)
        elif seq.routes_itself:
            prompt = None if seq.route else seq.tokens[: seq.route_tokens]
            segments.append(Segment(first, end, seq.adapter, given=seq.route, prompt=prompt))
            segment_of.append(len(segments) - 1)
            shared = None
        else:
            own = seq.adapter, seq.request.member
            if shared == own:
                segments[-1].end = end
            else:
                segments.append(Segment(first, end, seq.adapter, member=seq.request.member))
                shared = own
            segment_of.append(len(segments) - 1)
    return segments, segment_of, sums
