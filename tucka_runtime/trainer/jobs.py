"""Several adapters trained together: the rows of all go through one frozen base in one pass, and each ends as it would
alone.

Every adapter keeps its own `Loop`: data order, optimiser, schedule, clipping, evaluation, checkpoint. Only forwards and
backwards are common. What an adapter draws comes from a generator of its own, and padding that another's longer rows
cause is masked as its own is, so that results differ from those alone by rounding.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tucka_runtime.errors import TuckaError
from tucka_runtime.trainer.loop import Diverged, Loop, Work
from tucka_runtime.trainer.progress import JobsProgress
from tucka_runtime.trainer.shared import Carrier, Member

PASS_TOKENS = 8192
"""Rows times width that one pass takes at most, unless a single adapter's batch is larger: more are not faster on a
CPU, and the activations of a pass are in memory at once."""
PADDED = 1.5
"""How much wider than its narrowest batch a pass may be: beyond, padding costs more than the pass saves."""


@dataclass
class Job:
    """One adapter's training by its name. `failed` says why it ended before its time."""

    name: str
    loop: Loop
    failed: str | None = None

    def __post_init__(self) -> None:
        self.member = Member(self.loop.model, self.loop.router)

    @property
    def running(self) -> bool:
        return not self.loop.finished and self.failed is None


class Together:
    """Trains jobs over `base`, which each job's model was made on a `clone` of. `ended` is called with each job that
    has finished or failed, at once, while the others go on; TuckaError that it raises fails the job."""

    def __init__(
        self, base: nn.Module, jobs: list[Job], ended: Callable[[Job], None], progress: JobsProgress | None = None
    ):
        self.jobs, self._ended, self._progress = jobs, ended, progress
        self._carrier = Carrier(base, [job.member for job in jobs])
        self.stopping = False  # set from outside: all end after the step that they are in

    def run(self) -> None:
        """Until every job has ended, or all are stopping."""
        for job in self.jobs:
            job.loop.model.train()
        while not self.stopping and (running := [job for job in self.jobs if job.running]):
            self._step(running)

    def _step(self, running: list[Job]) -> None:
        works = [(job, self._within(job, job.loop.begin)) for job in running]
        for i in range(max(len(work.batches) for _, work in works)):
            for together in passes([(j, w, w.batches[i]) for j, w in works if i < len(w.batches) and not j.failed]):
                self._pass(together)
        for job, work in works:
            if not job.failed:
                self._within(job, partial(job.loop.end, work))
        if self._progress:
            self._progress.turn()
        for job in running:
            if not job.running:
                self._end(job)

    def _pass(self, together: "list[Batch]") -> None:
        logits = self._carrier.forward([(job.member, batch) for job, _, batch in together], together[0][0].loop.pad)
        losses = []
        for (job, work, batch), own in zip(together, logits, strict=True):
            try:
                losses.append(job.loop.learn(work, own, batch))
            except Diverged as error:
                job.failed = error.message
        if losses:
            torch.stack(losses).sum().backward()

    def _end(self, job: Job) -> None:
        try:
            self._within(job, partial(self._ended, job))
        except TuckaError as error:
            job.failed = error.message

    @staticmethod
    def _within(job: Job, call: Callable[[], Any]) -> Any:
        with job.member.drawing():
            return call()


Batch = tuple[Job, Work, dict[str, Tensor]]


def passes(batches: Iterable[Batch]) -> list[list[Batch]]:
    """Which batches go through the base together: packed ones apart from others, of similar width, and not more than
    PASS_TOKENS."""
    found: list[list[Batch]] = []
    narrowest, rows, packed = 0, 0, False
    for entry in sorted(batches, key=lambda entry: _extent(entry[2])):
        is_packed, width, own = _extent(entry[2])
        fits = is_packed == packed and width <= PADDED * narrowest and (rows + own) * width <= PASS_TOKENS
        if not found or not fits:
            found.append([])
            narrowest, rows, packed = width, 0, is_packed
        found[-1].append(entry)
        rows += own
    return found


def _extent(batch: dict[str, Tensor]) -> tuple[bool, int, int]:
    """Whether it is packed, its width, its rows."""
    rows, width = batch["input_ids"].shape
    return "attention_mask" not in batch, width, rows
