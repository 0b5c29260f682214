"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API."""

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from tucka_runtime.server.api import structured
from tucka_runtime.server.api.answer import Answer
from tucka_runtime.server.api.anthropic_answer import MessageAnswer
from tucka_runtime.server.api.anthropic_bodies import CountTokensBody, MessagesBody
from tucka_runtime.server.api.anthropic_history import conversation
from tucka_runtime.server.api.bodies import weights
from tucka_runtime.server.api.door import Context, Door, Opened
from tucka_runtime.server.api.reading import read_body
from tucka_runtime.server.api.turn import ChatTurn, ask, prompt_ids
from tucka_runtime.server.http.answers import JSONAnswer
from tucka_runtime.server.service.service import Service


async def open_messages(context: Context, body: MessagesBody) -> Opened[Answer]:
    """The assistant's next turn. Raises InvalidRequestError."""
    grammar = await _grammar(body, context.service)
    turn = ChatTurn(body=body, conversation=conversation(body), max_tokens=body.max_tokens, grammar=grammar)
    asked = await ask(context, turn)
    answer = MessageAnswer(body, context, asked.request)
    return Opened(asked.request, answer, asked.prompt_for_log, asked.parser)


MESSAGES = Door("chat", "msg_", MessagesBody, open_messages)


async def count_tokens(request: HTTPRequest) -> Response:
    """`{"input_tokens"}`: the tokens of the prompt that the same body would be answered to."""
    service: Service = request.app.state.service
    body = await read_body(request, CountTokensBody)
    adapter = await service.find(body.model, request.state.access, body.user, weights(body.adapters))
    ids = await prompt_ids(service, adapter, conversation(body), body.add_special_tokens)
    return JSONAnswer({"input_tokens": len(ids)})


async def _grammar(body: MessagesBody, service: Service) -> str | None:
    """What `output_config` holds the answer to."""
    form = body.output_config.format if body.output_config else None
    if form is None:
        return None
    return await structured.grammar_of(structured.SCHEMA, form.schema_, "output_config", service)
