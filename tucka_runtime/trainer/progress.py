"""How a training tells where it is: a bar in a terminal, else lines, each with what is needed to decide to wait."""

import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tucka_runtime.trainer.evaluate import Evaluation
from tucka_runtime.trainer.tracking import Tracker

SECONDS_BETWEEN_LINES = 60
COLLAPSED = 0.98
"""A router is called collapsed when one group takes this share of the routes in the last quarter of a training that has
at least FEW_STEPS: before, its centroids have hardly moved."""
FEW_STEPS = 20


@dataclass(frozen=True)
class Step:
    """One optimiser step: its number from 1, its loss, how often each group was chosen, the tokens it computed
    (prompts and completions, without padding), and its learning rate."""

    number: int
    loss: float
    load: list[int]
    tokens: int
    lr: float


def mean_load(loads: list[list[int]], turn: int) -> list[float]:
    """Share of each group: the mean over the last whole turns of the route scopes, in each of which a step of `turn`
    has its own scope. Scopes count differently (a route a batch, a record or a token), so every step weighs the same,
    and steps before the last whole turns are left out. Empty without a router."""
    loads = loads[len(loads) % turn :] or loads
    if not loads or not loads[0]:
        return []
    shares = [[count / max(1, sum(row)) for count in row] for row in loads]
    return [sum(column) / len(shares) for column in zip(*shares, strict=True)]


def collapsed(loads: list[list[int]], turn: int) -> str | None:
    """In a sentence, whether the last quarter of a training sent nearly everything to one expert group."""
    last = mean_load(loads[-max(turn, len(loads) // 4) :], turn)
    if len(loads) < FEW_STEPS or len(last) < 2 or max(last) < COLLAPSED:
        return None
    return (
        f"the router has collapsed: group {last.index(max(last))} took {max(last):.0%} of the routes in the last "
        "quarter of the steps, so the other groups add nothing. Try --balance 0.01, or --k 1."
    )


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class TrainingProgress:
    """Says each step of a run of `steps`, of which `done` lie behind; the route scopes take turns of `turn` steps.
    The `trackers` are told the same figures of every step."""

    def __init__(self, steps: int, done: int, turn: int, trackers: Sequence[Tracker] = ()):
        from tqdm import tqdm

        self._trackers = trackers

        self._steps, self._done, self._turn = steps, done, turn
        self._bar = tqdm(total=steps, initial=done, unit="step", disable=None, file=sys.stderr)
        self._loads: deque[list[int]] = deque(maxlen=turn * max(1, -(-max(1, steps // 10) // turn)))
        self._started = self._said = time.monotonic()
        self._tokens = 0

    def step(self, step: Step) -> None:
        self._loads.append(step.load)
        self._tokens += step.tokens
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        load = mean_load(list(self._loads), self._turn)
        experts = f" experts {'/'.join(f'{share:.0%}'[:-1] for share in load)}%" if load else ""
        text = f"loss {step.loss:.4f}{experts} {self._tokens / seconds:.0f} tok/s"
        values = {
            "train/loss": step.loss,
            "train/learning_rate": step.lr,
            "train/tokens_per_second": self._tokens / seconds,
        }
        self._track(values | {f"experts/{i}": share for i, share in enumerate(load)}, step.number)
        self._bar.update(1)
        self._bar.set_postfix_str(text, refresh=False)
        tenth = step.number % max(1, self._steps // 10) == 0 or step.number == self._steps
        if self._bar.disable and (tenth or now - self._said >= SECONDS_BETWEEN_LINES):
            self._said = now
            left = seconds / (step.number - self._done) * (self._steps - step.number)
            self._write(f"step {step.number}/{self._steps} {text} elapsed {clock(seconds)} left {clock(left)}")

    def evaluated(self, step: int, result: Evaluation) -> None:
        self._write(f"step {step}/{self._steps} held out: loss {result.loss:.4f} exact match {result.exact:.3f}")

        self._track({"eval/loss": result.loss, "eval/exact_match": result.exact}, step)

    def warn(self, text: str) -> None:
        self._write(f"warning: {text}")

    def close(self) -> None:
        self._bar.close()
        for tracker in self._trackers:
            tracker.close()

    def _track(self, values: dict[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(values, step)

    def _write(self, line: str) -> None:
        if self._bar.disable:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.write(line, file=sys.stderr)
