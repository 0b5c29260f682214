"""The shapes that are measured, and random batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from tucka_runtime.kernels.ops import Ops
from tucka_runtime.kernels.tables.blocks import AttentionMetadata
from tucka_runtime.kernels.tables.segments import SMALL_BATCH, DeltaSite, Segments, SitePlan


@dataclass(frozen=True)
class Shape:
    """A decoder: widths of its linears, in elements."""

    name: str
    d: int
    f: int
    heads: int
    kv_heads: int
    head: int
    layers: int
    vocab: int

    @property
    def q(self) -> int:
        return self.heads * self.head

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head

    @property
    def sites(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Input width and target widths of each site of a layer."""
        return {
            "qkv": (self.d, (self.q, self.kv, self.kv)),
            "o": (self.q, (self.d,)),
            "gate_up": (self.d, (self.f, self.f)),
            "down": (self.f, (self.d,)),
        }


LLAMA3_8B = Shape("Llama-3-8B", d=4096, f=14336, heads=32, kv_heads=8, head=128, layers=32, vocab=128256)
TINY = Shape("tiny", d=64, f=96, heads=4, kv_heads=2, head=16, layers=2, vocab=512)

BLOCK = 16


@dataclass(frozen=True)
class Measurement:
    """What to measure, where, with which kernels. `prompts` are numbers of rows of one sequence and one adapter."""

    shape: Shape
    rows: tuple[int, ...]
    adapters: tuple[int, ...]
    ranks: tuple[int, ...]
    prompts: tuple[int, ...]
    contexts: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    ops: Ops
    bmm_rows: int = 256
    """The most rows that gather-bmm is tried on: it gathers a copy of the factors for every row."""

    @property
    def deltas(self) -> list[tuple[int, int, int]]:
        """(rows, adapters, rank) of every batch; no more adapters than rows."""
        decodes = [c for c in product(self.rows, self.adapters, self.ranks) if c[1] <= c[0]]
        return decodes + [(rows, 1, rank) for rows, rank in product(self.prompts, self.ranks)]


@dataclass(frozen=True)
class SiteBatch:
    """One site and one batch for it: x (T, d_in), y (T, columns[-1])."""

    x: Tensor
    y: Tensor
    site: DeltaSite
    plan: SitePlan
    cores: Tensor


def spread(rows: int, adapters: int) -> list[tuple[int, int, int]]:
    """(first, end, adapter) of `rows` shared evenly among as many adapters as there are rows for."""
    used = min(rows, adapters)
    borders = [rows * i // used for i in range(used + 1)]
    return [(a, b, i) for i, (a, b) in enumerate(pairwise(borders))]


def batch(
    rows: int,
    adapters: int,
    rank: int,
    d_in: int,
    widths: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    targets: tuple[bool, ...] | None = None,
    padded: bool | None = None,
) -> SiteBatch:
    """Random factors of `adapters` adapters that adapt `targets` (all), each with its own rows. `padded`: the table of
    tiles has room for any membership, as in the engine's graphs; so it is by default for what those decode."""
    padded = rows <= SMALL_BATCH if padded is None else padded
    targets = targets or (True,) * len(widths)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float32, device=device).mul_(size[-1] ** -0.5).to(dtype)

    u = [[randn(rank, d_in) if on else None for on in targets] for _ in range(adapters)]
    e = [[randn(rank, w) if on else None for on, w in zip(targets, widths, strict=True)] for _ in range(adapters)]
    columns = [0]
    for w in widths:
        columns.append(columns[-1] + w)
    site = DeltaSite.build(u, e, columns, d_in, dtype, device, pool=device.type == "cpu")
    spans = spread(rows, adapters)
    plan = SitePlan.build(Segments.build(spans, rows, adapters, device, num_tiles=rows if padded else None), site)
    cores = randn(len(spans), len(widths), rank, rank)
    return SiteBatch(randn(rows, d_in), randn(rows, columns[-1]), site, plan, cores)


def stacked(table: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """(A, sum of r, width) of factors that every adapter has at every target."""
    return torch.stack([torch.cat([w for w in row if w is not None]) for row in table])


def blocks(rows: int, context: int, decoding: bool, device: torch.device) -> AttentionMetadata:
    """`rows` sequences of one row and `context` tokens each, or one sequence whose last `rows` tokens are the batch."""
    spans = [(i, 1, context) for i in range(rows)] if decoding else [(0, rows, context)]
    need = -(-context // BLOCK)
    order = torch.randperm(need * len(spans), generator=torch.Generator().manual_seed(0)).tolist()
    return AttentionMetadata.build(spans, [order[i * need : (i + 1) * need] for i in range(len(spans))], BLOCK, device)
