"""Managing aliases: GET/POST /v1/aliases, GET/DELETE /v1/aliases/{name}."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tucka_runtime.errors import TuckaError
from tucka_runtime.names import Alias
from tucka_runtime.server.api.bodies import AliasBody
from tucka_runtime.server.api.reading import read_body
from tucka_runtime.server.http.access import Sees
from tucka_runtime.server.http.answers import JSONAnswer
from tucka_runtime.server.service.audit import note
from tucka_runtime.server.service.service import Service


async def list_aliases(request: Request) -> Response:
    service: Service = request.app.state.service
    sees = request.state.access.sees
    shown = [_shown(alias, sees) for alias in service.adapters.aliases if sees(alias.name)]
    return JSONAnswer({"object": "list", "data": shown})


async def get_alias(request: Request) -> Response:
    service: Service = request.app.state.service
    sees = request.state.access.sees
    return JSONAnswer(_shown(service.adapters.alias_of(request.path_params["name"], sees), sees))


async def post_alias(request: Request) -> Response:
    """201 when it is new, 200 when it has other targets now."""
    service: Service = request.app.state.service
    access = request.state.access
    body = await read_body(request, AliasBody)
    note("alias", body.name)
    access.check_name(body.name)
    try:
        alias, new = await service.adapters.put_alias(body.name, body.targets, access.sees)
    except TuckaError as error:
        error.param = "targets" if error.param == "model" else error.param
        raise
    return JSONAnswer(_shown(alias, access.sees), 201 if new else 200)


async def delete_alias(request: Request) -> Response:
    service: Service = request.app.state.service
    name = request.path_params["name"]
    await service.adapters.remove_alias(name, request.state.access.sees)
    return JSONAnswer({"id": name, "object": "alias", "deleted": True})


def _shown(alias: Alias, sees: Sees) -> dict[str, Any]:
    """The alias, with the targets that the key sees: others may be its name's as well."""
    return {"name": alias.name, "object": "alias", "targets": {name: w for name, w in alias.targets if sees(name)}}
