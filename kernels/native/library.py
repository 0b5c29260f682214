"""Where the built native kernels lie, and which of them this CPU can run."""

import hashlib
import logging
import sys
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FOLDER = SOURCES / "built"


@cache
def _version() -> str:
    """What a library fits: the sources that it was made of, torch, and Python."""
    digest = hashlib.sha256(f"{torch.__version__} {sys.implementation.cache_tag}".encode())
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
def _loaded() -> tuple[str, Any] | None:
    for capability in capabilities():
        path = path_of(capability)
        if path.is_file():
            loader = ExtensionFileLoader("tucka_native", str(path))
            spec = spec_from_loader(loader.name, loader)
            assert spec is not None
            try:
                module = module_from_spec(spec)
            except ImportError as error:
                logger.warning("the native kernels in %s cannot be loaded: %s", path, error)
                continue
            return capability, module
    return None


def load() -> str | None:
    """Loads the library for this CPU, once, and names the capability that it was built for; None where there is none
    that can be loaded."""
    found = _loaded()
    return found[0] if found else None


def module() -> Any:
    """The functions of the library: each op by its name, its arguments by position. `load` must have found one."""
    found = _loaded()
    assert found is not None
    return found[1]
