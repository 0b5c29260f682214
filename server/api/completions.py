"""POST /v1/completions."""

from collections.abc import Sequence
from typing import Any

from tucka_runtime.messages import Request, TokenLogprob
from tucka_runtime.server.api import fields, structured
from tucka_runtime.server.api.answer import Answer, OpenAIAnswer
from tucka_runtime.server.api.bodies import CompletionBody
from tucka_runtime.server.api.door import Context, Door, Opened
from tucka_runtime.server.api.logprobs import completion_logprobs
from tucka_runtime.server.api.prompts import listed, tokenize
from tucka_runtime.server.api.sampling import (
    max_tokens_for,
    num_logprobs,
    num_prompt_logprobs,
    num_sequences,
    sampling_params,
)
from tucka_runtime.server.service.generation import ChoiceDelta
from tucka_runtime.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16


async def open_completion(context: Context, body: CompletionBody) -> Opened[Answer]:
    """Prompts continued. Raises InvalidRequestError."""
    service, default = context.service, context.defaults.generation.max_new_tokens or DEFAULT_MAX_TOKENS
    options = fields.stream_options(bool(body.stream), body.stream_options)
    prompts = listed(body.prompt, context.vocab_size, "prompt", service.config.max_n, "--max-n")
    n = num_sequences(body, len(prompts), service.config)
    logprobs = num_logprobs(body.logprobs, "logprobs", service.config)
    ids = await tokenize(
        context,
        prompts,
        "prompt",
        body.add_special_tokens is not False,
        body.split_special_tokens is True,
        fields.truncation(body, default if body.max_tokens is None else body.max_tokens, service.info),
    )
    max_tokens = max_tokens_for(body.max_tokens, default, max(map(len, ids)), service.info)
    grammar = await structured.grammar(body, "response_format", structured.schema_of(body.response_format), service)
    scored = num_prompt_logprobs(body, context)
    if scored is None and body.echo:
        scored = logprobs
    sampling = await sampling_params(body, context, max_tokens, logprobs, scored, grammar)
    if sampling.stop:
        context.defaults.text_tokenizer("stop")
    request = context.request(body, ids, sampling, n)
    tokenizer = context.defaults.tokenizer
    answer = CompletionAnswer(body, options, request, context.adapter, tokenizer, context.fingerprint)
    if body.echo:
        whole = body.truncate_prompt_tokens is None
        answer.echoes = [_echo(request, i, prompt, whole, tokenizer) for i, prompt in enumerate(prompts)]
    return Opened(request, answer, lambda: body.prompt)


COMPLETION = Door("text_completion", "cmpl-", CompletionBody, open_completion)


def _echo(request: Request, index: int, prompt: str | list[int], whole: bool, tokenizer: Tokenizer | None) -> str:
    """The prompt's text, as it was sent if that is `whole` or as its ids spell it."""
    if isinstance(prompt, str) and whole:
        return prompt
    return tokenizer.decode(list(request.prompts[index]), request.sampling.skip_special_tokens) if tokenizer else ""


class CompletionAnswer(OpenAIAnswer[CompletionBody]):
    """The prompts' continuations. With `echo` each choice begins with its prompt, scored if `logprobs` are asked."""

    object_name = chunk_name = "text_completion"
    echoes: Sequence[str] = ()
    """The prompts' texts, where they are to be repeated."""

    def chunks(self, delta: ChoiceDelta) -> Sequence[dict[str, Any]]:
        return (self.choice(delta),) if delta.first or delta.text or delta.tokens or delta.finish_reason else ()

    def choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        echo = self.echoes[delta.index // self.request.n] if self.echoes else ""
        found: dict[str, Any] = {
            "index": delta.index,
            "text": echo + delta.text if delta.first else delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            **self.extras(delta),
        }
        if self.body.logprobs is not None:
            entries = [(token.id, len(echo) + token.start, token.logprob) for token in delta.tokens]
            if delta.first and self.body.echo:
                entries = self._prompt_entries(self.prompt_of(delta.index), echo, delta.prompt_logprobs) + entries
            found["logprobs"] = completion_logprobs(self.labels, entries)
        if delta.first and self.body.prompt_logprobs is not None:
            found["prompt_logprobs"] = self.prompt_logprobs(delta)
        return found

    def _prompt_entries(
        self, prompt: tuple[int, ...], text: str, logprobs: list[TokenLogprob | None] | None
    ) -> list[tuple[int, int, TokenLogprob | None]]:
        sizes = [len((self.labels.raw(token_id) or b"").decode(errors="ignore")) for token_id in prompt]
        # The tokens may spell more than the text (a start token, a first space): offsets count from its end.
        offset = len(text) - sum(sizes)
        entries = []
        for token_id, size, logprob in zip(prompt, sizes, logprobs or [None] * len(prompt), strict=True):
            entries.append((token_id, max(offset, 0), logprob))
            offset += size
        return entries
