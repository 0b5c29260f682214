"""A sequence as the scheduler sees it: one prompt and one answer to it. No torch."""

from array import array
from enum import Enum

from tucka_runtime.messages import Request, Route, RouteScope, TokenLogprob


class Status(Enum):
    WAITING = 1
    RUNNING = 2
    FINISHED = 3


class Sequence:
    """What the engine's books have of one sequence.

    Three write in it. The scheduler: `status`, `num_computed`, `block_table`, `block_hashes`, `cached_tokens`. The
    runner: `routing`, when it finds a long prompt that must be routed first. The engine: the rest, as outcomes arrive,
    `pending` and `scheduled_at` when a step is launched, and, once a prompt is routed, `num_computed` back to 0.

    `num_computed` tokens have their KV in the blocks of `block_table`, or will once the device has done what it was
    given. `pending` counts the tokens that are chosen there and not known here yet: they count as tokens, but `tokens`
    does not have them. While `routing`, the prompt only goes through the model to be routed, and is computed after
    that."""

    __slots__ = (
        "adapter",
        "arrived",
        "block_hashes",
        "block_table",
        "cached_tokens",
        "first_token_at",
        "index",
        "last_group",
        "num_computed",
        "num_prompt",
        "pending",
        "prompt_logprobs",
        "prompt_route",
        "request",
        "route",
        "route_changes",
        "routing",
        "sampling",
        "scheduled_at",
        "scope",
        "seed",
        "status",
        "tokens",
    )

    def __init__(self, request: Request, index: int, scope: RouteScope | None, seed: int, arrived: float):
        prompt = request.prompts[index // request.n]
        self.request = request
        self.index = index
        self.adapter = request.adapter
        self.scope = scope
        self.sampling = request.sampling
        self.seed = seed
        self.tokens = list(prompt)
        self.num_prompt = len(prompt)
        self.pending = 0
        self.num_computed = 0
        self.cached_tokens = 0
        self.block_table = array("i")
        self.block_hashes: list[bytes] = []
        self.status = Status.WAITING
        self.route: Route | None = None  # request scope: fixed once the prompt was routed
        self.prompt_route: Route | None = None
        self.last_group = -1
        self.route_changes = 0
        self.routing = False
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.arrived = arrived
        self.scheduled_at = 0.0
        self.first_token_at = 0.0

    def __len__(self) -> int:
        return len(self.tokens) + self.pending

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
