"""What every test shares."""

import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tucka_runtime.kernels.native import library

# The kernels' tests run where there is no server: a GPU machine with torch, triton, transformers and safetensors alone.
pytest_plugins = ["tests.support.server_fixtures"] if importlib.util.find_spec("uvicorn") else []

# Triton reads this when it is first imported, which transformers does: so it is set here, before any test module.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What cannot run here is deselected, and said to be so in pytest's last line."""
    unfit = {"interpreted" if torch.cuda.is_available() else "gpu"}
    if library.load() is None:
        unfit.add("native")
    out = [item for item in items if any(map(item.get_closest_marker, unfit))]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


@pytest.fixture(autouse=True)
def logging_stays() -> Iterator[None]:
    """A command that a test runs logs to the stderr of that test, which is closed after it, and may silence loggers."""
    handlers = set(logging.root.handlers)
    loggers = [known for known in logging.root.manager.loggerDict.values() if isinstance(known, logging.Logger)]
    levels = [(known, known.level) for known in (logging.root, *loggers)]
    yield
    for handler in set(logging.root.handlers) - handlers:
        logging.root.removeHandler(handler)
    for known, level in levels:
        if known.level != level:
            known.setLevel(level)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Recorded vectors of the official TuckA code (tests/golden/README.md says how they were made)."""
    return Path(__file__).parent / "golden"
