"""The model of a decoding step again, with what bytes alone leave out: reads that wait for one another, forks, joins.

A step is 64 rows at context 1024, all seven linears adapted. Counts of waits are the compiler's (`--compile`, which
tests/kernels/test_compiles.py holds these to); the rest of what is assumed is `Machine`'s. Only what a delta adds
counts: of each expand's waits those of the pass that the base takes instead are taken off.
"""

from dataclasses import dataclass, replace

import torch

from tucka_runtime.kernels.bench.model import Machine, factors, kv, weights
from tucka_runtime.kernels.bench.shapes import Shape, spread
from tucka_runtime.kernels.fused.shrink_core import AHEAD, config
from tucka_runtime.kernels.tables.segments import SMALL_TILE, Segments

ROWS = 64


@dataclass(frozen=True)
class Waits:
    """Reads that wait for one another in an expand of a graph: from its start to its end, and in each turn over tiles;
    tiles that its resident programs work on at once; the waits of the base's pass."""

    path: int
    turn: int
    tiles: int
    base: int


SUM = Waits(path=7, turn=1, tiles=16, base=2)
EXPANDS = {"qkv": Waits(5, 2, 16, 1), "o": SUM, "gate_up": Waits(5, 2, 4, 1), "down": SUM}
SHRINK_PATH = 8
"""Waits of a shrink's last program, whose sums over the spans of d_in are read `AHEAD` at a time: once here."""


@dataclass(frozen=True)
class Added:
    """Microseconds a step that 32 adapters, or as many as there are, add: their factors' bytes; waits of shrinks over
    the base's product beside them; forks with their joins; what the expands wait for over their bytes; norms by last
    programs."""

    what: str
    factors: float
    shrinks: float
    forks: float
    expands: float
    norms: float
    base: float

    @property
    def total(self) -> float:
        """As a share of the base."""
        return (self.factors + self.shrinks + self.forks + self.expands + self.norms) / self.base


def adapter_tiles(spans: list[tuple[int, int, int]]) -> int:
    """How often a step of ROWS rows reads an adapter's factors: once for each tile."""
    segments = Segments.build(spans, ROWS, 1 + max(a for _, _, a in spans), torch.device("cpu"))
    return int((segments.tiles[:, 3] >= 0).sum())


def added(
    what: str,
    shape: Shape,
    machine: Machine,
    adapters: int,
    rank: int,
    element: float = 2,
    turn: int | None = None,
    early: int = 0,
) -> Added:
    """What a step adds whose factors have `element` bytes; `turn`: what a turn of every expand waits for; `early`:
    waits at an expand's start that are over when the kernel before it ends."""
    tiles, rate = adapter_tiles(spread(ROWS, adapters)), machine.copy * machine.efficiency
    shrinks = expands = 0.0
    for site, (d_in, widths) in shape.sites.items():
        splits = -(-d_in // config(ROWS, d_in, rank).span)
        waits = SHRINK_PATH + -(-splits // AHEAD.value) - 1
        beside = 2 * d_in * sum(widths) / machine.copy
        shrinks += max(0.0, machine.fork + machine.launch + waits * machine.latency - beside)
        own = EXPANDS[site]
        each = own.turn if turn is None else turn
        moved = element * adapters * rank * sum(widths) / rate
        turns = -(-tiles // own.tiles) * each * machine.latency
        expands += max(0, own.path - own.turn - own.base - early) * machine.latency + max(0.0, turns - moved)
    norms = 2 * 4 * min(-(-ROWS // adapters), SMALL_TILE) * 2 * shape.d / machine.program
    base = (weights(shape) + kv(shape, ROWS, 1024)) / machine.copy
    micros = shape.layers * 1e6
    return Added(
        what,
        factors(shape, "all", adapters, rank) * element / 2 / rate * 1e6,
        shrinks * micros,
        len(shape.sites) * machine.fork * micros,
        expands * micros,
        norms * micros,
        base * 1e6,
    )


def lines(shape: Shape, machine: Machine) -> list[Added]:
    """32 adapters of r 16 as built; then, each with those before it, what could still be done."""
    free = replace(machine, fork=0.0)
    better = replace(free, efficiency=0.9)
    return [
        added("as built", shape, machine, 32, 16),
        added("a turn waits once", shape, machine, 32, 16, turn=1),
        added("and forks cost nothing", shape, free, 32, 16, turn=1),
        added("and expands start early", shape, free, 32, 16, turn=1, early=2),
        added("and kernels at 0.9 of a copy", shape, better, 32, 16, turn=1, early=2),
        added("and factors in 12 bits", shape, better, 32, 16, 1.5, 1, 2),
        added("and in 8 bits", shape, better, 32, 16, 1, 1, 2),
    ]


def bank(shape: Shape, machine: Machine) -> str:
    """How much of a bank's factors is read where each row of a step is another member's."""
    own = factors(shape, "all", 1, 16) / 1e6
    tiles = adapter_tiles([(i, i + 1, 0) for i in range(ROWS)])
    return (
        f"{ROWS} rows of {ROWS} members of one bank of r 16: its factors are read for {tiles} tiles, {tiles * own:.0f} "
        f"MB a step; a tile for each member's rows would read them {ROWS} times, {ROWS * own:.0f} MB"
    )


def table(shape: Shape, machine: Machine) -> str:
    """The lines as text."""
    out = [
        f"with waits: a read {machine.latency * 1e6:.1f} us, a fork with its join {machine.fork * 1e6:.1f} us: "
        "assumptions, not measurements",
        f"{'decode 64, all seven r 16, 32 adapters':44}{'factors':>9}{'shrinks':>9}{'forks':>8}{'expands':>9}"
        f"{'norms':>8}{'added':>8}",
    ]
    for line in lines(shape, machine):
        out.append(
            f"{line.what:44}{line.factors:9.0f}{line.shrinks:9.0f}{line.forks:8.0f}{line.expands:9.0f}{line.norms:8.0f}"
            f"{line.total:8.1%}"
        )
    return "\n".join([*out, bank(shape, machine)])
