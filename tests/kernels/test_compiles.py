"""Every kernel compiles for the GPU it is written for, which takes no GPU; the compiler's report tells how well."""

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def report() -> list[dict[str, object]]:
    """One entry per kernel and shape (kernels/bench/compiled.py), from a process without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tucka_runtime.kernels.bench", "--compile", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    entries: list[dict[str, object]] = json.loads(done.stdout)["compiled"]
    return entries


def test_every_op_compiles(report: list[dict[str, object]]) -> None:
    from tucka_runtime.kernels.bench.__main__ import OPS

    assert {str(entry["op"]).split(" ")[0].split(",")[0] for entry in report} >= set(OPS) - {"route"}


def test_nothing_is_spilled(report: list[dict[str, object]]) -> None:
    assert not [entry for entry in report if entry["spilled"]]


def test_factors_are_read_in_16_bytes(report: list[dict[str, object]]) -> None:
    """No hint on alignment has been lost: then a factor would be read by dozens of 2-byte loads."""
    for entry in report:
        if entry["kernel"] in ("_shrink", "_expand", "_qkv", "_swiglu", "_add"):
            widths = entry["accesses"]
            assert isinstance(widths, dict)
            assert widths.get("16", 0) > 0 and widths.get("2", 0) <= 32, entry
