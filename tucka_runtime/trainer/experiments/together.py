"""Greedy decoding of several requests at once as the server's `batch` scope does it, to measure what that costs.

Every step is one forward over all requests that still run; its route is the mean over just the tokens of that step.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tucka_runtime.trainer.data import Example
from tucka_runtime.trainer.evaluate import Evaluation, evaluate
from tucka_runtime.trainer.model import set_route_scope


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


def serving_scopes(
    model: Any, router: Any, held: list[Example], pad: int, eos: int
) -> tuple[dict[str, float], Evaluation]:
    """Exact match under each way to serve a TuckA adapter, and the evaluation with a route a request.

    "request": a route a request. "batch_alone": batch scope, one request at a time. "batch_16": batch scope, sixteen
    requests at once, sub-tasks mixed in the order of `held`.
    """
    device = next(model.parameters()).device
    model.eval()
    set_route_scope(model, "request")
    result = evaluate(model, held, pad, device, router=router)
    set_route_scope(model, "decode")
    alone = evaluate(model, held, pad, device, router=router).exact
    set_route_scope(model, "batch")
    right = 0
    for i in range(0, len(held), 16):
        group = held[i : i + 16]
        said = decode_together(model, [list(e.ids[: e.start]) for e in group], eos, pad)
        right += sum(tuple(s) == e.ids[e.start : -1] for s, e in zip(said, group, strict=True))
    return {"request": result.exact, "batch_alone": alone, "batch_16": right / len(held)}, result
