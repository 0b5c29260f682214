"""What libraries of the engine's process read from its environment when they are loaded: before torch is imported."""

import os

SPIN = {"GOMP_SPINCOUNT": "10000"}
"""How long OpenMP's threads spin before they sleep, in torch's own products and loops; the native kernels have threads
of their own (kernels/native/pool.h). The default spins for milliseconds, which takes the cores from the API process and
from each other; sleeping at once costs a wake-up per operation. `python -m tucka_runtime.bench`, base only, tok/s on 2
cores, when all loops were its: idle machine 602 by default, 361 with OMP_WAIT_POLICY=passive, 695 with this; beside
two busy loops under 10, 178, 89."""

PRIMITIVES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}
"""How many compiled products oneDNN, and torch above it, keep. Each number of rows is a product of its own, and by
default they keep 1,024. One of the two alone does not help. tests/chaos/memory_slope.py measures it, and
docs/measurements/engine-faults-2026-11-26.md has its figures."""


def prepare() -> None:
    """Sets what the operator did not set."""
    for name, value in (SPIN | PRIMITIVES).items():
        os.environ.setdefault(name, value)
