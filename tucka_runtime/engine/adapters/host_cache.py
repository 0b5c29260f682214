"""Folded adapters without a slot, in the host's memory. What is kept, and for how long, the API's process decides."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from tucka_runtime.engine.adapters.folded import FoldedAdapter
from tucka_runtime.messages import AdapterInfo, AdapterKey

T = TypeVar("T")


class HostCache:
    """Adapters by key. Belongs to the thread that loads: nobody else reads it."""

    def __init__(self) -> None:
        self._folded: dict[AdapterKey, FoldedAdapter] = {}
        self._infos: dict[AdapterKey, AdapterInfo] = {}
        """The cards of all that were folded and not dropped, those in slots among them."""

    def __contains__(self, key: AdapterKey) -> bool:
        return key in self._folded

    def note(self, info: AdapterInfo) -> None:
        """Remembers the card of an adapter that was folded, until `drop`."""
        self._infos[info.key] = info

    def put(self, folded: FoldedAdapter) -> None:
        """Keeps an adapter whose tensors are in the host's memory. One that was dropped meanwhile stays away."""
        if folded.key in self._infos:
            self._folded[folded.key] = folded

    def find(self, key: AdapterKey) -> tuple[FoldedAdapter, AdapterInfo] | None:
        """The adapter and its card, which stay."""
        return (self._folded[key], self._infos[key]) if key in self._folded else None

    def take(self, key: AdapterKey) -> None:
        """Lets go of an adapter that has got a slot; its card stays."""
        self._folded.pop(key, None)

    def drop(self, key: AdapterKey) -> None:
        """Forgets an adapter. An unknown key is nothing to do."""
        self._folded.pop(key, None)
        self._infos.pop(key, None)


def moved(value: T, device: torch.device) -> T:
    """The same with all of its tensors on `device`, however deep in dataclasses, mappings and tuples they lie."""
    changed: Any = value
    if isinstance(value, Tensor):
        changed = value.to(device)
    elif is_dataclass(value) and not isinstance(value, type):
        changed = replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    elif isinstance(value, Mapping):
        changed = {key: moved(item, device) for key, item in value.items()}
    elif isinstance(value, tuple):
        changed = tuple([moved(item, device) for item in value])
    found: T = changed
    return found
