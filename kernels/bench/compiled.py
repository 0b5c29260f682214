"""What the compiler makes of every kernel, without a GPU: each is compiled for sm_90 through its own wrapper.

Registers, spilled bytes, shared memory, and how wide it reads and writes device memory: the first things to look at
when a kernel is slow, and a check that all of them compile. `--compile` prints it.
"""

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tucka_runtime.kernels.bench import ptx
from tucka_runtime.kernels.bench.shapes import LLAMA3_8B, batch, blocks
from tucka_runtime.kernels.fused import launch, norm
from tucka_runtime.kernels.fused.backend import OPS
from tucka_runtime.kernels.ops import LowRank
from tucka_runtime.kernels.tables.blocks import int8_cache
from tucka_runtime.kernels.tables.routes import CoreParts, RoutePlan


@dataclass(frozen=True)
class Compiled:
    """One kernel in one specialisation. `accesses` counts its global loads and stores by width in bytes, apart for each
    pointer: by the name that the statement gives to where it reads or writes."""

    op: str
    kernel: str
    registers: int
    spilled: int
    shared: int
    products: str
    accesses: dict[str, dict[int, int]]
    path: int
    """Reads that wait for each other from its start to its end, every loop gone through once."""
    latencies: int | None
    """Reads that wait for each other in a turn of its loop over tiles (ptx.latencies); None: it has no loop."""
    grid: tuple[int, ...]
    waves: float
    """Programs of the launch over those that an H200 holds at once."""


class _Device:
    """As much of a driver as compiling takes."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_all() -> list[Compiled]:
    """Every op at the Llama-3-8B shape in bf16: decoding 64 rows of 32 adapters, decoding one row (Triton compiles
    another kernel where a number is 1), a prompt of 512 rows, and the first and the last as the engine's graphs have
    them.

    Raises RuntimeError in Triton's interpreter, which compiles nothing.
    """
    if not isinstance(norm._norm, JITFunction):
        raise RuntimeError("Triton's interpreter is on: unset TRITON_INTERPRET to compile.")
    compiler = Compiler()
    with without_device(compiler):
        for compiler.op, call in _calls():
            call()
    return compiler.found


class Compiler(launch.Starter):
    """Reads what is compiled where the device would start it."""

    def __init__(self) -> None:
        self.found: list[Compiled] = []
        self.op = ""

    def resident(self, compiled: Any) -> int:
        """On a Hopper GPU."""
        registers, _ = _usage(compiled.asm["cubin"])
        return launch.HOPPER.resident(registers, compiled.metadata.shared, compiled.metadata.num_warps)

    def start(self, compiled: Any, grid: launch.Grid, args: tuple[object, ...]) -> None:
        """Notes what the compiler made of the kernel."""
        self.found.append(_read(self.op, compiled, grid, math.prod(grid) / self.resident(compiled)))


@contextmanager
def without_device(starter: launch.Starter) -> Iterator[None]:
    """Compiles for sm_90 what is launched meanwhile, and lets `starter` have it."""
    before, real = driver._active, launch.starter
    driver.set_active(_Device())
    launch.starter = starter
    try:
        yield
    finally:
        launch.starter = real
        driver._active = before


def _routes(ids: Tensor | None) -> RoutePlan:
    """One adapter's, of 64 linears."""
    c, g = torch.empty(64, 2, 2), torch.empty(64, 4, 2, 16, 16)
    adapter = CoreParts(c, g, torch.arange(64), torch.empty(LLAMA3_8B.vocab, 8))
    return RoutePlan.build([adapter], [0], [ids], [(0, (0.5, 0.5)) if ids is None else None], torch.device("cpu"))


