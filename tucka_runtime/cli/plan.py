"""`tucka plan`: how large a fleet has to be, and what its router does to it, on paper."""

import argparse
import json
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tucka_runtime.client import KEY_VARIABLES
from tucka_runtime.config import EngineConfig
from tucka_runtime.errors import ConfigError
from tucka_runtime.loadtest.lengths import parse
from tucka_runtime.planning.policies import POLICIES
from tucka_runtime.progress import bar

if TYPE_CHECKING:
    from tucka_runtime.planning.arrivals import Arrivals
    from tucka_runtime.planning.replica import ReplicaSettings
    from tucka_runtime.planning.report import FleetPlan

SERVE = EngineConfig()

ABOUT = """
Simulates requests over replicas of tucka serve, which take as long as a real one took, under four policies of the
router in front: round-robin, least-loaded, consistent-hash (each adapter has one replica) and affinity (the same, and
what would overload that replica spills over to the next).
"""

EXAMPLES = """
examples
  tucka plan --measure http://127.0.0.1:8000 -o profile.json
      what loads and steps take on a server that runs with fewer --adapter-slots than adapters; about a minute
  tucka plan --profile profile.json --zipf 1 --adapters 1000 --rate 50 --replicas 4,8,16 --slots 32
      50 requests a second of 1,000 adapters, the i-th asked for as often as 1/i says: hits, first tokens, throughput
  tucka plan --profile profile.json --trace trace.csv --replicas 8 --slots 32 --slo-first-token-ms 500
      what was logged (arrival,adapter,prompt_tokens,output_tokens), and the smallest fleet in which 99% of the first
      tokens come within 500 ms
  tucka plan --profile profile.json --trace azure.csv --zipf 1.2 --adapters 100000 --replicas 100 --slots 64
      a trace that knows no adapters (TIMESTAMP,ContextTokens,GeneratedTokens): they are drawn

Exit status: 0; 1 for wrong arguments, files or servers. docs/scale.md says what is on paper and what is not.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = ABOUT, EXAMPLES
    parser.usage = (
        "%(prog)s --profile FILE (--trace FILE | --zipf A --adapters K --rate R) --replicas N --slots M [flags]\n"
        "       %(prog)s --measure URL [URL ...] -o FILE"
    )
    times = parser.add_argument_group("times")
    times.add_argument("--profile", type=Path, metavar="FILE", help="what a replica's work takes: a file of --measure")
    times.add_argument(
        "--measure", nargs="+", metavar="URL",
        help="make one of a running server; of several, as replicas on one machine, measured at the same time",
    )  # fmt: skip
    times.add_argument("-o", "--output", type=Path, metavar="FILE", help="where --measure writes it")
    times.add_argument("--api-key", metavar="KEY", help=f"the server's key (default: {' or '.join(KEY_VARIABLES)})")

    load = parser.add_argument_group("requests")
    load.add_argument(
        "--trace", type=Path, metavar="FILE",
        help="CSV with columns arrival (seconds, or dates), adapter, prompt_tokens, output_tokens, or the load "
        "tester's JSONL; what it does not tell is drawn as below",
    )  # fmt: skip
    load.add_argument("--trace-speed", type=float, default=1.0, metavar="X", help="so many times as fast (default: 1)")
    load.add_argument("--zipf", type=float, metavar="A", help="draw adapters: the i-th has the weight 1 / i^A")
    load.add_argument("--adapters", type=int, metavar="K", help="of so many")
    load.add_argument("--rate", help="requests per second without --trace: R, ramp:FROM:TO, exp:FROM:TO, steps:R1,R2")
    load.add_argument("--burstiness", type=float, default=1.0, help="shape of the Gamma gaps (default: 1, Poisson)")
    load.add_argument("--requests", type=int, metavar="N", help="so many (default: 100000, or until --duration)")
    load.add_argument("--duration", type=float, metavar="S", help="for so many seconds")
    load.add_argument("--prompt-tokens", default="64", metavar="DIST", help="as of tucka loadtest (default: 64)")
    load.add_argument("--output-tokens", default="32", metavar="DIST", help="likewise (default: 32)")
    load.add_argument("--seed", type=int, default=0, help="of what is drawn; the same gives the same plan (default: 0)")
    load.add_argument(
        "--warmup", type=float, default=0.1, metavar="SHARE",
        help="share of the requests, the first, that fill slots and are not counted (default: 0.1)",
    )  # fmt: skip

    fleet = parser.add_argument_group("fleet")
    fleet.add_argument("--replicas", default="1", metavar="N[,N...]", help="replicas, a table for each (default: 1)")
    for name in ("adapter_slots", "adapter_host_bytes", "max_num_seqs", "max_num_batched_tokens"):
        short = ["--slots"] if name == "adapter_slots" else []
        default = getattr(SERVE, name)
        fleet.add_argument(
            *short, f"--{name.replace('_', '-')}", dest=name, type=int, default=default, metavar="N",
            help=f"as of tucka serve (default: {default})",
        )  # fmt: skip
    fleet.add_argument(
        "--policy",
        nargs="+",
        choices=POLICIES,
        default=list(POLICIES),
        metavar="NAME",
        help="those to try (default: all)",
    )
    result = parser.add_argument_group("result")
    result.add_argument("--percentiles", default="50,90,99", help="of first tokens (default: 50,90,99)")
    result.add_argument(
        "--slo-first-token-ms", type=float, metavar="MS", help="find each policy's smallest fleet that keeps this"
    )
    result.add_argument(
        "--slo-percentile", type=float, default=99.0, metavar="P", help="for P of 100 requests (default: 99)"
    )
    result.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    result.add_argument("--html", type=Path, metavar="FILE", help="write a page with the figures over the replicas")


def run(args: argparse.Namespace) -> int:
    """Raises TuckaError for what is wrong."""
    if args.measure:
        if args.output is None or args.profile or args.trace:
            raise ConfigError(
                "--measure URL makes a profile alone: give it -o FILE, and leave --profile and --trace out."
            )
        if not args.output.absolute().parent.is_dir():
            raise ConfigError(f"{args.output} cannot be written: its folder does not exist.")
        from tucka_runtime.planning.measure import measure

        command = shlex.join(["tucka", "plan", "--measure", *args.measure])
        measure(args.measure, args.api_key, command, lambda what: print(f"timing {what} ...", file=sys.stderr)).write(
            args.output
        )
        print(f"written to {args.output}")
        return 0
    from tucka_runtime.planning import report

    plan = make_plan(args)
    if args.html:
        try:
            args.html.write_text(report.page(plan), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{args.html} cannot be written: {error.strerror}.") from None
    print(json.dumps(report.as_json(plan, inputs(args)), indent=1) if args.json else report.render(plan))
    return 0


def inputs(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for."""
    left_out = ("run", "command", "measure", "output", "api_key", "json", "html")
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in left_out}


