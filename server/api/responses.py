"""POST /v1/responses. Nothing is kept: a request has the whole conversation."""

import time
from collections.abc import Sequence
from typing import Any

from tucka_runtime.errors import InvalidRequestError, TuckaError
from tucka_runtime.messages import FinishReason, Request
from tucka_runtime.server.api import structured
from tucka_runtime.server.api.answer import Answer, route_json
from tucka_runtime.server.api.door import Context, Door, Opened
from tucka_runtime.server.api.logprobs import Labels, chat_logprobs
from tucka_runtime.server.api.response_body import LOGPROBS, AllowedChoice, FunctionChoice, FunctionTool, ResponseBody
from tucka_runtime.server.api.response_history import conversation, function_tools
from tucka_runtime.server.api.response_output import ResponseOutput, Scores
from tucka_runtime.server.api.sampling import num_logprobs
from tucka_runtime.server.api.tools import Tools
from tucka_runtime.server.api.turn import ChatTurn, ask
from tucka_runtime.server.http.answers import encode_json
from tucka_runtime.server.http.errors import envelope
from tucka_runtime.server.service.generation import ChoiceDelta, Usage
from tucka_runtime.server.service.leases import Served
from tucka_runtime.server.service.text import Token


async def open_response(context: Context, body: ResponseBody) -> Opened[Answer]:
    """The assistant's next turn. Raises InvalidRequestError."""
    service = context.service
    told = conversation(body)
    schema = structured.schema_of(body.text.format if body.text else None)
    logprobs = _logprobs(body, told.tools, context)
    turn = ChatTurn(
        body=body,
        conversation=told,
        max_tokens=body.max_output_tokens,
        logprobs=logprobs,
        grammar=await structured.grammar(body, "text.format", schema, service),
        max_tokens_param="max_output_tokens",
    )
    asked = await ask(context, turn)
    labels = Labels(context.defaults.tokenizer, False)

    def scores(tokens: Sequence[Token]) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = chat_logprobs(labels, tokens)["content"]
        return content

    answer = ResponseAnswer(body, asked.request, context.adapter, None if logprobs is None else scores)
    return Opened(asked.request, answer, asked.prompt_for_log, asked.parser)


RESPONSE = Door("chat", "resp_", ResponseBody, open_response)


def _logprobs(body: ResponseBody, tools: Tools, context: Context) -> int | None:
    if LOGPROBS not in (body.include or ()):
        if body.top_logprobs:
            raise InvalidRequestError(f"`top_logprobs` is only allowed with `include: [{LOGPROBS!r}]`.", "top_logprobs")
        return None
    if tools.callable or context.defaults.thinks:
        raise InvalidRequestError(
            f"`{LOGPROBS}` is only there for answers that can be nothing but text: without functions to call, of a "
            "model that does not think. /v1/chat/completions has the log-probabilities of all tokens.",
            "include",
        )
    return num_logprobs(body.top_logprobs, "top_logprobs", context.service.config) or 0


class ResponseAnswer(Answer):
    """The response, or the events that make it: each is named, numbered, and `response.completed` or
    `response.incomplete` is the last, `response.failed` where it cannot go on."""

    def __init__(self, body: ResponseBody, request: Request, adapter: Served | None, scores: Scores | None):
        self._body, self._request, self._adapter = body, request, adapter
        self._created = int(time.time())
        self._output = ResponseOutput(request.id, scores)
        self._last: ChoiceDelta | None = None
        self._events = 0

    def frame(self, delta: ChoiceDelta) -> bytes:
        first = b""
        if delta.first:
            first = self._lifecycle("created", "in_progress") + self._lifecycle("in_progress", "in_progress")
        return first + b"".join(map(self._event, self._take(delta)))

    def ending(self, usage: Usage) -> bytes:
        return self._lifecycle(self._status, self._status, usage=_usage_json(usage))

    def failure(self, error: TuckaError) -> bytes:
        found = envelope(error)["error"]
        code = found["code"] or found["type"]
        cut = b"".join(map(self._event, self._output.cut_off()))
        return cut + self._lifecycle("failed", "failed", error={"code": code, "message": found["message"]})

    def whole(self, choices: Sequence[ChoiceDelta], usage: Usage) -> dict[str, Any]:
        (choice,) = choices
        self._take(choice)
        return self._response(self._status, usage=_usage_json(usage))

    def _take(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        if delta.finish_reason is not None:
            self._last = delta
        return self._output.take(delta)

    @property
    def _status(self) -> str:
        cut = self._last is not None and self._last.finish_reason == FinishReason.LENGTH
        return "incomplete" if cut else "completed"

    def _event(self, event: dict[str, Any]) -> bytes:
        numbered = event | {"sequence_number": self._events}
        self._events += 1
        return f"event: {event['type']}\ndata: ".encode() + encode_json(numbered) + b"\n\n"

    def _lifecycle(self, kind: str, status: str, **more: Any) -> bytes:
        return self._event({"type": f"response.{kind}", "response": self._response(status, **more)})

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        """All of the response as it stands."""
        body, sampling, last = self._body, self._request.sampling, self._last
        form = body.text.format if body.text else None
        choice = body.tool_choice
        found: dict[str, Any] = {
            "id": self._request.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": self._output.as_json(),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
            "tool_choice": choice.model_dump()
            if isinstance(choice, FunctionChoice | AllowedChoice)
            else choice or "auto",
            "tools": [_tool_json(tool) for tool in function_tools(body)],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "stop_reason": last.stop_reason if last else None,
        }
        if body.include_route:
            found["route"] = route_json(self._request, self._adapter, last.route) if last else None
        return found | more


def _tool_json(tool: FunctionTool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict,
    }


def _usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }
