"""What is asked of the engine and what it answers, wherever it runs (channel_messages.py says how it travels between
processes). Standard library only.

A request holds one or several prompts and asks `n` answers of each; every (prompt, answer) pair is a sequence, and its
`index` (prompt · n + answer) is the OpenAI choice index.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from tucka_runtime.errors import TuckaError

if TYPE_CHECKING:
    Floats = array[float]
else:
    Floats = array  # Python 3.11 has no other name for it when it runs, and channel.py reads the fields' types then


class RouteScope(StrEnum):
    """The tokens over which a TuckA adapter's route is computed (docs/architecture.md, "Route scope")."""

    BATCH = "batch"  # one route per adapter and forward pass: the paper's
    REQUEST = "request"  # one route per request, from its whole prompt, kept while decoding
    PREFIX = "prefix"  # the same from the prompt's first tokens, which the turns of a conversation share
    PINNED = "pinned"  # fixed when the adapter was loaded


ROUTE_PREFIX_TOKENS = 64
"""How many of a prompt's tokens route it under the scope "prefix", unless the adapter says another number."""


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """One generation of a loaded adapter. A reload under the same name is another generation."""

    name: str
    generation: int


FlowKey = tuple[str, str | None]
"""Who takes turns: a tenant with an adapter's name, None for the base."""


@dataclass(frozen=True, slots=True)
class Route:
    """The chosen expert group and its experts' weights, t of them: a router's are in [0.269, 0.731], a pinned route's
    in [0, 1]. Of a combination with several routers it has the groups of all as one number, the last one's counted
    first, and their weights one behind the other."""

    group: int
    weights: tuple[float, ...]

    def split(self, sizes: Sequence[tuple[int, int]]) -> "list[Route]":
        """The routes of the routers of a combination, each of k groups of t experts: `sizes` has (k, t)."""
        found, group, end = [], self.group, len(self.weights)
        for k, t in reversed(sizes):
            found.append(Route(group % k, self.weights[end - t : end]))
            group, end = group // k, end - t
        return found[::-1]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and what to make of them. The HTTP doors check ranges (server/api); the engine trusts them,
    so who calls it directly answers for them.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 are off. `logprobs` is the number of alternatives wanted beside
    the chosen token (None: no log-probabilities at all); `prompt_logprobs` the same for the prompt's own tokens.
    `end_token_ids` end an answer as the model's own end tokens do, unless `ignore_eos`.
    `allowed_token_ids`, if any, are the only ones that may be chosen. `bad_words` are runs of token ids that the
    answer may not have, unless nothing else may follow. `max_tokens` 0 scores the prompt and generates nothing.
    `grammar` (grammars.py) is what the answer has to match: it ends when it does, whatever `min_tokens` and
    `ignore_eos` say. The stop strings `stop` and the two fields after it are for who turns the tokens into text; the
    engine does not read them.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    end_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    @property
    def least_tokens(self) -> int:
        """The number of tokens after which an answer may end: `min_tokens`, unless a grammar says when it is complete.

        The sampler gives no end token before, and the engine ends at the first one after. A stop string is held against
        `min_tokens` itself: a grammar does not bring it forward.
        """
        return self.min_tokens if self.grammar is None else 0

    @property
    def penalised(self) -> bool:
        """Whether the tokens so far change the next one's logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class Pooling(StrEnum):
    """Which of a prompt's final hidden states make its embedding."""

    MEAN = "mean"  # all of them
    LAST = "last"  # the last token's, which has seen the others


@dataclass(frozen=True, slots=True)
class Request:
    """What the engine is asked for: by the HTTP doors, by `LLM`, or to warm up. `prompts` are token ids; `cache_salt`
    separates tenants' KV reuse; `route_scope` counts for adapters that have a router. With `pooling` each prompt is
    embedded, and `max_tokens` is 0. Turns are shared out between tenants and adapters; of one tenant's requests to one
    adapter the least `priority` goes first. `member` is the one asked for of an adapter that is a bank."""

    id: str
    prompts: tuple[tuple[int, ...], ...]
    sampling: SamplingParams
    n: int = 1
    adapter: AdapterKey | None = None
    route_scope: RouteScope | None = RouteScope.BATCH
    cache_salt: str = ""
    pooling: Pooling | None = None
    tenant: str = ""
    priority: int = 0
    member: int | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.n

    @property
    def flow(self) -> FlowKey:
        return self.tenant, self.adapter.name if self.adapter is not None else None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token under the model (before temperature and penalties), its rank (1 is the best),
    and the best alternatives as (token id, log-probability), best first."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class RouteReport:
    """The route of the forward pass that finished the prompt, and how often the group changed while decoding."""

    route: Route
    changes: int


