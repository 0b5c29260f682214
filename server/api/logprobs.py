"""Log-probabilities in OpenAI's two formats."""

from collections.abc import Sequence
from typing import Any

from tucka_runtime.messages import TokenLogprob
from tucka_runtime.server.service.text import Token
from tucka_runtime.tokenizer import Tokenizer

_LEAST = -9999.0  # stands for minus infinity, which JSON does not have


class Labels:
    """How tokens are written in answers: their text, `bytes:\\xe2` if that is no whole text, or `token_id:5`."""

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool):
        self._tokenizer = None if as_ids else tokenizer

    def __call__(self, token_id: int) -> str:
        raw = self.raw(token_id)
        if raw is None:
            return f"token_id:{token_id}"
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def raw(self, token_id: int) -> bytes | None:
        return self._tokenizer.token_bytes(token_id) if self._tokenizer else None


def completion_logprobs(
    labels: Labels, entries: Sequence[tuple[int, int, TokenLogprob | None]]
) -> dict[str, list[Any]]:
    """The log-probabilities of entries (token id, offset in the choice's text, its log-probability); None for a
    prompt's first token.

    `top_logprobs` has the asked number of alternatives and the token itself where it is not among them.
    """
    return {
        "tokens": [labels(token_id) for token_id, _, _ in entries],
        "token_logprobs": [None if found is None else _finite(found.logprob) for _, _, found in entries],
        "top_logprobs": [None if found is None else _top(labels, found) for _, _, found in entries],
        "text_offset": [offset for _, offset, _ in entries],
    }


def chat_logprobs(labels: Labels, tokens: Sequence[Token]) -> dict[str, Any]:
    content = []
    for token in tokens:
        found = token.logprob
        if found is None:
            continue
        entry = _chat_entry(labels, token.id, found.logprob)
        entry["top_logprobs"] = [_chat_entry(labels, token_id, logprob) for token_id, logprob in found.top]
        content.append(entry)
    return {"content": content, "refusal": None}


def prompt_logprobs(
    tokenizer: Tokenizer | None, entries: Sequence[TokenLogprob | None]
) -> list[dict[str, dict[str, Any]] | None]:
    """A prompt's log-probabilities as vLLM writes them: by token id, the prompt's own token first, then the
    alternatives; None for the first token."""

    def text(token_id: int) -> str | None:
        return tokenizer.token_bytes(token_id).decode(errors="replace") if tokenizer else None

    made: list[dict[str, dict[str, Any]] | None] = []
    for found in entries:
        if found is None:
            made.append(None)
            continue
        scores = {found.token_id: (found.logprob, found.rank)}
        for rank, (token_id, logprob) in enumerate(found.top, 1):
            scores.setdefault(token_id, (logprob, rank))
        made.append(
            {
                str(token_id): {"logprob": _finite(logprob), "rank": rank, "decoded_token": text(token_id)}
                for token_id, (logprob, rank) in scores.items()
            }
        )
    return made


def _top(labels: Labels, found: TokenLogprob) -> dict[str, float]:
    top: dict[str, float] = {}
    for token_id, logprob in (*found.top, (found.token_id, found.logprob)):
        top.setdefault(labels(token_id), _finite(logprob))
    return top


def _chat_entry(labels: Labels, token_id: int, logprob: float) -> dict[str, Any]:
    raw = labels.raw(token_id)
    return {
        "token": labels(token_id),
        "logprob": _finite(logprob),
        "bytes": None if raw is None else list(raw),
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
