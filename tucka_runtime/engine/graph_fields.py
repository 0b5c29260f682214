"""What varies from step to step, where a graph reads it."""

import torch
from torch import Tensor

from tucka_runtime.kernels.tables.transfer import pack, view

CPU = torch.device("cpu")

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of each field."""


class Fields:
    """Named tensors in one buffer on the device and one, pinned, on the host; `send` copies the one to the other."""

    def __init__(self, shapes: Shapes, device: torch.device):
        places, size = pack([dtype.itemsize * torch.Size(shape).numel() for dtype, shape in shapes.values()])
        at = dict(zip(shapes, places, strict=True))
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self.on_device = {name: view(self._device, at[name], *own) for name, own in shapes.items()}
        # Two by turns: the host writes the next step's while the last one's may still be on its way.
        self._hosts = [
            torch.zeros(size, dtype=torch.uint8, device=CPU, pin_memory=device.type == "cuda") for _ in range(2)
        ]
        self._views = [{name: view(host, at[name], *own) for name, own in shapes.items()} for host in self._hosts]
        self._turn = 0

    @property
    def on_host(self) -> dict[str, Tensor]:
        """Where the next `send` reads."""
        return self._views[self._turn]

    def send(self, size: int | None = None) -> None:
        """One copy of everything, or of the first `size` bytes."""
        self._device[:size].copy_(self._hosts[self._turn][:size], non_blocking=True)
        self._turn = 1 - self._turn