@dataclass(frozen=True, slots=True)
class Timing:
    """`time.monotonic()` of the engine at each border of a sequence's life; seconds. A border that was not reached is
    0. The clock is the machine's on Linux, so other processes may compare theirs."""

    arrived: float
    scheduled: float
    first_token: float
    finished: float


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a sequence ended, with its cause: `stop_token_id` is the token that ended it (the last of its tokens) where
    the reason is STOP, `error` what the client is told where it is ERROR."""

    reason: FinishReason
    stop_token_id: int | None = None
    error: TuckaError | None = None


@dataclass(slots=True)
class SequenceOutput:
    """What one step brought for one sequence. The one that has a `finish` is the last. It comes for every sequence that
    is not aborted with its whole request, as long as the engine lives.

    `prompt_logprobs` comes once, with the step that finished the prompt: one entry per prompt token, None for the
    first; so does `embedding`, as fp32 numbers of length 1 together, as many as the model's hidden size. `timing` comes
    with the first token and with the finish.
    """

    request_id: str
    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    embedding: Floats | None = None
    finish: Finish | None = None
    route: RouteReport | None = None
    cached_tokens: int = 0
    timing: Timing | None = None


@dataclass(frozen=True)
class EngineInfo:
    """The model as it is served. `fingerprint` is weights.fingerprint's, `kernels` the backend's name;
    `kv_cache_dtype` is a type, never auto."""

    model_type: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    kv_cache_tokens: int
    fingerprint: str
    max_num_batched_tokens: int
    kernels: str
    num_threads: int
    hidden_size: int
    kv_cache_dtype: str

    @property
    def context(self) -> int:
        """The tokens that a prompt and its answer can have together."""
        return min(self.max_model_len, self.kv_cache_tokens)


@dataclass(frozen=True)
class BaseLayout:
    """What an adapter needs to know of a base model.

    linears: dotted module path -> (d_in, d_out) of every linear an adapter may adapt, in the order they are declared,
    which is the order they run in; the head is not among them. parameters: name -> shape of every parameter that
    `modules_to_save` may replace, as the base stores it (Conv1D weights are (in, out)). fingerprint: identity of the
    base's weights. name: its path, or what else it is called; empty where nobody knows. embed, head: the paths of the
    embedding and of the head, both (vocab, d); tied: whether these are one.
    """

    linears: Mapping[str, tuple[int, int]]
    parameters: Mapping[str, tuple[int, ...]]
    fingerprint: str
    name: str = ""
    embed: str = ""
    head: str = ""
    tied: bool = False

    @property
    def tables(self) -> tuple[str, ...]:
        """The embedding and the head."""
        return tuple(path for path in (self.embed, self.head) if path)

    def resized(self, vocab_size: int) -> "BaseLayout":
        """The same with a vocabulary of another size."""
        own = {f"{path}.weight": (vocab_size, self.parameters[f"{path}.weight"][1]) for path in self.tables}
        return replace(self, parameters={**self.parameters, **own})


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter. `kind` is "tucka", "lora" or "bank", whose `members` requests choose from, or "combination", of
    which the engine does not know the digest. `scope` is what it is served with unless the request says so: "pinned"
    where its route is fixed, which no request changes; what its manifest says it was trained for ("route"); or None.
    `route_prefix_tokens` is how many tokens route a prompt under the scope "prefix", None without a router. `bytes` are
    those of its tensors on the device; `training` is its manifest; `load_seconds` what each stage of loading it took;
    `vocab_size` is that of its own vocabulary, None where it has the base's."""

    key: AdapterKey
    digest: str
    kind: str
    r: int
    k: int | None
    t: int | None
    p: int | None
    alpha: float | None
    target_modules: tuple[str, ...]
    num_modules: int
    router: str | None
    scope: str | None
    bytes: int
    training: dict[str, Any] | None
    route_prefix_tokens: int | None = None
    load_seconds: dict[str, float] = field(default_factory=dict)
    members: tuple[str, ...] = ()
    vocab_size: int | None = None


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step in figures. `schedule` to `output` are seconds on the host: choosing the work, packing the batch, routes
    and cores, layers and head, choosing tokens, booking them. `routes` has every routed segment's adapter and route,
    `adapters` those that had rows in the step. Of `decode_tokens`, the rows of decoding sequences, `draft_tokens` came
    from `drafts` of what follows, and `accepted_tokens` of those were right."""

    schedule: float
    batch: float
    route: float
    forward: float
    sample: float
    output: float
    prefill_tokens: int
    decode_tokens: int
    sequences: int
    adapters: tuple[AdapterKey, ...]
    routes: tuple[tuple[AdapterKey, Route], ...]
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def seconds(self) -> float:
        """All of the step."""
        return self.schedule + self.batch + self.route + self.forward + self.sample + self.output


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What stands in the engine's books: sequences in the batch and before it, KV blocks, and how many sequences were
    set back since the engine's process started, for want of blocks and for another flow's turn."""

    running: int
    waiting: int
    blocks_used: int
    blocks_total: int
    preemptions: int
    displacements: int
