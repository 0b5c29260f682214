"""For operators: probes, metrics, version; and the tokenizer over HTTP, with vLLM's bodies."""

import asyncio
from importlib.metadata import version as installed

from starlette.requests import Request
from starlette.responses import Response

from tucka_runtime import __version__
from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.server.api import fields
from tucka_runtime.server.api.bodies import DetokenizeBody, TokenizeMessagesBody, TokenizePromptBody
from tucka_runtime.server.api.reading import accept, read_body
from tucka_runtime.server.api.rendering import ChatPrompt, for_template, rendering
from tucka_runtime.server.api.tools import chat_tools
from tucka_runtime.server.api.turn import prompt_ids
from tucka_runtime.server.http.answers import JSONAnswer
from tucka_runtime.server.http.body import read_json
from tucka_runtime.server.service.leases import LoadedAdapter
from tucka_runtime.server.service.service import Service


async def root(request: Request) -> Response:
    """Says where to go: many a visitor's first request."""
    service: Service = request.app.state.service
    chat = "POST /v1/chat/completions" if service.template else "POST /v1/completions"
    return JSONAnswer(
        {
            "message": f"This is TuckA runtime {__version__}. GET /v1/models lists what it serves; {chat} with one of "
            "those as `model` answers. docs/api.md in its repository has the rest.",
            "models": "/v1/models",
            "chat": "/v1/chat/completions",
            "completions": "/v1/completions",
            "responses": "/v1/responses",
            "adapters": "/v1/adapters",
            "ready": "/ready",
            "metrics": "/metrics",
        }
    )


async def health(request: Request) -> Response:
    """200 while this process answers at all."""
    return JSONAnswer({"status": "ok"})


async def ready(request: Request) -> Response:
    """200 while requests can be served: the engine is up, and every adapter that was promised is in or can come when it
    is asked for. 503 otherwise, and as soon as the server is told to stop."""
    service: Service = request.app.state.service
    if service.draining:
        return JSONAnswer({"status": "stopping"}, 503, {"Retry-After": "1"})
    if not service.ready:
        return JSONAnswer({"status": "starting"}, 503, {"Retry-After": "1"})
    if lost := service.adapters.lost:
        return JSONAnswer({"status": "adapters lost", "lost": lost}, 503, {"Retry-After": "1"})
    return JSONAnswer({"status": "ready"})


async def version(request: Request) -> Response:
    return JSONAnswer(
        {"version": __version__, "torch": installed("torch"), "transformers": installed("transformers")},
    )


async def server_info(request: Request) -> Response:
    """What sglang-router asks of a server as it takes it in, by SGLang's names."""
    service: Service = request.app.state.service
    return JSONAnswer(
        {
            "model_path": service.model_name,
            "served_model_name": service.model_name,
            "version": __version__,
            "tp_size": 1,
            "dp_size": 1,
            "max_total_num_tokens": service.info.kv_cache_tokens,
            "context_length": service.info.max_model_len,
        }
    )


async def model_info(request: Request) -> Response:
    """The base, by SGLang's names."""
    service: Service = request.app.state.service
    return JSONAnswer(
        {
            "model_path": service.model_name,
            "tokenizer_path": service.model_name,
            "is_generation": True,
            "model_type": service.info.model_type,
        }
    )


async def metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    engine = service.engine
    text = service.metrics.render(
        service.ready,
        engine.restarts,
        engine.info,
        __version__,
        engine.silence,
        service.adapters.lost,
        engine.waiting,
        service.adapters.tiers,
        request.state.access,
    )
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def tokenize(request: Request) -> Response:
    """`{"count", "max_model_len", "tokens", "token_strs"}` of a prompt or of rendered messages."""
    service: Service = request.app.state.service
    asked = await read_json(request)
    if (asked.get("prompt") is None) == (asked.get("messages") is None):
        raise InvalidRequestError("Send either `prompt` or `messages`.", "prompt")
    kind: type[TokenizePromptBody | TokenizeMessagesBody] = TokenizePromptBody
    if asked.get("prompt") is None:
        kind = TokenizeMessagesBody
    body = accept(request, kind, asked)
    adapter = _adapter(request, body.model)
    defaults = await service.defaults(adapter)
    if isinstance(body, TokenizePromptBody):
        adds, splits = body.add_special_tokens is not False, body.split_special_tokens is True
        (ids,) = await service.encode(defaults, [body.prompt], adds, "prompt", service.vocab_size(adapter), splits)
    else:
        conversation = ChatPrompt(for_template(body.messages), chat_tools(body.tools, None, None), rendering(body))
        ids = await prompt_ids(service, adapter, conversation, body.add_special_tokens)
    tokenizer = defaults.text_tokenizer("prompt")
    return JSONAnswer(
        {
            "count": len(ids),
            "max_model_len": service.info.max_model_len,
            "tokens": ids,
            "token_strs": [tokenizer.token(token_id) for token_id in ids] if body.return_token_strs else None,
        }
    )


async def detokenize(request: Request) -> Response:
    """`{"prompt"}`: the text of token ids, special tokens included."""
    service: Service = request.app.state.service
    body = await read_body(request, DetokenizeBody)
    adapter = _adapter(request, body.model)
    tokenizer = (await service.defaults(adapter)).text_tokenizer("tokens")
    ids = fields.token_ids(body.tokens, service.vocab_size(adapter), "tokens")
    return JSONAnswer({"prompt": await asyncio.to_thread(tokenizer.decode, ids, False)})


async def tokenizer_info(request: Request) -> Response:
    """The special tokens, each under its name, and the chat template: what makes prompts on the client's side."""
    service: Service = request.app.state.service
    tokenizer = service.base_defaults.text_tokenizer(None)
    return JSONAnswer(
        {
            **dict.fromkeys(("bos_token", "eos_token", "pad_token")),
            **tokenizer.special_tokens,
            "chat_template": tokenizer.chat_template,
            "model_max_length": service.info.max_model_len,
        }
    )


def _adapter(request: Request, model: str | None) -> LoadedAdapter | None:
    """The adapter that a request for `model` gets; None is the base. Raises ModelNotFoundError."""
    service: Service = request.app.state.service
    return None if model is None else service.named(model, request.state.access, None)
