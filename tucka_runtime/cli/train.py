"""`tucka train`: records and a base model in, an adapter out, or several."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tucka_runtime.cli.train_end import finish, stopping, write
from tucka_runtime.cli.train_files import complete
from tucka_runtime.cli.train_flags import add_arguments, command, of_run
from tucka_runtime.cli.train_jobs import run_jobs
from tucka_runtime.cli.train_plan import Plan, build, check, check_out, check_settings, load, open_base, plan, summary
from tucka_runtime.errors import TuckaError
from tucka_runtime.terminal import say

if TYPE_CHECKING:
    from tucka_runtime.trainer.loop import Loop

__all__ = ["add_arguments", "main", "run"]


def run(given: argparse.Namespace) -> int:
    """Train; returns the exit status. Errors that a user can mend are printed without a traceback."""
    try:
        return run_jobs(given) if given.jobs or given.sweep else _run(complete(given))
    except TuckaError as error:
        say(f"tucka train: {error.message}", sys.stderr)
        return 2
    except PermissionError as error:
        say(f"tucka train: {error.filename} cannot be used by this user: permission denied.", sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    check(args)
    check_out(args.out, args.resume, args.overwrite)
    started = time.monotonic()
    checked = check_settings(args)
    base = open_base(args)
    planned = plan(args, base, checked)
    loop = build(planned, load(base, args, args.packing, labels=planned.config.labels))
    say(summary(loop, args.method))
    where = _train(planned, loop, started)
    if where is None:
        return 130
    try:
        finish(planned, loop, time.monotonic() - started, where)
    except KeyboardInterrupt:
        say(f"\nstopped while it was measured: the adapter is in {where}, without all of its figures", sys.stderr)
        return 130
    return 0


def _train(planned: Plan, loop: "Loop", started: float) -> Path | None:
    """Where the adapter is once it is trained; None where that was stopped: then a checkpoint is kept, and it is said
    how to go on."""
    from tucka_runtime.trainer import tracking
    from tucka_runtime.trainer.adapter import keep
    from tucka_runtime.trainer.loop import CHECKPOINT
    from tucka_runtime.trainer.progress import TrainingProgress, collapsed

    args = planned.args
    if args.resume:
        loop.resume(args.out)
        say(f"continuing after step {loop.step}")
    trackers = tracking.start(args.report_to, args.out, of_run(args))
    loop.progress = TrainingProgress(loop.config.steps, loop.step, loop.turn, trackers)
    for text in planned.warnings:
        loop.progress.warn(text)
    try:
        with stopping(loop):
            loop.run()
            if loop.finished:
                if said := collapsed(loop.history.load, loop.turn):
                    planned.warnings.append(said)
                    loop.progress.warn(said)
                return write(planned, loop, time.monotonic() - started)
    finally:
        loop.progress.close()
    where = keep(loop.save, args.out)
    move = "" if where == args.out else f" Move {where / CHECKPOINT} into {args.out} first."
    say(
        f"stopped after step {loop.step} of {loop.config.steps}; the checkpoint is in {where}.{move} To go on:\n"
        f"{command(args, resume=True, overwrite=False)}"
    )
    return None


def main() -> int:
    """`python -m tucka_runtime.cli.train`: the same command without the server's CLI."""
    parser = argparse.ArgumentParser(prog="tucka train", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
