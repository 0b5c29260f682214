"""What several tests use: engines and servers to drive, fakes, and files to feed them."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
