"""A forward pass that the device was given, and what its chunks bring."""

from array import array
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tucka_runtime.engine.adapters.segment import Routes
from tucka_runtime.engine.sampler import Choice
from tucka_runtime.engine.scheduler import ScheduledChunk
from tucka_runtime.engine.sequence import Sequence
from tucka_runtime.errors import TuckaError
from tucka_runtime.messages import Route, TokenLogprob


@dataclass(frozen=True, slots=True)
class Stages:
    """Seconds of one pass on the host: packing the batch; routes and cores known from token ids; the layers, the head
    and the prompts' scores; the choice of tokens and their log-probabilities. A graph does all of a step as
    `forward`."""

    batch: float
    route: float
    forward: float
    sample: float


@dataclass(eq=False)
class Round:
    """One choice of tokens, for the chunks `due`, of one vocabulary."""

    due: list[int]
    choice: Choice
    tokens: Tensor
    """The chosen ones, on the host once the pass is done."""


@dataclass(eq=False)
class Launched:
    """A pass that the device was given: its chunks in row order, the segment of each, and the tokens that it brings. Of
    drafts there is what was right: one more round for each token of it."""

    chunks: list[ScheduledChunk]
    segment_of: list[int | None]
    rounds: list[Round]
    routes: list[Routes]
    """On the host once `done` has passed."""
    done: torch.cuda.Event | None
    scores: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    """Log-probabilities of prompts that are scored, by chunk."""
    embeddings: dict[int, Tensor] = field(default_factory=dict)
    """What `Pooler.pool` made of prompts that end here, by chunk; on the host once `done` has passed."""
    stages: Stages = Stages(0.0, 0.0, 0.0, 0.0)

    @property
    def due_sequences(self) -> list[Sequence]:
        """The sequences that get a token."""
        return [self.chunks[i].seq for i in dict.fromkeys(i for part in self.rounds for i in part.due)]

    @property
    def settles(self) -> bool:
        """Whether what comes next depends on what this brings: a route that must be known to go on, penalties for the
        tokens so far, a grammar, bad words of several tokens, log-probabilities and drafts, which are made on the
        host."""
        return any(_settles(chunk.seq) for chunk in self.chunks)


def _settles(seq: Sequence) -> bool:
    p = seq.sampling
    unrouted = seq.routes_itself and seq.route is None
    held = p.penalised or p.grammar is not None or any(len(word) > 1 for word in p.bad_words)
    held = held or seq.ngrams is not None
    return bool(held or unrouted or p.logprobs is not None or p.prompt_logprobs is not None)


@dataclass(eq=False)
class Result:
    """What one chunk brought: the next token if it was due, behind those of its draft that are right, or the error
    that keeps the last of `tokens` from being chosen; its segment and that one's route; the prompt's scores or
    embedding."""

    segment: int | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    route: Route | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    embedding: "array[float] | None" = None
    error: TuckaError | None = None
