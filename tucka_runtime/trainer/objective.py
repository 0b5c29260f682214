"""What a training is for: the loop's side of completions, of preferences, of a classifier."""

from typing import Any, Protocol

import torch

from tucka_runtime.trainer.evaluate import HeldOut


class Objective(Protocol):
    """What is learnt: what a batch of records is to the model, the loss of what that says, and what is measured."""

    records: str
    """What the records are, in a word."""
    loss_of: str
    """What the loss is, in words."""
    share_of: str
    """What an evaluation's shares by sub-task are, in words."""

    def collate(self, batch: Any, pad: int) -> dict[str, torch.Tensor]:
        """The model's arguments."""
        ...

    def count(self, batch: dict[str, torch.Tensor]) -> int:
        """How many of what the loss is a mean over the batch has."""
        ...

    def logits(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the model says of the batch."""
        ...

    def loss(self, model: Any, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Summed, not the mean."""
        ...

    def evaluate(self, model: Any, held: Any, pad: int, device: torch.device, router: Any = None) -> HeldOut: ...

    def evaluate_base(self, model: Any, held: Any, pad: int, device: torch.device) -> HeldOut | None:
        """The same of the base alone; None where that says nothing."""
        ...

    def predictions(self, model: Any, held: Any, tokenizer: Any, pad: int, together: int) -> list[dict[str, Any]]:
        """What the first held-out records are answered, beside what is expected, `together` of them at once, under the
        route scope that is set."""
        ...
