"""Evaluation by teacher forcing: the loss, and exact match without generating.

Where the route does not depend on what is generated together (scopes "request" and "decode"), greedy decoding yields
the completion exactly when the argmax at every completion token, given the true ones before it, is the true token.
Under "batch" this holds only for the training-time route, over prompt and completion.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from tucka_runtime.trainer.answers import answered, completion_loss, exact, learnt
from tucka_runtime.trainer.data import Example, collate, pack
from tucka_runtime.trainer.decode import predictions


class HeldOut(Protocol):
    """What was measured of held-out records, whatever the objective: the loss and further figures by their names, the
    share that is right by sub-task, and the groups chosen by sub-task."""

    loss: float
    by_task: dict[str, float]
    groups: dict[str, list[int]]

    @property
    def figures(self) -> dict[str, float]: ...


def in_words(figures: Mapping[str, float], between: str = " ") -> str:
    """Figures as a line has them."""
    return between.join(f"{k.replace('_', ' ')} {v:.{4 if k == 'loss' else 3}f}" for k, v in figures.items())


@contextmanager
def measuring(model: Any, router: Any) -> Iterator[None]:
    """In eval mode, without gradients; the mode and the router's statistics are left as they were."""
    training = model.training
    kept = router.state_dict() if router is not None else None
    model.eval()
    with torch.no_grad():
        yield
    if router is not None:
        router.load_state_dict(kept)
    model.train(training)


class HasTask(Protocol):
    """A record of whatever objective."""

    @property
    def task(self) -> str: ...

    @property
    def tokens(self) -> int: ...


T = TypeVar("T", bound=HasTask)


def batches(held: Iterable[T], size: int, router: Any) -> Iterator[list[T]]:
    """Records in batches of at most `size`, by sub-task and length. Where all of a batch share a route it holds one
    sub-task, as in training."""
    alone = router is not None and router.scope == "batch"
    order = sorted(held, key=lambda record: (record.task, record.tokens))
    for _, group in groupby(order, key=lambda record: record.task if alone else None):
        own = list(group)
        for i in range(0, len(own), size):
            yield own[i : i + size]


class Tally:
    """What the records of an evaluation came to, by sub-task: which are right, and the group that each was given."""

    def __init__(self) -> None:
        self._right: dict[str, list[bool]] = defaultdict(list)
        self._groups: dict[str, list[int]] = {}

    def judge(self, records: Iterable[HasTask], right: Iterable[bool]) -> None:
        for record, own in zip(records, right, strict=True):
            self._right[record.task].append(own)

    def routed(self, records: Sequence[HasTask], router: Any, rows: int) -> None:
        """Notes the groups of a forward of `rows` rows, of which the first are the records'. Without a router there are
        none."""
        if router is not None:
            for record, group in zip(records, router.groups(rows), strict=False):
                self._groups.setdefault(record.task, [0] * router.k)[group] += 1

    @property
    def share(self) -> float:
        """Of all records, those that are right."""
        everything = [own for task in self._right.values() for own in task]
        return sum(everything) / max(len(everything), 1)

    @property
    def by_task(self) -> dict[str, float]:
        return {task: sum(own) / len(own) for task, own in sorted(self._right.items())}

    @property
    def groups(self) -> dict[str, list[int]]:
        return dict(sorted(self._groups.items()))


@dataclass
class Evaluation:
    """Mean loss of a completion token; exact match over all examples and by sub-task; groups chosen by sub-task."""

    loss: float
    exact: float
    by_task: dict[str, float]
    groups: dict[str, list[int]] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, float]:
        return {"loss": self.loss, "exact_match": self.exact}


class Completions:
    """The objective of supervised fine-tuning, for the loop: completions as the records have them. With `packing`
    several records share a row, and are told apart by their positions alone."""

    records = "examples"
    loss_of = "loss of a completion token"
    share_of = "exact match"

    def __init__(self, packing: bool):
        self._packing = packing

    def collate(self, batch: list[Example], pad: int) -> dict[str, Tensor]:
        if self._packing:
            ids, positions, labels = pack(batch, pad)
            return {"input_ids": ids, "position_ids": positions, "labels": labels}
        ids, mask, labels = collate(batch, pad)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def count(self, batch: dict[str, Tensor]) -> int:
        return len(learnt(batch["labels"]))

    def logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return answered(model, batch)

    def loss(self, model: Any, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return completion_loss(logits, batch["labels"])[0]

    def evaluate(
        self, model: Any, held: list[Example], pad: int, device: torch.device, router: Any = None
    ) -> Evaluation:
        return evaluate(model, held, pad, device, router=router)

    def evaluate_base(self, model: Any, held: list[Example], pad: int, device: torch.device) -> Evaluation:
        with model.disable_adapter():
            return evaluate(model, held, pad, device)

    def predictions(
        self, model: Any, held: list[Example], tokenizer: Any, pad: int, together: int
    ) -> list[dict[str, Any]]:
        return predictions(model, held, tokenizer, pad, together)


def evaluate(
    model: Any, examples: list[Example], pad: int, device: torch.device, batch_size: int = 64, router: Any = None
) -> Evaluation:
    """Evaluates under the route scope that is set; `router` (of the adapter) fills `groups`."""
    total, tokens = 0.0, 0
    tally = Tally()
    with measuring(model, router):
        for batch in batches(examples, batch_size, router):
            ids, mask, labels = (x.to(device) for x in collate(batch, pad))
            logits = answered(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
            loss, count = completion_loss(logits, labels)
            total, tokens = total + float(loss), tokens + count
            tally.judge(batch, exact(logits, labels).tolist())
            tally.routed(batch, router, len(batch))
    return Evaluation(total / max(tokens, 1), tally.share, tally.by_task, tally.groups)
