"""GET /v1/models and /v1/models/{id}: the base model, its aliases and its adapters as cards. Anthropic's clients ask at
the same path, with their `anthropic-version`, for cards of another shape."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
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

Card = dict[str, Any]
AT_ONCE = 64  # cards written before others get on: some 2 ms


async def list_models(request: Request) -> Response:
    service: Service = request.app.state.service
    sees = request.state.access.sees
    first = [base_card(service, name) for name in service.adapters.base_names if sees(name)]
    first += [alias_card(service, alias.name) for alias in service.adapters.aliases if sees(alias.name)]
    models = [model for adapter in service.adapters.all() for model in adapter.members if sees(model.model)]
    if not _for_anthropic(request):
        return await listed(request, models, first)
    names = [card["id"] for card in first] + [adapter.model for adapter in models] or [None]
    after = encode_json({"has_more": False, "first_id": names[0], "last_id": names[-1]})
    cards = await _encoded(service, [_anthropic_card(card) for card in first], models, _anthropic_card)
    return Response(b'{"data":[' + cards + b"]," + after[1:], media_type="application/json")


async def listed(request: Request, adapters: Sequence[LoadedAdapter], first: Sequence[Card] = ()) -> Response:
    """The list of `first` and the adapters' cards, or the page of it that the query asks for."""
    service: Service = request.app.state.service
    asked = accept(request, ListQuery, query_of(request, ListQuery))
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
    own = adapters[max(begin - len(first), 0) : max(end - len(first), 0)]
    cards = await _encoded(service, first[begin:end], own, lambda card: card)
    more = b"" if asked.limit is None else b',"has_more":%s' % (b"true" if end < total else b"false")
    return Response(b'{"object":"list","data":[' + cards + b"]" + more + b"}", media_type="application/json")


async def _encoded(
    service: Service, first: Sequence[Card], adapters: Sequence[LoadedAdapter], shape: Callable[[Card], Card]
) -> bytes:
    """Thousands of cards are written bit by bit, between which others get on."""
    cards = [encode_json(card) for card in first]
    for begin in range(0, len(adapters), AT_ONCE):
        cards += [encode_json(shape(adapter_card(service, one))) for one in adapters[begin : begin + AT_ONCE]]
        await asyncio.sleep(0)
    return b",".join(cards)


async def get_model(request: Request) -> Response:
    service: Service = request.app.state.service
    name, sees = request.path_params["name"], request.state.access.sees
    if not name:  # /v1/models/, as some clients have it
        return await list_models(request)
    if name in service.adapters.base_names and sees(name):
        card = base_card(service, name)
    elif name in service.adapters.aliases and sees(name):
        card = alias_card(service, name)
    else:
        card = adapter_card(service, service.adapters.card(name, sees))
    return JSONAnswer(_anthropic_card(card) if _for_anthropic(request) else card)


def _for_anthropic(request: Request) -> bool:
    return "anthropic-version" in request.headers


def _anthropic_card(card: Card) -> Card:
    return {
        "type": "model",
        "id": card["id"],
        "display_name": card["id"],
        "created_at": datetime.fromtimestamp(card["created"], UTC).isoformat(),
        "lifecycle": "active",
        "max_input_tokens": card["max_model_len"],
        "max_tokens": card["max_model_len"],
    }


def base_card(service: Service, name: str) -> Card:
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "tucka",
        "root": service.model_name,
        "parent": None,
        "max_model_len": service.info.max_model_len,
    }


def alias_card(service: Service, name: str) -> Card:
    """What it stands for is shown to admins alone, by /v1/aliases."""
    return base_card(service, name) | {"parent": service.model_name}


def adapter_card(service: Service, adapter: LoadedAdapter) -> Card:
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
            "vocab_size": info.vocab_size,
            "members": list(info.members) if info.members and adapter.member is None else None,
            "bytes": info.bytes,
            "defaults": service.adapters.sets(adapter.entry),
            "tier": service.adapters.tier(adapter),
            "keep_resident": adapter.entry.keep_resident,
            "overflows": service.metrics.adapters.overflows(adapter.key.name),
            "pinned": {"group": adapter.pinned.group, "weights": adapter.pinned.weights} if adapter.pinned else None,
        },
    }
