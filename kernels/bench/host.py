"""What a launch costs the host: the Python of a layer's launches in a step without a graph, up to the driver's door.

No device is needed: kernels are compiled for sm_90, and what would start them counts. A step with a prompt in it is
bound by this where it comes to more than what the device works meanwhile.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tucka_runtime.kernels.bench.compiled import without_device
from tucka_runtime.kernels.bench.shapes import TINY, batch
from tucka_runtime.kernels.fused import launch
from tucka_runtime.kernels.fused.backend import OPS
from tucka_runtime.kernels.ops import LowRank
from tucka_runtime.kernels.tables.blocks import AttentionMetadata

ROUNDS = 50


@dataclass(frozen=True)
class LayerCost:
    """Launches of a layer, and microseconds of this process that they take beside the base's products."""

    what: str
    launches: int
    looked_up: int
    """Those that Triton was asked for in a second layer of the same step."""
    micros: float


class Nothing(launch.Starter):
    """Starts nothing, and counts."""

    def __init__(self) -> None:
        self.count = self.looked_up = 0

    def resident(self, compiled: Any) -> int:
        """Any number: it is asked for each kernel that was not kept."""
        self.looked_up += 1
        return launch.INTERPRETED

    def start(self, compiled: Any, grid: launch.Grid, args: tuple[object, ...]) -> None:
        """One more."""
        self.count += 1


def layers() -> list[LayerCost]:
    """A layer of a mixed step, 64 decoding rows and 236 of a prompt, with adapters on all seven linears and without;
    and what a graph of 64 decoding rows has of it, which costs the host nothing once it is captured. Widths are tiny:
    the host does the same for any."""
    nothing = Nothing()
    out = []
    with without_device(nothing):
        for what, call in (
            ("mixed, 8 adapters", _layer(236, True)),
            ("mixed, no adapter", _layer(236, False)),
            ("captured, 8 adapters", _layer(0, True)),
            ("captured, no adapter", _layer(0, False)),
        ):
            call()
            nothing.count = nothing.looked_up = 0
            call()
            count, looked_up, rounds = nothing.count, nothing.looked_up, []
            for _ in range(ROUNDS):
                begin = time.perf_counter()
                call()
                rounds.append(time.perf_counter() - begin)
            out.append(LayerCost(what, count, looked_up, min(rounds) * 1e6))
    return out


def _layer(prompt: int, adapted: bool) -> Callable[[], None]:
    """The launches of one layer, of 64 decoding rows and so many of a prompt; without one as graphs are captured."""
    shape, rows, dtype, cpu = TINY, 64 + prompt, torch.bfloat16, torch.device("cpu")
    sites = {name: batch(rows, 8, 16, d, widths, dtype, cpu) for name, (d, widths) in shape.sites.items()}
    spans = [(i, 1, 100) for i in range(64)] + ([(64, prompt, prompt)] if prompt else [])
    table: list[list[int]] = [list(range(16))] * len(spans)
    metadata = AttentionMetadata.build(spans, table, 16, cpu)
    cache = torch.empty(256, shape.kv_heads, shape.head, dtype=dtype)
    angle = torch.empty(rows, 1, shape.head // 2, dtype=dtype)
    weight = torch.empty(shape.d, dtype=dtype)
    x = torch.empty(rows, shape.d, dtype=dtype)

    def shrink(name: str) -> LowRank | None:
        b = sites[name]
        return OPS.shrink_core(b.x, b.site, b.cores, b.plan) if adapted else None

    def call() -> None:
        low_rank = shrink("qkv")
        q = OPS.expand_qkv_rope_kv(
            sites["qkv"].y, low_rank, angle, angle, None, 1e-5, cache, cache, metadata.slot_mapping
        )
        OPS.attention(q, cache, cache, metadata, 0.1)
        low_rank = shrink("o")
        OPS.expand_residual(sites["o"].y, low_rank, x, weight, None, 1e-5)
        low_rank = shrink("gate_up")
        OPS.expand_swiglu(sites["gate_up"].y, low_rank)
        low_rank = shrink("down")
        OPS.expand_residual(sites["down"].y, low_rank, x, weight, None, 1e-5)

    return partial(torch.inference_mode()(call))


def table(found: list[LayerCost]) -> str:
    """One line per layer."""
    lines = [f"{'a layer':24}{'launches':>10}{'us':>8}{'us a launch':>13}"]
    lines += [f"{x.what:24}{x.launches:10}{x.micros:8.0f}{x.micros / x.launches:13.1f}" for x in found]
    return "\n".join(lines)
