"""A sequence as the scheduler sees it: one prompt and one answer to it. No torch."""

from array import array
from enum import Enum

from tucka_runtime.engine.ngram import NgramIndex
from tucka_runtime.messages import ROUTE_PREFIX_TOKENS, Request, Route, RouteScope, TokenLogprob


class Status(Enum):
    WAITING = 1
    RUNNING = 2
    FINISHED = 3


class Sequence:
    """What the engine's books have of one sequence.

    Four write in it. The queue: `number` and `charged`. The scheduler: `status`, `num_computed`, `block_table`,
    `block_hashes`, `cached_tokens`, `displaced`, and `route` where an earlier prompt had it. The runner: `routing`,
    when it finds a prompt that must be routed first, and in `tokens` those of a draft that are right. The engine: the
    rest, as outcomes arrive, `pending` and `scheduled_at` when a step is launched, `ngrams` when it speculates, and,
    once a prompt is routed, `num_computed` back to 0.

    `num_computed` tokens have their KV in the blocks of `block_table`, or will once the device has done what it was
    given. `pending` counts the tokens that are chosen there and not known here yet: they count as tokens, but `tokens`
    does not have them. A route of its own comes from the first `route_tokens` tokens of the prompt, and stays. While
    `routing`, those only go through the model to be routed, and are computed after that."""

    __slots__ = (
        "adapter",
        "arrived",
        "block_hashes",
        "block_table",
        "cached_tokens",
        "charged",
        "displaced",
        "first_token_at",
        "flow",
        "index",
        "last_group",
        "ngrams",
        "num_computed",
        "num_prompt",
        "number",
        "pending",
        "prompt_logprobs",
        "prompt_route",
        "request",
        "route",
        "route_changes",
        "route_key",
        "route_tokens",
        "routing",
        "sampling",
        "scheduled_at",
        "scope",
        "seed",
        "status",
        "tokens",
    )

    def __init__(
        self,
        request: Request,
        index: int,
        scope: RouteScope | None,
        seed: int,
        arrived: float,
        prefix_tokens: int = ROUTE_PREFIX_TOKENS,
    ):
        """`prefix_tokens` is the adapter's number of tokens that route a prompt under the scope "prefix"."""
        prompt = request.prompts[index // request.n]
        self.request = request
        self.index = index
        self.adapter = request.adapter
        self.flow = request.flow
        self.scope = scope
        self.sampling = request.sampling
        self.seed = seed
        self.tokens = list(prompt)
        self.num_prompt = len(prompt)
        self.route_tokens = min(prefix_tokens, len(prompt)) if scope is RouteScope.PREFIX else len(prompt)
        self.route_key: bytes | None = None
        self.pending = 0
        self.num_computed = 0
        self.cached_tokens = 0
        self.number = 0  # of its arrival
        self.charged = 0  # tokens that its flow was charged for
        self.displaced = 0  # how often it gave its seat to another flow
        self.block_table = array("i")
        self.block_hashes: list[bytes] = []
        self.status = Status.WAITING
        self.route: Route | None = None  # its own, once it is known
        self.prompt_route: Route | None = None
        self.last_group = -1
        self.route_changes = 0
        self.routing = False
        self.ngrams: NgramIndex | None = None  # drafts what follows
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.arrived = arrived
        self.scheduled_at = 0.0
        self.first_token_at = 0.0

    def __len__(self) -> int:
        return len(self.tokens) + self.pending

    @property
    def routes_itself(self) -> bool:
        """Whether it has a route of its own, from its prompt alone, which stays."""
        return self.scope in (RouteScope.REQUEST, RouteScope.PREFIX)

    @property
    def num_generated(self) -> int:
        """The answer's tokens, those that are still on the device included."""
        return len(self) - self.num_prompt

    @property
    def num_known(self) -> int:
        """The answer's tokens that are known here."""
        return len(self.tokens) - self.num_prompt

    @property
    def key(self) -> tuple[str, int]:
        return self.request.id, self.index
