"""`python -m tucka_runtime.kernels.bench`: times every kernel beside a floor. --help says what the columns mean."""

import argparse
import importlib
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime

import torch
from triton.runtime.errors import OutOfResources

from tucka_runtime.kernels.bench import chain, check, compiled, fewer_bits, host, model
from tucka_runtime.kernels.bench.shapes import LLAMA3_8B, TINY, Measurement
from tucka_runtime.kernels.bench.timing import Timed, measure, table
from tucka_runtime.kernels.dispatch import choose

HELP = """\
Times every kernel at a Llama-3-8B's shape and says how near to the limit it is.

  python -m tucka_runtime.kernels.bench                       everything (a GPU; about half an hour)
  python -m tucka_runtime.kernels.bench --op shrink_core      one op; --op may be repeated; `--op chain`: whole steps
  python -m tucka_runtime.kernels.bench --rows 64 --adapters 32 --ranks 16
  python -m tucka_runtime.kernels.bench --quick               small shapes; on a CPU: the reference kernels
  python -m tucka_runtime.kernels.bench --sweep --prompts 2048   constants: every configuration of prompts
  python -m tucka_runtime.kernels.bench --json > bench.json   for docs/measurements/
  python -m tucka_runtime.kernels.bench --model               bytes and launches against the targets; no device needed
  python -m tucka_runtime.kernels.bench --compile             registers, spills, widths of accesses; no device needed
  python -m tucka_runtime.kernels.bench --host                Python of a layer's launches; no device needed
"""

COLUMNS = """\
columns:
  us            one call, the median of 20 replays of a CUDA graph that holds many calls, each on tensors of its own,
                256 MB together, so that nothing comes from the cache that would not in a decoder
  GB/s          the bytes that must be moved (every input read once, every output written once) over that time
  launches      Triton kernels per call
  ×copy         our time over that of a copy of as many bytes: the floor is 1, less means that a cache helped
  ×gather-bmm   our time over torch's: factors gathered per row, then batched products (up to 256 rows)
  ×torch        our time over torch's own op
  ×without delta, ×no adapter   what adapters cost over the same kernels, or the whole step, without them
  ×one stream   a step whose shrinks run beside the base's products over one where they do not

Rows are shared evenly among the adapters. An op is timed only if its tests pass on this device.
"""

OPS = (
    "attention",
    "core",
    "expand",
    "expand_qkv_rope_kv",
    "expand_residual",
    "expand_swiglu",
    "norm",
    "route",
    "sample",
    "shrink_core",
)
"""The files beside this one that time something."""

SWEPT = ("shrink_core", "expand", "attention")
"""Ops with configurations of prompts to choose from; those of decoding are chosen by whole steps (choices.py)."""


