"""What every test shares."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """Recorded vectors of the official TuckA code (tests/golden/README.md says how they were made)."""
    return Path(__file__).parent / "golden"
