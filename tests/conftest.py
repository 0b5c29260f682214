"""What every test shares."""

import os
from pathlib import Path

import pytest
import torch

# Triton reads this when it is first imported, which transformers does: so it is set here, before any test module.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Recorded vectors of the official TuckA code (tests/golden/README.md says how they were made)."""
    return Path(__file__).parent / "golden"
