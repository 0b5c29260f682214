"""Serve's way to an adapter's replicas.

Serve's own routing by multiplexed model id asks which replicas have loaded a model, and turns to others only when all
of those are full: a hot model stays on one (ray issue 65691), and requests that come before the first load is known go
anywhere. This one asks `placement.ranks`, which needs to know nothing but the replicas and their queues. What a replica
has in a slot, its own engine decides, which never takes an adapter from under a request.
"""

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from tucka_runtime.server.ray.placement import ranks


class AdapterRouter(RequestRouter):
    """A request's adapter is its multiplexed model id; the base's requests have none."""

    def initialize_state(self, copies: dict[str, int], spill_at: int) -> None:
        self._copies, self._spill_at = copies, spill_at

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # where all of them are full
        adapter = pending_request.metadata.multiplexed_model_id
        order = ranks(
            adapter,
            [_place(replica) for replica in candidate_replicas],
            [self.replica_queue_len_cache.get(replica.replica_id) or 0 for replica in candidate_replicas],
            self._copies.get(adapter, 1),
            self._spill_at,
        )
        return [[candidate_replicas[at] for at in rank] for rank in order]


def _place(replica: RunningReplica) -> str:
    """Its rank among the replicas, which the one that takes its place inherits: with it come its adapters. Until it has
    said so, for a moment after its start, its own name."""
    return str(replica.routing_stats.get("rank", replica.replica_id.unique_id))
