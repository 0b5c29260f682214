"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7): pairs of answers in, no reward model.

    loss = -log σ(β · (log π(chosen)/ref(chosen) - log π(rejected)/ref(rejected)))

π is the base with the adapter and ref the base alone: the same weights with the adapter switched off, so no second
model is held. Log-probabilities are summed over an answer with its end token. β times the first quotient is an answer's
reward, and the difference of the two is the pair's margin; the pair is told apart rightly where it is positive.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tucka_runtime.trainer.answers import answer_logps, answered
from tucka_runtime.trainer.data import collate
from tucka_runtime.trainer.decode import predictions
from tucka_runtime.trainer.evaluate import Tally, batches, measuring
from tucka_runtime.trainer.pairs import Pair

TOGETHER = 32  # pairs in a batch of the evaluation


@dataclass
class PreferenceEvaluation:
    """Mean loss and margin of a pair; share of pairs that are told apart rightly, of all and by sub-task; mean rewards;
    groups chosen by sub-task."""

    loss: float
    accuracy: float
    margin: float
    chosen: float
    rejected: float
    by_task: dict[str, float]
    groups: dict[str, list[int]]

    @property
    def figures(self) -> dict[str, float]:
        return {
            "loss": self.loss, "accuracy": self.accuracy, "margin": self.margin, "reward_chosen": self.chosen,
            "reward_rejected": self.rejected,
        }  # fmt: skip


class Preferences:
    """The objective that DPO is, for the loop. A batch's rows are its pairs' chosen answers and then the rejected."""

    records = "pairs"
    loss_of = "DPO loss of a pair"
    share_of = "accuracy of pairs"

    def __init__(self, beta: float):
        self._beta = beta

    def collate(self, batch: Sequence[Pair], pad: int) -> dict[str, Tensor]:
        ids, mask, labels = collate([*(pair.chosen for pair in batch), *(pair.rejected for pair in batch)], pad)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def count(self, batch: dict[str, Tensor]) -> int:
        return len(batch["input_ids"]) // 2

    def logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return answered(model, batch)

    def loss(self, model: Any, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        chosen, rejected = self._rewards(model, logits, batch)
        return -nn.functional.logsigmoid(chosen - rejected).sum()

    def evaluate(
        self, model: Any, held: Sequence[Pair], pad: int, device: torch.device, router: Any = None
    ) -> PreferenceEvaluation:
        """Evaluates under the route scope that is set."""
        found: list[Tensor] = []
        tally = Tally()
        with measuring(model, router):
            for pairs in batches(held, TOGETHER, router):
                batch = {name: tensor.to(device) for name, tensor in self.collate(pairs, pad).items()}
                logits = answered(model, batch)
                tally.routed(pairs, router, 2 * len(pairs))  # the chosen answers' rows come first
                found.append(torch.stack(self._rewards(model, logits, batch)).cpu())
                tally.judge(pairs, (found[-1][0] > found[-1][1]).tolist())
        chosen, rejected = torch.cat(found, dim=1)
        margins = chosen - rejected
        loss, margin = (x.mean().item() for x in (-nn.functional.logsigmoid(margins), margins))
        return PreferenceEvaluation(
            loss, tally.share, margin, chosen.mean().item(), rejected.mean().item(), tally.by_task, tally.groups
        )

    def evaluate_base(self, model: Any, held: Sequence[Pair], pad: int, device: torch.device) -> None:
        """Nothing: the base is what the adapter is measured against."""

    def predictions(
        self, model: Any, held: Sequence[Pair], tokenizer: Any, pad: int, together: int
    ) -> list[dict[str, Any]]:
        return predictions(model, [pair.chosen for pair in held], tokenizer, pad, together)

    def _rewards(self, model: Any, logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Rewards of the chosen and of the rejected answers."""
        training = model.training
        # A base with dropout of its own is no reference while it draws.
        with torch.no_grad(), model.eval().disable_adapter():
            reference = answered(model, batch)
        model.train(training)
        gained = answer_logps(logits, batch["labels"]) - answer_logps(reference, batch["labels"])
        chosen, rejected = (self._beta * gained).chunk(2)
        return chosen, rejected
