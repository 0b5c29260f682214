"""How a training tells where it is: a bar in a terminal, else lines, each with what is needed to decide to wait."""

import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tucka_runtime.terminal import say
from tucka_runtime.trainer.evaluate import HeldOut, in_words
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


class Progress(Protocol):
    """Who is told how a training goes."""

    def step(self, step: Step) -> None: ...

    def evaluated(self, step: int, result: HeldOut) -> None: ...

    def warn(self, text: str) -> None: ...


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


def tenth(steps: int) -> int:
    """After how many steps something is due that is done ten times in `steps`, or less often in few."""
    return max(1, -(-steps // 10))


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class TrainingFigures:
    """One training's figures as they come: what its line says, and what its trackers are told of every step. The route
    scopes take turns of `turn` steps."""

    def __init__(self, steps: int, turn: int, trackers: Sequence[Tracker] = ()):
        self._turn, self._trackers = turn, trackers
        self._loads: deque[list[int]] = deque(maxlen=turn * -(-tenth(steps) // turn))
        self._started = time.monotonic()
        self.tokens = 0

    def step(self, step: Step) -> str:
        """Takes a step; returns it in words: its loss and the experts' shares."""
        self._loads.append(step.load)
        self.tokens += step.tokens
        load = mean_load(list(self._loads), self._turn)
        values = {
            "train/loss": step.loss,
            "train/learning_rate": step.lr,
            "train/tokens_per_second": self.tokens / max(time.monotonic() - self._started, 1e-9),
        }
        self._track(values | {f"experts/{i}": share for i, share in enumerate(load)}, step.number)
        experts = f" experts {'/'.join(f'{share:.0%}'[:-1] for share in load)}%" if load else ""
        return f"loss {step.loss:.4f}{experts}"

    def evaluated(self, step: int, result: HeldOut) -> None:
        self._track({f"eval/{name}": value for name, value in result.figures.items()}, step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()

    def _track(self, values: dict[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(values, step)


class TrainingProgress:
    """Says each step of a run of `steps`, of which `done` lie behind."""

    def __init__(self, steps: int, done: int, turn: int, trackers: Sequence[Tracker] = ()):
        from tqdm import tqdm

        self._steps, self._done = steps, done
        self._bar = tqdm(total=steps, initial=done, unit="step", disable=None, file=sys.stderr)
        self._figures = TrainingFigures(steps, turn, trackers)
        self._started = self._said = time.monotonic()

    def step(self, step: Step) -> None:
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        said = self._figures.step(step)
        text = f"{said} {self._figures.tokens / seconds:.0f} tok/s"
        self._bar.update(1)
        self._bar.set_postfix_str(text, refresh=False)
        due = step.number % tenth(self._steps) == 0 or step.number == self._steps
        if self._bar.disable and (due or now - self._said >= SECONDS_BETWEEN_LINES):
            self._said = now
            left = seconds / (step.number - self._done) * (self._steps - step.number)
            self._write(f"step {step.number}/{self._steps} {text} elapsed {clock(seconds)} left {clock(left)}")

    def evaluated(self, step: int, result: HeldOut) -> None:
        self._write(f"step {step}/{self._steps} held out: {in_words(result.figures)}")
        self._figures.evaluated(step, result)

    def warn(self, text: str) -> None:
        self._write(f"warning: {text}")

    def close(self) -> None:
        self._bar.close()
        self._figures.close()

    def _write(self, line: str) -> None:
        if self._bar.disable:
            say(line, sys.stderr)
        else:
            self._bar.write(line, file=sys.stderr)


class JobProgress:
    """The progress of one job among several, said in the lines of all."""

    def __init__(self, name: str, steps: int, done: int, figures: TrainingFigures, all_jobs: "JobsProgress"):
        self.name, self.steps, self.done, self.first = name, steps, done, done
        self.loss: float | None = None
        self.figures, self._all = figures, all_jobs
        all_jobs.jobs.append(self)

    def step(self, step: Step) -> None:
        self.figures.step(step)
        self.done, self.loss = step.number, step.loss

    def evaluated(self, step: int, result: HeldOut) -> None:
        self._all.say(f"{self.name}: step {step}/{self.steps} held out: {in_words(result.figures)}")
        self.figures.evaluated(step, result)

    def warn(self, text: str) -> None:
        self._all.say(f"warning: {self.name}: {text}")

    def leave(self) -> None:
        """The job has ended: nothing is left of it."""
        self.steps = self.done
        self.figures.close()

    @property
    def left(self) -> float:
        """Tokens that its remaining steps will compute, if they are as the ones so far."""
        return self.figures.tokens / max(1, self.done - self.first) * (self.steps - self.done)


class JobsProgress:
    """One line for all jobs, ten times in the longest of them, and at least once a minute."""

    def __init__(self) -> None:
        self.jobs: list[JobProgress] = []
        self._started = self._said = time.monotonic()
        self._turns = 0

    def turn(self) -> None:
        """All running jobs have taken a step."""
        self._turns += 1
        now = time.monotonic()
        longest = max(job.steps - job.first for job in self.jobs)
        if self._turns % tenth(longest) and now - self._said < SECONDS_BETWEEN_LINES:
            return
        self._said = now
        seconds = max(now - self._started, 1e-9)
        speed = sum(job.figures.tokens for job in self.jobs) / seconds
        left = sum(job.left for job in self.jobs) / max(speed, 1e-9)
        losses = ", ".join(
            f"{job.name} {job.done}/{job.steps} loss {job.loss:.4f}" for job in self.jobs if job.loss is not None
        )
        self.say(f"{losses}; {speed:.0f} tok/s elapsed {clock(seconds)} left {clock(left)}")

    @staticmethod
    def say(line: str) -> None:
        say(line, sys.stderr)
