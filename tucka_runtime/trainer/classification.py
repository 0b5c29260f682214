"""Sequence classification: a head over the labels, trained with the adapter and saved beside it (PEFT's SEQ_CLS)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import eq
from typing import Any

import torch
from torch import Tensor, nn

from tucka_runtime.trainer.decode import SHOWN
from tucka_runtime.trainer.evaluate import Tally, batches, measuring
from tucka_runtime.trainer.labelled import Labelled

TOGETHER = 64  # texts in a batch of the evaluation


@dataclass
class ClassEvaluation:
    """Mean loss of a text; share of texts that are given their label, of all and by sub-task; F1, its mean over the
    labels; groups chosen by sub-task."""

    loss: float
    accuracy: float
    f1: float
    by_task: dict[str, float]
    groups: dict[str, list[int]]

    @property
    def figures(self) -> dict[str, float]:
        return {"loss": self.loss, "accuracy": self.accuracy, "f1": self.f1}


class Classification:
    """The objective of a classifier, for the loop; the head's outputs are the `labels` in their order."""

    records = "texts"
    loss_of = "loss of a text"
    share_of = "accuracy"

    def __init__(self, labels: Sequence[str]):
        self._labels = labels
        self._index = {label: i for i, label in enumerate(labels)}

    def collate(self, batch: Sequence[Labelled], pad: int) -> dict[str, Tensor]:
        width = max(text.tokens for text in batch)
        ids = torch.full((len(batch), width), pad)
        mask = torch.zeros((len(batch), width), dtype=torch.int64)
        for row, text in enumerate(batch):
            ids[row, : text.tokens] = torch.tensor(text.ids)
            mask[row, : text.tokens] = 1
        labels = torch.tensor([self._index[text.label] for text in batch])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def count(self, batch: dict[str, Tensor]) -> int:
        return len(batch["labels"])

    def logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """(B, labels), in fp32. Encoders know no `use_cache`, so that it is not named."""
        logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits.float()

    def loss(self, model: Any, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")

    def evaluate(
        self, model: Any, held: Sequence[Labelled], pad: int, device: torch.device, router: Any = None
    ) -> ClassEvaluation:
        """Evaluates under the route scope that is set."""
        total = 0.0
        asked: list[str] = []
        said: list[str] = []
        tally = Tally()
        with measuring(model, router):
            for texts in batches(held, TOGETHER, router):
                batch = {name: tensor.to(device) for name, tensor in self.collate(texts, pad).items()}
                logits = self.logits(model, batch)
                tally.routed(texts, router, len(texts))
                total += self.loss(model, logits, batch).item()
                own, given = [text.label for text in texts], self._names(logits)
                tally.judge(texts, map(eq, given, own))
                asked += own
                said += given
        return ClassEvaluation(total / len(held), tally.share, f1(asked, said), tally.by_task, tally.groups)

    def evaluate_base(self, model: Any, held: Sequence[Labelled], pad: int, device: torch.device) -> None:
        """Nothing: the base has no head for these labels."""

    def predictions(
        self, model: Any, held: Sequence[Labelled], tokenizer: Any, pad: int, together: int
    ) -> list[dict[str, Any]]:
        """Which label the first SHOWN held-out texts are given, `together` of them at once."""
        rows = []
        with measuring(model, None):
            for i in range(0, min(len(held), SHOWN), together):
                texts = held[i : i + together]
                batch = {name: tensor.to(model.device) for name, tensor in self.collate(texts, pad).items()}
                for text, label in zip(texts, self._names(self.logits(model, batch)), strict=True):
                    prompt = tokenizer.decode(list(text.ids), skip_special_tokens=False)
                    rows.append(
                        {"prompt": prompt, "expected": text.label, "said": label, "right": label == text.label,
                         "task": text.task}
                    )  # fmt: skip
        return rows

    def _names(self, logits: Tensor) -> list[str]:
        return [self._labels[i] for i in logits.argmax(-1).tolist()]


def f1(expected: Sequence[str], said: Sequence[str]) -> float:
    """The mean over the labels that were expected or said of 2·right / (expected + said)."""
    right = Counter(a for a, b in zip(expected, said, strict=True) if a == b)
    asked, given = Counter(expected), Counter(said)
    return sum(2 * right[label] / (asked[label] + given[label]) for label in asked | given) / len(asked | given)
