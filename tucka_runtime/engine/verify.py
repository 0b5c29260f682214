"""The tokens that a pass brings: chosen row by row of a draft for as long as it is right, then read.

A draft is right as far as it is what the sampler chooses. Each of its tokens is chosen when all before it are, from the
logits that they lead to and with penalties, bad words and grammar as they are then. So nothing is ever taken back, and
as the sampler's choice is a function of logits, seed and position, what comes is what came without drafts.
"""

from dataclasses import replace

from torch import Tensor

from tucka_runtime.engine.batch import Chosen, Due
from tucka_runtime.engine.launched import Launched, Result, Round
from tucka_runtime.engine.sampler import Sampler
from tucka_runtime.engine.scheduler import ScheduledChunk
from tucka_runtime.errors import NonFiniteError


def choose(sampler: Sampler, chosen: Chosen, logits: Tensor, chunks: list[ScheduledChunk], asked: Due) -> list[Round]:
    """Chooses from logits (N, vocab) of `asked.rows`. What is right of the drafts joins the sequences' tokens, and
    takes their chunks' place in `chunks`. With drafts the device is waited for, once a round."""
    due = asked.chunks
    drafts = {i: draft for i in due if (draft := chunks[i].draft)}
    if not drafts:
        return [_round(sampler, chosen, logits, chunks, due, asked.first)]
    first_rows, rows = {}, 0
    for i in due:
        first_rows[i] = rows
        rows += 1 + len(drafts.get(i, ()))
    rounds: list[Round] = []
    while due:
        own = logits[[first_rows[i] + len(rounds) for i in due]]
        rounds.append(_round(sampler, chosen, own, chunks, due, asked.first))
        due = _right(sampler, rounds, chunks, drafts)
    for i, draft in drafts.items():
        right = sum(i in part.due for part in rounds) - 1
        chunks[i] = replace(chunks[i], count=1 + right, draft=draft[:right])
    return rounds


def _round(
    sampler: Sampler, chosen: Chosen, logits: Tensor, chunks: list[ScheduledChunk], due: list[int], first: int
) -> Round:
    """One token for each of the chunks that are `due`, from logits (len(due), vocab)."""
    seqs = [chunks[i].seq for i in due]
    choice = sampler.choose(logits, seqs)
    return Round(due, choice, chosen.keep(choice.tokens, seqs, first))


def _right(
    sampler: Sampler, rounds: list[Round], chunks: list[ScheduledChunk], drafts: dict[int, tuple[int, ...]]
) -> list[int]:
    """The chunks whose draft is what the last round chose, and does not end there: they go on behind it."""
    last, depth = rounds[-1], len(rounds) - 1
    going = []
    tokens = last.choice.tokens.tolist()  # waits, so that `finite` has come too
    for i, token, finite in zip(last.due, tokens, last.choice.finite.tolist(), strict=True):
        seq, draft = chunks[i].seq, drafts.get(i, ())
        failed = not finite or sampler.failure(seq) is not None
        if draft[depth : depth + 1] == (token,) and not failed and token not in sampler.stops(seq):
            seq.tokens.append(token)
            going.append(i)
    return going


def read_tokens(sampler: Sampler, launched: Launched, results: list[Result]) -> None:
    """Puts a pass's tokens, which have come to the host, into its chunks' results."""
    for part in launched.rounds:
        tokens, seqs = part.tokens.tolist(), [launched.chunks[i].seq for i in part.due]
        entries = sampler.entries(part.choice, tokens, seqs)
        finite = part.choice.finite.tolist()
        for i, seq, token, entry, ok in zip(part.due, seqs, tokens, entries, finite, strict=True):
            result = results[i]
            result.tokens.append(token)
            result.logprobs.append(entry)
            result.error = sampler.failure(seq) if ok else NonFiniteError.of(seq.adapter is not None)
