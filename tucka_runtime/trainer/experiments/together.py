"""Exact match of an adapter under each way to serve it."""

from typing import Any

from tucka_runtime.trainer.data import Example
from tucka_runtime.trainer.decode import decode_together
from tucka_runtime.trainer.evaluate import Evaluation, evaluate
from tucka_runtime.trainer.model import set_route_scope


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
        said = decode_together(model, [list(e.ids[: e.start]) for e in group], [eos], pad)
        right += sum(tuple(s) == e.ids[e.start : -1] for s, e in zip(said, group, strict=True))
    return {"request": result.exact, "batch_alone": alone, "batch_16": right / len(held)}, result
