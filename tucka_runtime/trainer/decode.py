"""Greedy decoding of several requests at once: what held-out prompts are answered, as served.

Under the route scope `batch` every step is one forward over all requests that still run, and its route is the mean over
just the tokens of that step, as in the server.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tucka_runtime.trainer.data import Example

SHOWN = 200  # held-out records whose answers are written: enough to read, and soon generated


@torch.no_grad()
def decode_together(
    model: Any, prompts: list[list[int]], ends: Sequence[int], pad: int, limit: int = 96
) -> list[list[int]]:
    """Completions of prompts that are admitted in one step, each without its end token, one of `ends`. Set the route
    scope before."""
    stop = torch.tensor(ends, device=next(model.parameters()).device)
    rows, longest = len(prompts), max(map(len, prompts))
    device = next(model.parameters()).device
    ids = torch.full((rows, longest), pad, device=device)
    mask = torch.zeros((rows, longest), dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):  # padding on the left: the last column is every prompt's last token
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, longest - len(prompt) :] = 1
    cache = DynamicCache(config=model.config)
    out: list[list[int]] = [[] for _ in prompts]
    running = torch.ones(rows, dtype=torch.bool, device=device)
    step: Tensor = ids
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for _ in range(limit):
        with warnings.catch_warnings():
            # Transformers renames the argument, and the older releases know the old name alone.
            warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
            logits = model(input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        chosen = logits[:, -1].argmax(-1)
        running &= ~torch.isin(chosen, stop)
        if not running.any():
            break
        for row in running.nonzero().flatten().tolist():
            out[row].append(int(chosen[row]))
        # A row that has ended is masked from now on: it no longer counts in the route.
        mask = torch.cat([mask, running[:, None].long()], dim=1)
        positions = positions[:, -1:] + 1
        step = torch.where(running, chosen, pad)[:, None]
    return out


def predictions(model: Any, held: list[Example], tokenizer: Any, pad: int, together: int) -> list[dict[str, Any]]:
    """What the first SHOWN held-out prompts are answered, beside what is expected, as texts; `together` prompts are
    decoded at once. Set the route scope before."""
    model.eval()
    held = [example for example in held if example.asks][:SHOWN]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    rows = []
    for i in range(0, len(held), together):
        group = held[i : i + together]
        limit = 2 * max(len(e.answer) + 1 for e in group)
        if context is not None:
            limit = min(limit, context - max(e.start for e in group))
        said = decode_together(model, [list(e.ids[: e.start]) for e in group], tokenizer.ends, pad, limit)
        for example, answer in zip(group, said, strict=True):
            expected = list(example.answer)
            texts = [
                tokenizer.decode(ids, skip_special_tokens=False)
                for ids in (list(example.ids[: example.start]), expected, answer)
            ]
            rows.append(
                dict(zip(("prompt", "expected", "said"), texts, strict=True))
                | {"right": answer == expected, "task": example.task}
            )
    return rows
