"""POST /v1/chat/completions."""

from typing import Any

from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.messages import Request
from tucka_runtime.server.api import fields
from tucka_runtime.server.api.bodies import ChatBody
from tucka_runtime.server.api.door import Door
from tucka_runtime.server.api.logprobs import chat_logprobs
from tucka_runtime.server.api.sampling import max_tokens_for, num_logprobs, num_sequences, sampling_params
from tucka_runtime.server.service.generation import ChoiceDelta
from tucka_runtime.tokenizer import unshielded


class Chat(Door[ChatBody]):
    """The assistant's next turn."""

    operation = "chat"
    body_type = ChatBody
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    async def ask(self) -> Request:
        body, service = self.body, self.service
        n = num_sequences(body, 1, service.config)
        logprobs = self._logprobs()
        self._prompt = await service.render_chat(fields.for_template(body.messages))
        (ids,) = await service.encode([self._prompt], body.add_special_tokens is True, "messages")
        if not ids:
            raise InvalidRequestError("The messages have no tokens once rendered. Send some text.", "messages")
        return self.request([ids], sampling_params(body, service.info, self._max_tokens(len(ids)), logprobs), n)

    @property
    def prompt_for_log(self) -> Any:
        return unshielded(self._prompt)

    def _logprobs(self) -> int | None:
        body = self.body
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequestError("`top_logprobs` is only allowed with `logprobs: true`.", "top_logprobs")
        if not body.logprobs:
            return None
        return num_logprobs(body.top_logprobs, "top_logprobs", self.service.config) or 0

    def _max_tokens(self, prompt_tokens: int) -> int:
        asked, param = self.body.max_tokens, "max_tokens"
        if self.body.max_completion_tokens is not None:
            if asked not in (None, self.body.max_completion_tokens):
                raise InvalidRequestError("`max_tokens` and `max_completion_tokens` differ. Send one of them.", param)
            asked, param = self.body.max_completion_tokens, "max_completion_tokens"
        return max_tokens_for(asked, None, prompt_tokens, self.service.info, param, prompt_param="messages")

    def choice(self, delta: ChoiceDelta, chunk: bool) -> dict[str, Any]:
        message: dict[str, Any] = {"content": delta.text}
        if delta.first:
            message = {"role": "assistant", **message}
        return {
            "index": delta.index,
            **({"delta": message} if chunk else {"message": message | {"refusal": None}}),
            "logprobs": chat_logprobs(self.labels, delta.tokens) if self.body.logprobs else None,
            "finish_reason": delta.finish_reason,
            **self.extras(delta, chunk),
        }
