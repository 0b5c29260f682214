"""Managing adapters: GET/POST /v1/adapters, GET/PUT/DELETE /v1/adapters/{name}, POST its rollback, vLLM's two routes
with its bodies, and SGLang's."""

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from tucka_runtime.errors import BaseModelMismatchError, InvalidAdapterError, TuckaError
from tucka_runtime.messages import Route
from tucka_runtime.server.api import fields
from tucka_runtime.server.api.bodies import LoadAdapterBody, LoadLoraBody, RollbackBody, UnloadLoraBody, UploadQuery
from tucka_runtime.server.api.models import adapter_card, listed
from tucka_runtime.server.api.reading import accept, query_of, read_body
from tucka_runtime.server.http.answers import JSONAnswer
from tucka_runtime.server.http.body import pieces
from tucka_runtime.server.http.multipart import boundary_of
from tucka_runtime.server.service.audit import note
from tucka_runtime.server.service.leases import LoadedAdapter
from tucka_runtime.server.service.service import Service


async def list_adapters(request: Request) -> Response:
    service: Service = request.app.state.service
    return await listed(request, service.adapters.all(request.state.access.sees))


async def get_adapter(request: Request) -> Response:
    """The card, and with it the whole of the adapter's training.json."""
    service: Service = request.app.state.service
    with _params(name="name"):
        adapter = service.adapters.get(request.path_params["name"], request.state.access.sees)
    card = adapter_card(service, adapter)
    return JSONAnswer(card | {"tucka": card["tucka"] | {"training": await service.adapters.training(adapter)}})


async def post_adapter(request: Request) -> Response:
    """201 with the card when it was loaded, 200 when the name had this content already."""
    service: Service = request.app.state.service
    body = await read_body(request, LoadAdapterBody)
    pinned = fields.pinned_route(body.pinned)
    with _params(name="name", path=None if pinned else "path"):  # a pinned route that does not fit is no fault of it
        inplace, keep = bool(body.load_inplace), body.keep_resident
        adapter, loaded = await _load(request, body.name, body.path, inplace, pinned, keep)
    return JSONAnswer(adapter_card(service, adapter), 201 if loaded else 200)


async def put_adapter(request: Request) -> Response:
    """The same for an adapter in the body: its files as multipart/form-data, else a .tar or .tar.gz of them."""
    service: Service = request.app.state.service
    asked = accept(request, UploadQuery, query_of(request, UploadQuery))
    name, boundary = request.path_params["name"], boundary_of(request.headers.get("content-type", ""))
    note("load", name)
    with _params(name="name"):
        request.state.access.check_name(name)
        uploaded = service.adapters.sources.uploaded(pieces(request), boundary)
        inplace, keep = bool(asked.load_inplace), asked.keep_resident
        adapter, loaded = await service.adapters.load_from(name, uploaded, inplace, None, keep_resident=keep)
    return JSONAnswer(adapter_card(service, adapter), 201 if loaded else 200)


async def roll_back(request: Request) -> Response:
    """200 with the card of what the name stands for then. The body may be empty."""
    service: Service = request.app.state.service
    name = request.path_params["name"]
    note("rollback", name)
    body = await read_body(request, RollbackBody) if request.state.body else RollbackBody()
    with _params(name="name"):
        adapter = await service.adapters.rollback(name, body.to, request.state.access.sees)
    return JSONAnswer(adapter_card(service, adapter))


async def delete_adapter(request: Request) -> Response:
    """200 when the adapter is gone, 202 when requests that use it go on until they end."""
    service: Service = request.app.state.service
    name = request.path_params["name"]
    with _params(name="name"):
        in_use = await service.adapters.unload(name, request.state.access.sees)
    return JSONAnswer({"id": name, "object": "model", "deleted": True}, 202 if in_use else 200)


async def load_lora_adapter(request: Request) -> Response:
    body = await read_body(request, LoadLoraBody)
    with _params(name="lora_name", path="lora_path"):
        await _load(request, body.lora_name, body.lora_path, bool(body.load_inplace), None, body.pinned)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload_lora_adapter(request: Request) -> Response:
    """200, as vLLM's, also when requests that use it go on."""
    service: Service = request.app.state.service
    body = await read_body(request, UnloadLoraBody)
    with _params(name="lora_name"):
        await service.adapters.unload(body.lora_name, request.state.access.sees)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def load_as_sglang(request: Request) -> Response:
    await load_lora_adapter(request)
    return _loaded(request)


async def unload_as_sglang(request: Request) -> Response:
    await unload_lora_adapter(request)
    return _loaded(request)


def _loaded(request: Request) -> Response:
    """SGLang's answer: what is loaded now, by name."""
    service: Service = request.app.state.service
    adapters = service.adapters.all(request.state.access.sees)
    return JSONAnswer({"success": True, "loaded_adapters": {a.key.name: a.entry.source for a in adapters}})


async def _load(
    request: Request, name: str, path: str, inplace: bool, pinned: Route | None, keep_resident: bool | None
) -> tuple[LoadedAdapter, bool]:
    service: Service = request.app.state.service
    note("load", name)
    request.state.access.check_name(name)
    source = service.adapters.sources.found(path)
    return await service.adapters.load_from(name, source, inplace, pinned, keep_resident=keep_resident)


@contextmanager
def _params(name: str, path: str | None = None) -> Iterator[None]:
    """Errors name the field as the route's client called it; those about an adapter's files name its path."""
    try:
        yield
    except TuckaError as error:
        if error.param in ("name", "model"):
            error.param = name
        elif isinstance(error, InvalidAdapterError | BaseModelMismatchError):
            error.param = path
        raise
