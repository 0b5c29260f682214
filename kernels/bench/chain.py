"""A whole decoding step at a decoder's shape: every layer with weights, caches and factors of its own, in one graph.

What a delta costs is this over the same step without adapters; what the step costs is this over the floor, the bytes of
weights, keys and values at a copy's rate. Shrinks run on a side stream beside the base's product. Cores are made at the
step's beginning from routes that are known; `one stream` is the same step whose shrinks run behind the products and not
beside them, `qkv in line` and the like the one where that is so at one site.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from tucka_runtime.kernels.bench import model
from tucka_runtime.kernels.bench.core import K, P, T
from tucka_runtime.kernels.bench.shapes import Measurement, SiteBatch, batch, blocks
from tucka_runtime.kernels.bench.timing import Call, Case, Timed, measure
from tucka_runtime.kernels.ops import LowRank
from tucka_runtime.kernels.tables.blocks import AttentionMetadata
from tucka_runtime.kernels.tables.routes import CoreParts, RoutePlan


@dataclass(frozen=True)
class Layer:
    """Weights (d_out, d_in) by site, caches, and what adapters there are at each site."""

    weights: dict[str, Tensor]
    caches: tuple[Tensor, Tensor]
    deltas: dict[str, SiteBatch]


class Chain:
    """All layers' tensors. 16 GB of weights and, at 64 rows of 1024, 8.6 GB of keys and values for a Llama-3-8B."""

    def __init__(self, sweep: Measurement, rows: int, context: int):
        shape, self.sweep = sweep.shape, sweep
        self.plan: AttentionMetadata = blocks(rows, context, True, sweep.device)
        slots = (int(self.plan.block_table.max()) + 1) * self.plan.block_size

        def randn(*size: int) -> Tensor:
            return torch.empty(size, dtype=sweep.dtype, device=sweep.device).normal_(std=size[-1] ** -0.5)

        self.layers = [
            Layer(
                {site: randn(sum(widths), d_in) for site, (d_in, widths) in shape.sites.items()},
                (randn(slots, shape.kv_heads, shape.head), randn(slots, shape.kv_heads, shape.head)),
                {},
            )
            for _ in range(shape.layers)
        ]
        self.head = randn(shape.vocab, shape.d)
        self.x = randn(rows, shape.d)
        self.ones = torch.ones(shape.d, dtype=sweep.dtype, device=sweep.device)
        angle = torch.rand(rows, 1, shape.head // 2, device=sweep.device)
        self.cos, self.sin = angle.cos().to(sweep.dtype), angle.sin().to(sweep.dtype)
        self.side = torch.cuda.Stream(sweep.device) if sweep.device.type == "cuda" else None
        self.routes: RoutePlan | None = None

    def adapt(self, targets: str | None, adapters: int, rank: int) -> None:
        """Gives every layer new adapters at `targets` of model.TARGETS; None: takes them away."""
        rows, device, dtype = self.x.shape[0], self.sweep.device, self.sweep.dtype
        self.routes = None
        for layer in self.layers:
            layer.deltas.clear()
        if targets is None:
            return
        used, linears = min(rows, adapters), sum(len(widths) for _, widths in self.sweep.shape.sites.values())
        self.cores = torch.zeros(used, linears * len(self.layers), rank, rank, dtype=dtype, device=device)
        slots, first = [], 0
        for layer in self.layers:
            for site, (d_in, widths) in self.sweep.shape.sites.items():
                chosen = model.TARGETS[targets].get(site)
                end = first + len(widths)
                if chosen is not None:
                    on = tuple(j in chosen for j in range(len(widths)))
                    own = batch(rows, adapters, rank, d_in, widths, dtype, device, on)
                    layer.deltas[site] = replace(own, cores=self.cores[:, first:end])
                    slots += [first + j for j in chosen]
                first = end
        at = torch.tensor(slots, device=device)
        c = [torch.randn(len(slots), T, P, device=device) for _ in range(used)]
        g = [torch.randn(len(slots), K, P, rank, rank, device=device) / rank for _ in range(used)]
        routed = [CoreParts(*parts, at, None) for parts in zip(c, g, strict=True)]
        known = [(i % K, [0.5] * T) for i in range(used)]
        self.routes = RoutePlan.build(routed, range(used), [None] * used, known, device)

    def step(self, in_line: Collection[str] = ()) -> Tensor:
        """The highest logit's id of every row. Shrinks run behind the products of the sites that are `in_line`."""
        return linear(self.hidden(in_line), self.head).argmax(-1)

    def hidden(self, in_line: Collection[str] = ()) -> Tensor:
        """The normalised hidden states (T, d) that those are of."""
        ops, shape = self.sweep.ops, self.sweep.shape
        self.in_line = in_line
        if self.routes is not None:
            ops.core(self.routes, self.cores)
        x, y = self.x, ops.norm(self.x, self.ones, None, 1e-5)
        for layer in self.layers:
            qkv, delta = self._linear(layer, "qkv", y)
            q = ops.expand_qkv_rope_kv(
                qkv, delta, self.cos, self.sin, None, 1e-5, *layer.caches, self.plan.slot_mapping
            )
            attended = ops.attention(q, *layer.caches, self.plan, shape.head**-0.5).flatten(1)
            out, delta = self._linear(layer, "o", attended)
            y, x = ops.expand_residual(out, delta, x, self.ones, None, 1e-5)
            up, delta = self._linear(layer, "gate_up", y)
            inner = ops.expand_swiglu(up, delta)
            down, delta = self._linear(layer, "down", inner)
            y, x = ops.expand_residual(down, delta, x, self.ones, None, 1e-5)
        return y

    def _linear(self, layer: Layer, site: str, x: Tensor) -> tuple[Tensor, LowRank | None]:
        b, side = layer.deltas.get(site), self.side
        if b is None:
            return linear(x, layer.weights[site]), None
        if side is None or site in self.in_line:
            return linear(x, layer.weights[site]), self.sweep.ops.shrink_core(x, b.site, b.cores, b.plan)
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            low_rank = self.sweep.ops.shrink_core(x, b.site, b.cores, b.plan)
        y = linear(x, layer.weights[site])
        main.wait_stream(side)
        return y, low_rank


def results(sweep: Measurement, rows: int, context: int, say: Callable[[str], None]) -> list[Timed]:
    """Steps without adapters, then with q and v or all seven linears adapted by 1, 8 and 32 adapters."""
    chain = Chain(sweep, rows, context)
    shape = sweep.shape
    out: list[Timed] = []
    base_bytes = model.weights(shape) + model.kv(shape, rows, context)
    settings: list[tuple[str | None, int, int]] = [(None, 0, 0)]
    settings += [(t, a, r) for r in sweep.ranks for t in model.TARGETS for a in (1, 8, 32) if a <= rows]
    for targets, adapters, rank in settings:
        chain.adapt(targets, adapters, rank)
        moved = base_bytes + (model.factors(shape, targets, adapters, rank) if targets else 0)
        label: dict[str, int | str] = {
            "rows": rows,
            "context": context,
            "targets": targets or "none",
            "adapters": adapters,
            "rank": rank,
        }
        calls: dict[str, Call] = {"own": chain.step}
        if targets and sweep.ops.name == "fused":
            calls["one stream"] = partial(chain.step, in_line=shape.sites)
            calls |= {f"{site} in line": partial(chain.step, in_line=(site,)) for site in model.TARGETS[targets]}
        result = measure(_case(label, moved, calls), sweep.device)
        if out:
            result.micros["no adapter"] = out[0].micros["own"]
        out.append(result)
        say(f"chain {label}: {result.micros['own']:.0f} us")
    return out


def _case(label: dict[str, int | str], moved: int, calls: dict[str, Call]) -> Case:
    return Case("chain", label, moved, lambda seed: calls)
