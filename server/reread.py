"""What a running server reads again on SIGHUP: the key file. The audit log is opened again, for who moves it away."""

import asyncio
import logging

from tucka_runtime.errors import ConfigError
from tucka_runtime.logs import fields
from tucka_runtime.server.http.key_file import read_key_file
from tucka_runtime.server.service.audit import AuditedChange
from tucka_runtime.server.service.service import Service

log = logging.getLogger("tucka_runtime.server")


async def reread(service: Service, hung_up: asyncio.Event) -> None:
    """Reads the key file again, and opens the audit log again, whenever SIGHUP has come. A file that is wrong changes
    nothing."""
    while True:
        await hung_up.wait()
        hung_up.clear()
        if service.audit is not None:
            await service.audit.reopen()
        if (path := service.config.api_key_file) is None:
            continue
        try:
            found = service.keys.replace(await asyncio.to_thread(read_key_file, path))
        except ConfigError as error:
            log.error("%s The keys stay as they were.", error.message)
            continue
        differs = {"added": found.added, "changed": found.changed, "removed": found.removed}
        said = "".join(f"; {what}: {', '.join(names)}" for what, names in differs.items() if names)
        log.info("%d keys in %s%s", found.count, path, said, extra=fields(event="keys_read", **differs))
        if service.audit is not None:
            await service.audit.write(None, None, AuditedChange("keys"), "ok", keys=differs)
