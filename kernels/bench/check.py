"""What lets a bench run: the op's tests, and its result on the very shape against the reference."""

import subprocess
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parents[2] / "tests" / "kernels"
"""The tests lie beside the package in a checkout; an installed wheel has none."""

NAMES = {
    "attention": "attention or decode or prefill or context",
    "chain": "graph or replay or fixed",
    "core": "core",
    "expand": "mix or layout or block or expand",
    "norm": "norm",
    "route": "route or group",
    "sample": "sample or filter or uniform or greedy",
    "shrink_core": "mix or layout or spans or shrink or bit",
}
"""What pytest's -k selects for an op; an op's own name where it is not here."""


def passes(op: str, device: torch.device) -> str | None:
    """Returns None where the op's tests pass, else what they said; without a checkout, that there are none."""
    if not TESTS.is_dir():
        return f"its tests are not here ({TESTS.name} of a checkout); --skip-tests times it all the same"
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        str(TESTS),
        "-q",
        "-x",
        "-k",
        NAMES.get(op, op),
        "-p",
        "no:cacheprovider",
    ]
    command += ["-m", "gpu"] if device.type == "cuda" else ["--ignore-glob=*fused*", "--ignore-glob=*compiles*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    return "its tests do not pass:\n" + "\n".join(done.stdout.splitlines()[-15:])
