"""POST /v1/embeddings: the base's or an adapter's final hidden states as one vector of length 1 per prompt."""

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.messages import Pooling, SamplingParams
from tucka_runtime.server.api import fields
from tucka_runtime.server.api.bodies import EmbeddingBody
from tucka_runtime.server.api.door import Context, Door, Opened, begin, finished
from tucka_runtime.server.api.prompts import listed, tokenize
from tucka_runtime.server.api.sampling import max_tokens_for
from tucka_runtime.server.http.answers import encode_json
from tucka_runtime.server.http.stream import until_disconnect
from tucka_runtime.server.service.generation import ChoiceDelta, Usage


async def open_embeddings(context: Context, body: EmbeddingBody) -> Opened[dict[str, Any]]:
    """The answer is its head. Raises InvalidRequestError."""
    service, info = context.service, context.service.info
    if body.dimensions not in (None, info.hidden_size):
        raise InvalidRequestError(
            f"`dimensions`: this model's embeddings have {info.hidden_size} dimensions, and a part of them means "
            "nothing. Leave it out.",
            "dimensions",
        )
    engine = service.engine.config
    most, setting = engine.max_num_seqs + engine.max_queue, "--max-num-seqs plus --max-queue"
    prompts = listed(body.input, context.vocab_size, "input", most, setting)
    ids = await tokenize(
        context,
        prompts,
        "input",
        body.add_special_tokens is not False,
        body.split_special_tokens is True,
        fields.truncation(body, 0, info, side="right"),
    )
    max_tokens_for(0, 0, max(map(len, ids)), info, prompt_param="input")
    request = context.request(body, ids, SamplingParams(max_tokens=0), 1, Pooling(body.pooling or Pooling.MEAN))
    return Opened(request, {"id": request.id, "object": "list", "model": body.model}, lambda: body.input)


EMBEDDING = Door("embeddings", "embd-", EmbeddingBody, open_embeddings)


async def embeddings(http: HTTPRequest) -> Response:
    body, head, submit = await begin(EMBEDDING, http)
    choices, usage = await until_disconnect(http.receive, finished(submit))
    raw = body.encoding_format == "base64"
    content = await asyncio.to_thread(_encoded, head, choices, raw, usage)
    return Response(content, media_type="application/json")


def _encoded(head: dict[str, Any], choices: Sequence[ChoiceDelta], raw: bool, usage: Usage) -> bytes:
    """The answer as JSON, encoded piece by piece: megabytes of numbers in one would hold up the event loop."""
    items = []
    for choice in choices:
        assert choice.embedding is not None
        embedding = base64.b64encode(choice.embedding).decode() if raw else choice.embedding.tolist()
        items.append(encode_json({"object": "embedding", "index": choice.index, "embedding": embedding}))
    used = encode_json({"prompt_tokens": usage.prompt, "total_tokens": usage.prompt})
    return b"".join((encode_json(head)[:-1], b',"data":[', b",".join(items), b'],"usage":', used, b"}"))
