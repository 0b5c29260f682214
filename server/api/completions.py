"""POST /v1/completions."""

from collections.abc import Sequence
from typing import Any

from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.messages import Request, TokenLogprob
from tucka_runtime.server.api import fields
from tucka_runtime.server.api.bodies import CompletionBody
from tucka_runtime.server.api.door import Door
from tucka_runtime.server.api.logprobs import completion_logprobs
from tucka_runtime.server.api.sampling import max_tokens_for, num_logprobs, num_sequences, sampling_params
from tucka_runtime.server.service.generation import ChoiceDelta

DEFAULT_MAX_TOKENS = 16


class Completion(Door[CompletionBody]):
    """Prompts continued. With `echo` each choice begins with its prompt, scored if `logprobs` are asked."""

    operation = "text_completion"
    body_type = CompletionBody
    object_name = chunk_name = "text_completion"
    id_prefix = "cmpl"

    async def ask(self) -> Request:
        body, service = self.body, self.service
        prompts = fields.prompts(body.prompt, service.info.vocab_size, service.config.max_n)
        n = num_sequences(body, len(prompts), service.config)
        logprobs = num_logprobs(body.logprobs, "logprobs", service.config)
        ids = await self._tokenize(prompts)
        max_tokens = max_tokens_for(body.max_tokens, DEFAULT_MAX_TOKENS, max(map(len, ids)), service.info)
        sampling = sampling_params(body, service.info, max_tokens, logprobs, logprobs if body.echo else None)
        for param, needed in (("stop", bool(sampling.stop)), ("response_format", sampling.json_schema is not None)):
            if needed:
                service.text_tokenizer(param)
        request = self.request(ids, sampling, n)
        self._echoes = [self._echo(i, prompt) for i, prompt in enumerate(prompts)] if body.echo else []
        return request

    @property
    def prompt_for_log(self) -> Any:
        return self.body.prompt

    async def _tokenize(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if not texts:
            return [prompt for prompt in prompts if not isinstance(prompt, str)]
        adds, splits = self.body.add_special_tokens is not False, self.body.split_special_tokens is True
        ids = await self.service.encode(texts, adds, "prompt", splits)
        if not all(ids):
            raise InvalidRequestError("A prompt has no tokens. Send text that the tokenizer knows.", "prompt")
        return ids

    def _echo(self, index: int, prompt: str | list[int]) -> str:
        """The prompt's text, as it was sent or as its ids spell it."""
        if isinstance(prompt, str):
            return prompt
        tokenizer = self.service.tokenizer
        skip = self.asked.sampling.skip_special_tokens
        return tokenizer.decode(list(self.asked.prompts[index]), skip) if tokenizer else ""

    def choice(self, delta: ChoiceDelta, chunk: bool) -> dict[str, Any]:
        echo = self._echoes[delta.index // self.asked.n] if self._echoes else ""
        found: dict[str, Any] = {
            "index": delta.index,
            "text": echo + delta.text if delta.first else delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            **self.extras(delta, chunk),
        }
        if self.body.logprobs is not None:
            entries = [(token.id, len(echo) + token.start, token.logprob) for token in delta.tokens]
            if delta.first and self.body.echo:
                entries = self._prompt_entries(self.prompt_of(delta.index), echo, delta.prompt_logprobs) + entries
            found["logprobs"] = completion_logprobs(self.labels, entries)
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
