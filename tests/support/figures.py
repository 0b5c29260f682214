"""Figures as an engine and a request bring them, for the metrics."""

from tucka_runtime.messages import AdapterInfo, AdapterKey, EngineLoad, FinishReason, StepStats, Timing
from tucka_runtime.server.metrics.metrics import Metrics


def adapter(name: str, generation: int = 1, kind: str = "tucka", scope: str | None = None, k: int = 3) -> AdapterInfo:
    key = AdapterKey(name, generation)
    seconds = {"read": 0.1, "fold": 0.2}
    return AdapterInfo(
        key, "ab" * 32, kind, 8, k, 3, 2, 16.0, ("q_proj",), 4, "layers.0.q", scope, 4096, None, None, seconds
    )


def step(
    running: int = 1,
    waiting: int = 0,
    blocks_used: int = 2,
    preemptions: int = 0,
    displacements: int = 0,
    drafts: int = 0,
    routes=(),
    adapters=(),
    **stages,
) -> tuple[StepStats, EngineLoad]:
    """What `Metrics.on_step` takes. Drafts have five tokens, of which two are right."""
    seconds = dict.fromkeys(("schedule", "batch", "route", "forward", "sample", "output"), 0.001) | stages
    seen = (5, 1, 2, adapters, routes, drafts, 5 * drafts, 2 * drafts)
    stats = StepStats(*seconds.values(), *seen)
    return stats, EngineLoad(running, waiting, blocks_used, 8, preemptions, displacements)


def serve_one(metrics: Metrics, model: str = "fin") -> None:
    metrics.admitted(model, prompt_tokens=10, sequences=1)
    metrics.first_token(model, 0.3, cached_tokens=4, timing=Timing(100.0, 100.1, 100.2, 0.0))
    metrics.tokens(1)
    metrics.tokens(2)
    metrics.waited(0.05, 2)
    metrics.decoded(0.05)
    metrics.finished(model, FinishReason.LENGTH, route_changes=2)
    metrics.closed(model, 0.4, generated=3, failed=False)
