"""First of three on a fresh device, ten minutes: is what the kernels compute right? From the checkout's folder:

    PYTHONPATH=. python docs/measurements/first-run/right.py
    TRITON_INTERPRET=1 PYTHONPATH=. python docs/measurements/first-run/right.py --small    tiny, no device

It needs pytest; compute-sanitizer is taken where it is on the PATH, tests of any layout where hypothesis is installed.
"""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from report import Figures, Report

from tucka_runtime.kernels.bench.chain import Chain
from tucka_runtime.kernels.bench.shapes import LLAMA3_8B, TINY, Measurement
from tucka_runtime.kernels.bench.timing import captured
from tucka_runtime.kernels.dispatch import backend

ROOT = Path(__file__).parents[3]
REPEATS = 10_000
REPORTED = 9
"""compute-sanitizer's exit status where it has something to report, and the tests have passed."""
READ = re.compile(r"at (\w+)(?:\+0x\w+)? in (\w+\.py):(\d+)")
SANITIZED = ("tests/kernels/test_graphs.py", "-k", "fixed and 4", "-m", "gpu")


def pytest(*arguments: str, before: tuple[str, ...] = ()) -> tuple[int, str]:
    """Exit status and output of a run of tests."""
    command = [*before, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def needs_hypothesis(file: Path) -> bool:
    """Whether a file of tests cannot even be read without."""
    return "\nfrom hypothesis" in file.read_text()


def tests(report: Report) -> Figures:
    """Every kernel test on the device, bf16 among them, and the engine's; a process for each file."""
    marks = ("-m", "interpreted", "-k", "norm") if report.small else ("-m", "gpu")
    every = [*sorted((ROOT / "tests/kernels").glob("test_*.py")), ROOT / "tests/engine/test_fused_engine.py"]
    files = [file for file in every if find_spec("hypothesis") or not needs_hypothesis(file)]
    with ThreadPoolExecutor(2 if report.small else 12) as pool:
        found = list(pool.map(lambda file: pytest(str(file), *marks), files))
    bad = {file.name: text for file, (status, text) in zip(files, found, strict=True) if status not in (0, 5)}
    if bad:
        (report.args.out / "right-tests.log").write_text("\n".join(bad.values()))
        raise RuntimeError(f"right-tests.log says why: {', '.join(bad)}")
    return {"files": len(files), "left out for want of hypothesis": len(every) - len(files)}


ANYTHING = ("tl.load(h_at", "tl.load(x_row")
"""Reads that may find what nobody has written: h is read as wide as it lies and then chosen from (tiles.load_h), and
rows of x that fill up a graph are multiplied for nobody."""


def uninitialised(text: str) -> dict[str, int]:
    """How often initcheck reports each line of a kernel, but for reads that may find anything."""
    found: dict[str, int] = {}
    for kernel, name, line in READ.findall(text):
        source = (ROOT / "kernels" / "fused" / name).read_text().splitlines()[int(line) - 1]
        if not any(read in source for read in ANYTHING):
            found[f"{kernel}: {source.strip()}"] = found.get(f"{kernel}: {source.strip()}", 0) + 1
    return found


def sanitizer(tool: str) -> Figures:
    """compute-sanitizer on one replayed batch of every kernel of half a layer."""
    path = shutil.which("compute-sanitizer")
    if path is None:
        return {"skipped": "compute-sanitizer is not on the PATH"}
    before = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", path, "--tool", tool, "--error-exitcode", str(REPORTED))
    status, text = pytest(*SANITIZED, before=(*before, "--print-limit", "100000"))
    if tool == "initcheck" and status == REPORTED and "ERROR SUMMARY" in text:
        if errors := uninitialised(text):
            raise RuntimeError(str(errors))
        return {"errors": 0, "reads that may find anything": len(READ.findall(text))}
    if status:
        raise RuntimeError(text[-2000:])
    return {"errors": 0}


def steps(report: Report, name: str) -> Chain:
    """Two layers of 64 rows of 32 adapters; the same numbers for every backend."""
    shape = TINY if report.small else replace(LLAMA3_8B, layers=2)
    dtype = torch.float32 if report.small else torch.bfloat16
    what = Measurement(shape, (64,), (32,), (16,), (), (128,), dtype, report.device, backend(name))
    torch.manual_seed(0)
    chain = Chain(what, 4 if report.small else 64, 20 if report.small else 1024)
    chain.adapt("all", 2 if report.small else 32, 16)
    return chain


def repeats(report: Report) -> Figures:
    """A step's tokens, bit for bit, over many replays of one graph: a race would show as a difference."""
    chain, count = steps(report, "fused"), 3 if report.small else REPEATS
    out: list[torch.Tensor] = []
    call = lambda: out.append(chain.hidden())  # noqa: E731
    graph = None if report.small else captured([call])
    call() if graph is None else graph.replay()
    first, other = out[-1].clone(), 0
    for _ in range(count):
        if graph is None:
            call()
        else:
            graph.replay()
        other += int(not torch.equal(out[-1], first))
    if other:
        raise RuntimeError(f"{other} of {count} repeats were different")
    return {"repeats": count, "different": 0}


def agreement(report: Report) -> Figures:
    """The step's tokens by the fused kernels and by the reference."""
    mine, theirs = (steps(report, name).step() for name in ("fused", "reference"))
    share = float((mine == theirs).float().mean())
    if share < 0.9:
        raise RuntimeError(f"only {share:.2f} of the tokens agree")
    return {"tokens that agree": share}


if __name__ == "__main__":
    with torch.inference_mode():
        report = Report("right", __doc__)
        report.section("agreement", lambda: agreement(report))
        report.section("repeats", lambda: repeats(report))
        report.section("memcheck", lambda: sanitizer("memcheck"))
        report.section("initcheck", lambda: sanitizer("initcheck"))
        report.section("tests", lambda: tests(report))
    sys.exit(report.end())
