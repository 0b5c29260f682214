"""`tucka train --jobs` and `--sweep`: several adapters over one base in one pass, each ending as it would alone."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from tucka_runtime.cli.train_end import finish, stopping, write
from tucka_runtime.cli.train_files import jobs_of, named
from tucka_runtime.cli.train_flags import command, of_run
from tucka_runtime.cli.train_plan import (
    Base,
    Plan,
    build,
    check,
    check_out,
    check_settings,
    load,
    open_base,
    plan,
    summary,
)
from tucka_runtime.errors import ConfigError
from tucka_runtime.terminal import say

if TYPE_CHECKING:
    from tucka_runtime.trainer.jobs import Job
    from tucka_runtime.trainer.progress import JobsProgress

SOME_FAILED = 1  # the exit status when some jobs came to nothing and others to their end
T = TypeVar("T")
ONE_BY_ONE = "Run tucka train once for each, with an --out of its own, without --jobs and --sweep."


def run_jobs(given: argparse.Namespace) -> int:
    """Trains the jobs; returns the exit status: 0 if all came to their end, 1 if some failed, 130 if they were stopped.
    Raises TuckaError where a job would not even begin: then none does."""
    jobs = jobs_of(given)
    finished = _each(jobs, lambda _, args: _look(args))
    todo = {name: args for name, args in jobs.items() if not finished[name]}
    for name in (name for name in jobs if finished[name]):
        say(f"{name}: already written to {jobs[name].out}")
    failed: dict[str, str] = {}
    if todo and not _train(given, todo, failed):
        return 130
    _report(given, jobs, failed)
    return SOME_FAILED if failed else 0


def _each(jobs: dict[str, argparse.Namespace], call: Callable[[str, argparse.Namespace], T]) -> dict[str, T]:
    """What a check gives for each job. Raises ConfigError that says all that is wrong, with the jobs' names."""
    found, wrong = {}, []
    for name, args in jobs.items():
        try:
            with named(name):
                found[name] = call(name, args)
        except ConfigError as error:
            wrong.append(error.message)
    if wrong:
        raise ConfigError("\n".join(wrong))
    return found


def _look(args: argparse.Namespace) -> bool:
    """Whether the job's adapter is there already, where a run is resumed: such a job is not trained again, and one of
    which there is no checkpoint begins anew. Raises ConfigError as the checks of a single training do."""
    from tucka_runtime.trainer.loop import CHECKPOINT
    from tucka_runtime.trainer.records import digest

    check(args)
    if others := [name for name in args.report_to if name != "tensorboard"]:
        raise ConfigError(
            f"--report-to {others[0]} knows one run at a time: of several jobs, tensorboard alone is told."
        )
    if args.objective == "classify":
        raise ConfigError(
            f"--objective classify: a pass has one base, and a classifier's has a head for its own labels. {ONE_BY_ONE}"
        )
    if args.dora:
        raise ConfigError(
            f"--dora: in a pass the base's products are common to all, and DoRA scales them for each. {ONE_BY_ONE}"
        )
    if args.resume and not (args.out / CHECKPOINT).is_file():
        args.resume = False
        try:
            training = json.loads((args.out / "training.json").read_text("utf-8"))
            same = training["flags"] == json.loads(json.dumps(of_run(args)))
            data = training["data"]
            if same and (data["file"], data["sha256"]) == (args.data.name, digest(args.data)):
                return True
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no result of an earlier run: check_out says what else is there
    check_out(args.out, args.resume, args.overwrite)
    return False


def _train(given: argparse.Namespace, todo: dict[str, argparse.Namespace], failed: dict[str, str]) -> bool:
    """Whether all came to an end; `failed` gets the reasons of those that came to a bad one."""
    from tucka_runtime.trainer.jobs import Together
    from tucka_runtime.trainer.progress import JobsProgress

    started = time.monotonic()
    checked = _each(todo, lambda _, args: check_settings(args))
    first = next(iter(todo.values()))
    base = open_base(first)
    plans = _each(todo, lambda name, args: plan(args, base, checked[name]))
    model = load(base, first, any(args.packing for args in todo.values()), together=True)
    progress = JobsProgress()
    try:
        jobs = _start(plans, base, model, progress)

        def ended(job: "Job") -> None:
            _end(job, plans[job.name], time.monotonic() - started, progress)

        together = Together(model, list(jobs.values()), ended, progress)
        with stopping(together):
            together.run()
    finally:
        for job in progress.jobs:
            job.leave()
    failed |= {name: job.failed for name, job in jobs.items() if job.failed}
    if unfinished := [job for job in jobs.values() if job.running]:
        _keep(given, unfinished)
        return False
    return True


