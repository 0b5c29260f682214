"""Greedy decoding of several requests at once as the server's `batch` scope does it, to measure what that costs.

Every step is one forward over all requests that still run; its route is the mean over just the tokens of that step.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


@torch.no_grad()
def decode_together(model: Any, prompts: list[list[int]], eos: int, pad: int, limit: int = 96) -> list[list[int]]:
    """Completions (without the end token) of prompts that are admitted in one step. Set the route scope before."""
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
        logits = model(input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        chosen = logits[:, -1].argmax(-1)
        running &= chosen != eos
        if not running.any():
            break
        for row in running.nonzero().flatten().tolist():
            out[row].append(int(chosen[row]))
        # A row that has ended is masked from now on: it no longer counts in the route.
        mask = torch.cat([mask, running[:, None].long()], dim=1)
        positions = positions[:, -1:] + 1
        step = torch.where(running, chosen, pad)[:, None]
    return out
