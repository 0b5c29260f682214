"""Second of three on a fresh device, ten minutes: where does a step's time go? From the checkout's folder:

    PYTHONPATH=. python docs/measurements/first-run/where.py
    TRITON_INTERPRET=1 PYTHONPATH=. python docs/measurements/first-run/where.py --small    tiny, no device

It takes ncu where that is on the PATH.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from report import Figures, Report
from torch.profiler import ProfilerActivity, profile

from tucka_runtime.kernels.bench import chain, choices, timing
from tucka_runtime.kernels.bench.__main__ import SWEPT
from tucka_runtime.kernels.bench.shapes import LLAMA3_8B, TINY, Measurement
from tucka_runtime.kernels.bench.timing import timed
from tucka_runtime.kernels.dispatch import backend

KERNELS = ("_shrink", "_qkv", "_swiglu", "_add", "_decode")
COUNTED = """--op shrink_core --op expand_swiglu --op expand_residual --op expand_qkv_rope_kv --op attention
    --rows 64 --adapters 32 --ranks 16 --prompts 64 --contexts 1024 --skip-tests""".split()
SWEEP = "--sweep --ranks 16 --prompts 2048 --skip-tests --json --op".split()
"""Arguments of the kernels' bench, whose last is the op."""


def what(report: Report) -> Measurement:
    """64 rows at r 16."""
    shape = TINY if report.small else LLAMA3_8B
    dtype = torch.float32 if report.small else torch.bfloat16
    return Measurement(shape, (64,), (32,), (16,), (), (1024,), dtype, report.device, backend("fused"))


@triton.jit
def _chase(table, out, count):
    """Reads that each need the one before."""
    at = tl.program_id(0).to(tl.int64)
    for _ in range(count):
        at = tl.load(table + at)
    tl.store(out + tl.program_id(0), at)


def wait(report: Report) -> float:
    """Microseconds of a read of device memory that the next one waits for: one of eight programs on each SM, as a
    kernel's are."""
    size, programs, count = (1 << 8, 2, 4) if report.small else (1 << 27, 8 * 132, 2000)
    order = torch.randperm(size, device=report.device)
    table = torch.empty_like(order)
    table[order] = order.roll(-1)
    out = torch.empty(programs, dtype=torch.int64, device=report.device)
    return timed([lambda: _chase[(programs,)](table, out, count)], report.device) / count


def machine(report: Report) -> Figures:
    """What the device does at best: rates of a copy and of products, a launch, a fork with its join, a read's wait."""
    size = 1 << (12 if report.small else 32)
    a, b = (torch.empty(size, dtype=torch.uint8, device=report.device) for _ in "ab")
    side_length = 16 if report.small else 8192
    # Random: zeros are multiplied an eighth faster.
    square = torch.randn(side_length, side_length, device=report.device).to(torch.bfloat16)
    small, count = torch.zeros(16, device=report.device), 2 if report.small else 400
    side = None if report.small else torch.cuda.Stream()

    def forked() -> None:
        for _ in range(count):
            if side is not None:
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    small.add_(1)
                torch.cuda.current_stream().wait_stream(side)
            else:
                small.add_(1)

    def plain() -> None:
        for _ in range(count):
            small.add_(1)

    launch = timed([plain], report.device) / count
    return {
        "copy TB/s": round(2 * size / timed([lambda: b.copy_(a)], report.device) / 1e6, 3),
        "products TFLOP/s": round(2 * side_length**3 / timed([lambda: square @ square], report.device) / 1e6, 1),
        "launch us": round(launch, 2),
        "wait us": round(wait(report), 3),
        "fork and join us": round(timed([forked], report.device) / count - launch, 2),
    }


def step(report: Report) -> Figures:
    """Whole steps: without adapters, and with 1, 8 and 32 on q and v, and on all seven."""
    rows, context = (2, 20) if report.small else (64, 1024)
    found = chain.results(what(report), rows, context, lambda text: print(text, file=sys.stderr))
    return {" ".join(str(v) for v in r.shape.values()): {k: round(v) for k, v in r.micros.items()} for r in found}


def trace(report: Report, adapters: int) -> Figures:
    """Microseconds of each kernel in a step of so many adapters, launched one by one."""
    own = chain.Chain(what(report), 2 if report.small else 64, 20 if report.small else 1024)
    own.adapt("all" if adapters else None, min(adapters, 2) if report.small else adapters, 16)
    own.step()
    activity, column = ProfilerActivity.CUDA, "self_device_time_total"
    if report.small:
        activity, column = ProfilerActivity.CPU, "self_cpu_time_total"
    with profile(activities=[activity]) as profiled:
        own.step()
    micros = sorted(((getattr(row, column), row.key[:40]) for row in profiled.key_averages()), reverse=True)
    return {key: round(own, 1) for own, key in micros[:20] if own}


def chosen(report: Report, rows: int, adapters: int) -> Figures:
    """A step's microseconds with other constants: what is under "as built" by more than that differs from itself says
    what the constant shall be."""
    if report.small:
        rows = adapters = 1
    context = 20 if report.small else 1024
    found = choices.results(what(report), rows, context, adapters, lambda text: print(text, file=sys.stderr))
    return {name: round(own, 1) for name, own in sorted(found.items(), key=lambda item: item[1])}


def counters() -> Figures:
    """ncu on five kernels: the share of the memory's rate and of the SM's warps that each reaches."""
    path = shutil.which("ncu")
    if path is None:
        return {"skipped": "ncu is not on the PATH"}
    shares = ("dram__throughput.avg.pct_of_peak_sustained_elapsed", "sm__warps_active.avg.pct_of_peak_sustained_active")
    command = [path, "--csv", "-k", "regex:" + "|".join(KERNELS), "-c", "40", "--metrics"]
    command += [",".join(("gpu__time_duration.sum", *shares)), sys.executable, "-m", "tucka_runtime.kernels.bench"]
    command += COUNTED
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"csv": done.stdout.splitlines()[-120:]}


def sweep(report: Report, op: str) -> Callable[[], Figures]:
    """Every configuration of an op for a prompt of 2048 rows: the best decides the constant that says "unmeasured"."""

    def run() -> Figures:
        if report.small:
            return {"skipped": "the bench's sweeps need a device"}
        command = [sys.executable, "-m", "tucka_runtime.kernels.bench", *SWEEP, op]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        timings = json.loads(done.stdout)["results"][op]
        best = min(timings, key=lambda t: t["micros"]["own"])
        return {"best": best["shape"], "us": round(best["micros"]["own"], 1), "all": len(timings)}

    return run


if __name__ == "__main__":
    with torch.inference_mode():
        report = Report("where", __doc__)
        if report.small:
            timing.REPEATS = 1
        report.section("machine", lambda: machine(report))
        report.section("step", lambda: step(report))
        for count in (0, 1, 32):
            report.section(f"trace {count}", lambda count=count: trace(report, count))
        for rows, count in ((64, 32), (32, 8), (16, 8), (4, 4), (1, 1)):
            report.section(f"choices {rows} {count}", lambda rows=rows, count=count: chosen(report, rows, count))
        report.section("counters", counters)
        for name in SWEPT:
            report.section(f"sweep {name}", sweep(report, name))
    sys.exit(report.end())