def numbers(text: str) -> tuple[int, ...]:
    """`1,8,64` as numbers."""
    return tuple(int(part) for part in text.split(","))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m tucka_runtime.kernels.bench",
        description=HELP,
        epilog=COLUMNS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", action="append", choices=[*OPS, "chain"], help="only these (default: all)")
    parser.add_argument("--quick", action="store_true", help="small shapes: a minute, and all that a CPU can do")
    parser.add_argument("--rows", type=numbers, metavar="B,…", help="decoding rows (1,8,32,64,128,256)")
    parser.add_argument("--adapters", type=numbers, metavar="A,…", help="active adapters (1,8,32,64)")
    parser.add_argument("--ranks", type=numbers, metavar="R,…", help="ranks (8,16,64,128)")
    parser.add_argument("--prompts", type=numbers, metavar="T,…", help="rows of a prompt (512,2048,8192)")
    parser.add_argument("--contexts", type=numbers, metavar="L,…", help="tokens a decoding row attends to (1024,8192)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="(bfloat16; float32 on a CPU)")
    parser.add_argument("--json", action="store_true", help="results as JSON on standard output, progress on the other")
    parser.add_argument("--sweep", action="store_true", help=f"time configurations instead: {', '.join(SWEPT)} (a GPU)")
    parser.add_argument("--skip-tests", action="store_true", help="time ops whose tests have not been run")
    parser.add_argument("--model", action="store_true", help="print the model of bytes and launches, time nothing")
    parser.add_argument("--compile", action="store_true", help="print what the compiler makes of all, time nothing")
    parser.add_argument("--host", action="store_true", help="print what a layer's launches cost the host")
    parser.add_argument(
        "--bandwidth", type=float, default=3.0, help="TB/s of a large copy, for --model (3.0, an H100's)"
    )
    return parser.parse_args(arguments)


def sweep(args: argparse.Namespace, device: torch.device) -> Measurement:
    """What the command line asks to be measured."""
    small = args.quick
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    return Measurement(
        shape=TINY if small else LLAMA3_8B,
        rows=args.rows or ((1, 8) if small else (1, 8, 32, 64, 128, 256)),
        adapters=args.adapters or ((1, 8) if small else (1, 8, 32, 64)),
        ranks=args.ranks or ((8, 16) if small else (8, 16, 64, 128)),
        prompts=args.prompts or ((64,) if small else (512, 2048, 8192)),
        contexts=args.contexts or ((64,) if small else (1024, 8192)),
        dtype=getattr(torch, dtype),
        device=device,
        ops=choose(device),
    )


def say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def run(op: str, what: Measurement, skip_tests: bool, configurations: bool) -> list[Timed]:
    """Times one op, or its configurations, or says why not."""
    if configurations and op not in SWEPT:
        say(f"{op} has no configurations to choose from; those that have: {', '.join(SWEPT)}")
        return []
    if not skip_tests and (trouble := check.passes(op, what.device)):
        say(f"{op} is not timed: {trouble}")
        return []
    if op == "chain":
        return chain.results(what, max(what.rows) if what.shape is TINY else 64, what.contexts[0], say)
    module = importlib.import_module(f"tucka_runtime.kernels.bench.{op}")
    cases = module.variants(what) if configurations else module.cases(what)
    found = []
    for case in cases:
        try:
            found.append(measure(case, what.device))
        except OutOfResources as e:
            if not configurations:
                raise
            say(f"{op} {case.shape}: {e}")
            continue
        say(f"{op} {case.shape}: {found[-1].micros['own']:.1f} us")
    return found


def environment(what: Measurement) -> dict[str, object]:
    """What a figure is worth nothing without."""
    import triton

    cuda = what.device.type == "cuda"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()}), reference kernels",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": str(what.dtype).removeprefix("torch."),
        "shape": what.shape.name,
        "command": "python -m tucka_runtime.kernels.bench " + " ".join(sys.argv[1:]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if something was timed or printed, 1 if every op was refused."""
    args = parse(arguments)
    if args.model:
        machine = model.Machine(copy=args.bandwidth * 1e12)
        if args.json:
            lines = [asdict(line) for line in model.lines(LLAMA3_8B, machine)]
            print(json.dumps({"model": lines, "fewer bits": fewer_bits.errors()}, indent=1))
        else:
            print(model.table(LLAMA3_8B, machine))
            print(fewer_bits.table())
        return 0
    if args.host:
        layers = host.layers()
        print(json.dumps({"host": [asdict(x) for x in layers]}) if args.json else host.table(layers))
        return 0
    if args.compile:
        found = compiled.compile_all()
        print(json.dumps({"compiled": [asdict(c) for c in found]}) if args.json else compiled.table(found))
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and (args.sweep or not args.quick):
        say("There is no GPU. --quick times the reference kernels on small shapes; --model and --compile need none.")
        return 1
    if device.type == "cpu":
        say("No GPU: this times the reference kernels on a CPU, on small shapes. It says nothing about the fused ones.")
    what = sweep(args, device)
    where = environment(what)
    if not args.json:
        print("\n".join(f"{key}: {value}" for key, value in where.items()))
    results = {}
    for op in args.op or (SWEPT if args.sweep else [*OPS, "chain"]):
        timed = run(op, what, args.skip_tests, args.sweep)
        if timed:
            results[op] = [r.as_json() for r in timed]
        if timed and not args.json:
            print("\n" + table(timed), flush=True)
    if args.json:
        print(json.dumps({**where, "results": results}, indent=1))
    return 0 if results else 1


if __name__ == "__main__":
    sys.exit(main())
