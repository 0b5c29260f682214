"""From logits to tokens: bias, penalties, filters, choice, log-probabilities. Whole batch at once; rows that do not ask
for a step do not pay for it.
"""

from collections.abc import Sequence as Rows
from types import SimpleNamespace

import torch
from torch import Tensor

from tucka_runtime.sequence import Sequence, TokenLogprob

GREEDY_BELOW = 1e-5  # temperatures under this would overflow fp32 logits; they are greedy


class Sampler:
    """Chooses tokens. Keeps token counts of the sequences that have penalties, until `forget`."""

    def __init__(self, ops: SimpleNamespace, vocab: int, eos: frozenset[int], device: torch.device):
        self.ops = ops
        self.vocab = vocab
        self.eos = eos
        self.device = device
        self.counts: dict[tuple[str, int], tuple[Tensor, Tensor, int]] = {}

    def forget(self, seq: Sequence) -> None:
        self.counts.pop(seq.key, None)

    def stops(self, seq: Sequence) -> frozenset[int]:
        """Tokens that end the sequence."""
        own = frozenset(seq.sampling.stop_token_ids)
        return own if seq.sampling.ignore_eos else own | self.eos

    def __call__(self, logits: Tensor, seqs: Rows[Sequence]) -> tuple[list[int], list[TokenLogprob | None]]:
        """The next token of each sequence. logits (N, vocab) fp32, one row per sequence, is used up.

        Log-probabilities are the model's own: before bias, penalties and temperature.
        """
        wants = [i for i, seq in enumerate(seqs) if seq.sampling.logprobs is not None]
        raw = logits[wants].clone() if wants else None
        for i, seq in enumerate(seqs):
            self._adjust(logits[i], seq)
        temperatures = [0.0 if s.sampling.temperature < GREEDY_BELOW else s.sampling.temperature for s in seqs]
        if any(temperatures):
            self._filter(logits, temperatures, seqs)
            chosen = self.ops.sample.sample(
                logits,
                torch.tensor(temperatures).to(self.device),
                torch.tensor([seq.seed for seq in seqs]).to(self.device),
                torch.tensor([len(seq) for seq in seqs]).to(self.device),
            )
        else:
            chosen = logits.argmax(dim=-1)
        tokens = chosen.tolist()
        out: list[TokenLogprob | None] = [None] * len(tokens)
        if raw is not None:
            tops = [seqs[i].sampling.logprobs or 0 for i in wants]
            for i, entry in zip(wants, logprobs(raw, [tokens[i] for i in wants], tops), strict=True):
                out[i] = entry
        return tokens, out

    def _adjust(self, row: Tensor, seq: Sequence) -> None:
        """Penalties, bias and the ban on ending early, in place. row (vocab,)."""
        p = seq.sampling
        if p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty:
            seen, counts = self._count(seq)
            if p.repetition_penalty != 1.0:
                scaled = torch.where(row > 0, row / p.repetition_penalty, row * p.repetition_penalty)
                row.copy_(torch.where(seen | (counts > 0), scaled, row))
            row.sub_(counts * p.frequency_penalty + (counts > 0) * p.presence_penalty)
        if p.logit_bias:
            ids = torch.tensor([i for i, _ in p.logit_bias]).to(self.device)
            row.index_add_(0, ids, torch.tensor([b for _, b in p.logit_bias]).to(self.device, row.dtype))
        if seq.num_generated < p.min_tokens and (stops := self.stops(seq)):
            row[torch.tensor(sorted(stops)).to(self.device)] = float("-inf")

    def _count(self, seq: Sequence) -> tuple[Tensor, Tensor]:
        """Which tokens the prompt has (vocab,) bool, and how often each was generated (vocab,) fp32."""
        entry = self.counts.get(seq.key)
        if entry is None:
            seen = torch.zeros(self.vocab, dtype=torch.bool, device=self.device)
            seen[torch.tensor(seq.tokens[: seq.num_prompt]).to(self.device)] = True
            entry = seen, torch.zeros(self.vocab, device=self.device), seq.num_prompt
        seen, counts, known = entry
        if known < len(seq):
            fresh = torch.tensor(seq.tokens[known:]).to(self.device)
            counts.index_add_(0, fresh, torch.ones(len(fresh), device=self.device))
        self.counts[seq.key] = seen, counts, len(seq)
        return seen, counts

    def _filter(self, logits: Tensor, temperatures: list[float], seqs: Rows[Sequence]) -> None:
        rows = [
            i
            for i, (t, seq) in enumerate(zip(temperatures, seqs, strict=True))
            if t and (seq.sampling.top_k or seq.sampling.top_p < 1 or seq.sampling.min_p > 0)
        ]
        if not rows:
            return
        asked = [seqs[i].sampling for i in rows]
        own = logits[rows]
        kept = self.ops.sample.filter_logits(
            own / torch.tensor([temperatures[i] for i in rows]).to(self.device)[:, None],
            torch.tensor([p.top_k or self.vocab for p in asked]).to(self.device),
            torch.tensor([p.top_p for p in asked]).to(self.device),
            torch.tensor([p.min_p for p in asked]).to(self.device),
        )
        logits[rows] = own.masked_fill_(kept == float("-inf"), float("-inf"))


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
