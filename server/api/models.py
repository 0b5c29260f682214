"""GET /v1/models and /v1/models/{id}: the base model, its aliases and its adapters as cards."""

import asyncio
from collections.abc import Sequence
from itertools import chain
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.server.api.bodies import ListQuery
from tucka_runtime.server.api.reading import accept, query_of
from tucka_runtime.server.http.answers import JSONAnswer, encode_json
from tucka_runtime.server.service.leases import LoadedAdapter
from tucka_runtime.server.service.service import Service

AT_ONCE = 64  # cards written before others get on: some 2 ms


async def list_models(request: Request) -> Response:
    service: Service = request.app.state.service
    sees = request.state.access.sees
    first = [base_card(service)] if sees(service.model_name) else []
    first += [alias_card(service, alias.name) for alias in service.adapters.aliases if sees(alias.name)]
    models = [model for adapter in service.adapters.all() for model in adapter.members if sees(model.model)]
    return await listed(request, models, first)


async def listed(request: Request, adapters: Sequence[LoadedAdapter], first: Sequence[dict[str, Any]] = ()) -> Response:
    """The list of `first` and the adapters' cards, or the page of it that the query asks for. Thousands are written bit
    by bit, between which others get on."""
    service: Service = request.app.state.service
    asked = accept(request, ListQuery, query_of(request))
    begin = 0
    if asked.after is not None:
        ids = chain((card["id"] for card in first), (adapter.model for adapter in adapters))
        begin = next((i for i, own in enumerate(ids, 1) if own == asked.after), 0)
        if not begin:
            raise InvalidRequestError(
                "`after` is no `id` of this list, or not any more. Begin with the first page again.", "after"
            )
    total = len(first) + len(adapters)
    end = total if asked.limit is None else min(begin + asked.limit, total)
    cards = [encode_json(card) for card in first[begin:end]]
    for at in range(max(begin - len(first), 0), end - len(first), AT_ONCE):
        some = adapters[at : min(at + AT_ONCE, end - len(first))]
        cards += [encode_json(adapter_card(service, adapter)) for adapter in some]
        await asyncio.sleep(0)
    more = b"" if asked.limit is None else b',"has_more":%s' % (b"true" if end < total else b"false")
    return Response(b'{"object":"list","data":[' + b",".join(cards) + b"]" + more + b"}", media_type="application/json")


async def get_model(request: Request) -> Response:
    service: Service = request.app.state.service
    name, sees = request.path_params["name"], request.state.access.sees
    if not name:  # /v1/models/, as some clients have it
        return await list_models(request)
    if name == service.model_name and sees(name):
        return JSONAnswer(base_card(service))
    if name in service.adapters.aliases and sees(name):
        return JSONAnswer(alias_card(service, name))
    return JSONAnswer(adapter_card(service, service.adapters.card(name, sees)))


def base_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.started,
        "owned_by": "tucka",
        "root": service.model_name,
        "parent": None,
        "max_model_len": service.info.max_model_len,
    }


def alias_card(service: Service, name: str) -> dict[str, Any]:
    """What it stands for is shown to admins alone, by /v1/aliases."""
    return base_card(service) | {"id": name, "parent": service.model_name}


def adapter_card(service: Service, adapter: LoadedAdapter) -> dict[str, Any]:
    """A card as OpenAI's; `parent` is the base, or a member's bank; `tucka` has what adapters alone have."""
    info = adapter.info
    return {
        "id": adapter.model,
        "object": "model",
        "created": adapter.created,
        "owned_by": "tucka",
        "root": service.model_name,
        "parent": service.model_name if adapter.member is None else adapter.key.name,
        "max_model_len": service.info.max_model_len,
        "tucka": {
            "digest": adapter.digest,
            "generation": adapter.key.generation,
            "version_of": adapter.entry.version_of,
            "versions": [version.name for version in adapter.entry.versions],
            "kind": info.kind,
            "r": info.r,
            "k": info.k,
            "t": info.t,
            "p": info.p,
            "alpha": info.alpha,
            "scope": info.scope,
            "route_prefix_tokens": info.route_prefix_tokens,
            "router": info.router,
            "target_modules": list(info.target_modules),
            "num_modules": info.num_modules,
            "members": list(info.members) if info.members and adapter.member is None else None,
            "bytes": info.bytes,
            "tier": service.adapters.tier(adapter),
            "keep_resident": adapter.entry.keep_resident,
            "overflows": service.metrics.adapters.overflows(adapter.key.name),
            "pinned": {"group": adapter.pinned.group, "weights": adapter.pinned.weights} if adapter.pinned else None,
        },
    }
