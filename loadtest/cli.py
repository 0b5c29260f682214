"""`tucka loadtest`: run, sweep, fairness, compare, report. The help needs no extra: what does is imported when it
runs."""

import argparse
import asyncio
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tucka_runtime.errors import ConfigError, TuckaError
from tucka_runtime.loadtest import settings, slo
from tucka_runtime.loadtest.conform import command as conform
from tucka_runtime.loadtest.settings import Settings

EXAMPLES = """
examples
  tucka loadtest --url http://127.0.0.1:8000
      30 s of 4 conversations at a time to every adapter (Zipf), with canaries: a first look
  tucka loadtest --rate 5 --burstiness 0.5 --popularity zipf:1.2 --goodput ttft:500 tpot:50 --html report.html
      open loop in bursts, goodput under an SLO, a report to look at
  tucka loadtest --rate 5 --churn-rate 0.5 --churn-adapter fr=/srv/fr de=/srv/de
      adapters come and go meanwhile (the server must allow it; give --admin-key if it wants one)
  tucka loadtest --versus-base --repeats 5
      what adapters cost: adapter / base, from interleaved pairs, with 95% intervals
  tucka loadtest sweep --goodput ttft:500 tpot:50
      the highest rate that meets the SLO
  tucka loadtest fairness --concurrency 100 --repeats 3 --ignore-eos
      the last adapter's first token, while 100 requests are in flight to the first, or evenly to all others
  tucka loadtest compare before.json after.json
      what changed, and whether it is more than noise
  tucka loadtest conform http://127.0.0.1:8000 --base /models/llama --folder /srv/adapters/kit
      does any request get another adapter's answer? docs/conform.md

Exit status: 0; 1 if the server or the arguments are wrong, or no request was answered; 2 if answers were wrong (a
canary answered as another adapter, an unloaded adapter answered). `conform`: 1 if a row fails.
docs/loadtest.md defines every figure.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Measure an OpenAI-compatible server the way it will be used, and check its answers meanwhile."
    parser.usage = "%(prog)s [--url URL] [flags] [ACTION ...]"
    parser.epilog = EXAMPLES
    settings.add_flags(parser)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions (default: run once)")
    sweeper = actions.add_parser("sweep", help="find the highest rate that meets the SLO")
    settings.add_flags(sweeper, defaults=False)
    sweeper.add_argument("--share", type=float, default=0.95, help="share of requests that must be good (default 0.95)")
    sweeper.add_argument("--start-rate", type=float, default=1.0, help="first rate tried (default 1)")
    sweeper.add_argument("--tolerance", type=float, default=0.1, help="how narrow to search, relative (default 0.1)")
    sweeper.add_argument("--most-runs", type=int, default=15, help="stop after this many runs (default 15)")
    fair = actions.add_parser("fairness", help="does one adapter's flood make another wait?")
    settings.add_flags(fair, defaults=False)
    fair.add_argument("--quiet-rate", type=float, default=2.0, help="requests per second of the quiet one (default 2)")
    comparer = actions.add_parser("compare", help="two results side by side (vllm bench's JSON is read as well)")
    comparer.add_argument("a", metavar="A.json")
    comparer.add_argument("b", metavar="B.json")
    conformer = actions.add_parser("conform", help="hold a server's adapters to what isolation asks, row by row")
    conform.add_flags(conformer)
    reporter = actions.add_parser("report", help="make the HTML report of a JSON result again")
    reporter.add_argument("result", metavar="RESULT.json")
    reporter.add_argument("page", metavar="REPORT.html")


def run(args: argparse.Namespace) -> int:
    """0; 1 for wrong arguments or a server that cannot be tested or answered nothing; 2 for wrong answers."""
    from tucka_runtime.loadtest import sweep
    from tucka_runtime.loadtest.report import compare, report, table

    try:
        if args.action == "compare":
            print(compare.render(report.read(args.a), report.read(args.b), (args.a, args.b)))
            return 0
        if args.action == "report":
            write_page(report.read(args.result, sweeps=True), args.page)
            return 0
        if args.action == "conform":
            return conform.run(args)
        test = settings.from_args(args)
        for path in (test.json, test.html):
            if path and not Path(path).resolve().parent.is_dir():
                raise ConfigError(f"{path} cannot be written: its folder does not exist")
        if args.action == "fairness":
            return run_fairness(test, args)
        outcome = asyncio.run(run_sweep(test, args) if args.action == "sweep" else run_once(test))
    except TuckaError as error:
        print(f"tucka loadtest: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("aborted", file=sys.stderr)
        return 130
    results = [point["result"] for point in outcome["points"]] if args.action == "sweep" else [outcome]
    status = 2 if not outcome["correct"] else 0 if any(result["completed"] for result in results) else 1
    try:  # files before the table: whoever reads that may go away first, as `| head` does
        if test.json:
            report.write(outcome, test.json)
        if test.html:
            write_page(outcome, test.html)
    except TuckaError as error:
        print(f"tucka loadtest: {error.message}", file=sys.stderr)
        status = 1
    print(sweep.render(outcome) if args.action == "sweep" else table.render(outcome))
    return status


async def run_once(test: Settings) -> dict[str, Any]:
    from tucka_runtime.loadtest.report import report
    from tucka_runtime.loadtest.session import Session

    return report.build(await Session(test).execute())


async def run_sweep(test: Settings, args: argparse.Namespace) -> dict[str, Any]:
    """The outcome of the sweep; the single results are in its `points`, without raw requests."""
    from tucka_runtime.loadtest import sweep

    if not 0 < args.share <= 1 or args.start_rate <= 0 or args.tolerance <= 0 or args.most_runs < 1:
        raise ConfigError("--share must be in (0, 1], --start-rate and --tolerance positive, --most-runs at least 1")
    test = replace(test, no_raw=True, duration=test.duration or (None if test.requests else 20.0))
    if not test.goodput:
        alone = replace(test, rate="closed", concurrency=1, requests=12, duration=None, canary_rate=0.0, churn_rate=0.0)
        unhurried = await run_once(alone)
        if sweep.interrupted(unhurried):
            raise KeyboardInterrupt
        test = replace(test, goodput=sweep.default_limits(unhurried))
        print(f"no --goodput given; from requests sent one at a time: {' '.join(test.goodput)}", file=sys.stderr)

    correct = []  # of all runs, those too that make no point

    async def measure(rate: float) -> dict[str, Any]:
        result = await run_once(replace(test, rate=repr(rate), label=f"{rate:g}/s"))
        correct.append(result["correct"])
        return result

    search = sweep.Sweep(measure, args.share, args.start_rate, args.tolerance, args.most_runs)
    outcome = await search.execute()
    return {
        "format": "tucka-loadtest-sweep/1",
        **outcome,
        "share": args.share,
        "goodput_slo_ms": slo.parse(test.goodput),
        "correct": all(correct),
        "points": search.points,
    }


def run_fairness(test: Settings, args: argparse.Namespace) -> int:
    """0, or 1 where the quiet adapter got no answer. Raises ConfigError, ServerError."""
    from tucka_runtime.loadtest import fairness
    from tucka_runtime.loadtest.report import report

    if args.quiet_rate <= 0:
        raise ConfigError("--quiet-rate must be positive")
    if test.html:
        raise ConfigError("fairness makes no page: give --json, not --html")
    outcome = asyncio.run(fairness.Fairness(test, args.quiet_rate).execute())
    if test.json:
        report.write(outcome, test.json)
    print(fairness.render(outcome))
    return 0 if outcome["ratio"] is not None else 1


def write_page(result: dict[str, Any], path: str) -> None:
    from tucka_runtime.loadtest.report import page

    try:
        Path(path).write_text(page.render(result), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tucka loadtest")
    add_arguments(parser)
    return run(parser.parse_args(argv))
