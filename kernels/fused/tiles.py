"""What the fused kernels share: tiles of rows, factors behind pointer tables, products.

What a batch decides (how many rows, tiles, parts) is in `do_not_specialize`: Triton compiles another kernel, in a
second or more, wherever an argument is 1 or stops being a multiple of 16.

Three rules hold in every kernel here. Offsets that may pass 2^31 elements are int64. What lies outside is masked, with
0 for `other`: never wrapped around, never multiplied by what happens to be there. Sums have a fixed order.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import triton
import triton.language as tl

from tucka_runtime.kernels.fused.launch import Grid
from tucka_runtime.kernels.ops import LowRank
from tucka_runtime.kernels.tables import routes
from tucka_runtime.kernels.tables.segments import SMALL_TILE, Segments, power_of_2


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. triton.cdiv also serves its compiler, and takes 3 us a call for it."""
    return -(-a // b)


# Columns of RoutePlan.records, and how many there are.
IDS, COUNT, TABLE = tl.constexpr(routes.IDS), tl.constexpr(routes.COUNT), tl.constexpr(routes.TABLE)
GROUPS, EXPERTS = tl.constexpr(routes.GROUPS), tl.constexpr(routes.EXPERTS)
C, G, LINEARS = tl.constexpr(routes.C), tl.constexpr(routes.G), tl.constexpr(routes.LINEARS)
MODULES, SLICES, RANK = tl.constexpr(routes.MODULES), tl.constexpr(routes.SLICES), tl.constexpr(routes.RANK)
CORE, COLUMNS = tl.constexpr(routes.CORE), tl.constexpr(routes.COLUMNS)

CHUNK = 16
"""Ranks go by chunks of this many: the least side of a tensor core's product. An adapter pays for ceil(r / 16)."""


def tile_grid(segments: Segments, blocks: int) -> Callable[[int], Grid]:
    """The grid (programs along the tiles, `blocks`) of a kernel of whose programs so many are resident: one per tile,
    unless the table has room for as many tiles as rows. Then most would only find that theirs is empty, 14,336 programs
    for SwiGLU at 64 rows of a Llama-3-8B with one adapter, of which 896 have work. So as many as are resident at once,
    and no more, take tiles by turns (`next_tile`): one that starts when the others end would double the time.
    """
    tiles = segments.tiles.shape[0]
    return lambda resident: (min(tiles, max(1, resident // blocks)) if segments.padded else tiles, blocks)


@triton.jit
def load_tile(tiles, index):
    """First row, end row, core and adapter of a tile (Segments.tiles)."""
    at = tiles + index * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def next_tile(tiles, index, num_tiles, PADDED: tl.constexpr):
    """The same of the tile after `index` that is this program's; no rows if there is none, as in tables that are not
    padded: told so, the compiler makes no loop (of which a prompt's would need a third more registers). It is asked for
    before a tile is done, so that its row is there afterwards."""
    index += tl.num_programs(0)
    if PADDED:
        at, real = tiles + index * 4, index < num_tiles
        first, end = tl.load(at, mask=real, other=0), tl.load(at + 1, mask=real, other=0)
        adapter = tl.load(at + 3, mask=real, other=-1)
    else:
        first, end, adapter = index * 0, index * 0, index * 0 - 1
    return index, first, end, adapter


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in fp32. fp32 operands are multiplied as such: TF32 would be off by 3e-4."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def find_target(borders, column, n):
    """The target of a site whose columns hold `column`: the number of inner borders at or before it."""
    target = tl.full((), 0, tl.int32)
    for j in range(1, n):
        target += (tl.load(borders + j) <= column).to(tl.int32)
    return target


# A delta is read in an order that lets reads overlap: rank and address, and beside them what a program needs of a tile
# in any case (h, what the delta is added to); then E; and only then the products. Each kernel is written out that way.


@triton.jit
def find_borders(borders, target, ALIGN: tl.constexpr):
    """The first column of a target, and its width."""
    begin = tl.multiple_of(tl.load(borders + target), ALIGN)
    return begin, tl.multiple_of(tl.load(borders + target + 1) - begin, ALIGN)


@triton.jit
def load_rank(e_ptr, rank, adapter, target, n):
    """The rank of an adapter at a target, and the address of its E: 0 for the base's (adapter -1)."""
    at = adapter * n + target
    return tl.load(rank + at, mask=adapter >= 0, other=0), tl.load(e_ptr + at, mask=adapter >= 0, other=0)


@triton.jit
def load_h(h, first, end, adapter, target, c, n, width_h, H: tl.constexpr, M: tl.constexpr, R: tl.constexpr):
    """(M, R) of h at the rows of one tile and ranks from c on; beyond the adapter's own there is anything.

    h is read as wide as it lies, and `multiply` chooses: a mask of the rank would split the reads into single elements.
    """
    rows = first + tl.arange(0, M)
    end = tl.where(adapter >= 0, end, first)  # nothing of the base's
    i = c + tl.arange(0, R)
    width_h = width_h // H * H  # which says so to the compiler: a hint on an argument is lost in a call
    h_at = h + (rows[:, None].to(tl.int64) * n + target) * width_h + i[None, :]
    return tl.load(h_at, mask=(rows < end)[:, None] & (i < width_h)[None, :], other=0.0)


@triton.jit
def load_e(address, like, r, c, own, width, wanted, ALIGN: tl.constexpr, R: tl.constexpr):
    """(R, BLOCK_N) of E at ranks from c on, in `like`'s type; its columns `own` (BLOCK_N,), of `width`, are `wanted`.

    Factors start at multiples of 16 bytes (DeltaSite.build sees to it). The hint stands on the computed pointers: on
    the loaded address it is lost where that becomes a pointer, and E is read two bytes at a time.
    """
    i = c + tl.arange(0, R)
    e = address.to(tl.pointer_type(like.dtype.element_ty))
    e_at = tl.multiple_of(e + i[:, None].to(tl.int64) * width + own[None, :], (1, ALIGN))
    return tl.load(e_at, mask=(i < r)[:, None] & wanted[None, :], other=0.0)


@triton.jit
def scaled(y, affine_ptr, adapter, target, n, own, width, wanted):
    """y (M, BLOCK_N) in fp32, its columns `own` (BLOCK_N,), of `width`, of which some are `wanted`, scaled and offset
    as the adapter has it (DeltaSite.affine): as they are where it has nothing."""
    address = tl.load(affine_ptr + adapter * n + target, mask=adapter >= 0, other=0)
    there = tl.where(address != 0, wanted, False)
    at = address.to(tl.pointer_type(tl.float32)) + own
    scales, offsets = tl.load(at, mask=there, other=1.0), tl.load(at + width, mask=there, other=0.0)
    return y * scales[None, :] + offsets[None, :]


@triton.jit
def multiply(a, b, r, c, acc):
    """acc + h E over the ranks that `load_h` and `load_e` brought, from c on."""
    i = c + tl.arange(0, a.shape[1])
    return dot(tl.where((i < r)[None, :], a, 0.0), b, acc)


@triton.jit
def add_further(
    acc, h, address, first, end, adapter, target, r, own, width, wanted, n, width_h,
    E: tl.constexpr, H: tl.constexpr, M: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """acc and the product over the ranks from R on, where an adapter has so many."""
    for c in range(R, r, R):
        a = load_h(h, first, end, adapter, target, c, n, width_h, H, M, R)
        acc = multiply(a, load_e(address, h, r, c, own, width, wanted, E, R), r, c, acc)
    return acc


def rank_block(max_rank: int) -> int:
    """Rank rows of E that are in flight at once: all of them up to 64, for a read's latency is most of its time. What
    is over an adapter's own rank is masked: not read, and its product is a tensor core's few zeros.
    """
    return max(CHUNK, min(64, power_of_2(max_rank)))


def alignment(columns: Sequence[int]) -> int:
    """The largest power of two up to 16 that divides every border."""
    return math.gcd(16, *columns)


def delta_args(low_rank: LowRank) -> tuple[object, ...]:
    """What every kernel with a delta takes: h, e_ptr, affine_ptr (never read where no adapter has any), rank, borders,
    tiles, their number, n, the width of h."""
    h, site, plan = low_rank.h, low_rank.site, low_rank.plan
    tiles, n = plan.segments.tiles, len(site.columns) - 1
    affine = site.e_ptr if site.affine_ptr is None else site.affine_ptr
    return h, site.e_ptr, affine, site.rank, site.borders, tiles, tiles.shape[0], n, plan.max_rank


def delta_options(low_rank: LowRank, start: int) -> dict[str, int]:
    """The constants of such a kernel, whose programs' columns start at multiples of `start`."""
    segments = low_rank.plan.segments
    size, rank = low_rank.h.element_size(), low_rank.plan.max_rank
    affine = low_rank.site.affine_ptr is not None
    return _delta_options(low_rank.site.columns, start, size, rank, segments.tile_rows, segments.padded, affine)


@lru_cache(256)
def _delta_options(
    columns: tuple[int, ...], start: int, size: int, rank: int, tile_rows: int, padded: bool, affine: bool
) -> dict[str, int]:
    return {
        "ALIGN": alignment(columns),
        "E_ALIGN": math.gcd(16, size * math.gcd(start, *columns)),
        "H_ALIGN": math.gcd(16, rank),
        "BLOCK_R": rank_block(rank),
        "FURTHER": rank > rank_block(rank),
        "AFFINE": affine,
        "BLOCK_M": tile_rows,
        "PADDED": padded,
    }


NO_DELTA: dict[str, int] = {
    "ALIGN": 1,
    "E_ALIGN": 1,
    "H_ALIGN": 1,
    "BLOCK_R": CHUNK,
    "FURTHER": False,
    "AFFINE": False,
    "BLOCK_M": SMALL_TILE,
    "PADDED": False,
}
"""The constants of such a kernel where no row has an adapter."""
