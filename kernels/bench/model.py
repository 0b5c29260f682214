"""What the targets leave room for, from bytes and launches alone: no device is asked.

A decoding step is bound by bytes: weights once, every context's keys and values once, factors of every active adapter
once. A prompt is bound by products. What a delta adds is its bytes over what a copy reaches times `efficiency`, and
its launches that nothing hides.
"""

from dataclasses import dataclass

from tucka_runtime.kernels.bench.shapes import Shape

NORMED = ("o", "down")
"""Sites whose sum is normalised: without a delta in one launch, with one in two."""


@dataclass(frozen=True)
class Machine:
    """bytes/s of a large copy, the share of it that kernels are asked to reach, flop/s of large bf16 products, seconds
    that a launch in a graph costs where nothing hides it. All but the share are an H100's, as `machine` and `step` of
    docs/measurements/first-run/where.py found them."""

    copy: float = 3.0e12
    efficiency: float = 0.75
    products: float = 7.8e14
    launch: float = 1.0e-6


@dataclass(frozen=True)
class Estimate:
    """Microseconds and shares of one target. `at_floor` counts bytes at the copy's rate and no launch, `expected` every
    launch, `overlapped` only what no side stream can hide: all but the shrinks."""

    what: str
    target: float
    base: float
    delta_bytes: int
    launches: int
    at_floor: float
    expected: float
    overlapped: float


def weights(shape: Shape) -> int:
    """bf16 bytes of the weights that a step reads: all linears and the head."""
    layer = sum(d_in * sum(widths) for d_in, widths in shape.sites.values())
    return 2 * (shape.layers * layer + shape.vocab * shape.d)


def kv(shape: Shape, rows: int, context: int) -> int:
    """bf16 bytes of the keys and values that decoding `rows` contexts reads."""
    return 2 * shape.layers * rows * context * 2 * shape.kv


TARGETS: dict[str, dict[str, tuple[int, ...]]] = {
    "qv": {"qkv": (0, 2)},
    "all": {"qkv": (0, 1, 2), "o": (0,), "gate_up": (0, 1), "down": (0,)},
}
"""Which targets of each site are adapted: q and v, or all seven linears."""


def factors(shape: Shape, targets: str, adapters: int, rank: int) -> int:
    """bf16 bytes of the factors of so many adapters, all layers."""
    widths = 0
    for site, chosen in TARGETS[targets].items():
        d_in, outs = shape.sites[site]
        widths += sum(d_in + outs[j] for j in chosen)
    return 2 * shape.layers * adapters * rank * widths


def decode(shape: Shape, machine: Machine, targets: str, adapters: int, rank: int, target: float) -> Estimate:
    """64 rows at context 1024, shared evenly among the adapters."""
    base = (weights(shape) + kv(shape, 64, 1024)) / machine.copy
    moved = factors(shape, targets, adapters, rank)
    norms = shape.layers * sum(s in NORMED for s in TARGETS[targets])
    exposed = norms * machine.launch
    shrinks = shape.layers * len(TARGETS[targets]) * 2
    floor = moved / machine.copy
    expected = floor / machine.efficiency + shrinks * machine.launch + exposed
    name = {"qv": "q, v", "all": "all seven"}[targets]
    return Estimate(
        f"decode 64 rows, {name} r {rank}, {adapters} adapter{'s' * (adapters > 1)}",
        target,
        base * 1e6,
        moved,
        shrinks + norms,
        floor / base,
        expected / base,
        (floor / machine.efficiency + exposed) / base,
    )


def prompt(shape: Shape, machine: Machine, rows: int, rank: int, target: float) -> Estimate:
    """A prompt of one adapter that adapts all seven linears, over the base's products."""
    base = (weights(shape) - 2 * shape.vocab * shape.d) * rows / machine.products  # 2 flops per weight, 2 bytes each
    read = {s: d_in for s, (d_in, _) in shape.sites.items()}
    # Shrinks read x again (once per 64 rank rows of the site); o and down store the sum once more and read it.
    blocks = {s: -(-rank * len(shape.sites[s][1]) // 64) for s in read}
    again = sum(read[s] * blocks[s] for s in read) + 2 * shape.d
    moved = 2 * shape.layers * rows * again + factors(shape, "all", 1, rank)
    # A shrink multiplies whole blocks of 64 rank rows; small products reach half of what large ones do.
    per_row = sum(read[s] * 64 * blocks[s] + rank * sum(shape.sites[s][1]) for s in read)
    products = 2 * shape.layers * rows * per_row / (machine.products / 2)
    shrinks, norms = shape.layers * 2 * len(shape.sites), shape.layers * len(NORMED)
    floor = moved / machine.copy
    exposed = max(floor / machine.efficiency, products) + norms * machine.launch
    expected = exposed + shrinks * machine.launch
    return Estimate(
        f"prompt {rows}, all seven r {rank}",
        target,
        base * 1e6,
        moved,
        shrinks + norms,
        floor / base,
        expected / base,
        exposed / base,
    )


def lines(shape: Shape, machine: Machine) -> list[Estimate]:
    """Every target."""
    return [
        decode(shape, machine, "qv", 32, 16, 0.04),
        decode(shape, machine, "all", 1, 16, 0.05),
        decode(shape, machine, "all", 8, 16, 0.08),
        decode(shape, machine, "all", 32, 16, 0.15),
        prompt(shape, machine, 2048, 16, 0.04),
        prompt(shape, machine, 8192, 16, 0.04),
        prompt(shape, machine, 8192, 64, 0.06),
    ]


def table(shape: Shape, machine: Machine) -> str:
    """The targets as lines of text."""
    out = [
        f"{shape.name}: copy {machine.copy / 1e12:.1f} TB/s, kernels at {machine.efficiency:.2f} of it, products "
        f"{machine.products / 1e12:.0f} TFLOP/s, launch {machine.launch * 1e6:.1f} us",
        f"{'what':44}{'base us':>9}{'delta MB':>10}{'launches':>10}{'floor':>8}{'expected':>10}{'overlapped':>12}"
        f"{'target':>8}",
    ]
    for line in lines(shape, machine):
        out.append(
            f"{line.what:44}{line.base:9.0f}{line.delta_bytes / 1e6:10.0f}{line.launches:10}"
            f"{line.at_floor:8.1%}{line.expected:10.1%}{line.overlapped:12.1%}{line.target:8.0%}"
        )
    return "\n".join(out)
