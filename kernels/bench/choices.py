"""Other values of the fused kernels' constants, each timed in a whole decoding step as an engine's graph holds it.

Alone, a kernel waits for nothing and has the device to itself; in a step it starts behind a product, beside one, or
with the launch before it still ending. So a constant is chosen by the step that it makes, of eight layers with factors,
weights and caches of their own, and not by its kernel's own time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from tucka_runtime.kernels.bench.chain import Chain
from tucka_runtime.kernels.bench.shapes import Measurement
from tucka_runtime.kernels.bench.timing import timed
from tucka_runtime.kernels.fused import (
    attention,
    attention_decode,
    expand_qkv_rope_kv,
    expand_residual,
    expand_swiglu,
    launch,
    norm,
    shrink_core,
)

LAYERS = 8
"""Of the measured step: enough weights, keys and factors that nothing comes from the L2 cache."""


@dataclass(frozen=True)
class Put:
    """A value in the place of a module's own."""

    module: Any
    name: str
    value: object

    @contextmanager
    def applied(self) -> Iterator[None]:
        before = getattr(self.module, self.name)
        setattr(self.module, self.name, self.value)
        try:
            yield
        finally:
            setattr(self.module, self.name, before)


def warps(module: Any, kernel: str, count: int) -> Put:
    """Launches of one kernel of a module by programs of so many warps."""

    def start(function: Any, grid: Any, *args: Any, **given: Any) -> None:
        own = {"num_warps": count} if function.fn.__name__ == kernel else {}
        launch.launch(function, grid, *args, **(given | own))

    return Put(module, "launch", start)


def alternatives(what: Measurement) -> dict[str, Put]:
    """By what is other than it is built."""
    found: dict[str, Put] = {}
    built = shrink_core.config(max(what.rows), what.shape.d)
    for block_k, span, count in product((128, 256), (512, 1024, 2048), (2, 4)):
        how = replace(built, block_k=block_k, span=span, warps=count)
        found[f"shrink: {span} by {block_k}, {count} warps"] = Put(shrink_core, "config", lambda *_, how=how: how)
    for module, kernel in ((expand_residual, "_add"), (expand_swiglu, "_swiglu")):
        for block in (32, 128):
            found[f"{kernel}: {block} columns"] = Put(module, "BLOCK_N", block)
    for module, kernel in ((expand_residual, "_add"), (expand_swiglu, "_swiglu"), (expand_qkv_rope_kv, "_qkv")):
        for count in (1, 2, 8):
            found[f"{kernel}: {count} warps"] = warps(module, kernel, count)
    for split, (step, stages) in product((256, 512, 1024), ((32, 8), (64, 3), (64, 5), (128, 3), (128, 4))):
        own = attention_decode.Cut(split, step, stages)
        found[f"decode: {split} by {step}, {stages} stages"] = Put(attention, "cut", lambda *_, own=own: own)
    for count in (2, 16):
        found[f"norm: {count} warps"] = warps(norm, "_norm", count)
    return found


def results(what: Measurement, rows: int, context: int, adapters: int, say: Callable[[str], None]) -> dict[str, float]:
    """Microseconds of a step, as built (first and last) and with each alternative. One that raises, as what does not
    fit a device's registers or shared memory does, has none: its error is said."""
    own = replace(what, shape=replace(what.shape, layers=min(LAYERS, what.shape.layers)), rows=(rows,))
    chain = Chain(own, rows, context)
    chain.adapt("all", adapters, max(what.ranks))
    found: dict[str, float] = {}
    for name, change in {"as built": None, **alternatives(own), "as built, again": None}.items():
        with change.applied() if change else nullcontext():
            try:
                found[name] = timed([chain.step], what.device)
            except Exception as error:  # a border: an alternative that cannot run is not one
                say(f"{name}: {type(error).__name__}: {error}"[:200])
                continue
        say(f"{name}: {found[name]:.0f} us")
    return found
