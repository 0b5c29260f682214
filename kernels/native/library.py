"""Where the built native kernels lie, and which of them this CPU can run."""

import hashlib
import logging
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FOLDER = SOURCES / "built"


@cache
def _version() -> str:
    """What a library fits: the sources that it was made of, and torch."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def capabilities() -> tuple[str, ...]:
    """What libraries this CPU can run, the best first: torch's own names, and AVX512_BF16 where it multiplies bf16."""
    own = torch.backends.cpu.get_cpu_capability()
    better = ("AVX512_BF16",) if own == "AVX512" and torch.cpu._is_avx512_bf16_supported() else ()
    return (*better, own, "DEFAULT")


def path_of(capability: str) -> Path:
    """The library for one of `capabilities`. One of other sources or another torch has another name, so that it is
    never loaded."""
    return FOLDER / f"tucka-{capability.lower()}-{_version()}.so"


@cache
def load() -> str | None:
    """Loads the library for this CPU, once, and names the capability that it was built for; None where there is none
    that can be loaded. From then on `torch.ops.tucka` has the ops."""
    for capability in capabilities():
        path = path_of(capability)
        if path.is_file():
            try:
                torch.ops.load_library(path)
            except OSError as error:
                logger.warning("the native kernels in %s cannot be loaded: %s", path, error.__cause__ or error)
                continue
            return capability
    return None