def make_plan(args: argparse.Namespace) -> "FleetPlan":
    """All fleets, one after the other. Raises ConfigError."""
    from tucka_runtime.planning.fleet import smallest_fleet
    from tucka_runtime.planning.profile import read_profile
    from tucka_runtime.planning.replica import ReplicaSettings
    from tucka_runtime.planning.report import FleetPlan
    from tucka_runtime.planning.simulation import Limit, Simulation

    replicas, percentiles = check(args)
    profile = read_profile(args.profile)
    arrivals = requests(args)
    settings = ReplicaSettings(
        slots=args.adapter_slots,
        host=args.adapter_host_bytes // profile.adapter_bytes,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
    )
    skip = int(args.warmup * len(arrivals))
    shown = sys.stderr.isatty()
    fleets = []
    for number in replicas:
        for policy in args.policy:
            simulation = Simulation(arrivals, number, policy, settings, profile)
            with bar(len(arrivals), "request", shown, f"{number} replicas, {policy}") as progress:
                simulation.run(progress.update, skip=skip)
            fleets.append(simulation.figures(percentiles))
    limit = Limit(args.slo_first_token_ms / 1000, args.slo_percentile) if args.slo_first_token_ms else None
    smallest: dict[str, int | None] = {}
    for policy in args.policy:
        if limit is None:
            break
        # As many as would have nothing else to do, by the largest fleet that was tried.
        largest = [f for f in fleets if f.policy == policy][-1]
        guess = math.ceil(largest.busy * largest.replicas)
        with bar(None, "request", shown, f"smallest, {policy}") as progress:
            smallest[policy] = smallest_fleet(arrivals, policy, settings, profile, limit, skip, guess, progress.update)
    return FleetPlan(about(arrivals, settings, skip), fleets, limit, smallest)


