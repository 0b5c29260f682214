"""How many replicas there should be, by more than Serve's own policy looks at."""

from collections.abc import Mapping
from typing import Any, Protocol


class ScalingContext(Protocol):
    """What is read of Serve's AutoscalingContext. `aggregated_metrics` are what `Replica.record_autoscaling_stats`
    says, by name and replica."""

    current_num_replicas: int
    target_num_replicas: int
    total_num_requests: float
    aggregated_metrics: Mapping[str, Mapping[Any, float]] | None


class LoadPolicy:
    """As many replicas as the most pressing target asks for; Serve applies its delays and bounds to that."""

    def __init__(self, ongoing: float, targets: Mapping[str, float]):
        """`ongoing` requests, and of each figure in `targets` so much, is what one replica should have."""
        self._ongoing, self._targets = ongoing, targets

    def __call__(self, context: ScalingContext) -> tuple[float, dict[str, Any]]:
        if not context.current_num_replicas:
            return context.target_num_replicas, {}
        figures = context.aggregated_metrics or {}
        wanted = [sum(figures.get(name, {}).values()) / target for name, target in self._targets.items()]
        return max([context.total_num_requests / self._ongoing, *wanted]), {}
