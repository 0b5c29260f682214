"""/openapi.json, made by FastAPI from the bodies' models.

FastAPI describes the routes and does not serve them: its own handling of a body is lax (duplicate keys, NaN), and costs
0.2 ms a request.
"""

import re
from collections.abc import Sequence
from inspect import Parameter, Signature
from typing import Any, Literal

from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from tucka_runtime import __version__
from tucka_runtime.adapters.files import FILE_LIMITS, served_files
from tucka_runtime.server.api import anthropic_bodies, bodies, console, docs
from tucka_runtime.server.api.response_body import ResponseBody
from tucka_runtime.server.api.values import Body
from tucka_runtime.server.http.answers import JSONAnswer
from tucka_runtime.server.http.errors import speaks_anthropic

BODIES: dict[str, Any] = {
    "/v1/completions": bodies.CompletionBody,
    "/v1/chat/completions": bodies.ChatBody,
    "/v1/responses": ResponseBody,
    "/v1/messages": anthropic_bodies.MessagesBody,
    "/v1/messages/count_tokens": anthropic_bodies.CountTokensBody,
    "/v1/embeddings": bodies.EmbeddingBody,
    "/v1/adapters": bodies.LoadAdapterBody,
    "/v1/adapters/{name:path}/rollback": bodies.RollbackBody,
    "/v1/aliases": bodies.AliasBody,
    "/v1/load_lora_adapter": bodies.LoadLoraBody,
    "/v1/unload_lora_adapter": bodies.UnloadLoraBody,
    "/load_lora_adapter": bodies.LoadLoraBody,
    "/unload_lora_adapter": bodies.UnloadLoraBody,
    "/tokenize": bodies.TokenizePromptBody | bodies.TokenizeMessagesBody,
    "/detokenize": bodies.DetokenizeBody,
}
"""The types of bodies by the path that they are posted to."""

QUERIES: dict[tuple[str, str], type[Body]] = {
    ("GET", "/v1/models"): bodies.ListQuery,
    ("GET", "/v1/adapters"): bodies.ListQuery,
    ("PUT", "/v1/adapters/{name:path}"): bodies.UploadQuery,
}

_FILE = {"type": "string", "format": "binary"}
UPLOAD: dict[str, Any] = {
    "application/x-tar": {"schema": _FILE},
    "application/gzip": {"schema": _FILE},
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "properties": dict.fromkeys(served_files(True), _FILE),
            "required": list(FILE_LIMITS)[:2],
        }
    },
}
"""What an adapter is uploaded as."""

_STREAMED = ("application/json", "text/event-stream")
ANSWERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"), _STREAMED),
    **dict.fromkeys(("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/metrics"), ("text/plain",)),
    "/": ("application/json", "text/html"),
    "/docs": ("text/html",),
    docs.FOLDER + "{name}": ("text/html", "text/css", "text/javascript"),
    console.FOLDER + "{name}": ("text/html", "text/css", "text/javascript", "image/svg+xml"),
}
"""What is answered by other paths than those that have JSON alone."""
STATUSES: dict[tuple[str, str], int] = {
    ("POST", "/v1/adapters"): 201,
    ("PUT", "/v1/adapters/{name:path}"): 201,
    ("POST", "/v1/aliases"): 201,
    ("DELETE", "/v1/adapters/{name:path}"): 202,
    ("GET", "/ready"): 503,
}
"""Statuses other than 200 whose answer is no error's."""


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class AnthropicErrorDetail(BaseModel):
    type: str
    message: str


class AnthropicErrorBody(BaseModel):
    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str


def document(routes: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The OpenAPI description of (method, path) pairs."""
    return get_openapi(
        title="TuckA runtime",
        version=__version__,
        routes=[_described(method, path) for method, path in routes],
    )


async def openapi(request: Request) -> Response:
    return JSONAnswer(request.app.state.openapi)


def _described(method: str, path: str) -> APIRoute:
    """A route that only says what its parameters are."""

    def endpoint(**_: Any) -> None:
        raise AssertionError("a description is not called")

    content: dict[str, Any] = {kind: {"schema": {}} for kind in ANSWERS.get(path, ("application/json",))}
    parameters: dict[str, type] = {"name": str} if "{name" in path else {}
    if method == "POST" and path in BODIES:
        parameters["body"] = BODIES[path]
    described = [Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind) for name, kind in parameters.items()]
    if (query := QUERIES.get((method, path))) is not None:
        described += [
            Parameter(name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.annotation)
            for name, field in query.model_fields.items()
        ]
    endpoint.__signature__ = Signature(described)  # type: ignore[attr-defined]
    return APIRoute(
        path,
        endpoint,
        methods=[method],
        response_model=None,
        response_class=Response,  # which has no type of its own
        openapi_extra={"requestBody": {"required": True, "content": UPLOAD}} if method == "PUT" else None,
        operation_id="_".join([method.lower(), *re.findall(r"\w+", path.replace(":path", ""))]),
        summary=f"{method} {path.replace(':path', '')}",
        responses={
            **{status: {"content": content} for status in {200, STATUSES.get((method, path), 200)}},
            "default": {
                "model": AnthropicErrorBody if speaks_anthropic(path) else ErrorBody,
                "description": "An error",
            },
        },
    )
