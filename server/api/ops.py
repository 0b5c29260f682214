"""For operators: probes, metrics, version; and the tokenizer over HTTP, with vLLM's bodies."""

import asyncio
from importlib.metadata import version as installed

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tucka_runtime import __version__
from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.server.api import fields
from tucka_runtime.server.api.bodies import DetokenizeBody, TokenizeBody
from tucka_runtime.server.api.reading import read_body
from tucka_runtime.server.service.service import Service


async def health(request: Request) -> Response:
    """200 while this process answers at all."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """200 while requests can be served: the engine is up and every adapter is in. 503 otherwise."""
    service: Service = request.app.state.service
    if service.ready:
        return JSONResponse({"status": "ready"})
    return JSONResponse({"status": "starting"}, 503, {"Retry-After": "1"})


async def version(request: Request) -> Response:
    return JSONResponse(
        {"version": __version__, "torch": installed("torch"), "transformers": installed("transformers")},
    )


async def metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    engine = service.engine
    text = service.metrics.render(service.ready, engine.restarts, engine.info, __version__)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def tokenize(request: Request) -> Response:
    """`{"count", "max_model_len", "tokens", "token_strs"}` of a prompt or of rendered messages."""
    service: Service = request.app.state.service
    body = await read_body(request, TokenizeBody)
    _check_model(service, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("Send either `prompt` or `messages`.", "prompt")
    if body.messages is None:
        assert body.prompt is not None
        (ids,) = await service.encode([body.prompt], body.add_special_tokens is not False, "prompt")
    else:
        text = await service.render_chat(fields.for_template(body.messages))
        (ids,) = await service.encode([text], body.add_special_tokens is True, "messages")
    tokenizer = service.text_tokenizer("prompt")
    return JSONResponse(
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
    _check_model(service, body.model)
    tokenizer = service.text_tokenizer("tokens")
    ids = fields.token_ids(body.tokens, service.info.vocab_size, "tokens")
    return JSONResponse({"prompt": await asyncio.to_thread(tokenizer.decode, ids, False)})


def _check_model(service: Service, model: str | None) -> None:
    if model is not None and model != service.model_name:
        service.adapters.get(model)
