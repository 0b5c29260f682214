"""What a language model says of the tokens that are learnt, and nothing of the others.

Prompts and padding are most of many batches, and the head with its vocabulary can be the widest product of the model:
where nothing is learnt, neither its logits nor their loss are computed. N counts a batch's learnt tokens, row by row.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from torch import Tensor, nn

from tucka_runtime.trainer.routing import UNLEARNT


def asked(labels: Tensor) -> Tensor:
    """Where (B, S) a token stands after which a learnt one comes, for labels (B, S)."""
    return nn.functional.pad(labels[:, 1:] != UNLEARNT, (0, 1))


def learnt(labels: Tensor) -> Tensor:
    """The learnt tokens (N,) of labels (B, S)."""
    rest = labels[:, 1:]
    return rest[rest != UNLEARNT]


def answered(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits (N, V) of a base, or of a PEFT model of it, for a batch with labels, without the cache with which
    transformers would not keep packed records apart."""
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model

    def without_labels(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"labels": None}

    # The routers see the labels first, for they were there before; of its own loss the base computes nothing.
    hook = base.register_forward_pre_hook(without_labels, with_kwargs=True)
    try:
        return logits_at(base, asked(batch["labels"]), lambda: model(**batch, use_cache=False).logits)
    finally:
        hook.remove()


def logits_at(base: Any, where: Tensor, forward: Any) -> Tensor:
    """Of the logits that `forward` computes with `base` those (N, V) that are asked for, `where` (B, S). A head that is
    a plain linear is given no others."""
    with _picking(base.get_output_embeddings(), where) as picked:
        logits: Tensor = forward()
    return logits[0] if picked else logits[where]


@contextmanager
def _picking(head: nn.Module | None, where: Tensor) -> Iterator[list[bool]]:
    """Lets the head see only what `where` picks, as one row; the list has an entry once it did."""
    picked: list[bool] = []

    def pick(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not args or args[0].shape[:-1] != where.shape:
            return None
        picked.append(True)
        return (args[0][where][None],)

    # Layers of adapters are no nn.Linear: they may have a route for each row.
    hook = head.register_forward_pre_hook(pick) if isinstance(head, nn.Linear) else None
    try:
        yield picked
    finally:
        if hook is not None:
            hook.remove()


def completion_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Summed cross-entropy of the learnt tokens and their number; logits (N, V), labels (B, S)."""
    target = learnt(labels)
    return nn.functional.cross_entropy(logits.float(), target, reduction="sum"), len(target)


def answer_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities (B,) of the rows' learnt tokens, summed; logits (N, V), labels (B, S)."""
    each = nn.functional.cross_entropy(logits.float(), learnt(labels), reduction="none")
    return -each.new_zeros(len(labels)).index_add(0, rows(labels), each)


def exact(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether (B,) the likeliest tokens of a row are all the learnt ones; logits (N, V), labels (B, S)."""
    wrong = (logits.argmax(-1) != learnt(labels)).to(torch.int64)
    return wrong.new_zeros(len(labels)).index_add(0, rows(labels), wrong) == 0


def rows(labels: Tensor) -> Tensor:
    """The rows (N,) that the learnt tokens of labels (B, S) stand in."""
    return asked(labels).nonzero()[:, 0]