def _start(plans: dict[str, Plan], base: Base, model: Any, progress: "JobsProgress") -> "dict[str, Job]":
    """A job each, with its adapter on a copy of the base's modules, resumed where it is to be. Raises ConfigError."""
    from tucka_runtime.trainer import tracking
    from tucka_runtime.trainer.adapter import trainable_parameters
    from tucka_runtime.trainer.jobs import Job
    from tucka_runtime.trainer.preflight import nearest_folder
    from tucka_runtime.trainer.progress import JobProgress, TrainingFigures
    from tucka_runtime.trainer.shared import clone

    on_disk: dict[int, int] = {}

    def start(name: str, args: argparse.Namespace) -> Job:
        disk = nearest_folder(args.out).stat().st_dev
        loop = build(plans[name], clone(model), on_disk.get(disk, 0))
        on_disk[disk] = on_disk.get(disk, 0) + trainable_parameters(loop.model)
        if args.resume:
            loop.resume(args.out)
        behind = f", {loop.step} of them done" if loop.step else ""
        say(f"{name}: {summary(loop, args.method)}{behind}")
        return Job(name, loop)

    jobs = _each({name: planned.args for name, planned in plans.items()}, start)
    for name, job in jobs.items():
        loop, args = job.loop, plans[name].args
        figures = TrainingFigures(loop.config.steps, loop.turn, tracking.start(args.report_to, args.out, of_run(args)))
        loop.progress = JobProgress(name, loop.config.steps, loop.step, figures, progress)
        for text in plans[name].warnings:
            loop.progress.warn(text)
    return jobs


def _end(job: "Job", planned: Plan, seconds: float, progress: "JobsProgress") -> None:
    """Writes what a job has come to, while the others go on. Raises ConfigError where that cannot be done."""
    from tucka_runtime.trainer.progress import collapsed

    next(entry for entry in progress.jobs if entry.name == job.name).leave()
    if job.failed:
        progress.say(f"{job.name}: ended after step {job.loop.step}: {job.failed}")
        return
    if said := collapsed(job.loop.history.load, job.loop.turn):
        planned.warnings.append(said)
        progress.say(f"warning: {job.name}: {said}")
    where = write(planned, job.loop, seconds)
    finish(planned, job.loop, seconds, where, lambda line: say(f"{job.name}: {line}"))


def _keep(given: argparse.Namespace, jobs: "list[Job]") -> None:
    """Keeps a checkpoint of each job that was stopped, and says how to go on."""
    from tucka_runtime.trainer.adapter import keep
    from tucka_runtime.trainer.loop import CHECKPOINT

    for job in jobs:
        out = job.loop.folder
        assert out is not None
        at = f"{job.name}: stopped after step {job.loop.step} of {job.loop.config.steps};"
        try:
            with job.member.drawing():
                where = keep(job.loop.save, out)
        except ConfigError as error:
            say(f"{at} {error.message}")
            continue
        move = "" if where == out else f" Move {where / CHECKPOINT} into {out} first."
        say(f"{at} the checkpoint is in {where}.{move}")
    say(f"To go on:\n{command(given, resume=True, overwrite=False)}")


def _report(given: argparse.Namespace, jobs: dict[str, argparse.Namespace], failed: dict[str, str]) -> None:
    """The table of all jobs; of a sweep also the best, and both in files beside the adapters."""
    from tucka_runtime.trainer import sweep

    rows = [sweep.row(name, args.out, failed.get(name)) for name, args in jobs.items()]
    say(sweep.table(rows))
    if not given.sweep:
        return
    if (best := sweep.best(rows)) is not None:
        what = "accuracy" if best.exact_match is None else "exact match"
        say(f"best by held-out {what}, then loss: {best.name}, in {jobs[best.name].out}")
    try:
        sweep.write(next(iter(jobs.values())).out.parent, rows)
    except OSError as error:
        say(f"warning: the sweep's report was not written: {error.strerror}.", sys.stderr)