def _calls() -> list[tuple[str, Any]]:
    ops, shape = OPS, LLAMA3_8B
    calls: list[tuple[str, Any]] = []
    for label, rows, adapters in (
        ("decode", 64, 32), ("single", 1, 1), ("prompt", 512, 1), ("graph", 64, 32), ("prompt graph", 512, 8)
    ):  # fmt: skip
        in_graph = label.endswith("graph")
        case, mlp, out = (
            batch(rows, adapters, 16, shape.d, widths, torch.bfloat16, torch.device("cpu"), padded=in_graph)
            for widths in ((shape.q, shape.kv, shape.kv), (shape.f, shape.f), (shape.d,))
        )
        plan = blocks(rows, rows if label == "prompt" else 1024, label != "prompt", torch.device("cpu"))
        cache = torch.empty(64, shape.kv_heads, shape.head, dtype=torch.bfloat16)
        small = int8_cache(64, shape.kv_heads, shape.head, torch.device("cpu"))
        angle = torch.empty(rows, 1, shape.head // 2, dtype=torch.bfloat16)
        x, weight = torch.empty(rows, shape.d, dtype=torch.bfloat16), torch.empty(shape.d, dtype=torch.bfloat16)
        q = torch.empty(rows, shape.heads, shape.head, dtype=torch.bfloat16)
        logits = torch.empty(rows, shape.vocab)
        column = torch.empty(rows)
        whole = torch.empty(rows, dtype=torch.int64)
        norms = (torch.empty(shape.head, dtype=torch.bfloat16),) * 2

        def add(name: str, call: Any, label: str = label) -> None:
            calls.append((f"{name} ({label})", call))

        h = case.y.new_empty(rows, 3, 16)
        at_qkv, at_mlp, at_out = (LowRank(h, c.site, c.plan) for c in (case, mlp, out))
        add("shrink_core", lambda c=case: ops.shrink_core(c.x, c.site, c.cores, c.plan))
        add("expand", lambda c=case, d=at_qkv: ops.expand(c.y, d))
        for n in (None, norms):
            add(
                "expand_qkv_rope_kv",
                lambda c=case, d=at_qkv, n=n, a=angle, k=cache, w=whole: ops.expand_qkv_rope_kv(
                    c.y, d, a, a, n, 1e-5, k, k, w
                ),
            )
        add("expand_swiglu", lambda c=mlp, d=at_mlp: ops.expand_swiglu(c.y, d))
        add(
            "expand_residual",
            lambda c=out, d=at_out, x=x, w=weight: ops.expand_residual(c.y, d, x, w, None, 1e-5),
        )
        add(
            "expand_residual, bias",
            lambda c=out, d=at_out, x=x, w=weight: ops.expand_residual(c.y, d, x, w, w, 1e-5),
        )
        if label == "prompt":
            # Of h as narrow as this Triton says nothing to the compiler, as it does of a multiple of 16.
            narrow = [replace(at, plan=replace(at.plan, max_rank=8)) for at in (at_qkv, at_mlp, at_out)]
            add("expand, rank 8", lambda c=case, d=narrow[0]: ops.expand(c.y, d))
            add(
                "expand_qkv_rope_kv, rank 8",
                lambda c=case, d=narrow[0], a=angle, k=cache, w=whole: ops.expand_qkv_rope_kv(
                    c.y, d, a, a, None, 1e-5, k, k, w
                ),
            )
            add("expand_swiglu, rank 8", lambda c=mlp, d=narrow[1]: ops.expand_swiglu(c.y, d))
            add(
                "expand_residual, rank 8",
                lambda c=out, d=narrow[2], x=x, w=weight: ops.expand_residual(c.y, d, x, w, None, 1e-5),
            )
        if in_graph:
            # Where an adapter of the batch changes the base's products too.
            at_qkv, at_mlp, at_out = (
                replace(at, site=replace(at.site, affine_ptr=at.site.e_ptr)) for at in (at_qkv, at_mlp, at_out)
            )
            add("expand, scaled", lambda c=case, d=at_qkv: ops.expand(c.y, d))
            add(
                "expand_qkv_rope_kv, scaled",
                lambda c=case, d=at_qkv, n=norms, a=angle, k=cache, w=whole: ops.expand_qkv_rope_kv(
                    c.y, d, a, a, n, 1e-5, k, k, w
                ),
            )
            add("expand_swiglu, scaled", lambda c=mlp, d=at_mlp: ops.expand_swiglu(c.y, d))
            add(
                "expand_residual, scaled",
                lambda c=out, d=at_out, x=x, w=weight: ops.expand_residual(c.y, d, x, w, None, 1e-5),
            )
            continue  # what else there is has no tiles
        if label != "single":
            add("attention, int8", lambda q=q, k=small, p=plan: ops.attention(q, k, k, p, 0.1))
            add(
                "expand_qkv_rope_kv, int8",
                lambda c=case, d=at_qkv, a=angle, k=small, w=whole: ops.expand_qkv_rope_kv(
                    c.y, d, a, a, None, 1e-5, k, k, w
                ),
            )
        add("norm", lambda x=x, w=weight: ops.norm(x, w, w, 1e-5))
        add("attention", lambda q=q, k=cache, p=plan: ops.attention(q, k, k, p, 0.1))
        for d in (64, 128, 256) if label == "decode" else ():
            wide, kept = torch.empty(rows, shape.heads, d), torch.empty(64, shape.kv_heads, d)
            add("attention, fp32", lambda q=wide, k=kept, p=plan: ops.attention(q, k, k, p, 0.1))
        add("attention, window", lambda q=q, k=cache, p=plan: ops.attention(q, k, k, p, 0.1, 512))
        add("sample", lambda x=logits, c=column, w=whole: ops.sample(x, c, w, w))
        add("filter", lambda x=logits, c=column, w=whole: ops.filter_logits(x, w, c, c))
        add("route_ids", lambda w=whole: ops.route_ids(_routes(w)))
        add("route_hidden", lambda x=x: ops.route_hidden(x, torch.empty(8, shape.d), 2))
    cores = torch.empty(1, 64, 16, 16).bfloat16()
    calls.append(("core", lambda: ops.core(_routes(None), cores)))
    return calls


def _read(op: str, kernel: Any, grid: launch.Grid, waves: float) -> Compiled:
    text = kernel.asm["ptx"]
    products = [p for p in ("wgmma", "mma.sync") if p in text]
    usage = _usage(kernel.asm["cubin"])
    shared, waits = kernel.metadata.shared, (ptx.path(text), ptx.latencies(text))
    return Compiled(op, kernel.name, *usage, shared, "+".join(products), ptx.accesses(text), *waits, grid, waves)


@cache
def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of local memory, from the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (-1, -1)


def table(found: list[Compiled]) -> str:
    """One line per kernel."""
    head = (
        f"{'op':32}{'kernel':14}{'registers':>10}{'spilled':>9}{'shared':>9}{'path':>6}{'latencies':>11}{'waves':>7}  "
    )
    lines = [head + f"{'products':16}bytes per access: times"]
    for c in found:
        total: Counter[int] = Counter()
        for widths in c.accesses.values():
            total.update(widths)
        waits = "-" if c.latencies is None else str(c.latencies)
        text = " ".join(f"{size}:{times}" for size, times in sorted(total.items()))
        usage = f"{c.registers:10}{c.spilled:9}{c.shared:9}{c.path:6}{waits:>11}{c.waves:7.2f}"
        lines.append(f"{c.op:32}{c.kernel:14}{usage}  {c.products:16}{text}")
    return "\n".join(lines)
