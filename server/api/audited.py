"""What changes adapters, with its line in the audit log."""

from starlette.requests import Request
from starlette.responses import Response

from tucka_runtime.server.api.door import Endpoint
from tucka_runtime.server.service.service import Service


def audited(route: str, endpoint: Endpoint) -> Endpoint:
    """The endpoint, whose answer waits for its line. It raises StorageError, before anything is done, while the audit
    log cannot be written."""

    async def change(request: Request) -> Response:
        service: Service = request.app.state.service
        if service.audit is None:
            return await endpoint(request)
        async with service.audit.change(route, request.state.access.name, request.state.request_id):
            return await endpoint(request)

    return change
