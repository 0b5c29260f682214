"""How `tucka train` ends: stopped on the way, or measured and written."""

import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from tucka_runtime.cli.train_flags import of_run
from tucka_runtime.cli.train_plan import Plan
from tucka_runtime.errors import ConfigError
from tucka_runtime.terminal import say

if TYPE_CHECKING:
    from tucka_runtime.trainer.evaluate import HeldOut
    from tucka_runtime.trainer.loop import Loop

PREDICTIONS = "predictions.jsonl"
PICTURE = "training.png"


class Stoppable(Protocol):
    """What ends after the step that it is in when `stopping` is set."""

    stopping: bool


@contextmanager
def stopping(running: Stoppable) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) lets the step that is running end, the second ends everything at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        running.stopping = True
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)
        say("\nstopping after this step; once more ends at once, without a checkpoint", sys.stderr)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write(planned: Plan, loop: "Loop", seconds: float) -> Path:
    """Writes the adapter as soon as it is trained; returns where it is. Raises ConfigError where no place takes it."""
    from tucka_runtime.trainer.card import CARD_NAME

    where = _keep(planned, loop, _manifest(planned, loop, seconds), planned.args.out)
    for name in (CARD_NAME, PREDICTIONS, PICTURE):  # of an adapter that was there before
        with suppress(OSError):
            (where / name).unlink()
    return where


def finish(planned: Plan, loop: "Loop", seconds: float, where: Path, tell: Callable[[str], None] = say) -> None:
    """Measures the adapter that was written to `where`, writes its figures beside it and publishes it. Raises
    ConfigError where that is not --out, or the server refuses it."""
    from tucka_runtime.trainer.card import CARD_NAME, card
    from tucka_runtime.trainer.loop import CHECKPOINT
    from tucka_runtime.trainer.plot import figure

    args, base = planned.args, planned.base
    result, alone = (loop.evaluate(), base.score(loop)) if loop.held else (None, None)
    training = _manifest(planned, loop, seconds, result, alone)
    where = _keep(planned, loop, training, where)
    if result:
        _tell(result, alone, tell)
    if where != args.out:
        raise ConfigError(f"{args.out} could not be written (is the disk full?): the adapter is in {where} instead.")
    (args.out / CHECKPOINT).unlink(missing_ok=True)  # what it was for is done
    try:
        name = args.name or args.out.resolve().name
        (args.out / CARD_NAME).write_text(card(name, training), "utf-8")
        together = 1 if args.route_batch == "batch" else 16  # a batch's route is one request's: nobody else is known
        if rows := loop.objective.predictions(loop.model, loop.held, base.tokenizer, loop.pad, together):
            (args.out / PREDICTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
        title = f"{args.method} · {args.data.name} · {len(loop.history.loss)} steps"
        words = (loop.objective.loss_of, loop.objective.share_of)
        figure(loop.history, result, args.out / PICTURE, title, *words)
    except OSError as error:
        say(f"warning: card, predictions and picture were not all written: {error.strerror}.", sys.stderr)
    tell(f"written to {args.out}")
    if args.objective != "classify" and not planned.publication:
        model = ["--model", str(args.model)] if args.model else []
        tell("To serve it: " + shlex.join(["tucka", "serve", *model, "--adapter", f"{name}={args.out}"]))
    if planned.publication:
        planned.publication.publish()
        tell(f"published as {planned.publication.name!r} at {planned.publication.url}")


def _manifest(
    planned: Plan, loop: "Loop", seconds: float, result: "HeldOut | None" = None, alone: "HeldOut | None" = None
) -> dict[str, Any]:
    from tucka_runtime.trainer.adapter import manifest, trainable_parameters

    return manifest(
        planned.settings, loop.config, loop.history, result, alone, base_name=planned.base.name,
        base_fingerprint=planned.base.fingerprint, data=planned.data, parameters=trainable_parameters(loop.model),
        router=loop.router, seconds=seconds, flags=of_run(planned.args), warnings=planned.warnings,
    )  # fmt: skip


def _keep(planned: Plan, loop: "Loop", training: dict[str, Any], folder: Path) -> Path:
    from tucka_runtime.trainer.adapter import keep, write

    return keep(lambda place: write(loop.model, place, planned.base.name, training), folder)


def _tell(result: "HeldOut", alone: "HeldOut | None", tell: Callable[[str], None]) -> None:
    from tucka_runtime.trainer.evaluate import in_words

    beside = f" (base: {in_words(alone.figures, ', ')})" if alone else ""
    tell(f"held out: {in_words(result.figures, ', ')}{beside}")
    for task, value in result.by_task.items():
        groups = f"   groups {result.groups[task]}" if result.groups else ""
        tell(f"  {task:<16} {value:.3f}{groups}")