def about(arrivals: "Arrivals", settings: "ReplicaSettings", skip: int) -> str:
    """One line on what was planned for."""
    return (
        f"{len(arrivals)} requests in {arrivals.at[-1]:.0f} s, the first {skip} not counted; {len(arrivals.names)} "
        f"adapters, {settings.slots} slots and room for {settings.host} in the host cache of each replica"
    )


def check(args: argparse.Namespace) -> tuple[list[int], tuple[float, ...]]:
    """The numbers of replicas, smallest first, and the percentiles. Raises ConfigError for flags that are wrong or
    missing."""
    if args.profile is None:
        raise ConfigError("Give --profile FILE, which `tucka plan --measure URL -o FILE` makes of a running server.")
    if args.trace is None and (args.zipf is None or args.rate is None):
        raise ConfigError("Give --trace FILE, or --zipf A with --adapters K and --rate R.")
    if args.trace is not None and args.rate is not None:
        raise ConfigError("A trace has its own arrivals: leave --rate out, and see --trace-speed.")
    if args.zipf is not None and not (0 <= args.zipf < 100 and (args.adapters or 0) >= 1):
        raise ConfigError("--zipf must be at least 0, and needs --adapters K of at least 1.")
    try:
        replicas = sorted({int(number) for number in args.replicas.split(",")})
        percentiles = tuple(float(p) for p in args.percentiles.split(","))
    except ValueError:
        raise ConfigError("--replicas and --percentiles are numbers with commas between, as 10,100,1000.") from None
    if not 1 <= replicas[0] <= replicas[-1] <= 100_000 or not all(0 <= p <= 100 for p in percentiles):
        raise ConfigError("--replicas must be between 1 and 100000, --percentiles between 0 and 100.")
    if not (0 <= args.warmup < 1 and args.trace_speed > 0 and args.burstiness > 0 and args.adapter_host_bytes >= 0):
        raise ConfigError(
            "--warmup must be a share below 1, --trace-speed and --burstiness over 0, --adapter-host-bytes at least 0."
        )
    if ":" in (args.rate or "") and args.duration is None:
        raise ConfigError("A --rate that changes needs --duration S, over which it does.")
    for name in ("adapter_slots", "max_num_seqs", "max_num_batched_tokens", "requests", "duration"):
        if getattr(args, name) is not None and not 1 <= getattr(args, name) < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1.")
    if args.max_num_seqs > args.max_num_batched_tokens:
        raise ConfigError("--max-num-seqs exceeds --max-num-batched-tokens: every sequence needs a token in each step.")
    if args.slo_first_token_ms is not None and not (args.slo_first_token_ms > 0 and 0 < args.slo_percentile <= 100):
        raise ConfigError("--slo-first-token-ms must be over 0, --slo-percentile between 0 and 100.")
    return replicas, percentiles


def requests(args: argparse.Namespace) -> "Arrivals":
    """Those of the trace, or drawn. Raises ConfigError."""
    from tucka_runtime.planning.arrivals import Drawn, read_trace, synthetic

    drawn = Drawn(
        prompt=parse(args.prompt_tokens, "--prompt-tokens"),
        output=parse(args.output_tokens, "--output-tokens"),
        zipf=args.zipf,
        adapters=args.adapters or 0,
        seed=args.seed,
    )
    if args.trace is not None:
        return read_trace(args.trace, drawn).faster(args.trace_speed)
    count = args.requests if args.requests or args.duration else 100_000
    return synthetic(drawn, args.rate, args.burstiness, count, args.duration or math.inf)
