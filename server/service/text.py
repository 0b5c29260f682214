"""One sequence's tokens as text: detokenised, cut at stop strings, released only when it can no longer change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tucka_runtime.detokenizer import Detokenizer
from tucka_runtime.messages import Finish, FinishReason, SamplingParams, SequenceOutput, TokenLogprob
from tucka_runtime.server.service.stops import StopStrings, StopTable
from tucka_runtime.tokenizer import Tokenizer


class Token(NamedTuple):
    """A generated token; its text begins at character `start` of the answer."""

    id: int
    start: int
    logprob: TokenLogprob | None


@dataclass(slots=True)
class TextDelta:
    """What became final with one step. The tokens are those whose text is in `text` (or that have none)."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


def stop_reasons(sampling: SamplingParams, tokenizer: Tokenizer | None) -> dict[int, int | str]:
    """What an answer's `stop_reason` is, by the token that ended it: the id for `stop_token_ids`, the string for stop
    strings that are exactly one special token."""
    reasons: dict[int, int | str] = {token_id: token_id for token_id in sampling.stop_token_ids}
    return reasons | (tokenizer.special_ids(sampling.stop) if tokenizer else {})


def stopping(sampling: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """The same, with all the tokens that the engine has to stop at: special tokens have no text to be found in."""
    return replace(sampling, stop_token_ids=tuple(stop_reasons(sampling, tokenizer)))


class SequenceText:
    """Invariant: what was released is a prefix of the final answer, text and tokens alike.

    `detokenizer` is None where the model has no tokenizer: tokens pass, texts are empty. `reasons` are those of
    `stop_reasons`.
    """

    def __init__(
        self,
        detokenizer: Detokenizer | None,
        stops: StopTable = (),
        reasons: Mapping[int, int | str] | None = None,
        include_stop: bool = False,
        min_tokens: int = 0,
    ):
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops) if stops else None
        self._reasons = reasons or {}
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._released = 0  # characters
        self._tail = ""  # detokenised, not released
        self._tokens: list[Token] = []  # not released
        self.generated = 0  # tokens the engine made, those of a cut stop string included
        self.finished = False

    @classmethod
    def of(
        cls, sampling: SamplingParams, tokenizer: Tokenizer | None, table: StopTable, marks: Sequence[str] = ()
    ) -> "SequenceText":
        """The text of a sequence of that request; `table` is of its stop strings. `marks` are seen in it even where
        they are special tokens."""
        shown = tokenizer.special_ids(marks) if tokenizer and marks else ()
        return cls(
            Detokenizer(tokenizer, sampling.skip_special_tokens, shown) if tokenizer else None,
            table,
            stop_reasons(sampling, tokenizer),
            sampling.include_stop_str_in_output,
            sampling.min_tokens,
        )

    def push(self, output: SequenceOutput) -> TextDelta:
        """Takes one step's tokens. After a delta with `finish_reason` nothing more may be pushed."""
        ids = output.token_ids
        if len(ids) == 1 and output.finish is None and not self._tokens and self._stops is None and self._detokenizer:
            return self._pass(ids[0], output.logprobs[0] if output.logprobs else None, self._detokenizer)
        delta = TextDelta()
        stop_token_id = output.finish.stop_token_id if output.finish else None
        for i, token_id in enumerate(output.token_ids):
            logprob = output.logprobs[i] if output.logprobs else None
            self._tokens.append(Token(token_id, self._released + len(self._tail), logprob))
            self.generated += 1
            ends = stop_token_id is not None and i == len(output.token_ids) - 1
            if self._detokenizer and (self._include_stop or not ends):
                spelled = self._reasons.get(token_id) if ends else None
                piece = spelled if isinstance(spelled, str) else self._detokenizer.push(token_id)
                if self._append(piece, delta):
                    return delta
            self._release(delta)
        if output.finish is not None:
            self._finish(output.finish, delta)
        return delta

    def _pass(self, token_id: int, logprob: TokenLogprob | None, detokenizer: Detokenizer) -> TextDelta:
        """`push` where nothing is held and no stop string can begin, as with most tokens of most answers."""
        token = Token(token_id, self._released, logprob)
        piece = detokenizer.push(token_id)
        self.generated += 1
        self._released += len(piece)
        if piece or not detokenizer.pending:
            return TextDelta(piece, [token])
        self._tokens.append(token)
        return TextDelta()

    def _finish(self, finish: Finish, delta: TextDelta) -> None:
        if self._detokenizer and self._append(self._detokenizer.flush(), delta):
            return
        delta.text += self._tail
        delta.tokens += self._tokens
        delta.finish_reason = finish.reason
        if finish.stop_token_id is not None:
            delta.stop_reason = self._reasons.get(finish.stop_token_id)
        self.finished = True

    def _append(self, piece: str, delta: TextDelta) -> bool:
        """Adds text; True if a stop string ended the answer."""
        before = self._released + len(self._tail)
        self._tail += piece
        match = self._stops.feed(piece, counts=self.generated > self._min_tokens) if self._stops else None
        if match is None:
            return False
        length, stop = match
        end = before + length - (0 if self._include_stop else len(stop))
        delta.text += self._tail[: end - self._released]
        delta.tokens += [token for token in self._tokens if token.start < end]
        delta.finish_reason = FinishReason.STOP
        delta.stop_reason = stop
        self.finished = True
        return True

    def _release(self, delta: TextDelta) -> None:
        count = len(self._tail) - (self._stops.held if self._stops else 0)
        delta.text += self._tail[:count]
        self._tail = self._tail[count:]
        self._released += count
        if not self._tail and not (self._detokenizer and self._detokenizer.pending):
            settled = len(self._tokens)
        else:
            settled = 0
            while settled < len(self._tokens) and self._tokens[settled].start < self._released:
                settled += 1
        delta.tokens += self._tokens[:settled]
        del self._tokens[:settled]
