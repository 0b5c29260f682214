"""Routes that prompts had before: what routes a prompt is known before it is computed, so that its KV can be found.

KV of a routed adapter may be shared where the route is the same to the last bit, and a route that is found once more
need not be: a mean of hidden states is rounded otherwise in other company. So the first one stays. No torch.
"""

from collections import OrderedDict

from tucka_runtime.engine.block_manager import chain
from tucka_runtime.engine.sequence import Sequence
from tucka_runtime.messages import Route


def owner(seq: Sequence, rope_limit: int | None) -> tuple[object, ...]:
    """Whose a sequence's KV and route are: of tenant and weights, a bank's member's, and, where rotary positions
    stretch with a prompt longer than `rope_limit`, of its length."""
    adapter = (seq.adapter.name, seq.adapter.generation) if seq.adapter else None
    stretched = seq.num_prompt if rope_limit is not None and seq.num_prompt > rope_limit else None
    return seq.request.cache_salt, adapter, seq.request.member, stretched


class RouteCache:
    """The last `capacity` routes, by owner and by the tokens that they come from."""

    def __init__(self, capacity: int, rope_limit: int | None = None):
        self.capacity = capacity
        self.rope_limit = rope_limit
        self.routes: OrderedDict[bytes, Route] = OrderedDict()

    def find(self, seq: Sequence) -> Route | None:
        """The route that a prompt of the same first tokens had."""
        key = self._key(seq)
        if (route := self.routes.get(key)) is not None:
            self.routes.move_to_end(key)
        return route

    def keep(self, seq: Sequence) -> None:
        """Remembers a sequence's own route, unless there is one from the same tokens."""
        if seq.route is None:
            return
        self.routes.setdefault(self._key(seq), seq.route)
        if len(self.routes) > self.capacity:
            self.routes.popitem(last=False)

    def _key(self, seq: Sequence) -> bytes:
        if seq.route_key is None:
            tokens = seq.tokens[: seq.route_tokens]
            seq.route_key = chain(repr(owner(seq, self.rope_limit)).encode(), tokens)
        return seq.route_key
