"""Adapters that were sent for, and the requests that hold a slot or wait for one."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum

from tucka_runtime.errors import TuckaError
from tucka_runtime.messages import AdapterInfo, AdapterKey

Load = Callable[[bool], Awaitable[AdapterInfo]]
"""Has the engine load an adapter, into a slot or (False) into the host cache. Raises TuckaError."""


class Tier(StrEnum):
    """Where an adapter is that has been loaded under a name: as near as it is."""

    RESIDENT = "resident"  # in a slot: any batch may have it
    HOST = "host"  # folded, in the host's memory
    REGISTERED = "registered"  # on the disk


@dataclass(eq=False)
class Coming:
    """An adapter that was sent for. It waits for a slot, and then for the engine."""

    load: Load
    holds: "set[Hold]" = field(default_factory=set)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    error: TuckaError | None = None
    task: "asyncio.Task[None] | None" = None


@dataclass(eq=False)
class Hold:
    """A request's hold on its adapter's slot: `coming` until it has one."""

    key: AdapterKey
    coming: Coming | None = None
