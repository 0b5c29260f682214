"""How kernels are started: what decides which compiled kernel is taken, and how many programs are resident."""

import json
import os
import subprocess
import sys
from itertools import product
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import native_specialize_impl

from tucka_runtime.kernels.fused.launch import HOPPER, kinds


def arguments() -> list[Any]:
    """Whole numbers at the borders, fractions, and tensors of two types, aligned or not."""
    numbers = [0, 1, 2, 15, 16, 17, 48, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1, 2**40, 2**40 + 8, -16, -(2**31)]
    tensors = [torch.zeros(64, dtype=t)[begin:] for t in (torch.float16, torch.int64) for begin in (0, 1, 8)]
    return [*numbers, 0.5, *tensors, torch.nn.Parameter(torch.zeros(4)[1:])]


def test_equal_keys_are_of_arguments_that_triton_does_not_tell_apart() -> None:
    """Else a kernel that was compiled for others would run: one that reads 16 bytes at a time where 2 are aligned."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    told = [native_specialize_impl(backend, value, False, True, True) for value in arguments()]
    keys = kinds(tuple(arguments()))
    for (a, own_a), (b, own_b) in product(zip(keys, told, strict=True), repeat=2):
        assert a != b or own_a == own_b
    assert len(set(map(str, keys))) < len(keys)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "each"),
    [
        (64, 0, 4, 8),  # 16 warps' registers in each quarter of an SM
        (72, 0, 4, 7),  # 2,304 registers a warp: seven in a quarter, 28 warps in all
        (152, 72192, 4, 3),
        (168, 0, 4, 3),
        (255, 0, 8, 1),  # eight warps, two in each quarter
        (32, 98304, 8, 2),
        (16, 0, 1, 32),  # no more programs than that, however small
        (32, 233000, 4, 0),
    ],
)
def test_programs_that_are_resident(registers: int, shared: int, warps: int, each: int) -> None:
    """As NVIDIA's occupancy calculator says for compute capability 9.0."""
    assert HOPPER.resident(registers, shared, warps) == 132 * each


def test_launches_of_a_layer() -> None:
    """Counted, not timed: `--host` prints the time too. A second layer of the same step compiles nothing. Without
    adapters a layer of a graph has five beside the base's products, with them a shrink of two more at each site, and
    two norms."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tucka_runtime.kernels.bench", "--host", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["host"]
    assert [layer["launches"] for layer in found] == [16, 6, 15, 5]
    assert all(layer["looked_up"] == 0 for layer in found)
