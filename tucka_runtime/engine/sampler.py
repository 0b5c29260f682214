"""From logits to tokens: penalties, bias, schemas, bad words, filters, choice, log-probabilities. Whole batch at
once; rows that do not ask for a step do not pay for it.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from tucka_runtime.engine.bad_words import BadWords
from tucka_runtime.engine.grammar import Grammars
from tucka_runtime.engine.sequence import Sequence
from tucka_runtime.errors import TuckaError
from tucka_runtime.kernels.ops import Ops
from tucka_runtime.kernels.tables.transfer import place
from tucka_runtime.messages import TokenLogprob
from tucka_runtime.tokenizer import Tokenizer

GREEDY_BELOW = 1e-5  # temperatures under this would overflow fp32 logits; they are greedy


@dataclass(frozen=True, eq=False)
class Choice:
    """Tokens (N,) int64 on the device, whether each row's logits were `finite` (N,) bool, on its way to the host, and
    the logits `raw` of the rows `wants` that asked for log-probabilities."""

    tokens: Tensor
    finite: Tensor
    wants: list[int] = field(default_factory=list)
    raw: Tensor | None = None


class Sampler:
    """Chooses tokens. Keeps, until `forget`, token counts of the sequences that have penalties, and bad words."""

    def __init__(self, ops: Ops, vocab: int, eos: frozenset[int], device: torch.device, tokenizer: Tokenizer | None):
        """JSON schemas are followed with the model's tokenizer, whose tokens are the `vocab` of the base."""
        self.ops = ops
        self.grammars = Grammars(tokenizer, vocab, eos)
        self.eos = eos
        self.device = device
        self.counts: dict[tuple[str, int], tuple[Tensor, Tensor, int]] = {}
        self.bad_words: dict[tuple[str, int], BadWords] = {}
        bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
        self.banned = torch.where(bits == 0, float("-inf"), 0.0).to(device)
        """-infinity for the bits of a byte that are not set, the lowest first, and 0 for the others (256, 8)."""

    def forget(self, seq: Sequence) -> None:
        self.counts.pop(seq.key, None)
        self.bad_words.pop(seq.key, None)
        self.grammars.forget(seq)

    def stops(self, seq: Sequence) -> frozenset[int]:
        """Tokens that end the sequence."""
        own, ends = frozenset(seq.sampling.stop_token_ids), self.eos.union(seq.sampling.end_token_ids)
        if seq.sampling.grammar is not None:
            return own | ends | self.grammars.ends
        return own if seq.sampling.ignore_eos else own | ends

    def failure(self, seq: Sequence) -> TuckaError | None:
        """What keeps a sequence from going on."""
        return self.grammars.broken.get(seq.key)

    def plain(self, seq: Sequence) -> bool:
        """Whether nothing but its temperature and filters stands between a sequence's logits and the choice."""
        p = seq.sampling
        return not (p.grammar is not None or p.logprobs is not None or self._adjusts(seq))

    def _adjusts(self, seq: Sequence) -> bool:
        """Whether `_adjust` changes anything."""
        p = seq.sampling
        named = p.logit_bias or p.allowed_token_ids or p.bad_words
        return bool(named or p.penalised or (seq.num_generated < p.least_tokens and self.stops(seq)))

    def finite(self, logits: Tensor) -> Tensor:
        """Whether all logits of a row (N, vocab) are finite: (N,) bool, on its way to the host."""
        return self.ops.finite_rows(logits).to("cpu", non_blocking=True, copy=True)

    def choose(self, logits: Tensor, seqs: Rows[Sequence]) -> Choice:
        """The next token of each sequence, on the device. logits (N, vocab) fp32, one row per sequence, is used up.

        Log-probabilities are the model's own: before bias, penalties and temperature.
        """
        finite = self.finite(logits)
        wants = [i for i, seq in enumerate(seqs) if seq.sampling.logprobs is not None]
        raw = logits[wants].clone() if wants else None
        self._hold(logits, seqs)
        for i, seq in enumerate(seqs):
            if self._adjusts(seq):
                self._adjust(logits[i], seq)
        heats = [temperature(seq) for seq in seqs]
        self._filter(logits, heats, seqs)
        chosen = self.ops.sample(logits, *place(draws(seqs), self.device))
        return Choice(chosen, finite, wants, raw)

    def entries(self, choice: Choice, tokens: Rows[int], seqs: Rows[Sequence]) -> list[TokenLogprob | None]:
        """The log-probabilities that were asked for, once the chosen `tokens` are known."""
        out: list[TokenLogprob | None] = [None] * len(tokens)
        if choice.raw is not None:
            tops = [seqs[i].sampling.logprobs or 0 for i in choice.wants]
            found = logprobs(choice.raw, [tokens[i] for i in choice.wants], tops)
            for i, entry in zip(choice.wants, found, strict=True):
                out[i] = entry
        return out

    def begin(self, seqs: Rows[Sequence]) -> None:
        """Begins, beside the forward pass, what `choose` will need for sequences that get a token by it."""
        self.grammars.begin([seq for seq in seqs if seq.sampling.grammar is not None])

    def _hold(self, logits: Tensor, seqs: Rows[Sequence]) -> None:
        """What grammars allow, in place, all rows at once: no tokens that an adapter has added. logits (N, vocab)."""
        rows = [i for i, seq in enumerate(seqs) if seq.sampling.grammar is not None]
        if not rows:
            return
        masks, at = place([self.grammars.masks([seqs[i] for i in rows]), torch.tensor(rows)], self.device)
        banned = self.banned.index_select(0, masks.view(torch.uint8).flatten().int())
        # Added, for torch takes twenty times as long to fill by a mask.
        own = banned.view(len(rows), -1)[:, : self.grammars.vocab]
        if beside := logits.shape[1] - own.shape[1]:  # padding by nothing copies all the same
            own = pad(own, (0, beside), value=float("-inf"))
        logits.index_add_(0, at, own)

    def _adjust(self, row: Tensor, seq: Sequence) -> None:
        """Penalties, bias, allowed tokens, the ban on ending early and bad words, in place. row (vocab,)."""
        p = seq.sampling
        if p.penalised:
            seen, counts = self._count(seq, len(row))
            if p.repetition_penalty != 1.0:
                scaled = torch.where(row > 0, row / p.repetition_penalty, row * p.repetition_penalty)
                row.copy_(torch.where(seen | (counts > 0), scaled, row))
            row.sub_(counts * p.frequency_penalty + (counts > 0) * p.presence_penalty)
        if p.logit_bias:
            ids, biases = zip(*p.logit_bias, strict=True)
            row.index_add_(0, *place([torch.tensor(ids), torch.tensor(biases, dtype=row.dtype)], self.device))
        if p.allowed_token_ids:
            (ids_left,) = place([torch.tensor(p.allowed_token_ids)], self.device)
            kept = row.index_select(0, ids_left)
            row.fill_(float("-inf")).index_copy_(0, ids_left, kept)
        if seq.num_generated < p.least_tokens and (stops := sorted(id_ for id_ in self.stops(seq) if id_ < len(row))):
            row.index_fill_(0, place([torch.tensor(stops)], self.device)[0], float("-inf"))
        if p.bad_words and (banned := self._banned(seq)):
            without = row.index_fill(0, place([torch.tensor(banned)], self.device)[0], float("-inf"))
            row.copy_(torch.where(without.isneginf().all(), row, without))

    def _banned(self, seq: Sequence) -> list[int]:
        """The tokens that would complete a bad word."""
        words = self.bad_words.get(seq.key)
        if words is None:
            words = self.bad_words[seq.key] = BadWords(seq.sampling.bad_words)
        return words.after(seq.tokens, seq.num_prompt)

    def _count(self, seq: Sequence, vocab: int) -> tuple[Tensor, Tensor]:
        """Which tokens the prompt has (vocab,) bool, and how often each was generated (vocab,) fp32."""
        entry = self.counts.get(seq.key)
        if entry is None:
            seen = torch.zeros(vocab, dtype=torch.bool, device=self.device)
            seen[torch.tensor(seq.tokens[: seq.num_prompt]).to(self.device)] = True
            entry = seen, torch.zeros(vocab, device=self.device), seq.num_prompt
        seen, counts, known = entry
        if known < len(seq):
            fresh = torch.tensor(seq.tokens[known:]).to(self.device)
            counts.index_add_(0, fresh, torch.ones(len(fresh), device=self.device))
        self.counts[seq.key] = seen, counts, len(seq)
        return seen, counts

    def _filter(self, logits: Tensor, temperatures: list[float], seqs: Rows[Sequence]) -> None:
        rows = [i for i, seq in enumerate(seqs) if filtered(seq)]
        if not rows:
            return
        parts = [
            torch.tensor(rows),
            torch.tensor([temperatures[i] for i in rows]),
            *filters([seqs[i] for i in rows], logits.shape[1]),
        ]
        at, heat, top_k, top_p, min_p = place(parts, self.device)
        own = logits.index_select(0, at)
        kept = self.ops.filter_logits(own / heat[:, None], top_k, top_p, min_p)
        logits.index_copy_(0, at, own.masked_fill_(kept == float("-inf"), float("-inf")))


