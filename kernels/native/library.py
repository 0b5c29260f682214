"""Where the built native kernels lie, and which of them this CPU can run."""

from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "built"


def path_of(capability: str) -> Path:
    """The library for one of torch's CPU capabilities. It fits the version of torch that it was built with, alone."""
    version = torch.__version__.split("+")[0]
    return FOLDER / f"tucka-{version}-{capability.lower()}.so"


@cache
def load() -> str | None:
    """Loads the library for this CPU, once, and says which instructions it takes; None where there is none that can be
    loaded. Then `torch.ops.tucka` has the ops."""
    own = torch.backends.cpu.get_cpu_capability()
    for capability in (own, "DEFAULT"):
        path = path_of(capability)
        if path.is_file():
            try:
                torch.ops.load_library(path)
            except OSError:
                continue
            return capability
    return None
