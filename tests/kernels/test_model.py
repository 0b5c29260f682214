"""The model of bytes and launches: what it counts, and that the README has what it prints."""

from pathlib import Path

import pytest

from tucka_runtime.kernels.bench import fewer_bits, model
from tucka_runtime.kernels.bench.shapes import LLAMA3_8B

README = Path(__file__).parents[2] / "kernels" / "README.md"


def decode(adapters: int, rank: int = 16, targets: str = "all", **machine: float) -> model.Estimate:
    return model.decode(LLAMA3_8B, model.Machine(**machine), targets, adapters, rank, 0.15)


def test_launches_that_a_delta_adds() -> None:
    """Two of a shrink at each site, and a norm apart from its sum at o and down."""
    assert [decode(adapters).launches for adapters in (1, 32)] == [32 * (4 * 2 + 2)] * 2
    assert decode(32, targets="qv").launches == 32 * 2
    assert model.prompt(LLAMA3_8B, model.Machine(), 2048, 16, 0.04).launches == 32 * (4 * 2 + 2)


def test_what_no_stream_hides_is_counted() -> None:
    line = decode(32)
    assert line.overlapped - line.at_floor / 0.75 == pytest.approx(64e-6 / (line.base * 1e-6))
    assert line.expected - line.overlapped == pytest.approx(32 * 4 * 2e-6 / (line.base * 1e-6))


def test_the_readme_has_what_the_model_prints() -> None:
    rows = [row.replace("*", "") for row in README.read_text().splitlines() if row.startswith("| ")]
    for line in model.lines(LLAMA3_8B, model.Machine()):
        figures = f"| {line.base:.0f} | {line.delta_bytes / 1e6:.0f} | {line.launches} | {line.at_floor:.1%} "
        figures += f"| {line.expected:.1%} | {line.overlapped:.1%} | {line.target:.0%} |"
        assert [row for row in rows if row.endswith(figures)], figures


def test_no_format_of_8_bits_keeps_the_tolerance() -> None:
    """Why factors stay in 16: one that did would be worth building."""
    readme = README.read_text()
    for name, error in fewer_bits.errors().items():
        assert (error > fewer_bits.TOLERANCE) == (not name.startswith("12 bits"))
        assert f"{error:.2%}" in readme