def filtered(seq: Sequence) -> bool:
    """Whether a sequence draws from a part of its tokens. A greedy one takes the best, whatever the filters."""
    p = seq.sampling
    return temperature(seq) > 0 and bool(p.top_k or p.top_p < 1 or p.min_p > 0)


def filters(seqs: Rows[Sequence], vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """What ops.FilterLogits takes of each: top-k (N,) int64, top-p and min-p (N,) fp32, off where it is greedy."""
    asked = [seq.sampling if filtered(seq) else None for seq in seqs]
    return (
        torch.tensor([(p.top_k if p else 0) or vocab for p in asked]),
        torch.tensor([p.top_p if p else 1.0 for p in asked], dtype=torch.float32),
        torch.tensor([p.min_p if p else 0.0 for p in asked], dtype=torch.float32),
    )


def temperature(seq: Sequence) -> float:
    """0 is greedy."""
    return 0.0 if seq.sampling.temperature < GREEDY_BELOW else seq.sampling.temperature


def draws(seqs: Rows[Sequence]) -> tuple[Tensor, Tensor, Tensor]:
    """What the random choice depends on: temperature (N,) fp32, seed (N,) and the token's position (N,) int64."""
    return (
        torch.tensor([temperature(seq) for seq in seqs]),
        torch.tensor([seq.seed for seq in seqs]),
        torch.tensor([len(seq) for seq in seqs]),
    )


def logprobs(logits: Tensor, tokens: Rows[int], tops: Rows[int]) -> list[TokenLogprob]:
    """Log-probability and rank of one token per row, and each row's best `tops[i]`. logits (N, vocab) fp32."""
    table = torch.log_softmax(logits, dim=-1)
    chosen = table.gather(1, torch.tensor(tokens, device=table.device)[:, None])
    ranks = (table > chosen).sum(dim=1) + 1
    best = table.topk(min(max(max(tops), 1), table.shape[1]), dim=-1)
    values, ids = best.values.tolist(), best.indices.tolist()
    return [
        TokenLogprob(token, value, rank, tuple(zip(ids[i][:top], values[i][:top], strict=True)))
        for i, (token, value, rank, top) in enumerate(
            zip(tokens, chosen.squeeze(1).tolist(), ranks.tolist(), tops, strict=True)
        )
    ]
