"""How `tucka train` ends: stopped on the way, or measured and written."""

import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from tucka_runtime.cli.train_flags import of_run
from tucka_runtime.cli.train_plan import Plan
from tucka_runtime.errors import ConfigError

if TYPE_CHECKING:
    from tucka_runtime.trainer.evaluate import HeldOut
    from tucka_runtime.trainer.loop import Loop


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
        print("\nstopping after this step; once more ends at once, without a checkpoint", file=sys.stderr, flush=True)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write(planned: Plan, loop: "Loop", seconds: float, say: Callable[[str], None] = print) -> None:
    """Measures what was trained, writes and publishes it. Raises ConfigError where no place takes it, or another than
    --out, or the server refuses it."""
    from tucka_runtime.trainer.adapter import keep, manifest, trainable_parameters, write
    from tucka_runtime.trainer.card import CARD_NAME, card
    from tucka_runtime.trainer.loop import CHECKPOINT
    from tucka_runtime.trainer.plot import figure

    args, base = planned.args, planned.base
    result, alone = (loop.evaluate(), base.score(loop)) if loop.held else (None, None)
    training = manifest(
        planned.settings, loop.config, loop.history, result, alone, base_name=base.folder.name,
        base_fingerprint=base.fingerprint, data=source(args.data) | _counts(loop),
        parameters=trainable_parameters(loop.model), router=loop.router, seconds=seconds, flags=of_run(args),
        warnings=planned.warnings,
    )  # fmt: skip
    if result:
        _tell(result, alone, say)
    where = keep(lambda place: write(loop.model, place, base.folder.name, training), args.out)
    if where != args.out:
        raise ConfigError(f"{args.out} could not be written (is the disk full?): the adapter is in {where} instead.")
    (args.out / CHECKPOINT).unlink(missing_ok=True)  # what it was for is done
    try:
        name = args.name or args.out.resolve().name
        (args.out / CARD_NAME).write_text(card(name, training), "utf-8")
        if loop.held:  # one at a time where a route is a batch's: nobody else is known to be served
            together = 1 if args.route_batch == "batch" else 16
            rows = loop.objective.predictions(loop.model, loop.held, base.tokenizer, loop.pad, together)
            (args.out / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        title = f"{args.method} · {args.data.name} · {len(loop.history.loss)} steps"
        words = (loop.objective.loss_of, loop.objective.share_of)
        figure(loop.history, result, args.out / "training.png", title, *words)
    except OSError as error:
        print(f"warning: card, predictions and picture were not all written: {error.strerror}.", file=sys.stderr)
    say(f"written to {args.out}")
    if args.objective != "classify" and not planned.publication:
        model = ["--model", str(args.model)] if args.model else []
        say("To serve it: " + shlex.join(["tucka", "serve", *model, "--adapter", f"{name}={args.out}"]))
    if planned.publication:
        planned.publication.publish()
        say(f"published as {planned.publication.name!r} at {planned.publication.url}")


def source(path: Path) -> dict[str, Any]:
    """Which data: the file's name and the digest of what is in it, or in the folder."""
    from tucka_runtime.trainer.adapter import digest

    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return {"file": path.name, "sha256": digest(b"".join(file.read_bytes() for file in files))}


def _counts(loop: "Loop") -> dict[str, int]:
    return {"train": len(loop.train), "held_out": len(loop.held)}


def _tell(result: "HeldOut", alone: "HeldOut | None", say: Callable[[str], None]) -> None:
    from tucka_runtime.trainer.evaluate import in_words

    beside = f" (base: {in_words(alone.figures, ', ')})" if alone else ""
    say(f"held out: {in_words(result.figures, ', ')}{beside}")
    for task, value in result.by_task.items():
        groups = f"   groups {result.groups[task]}" if result.groups else ""
        say(f"  {task:<16} {value:.3f}{groups}")
