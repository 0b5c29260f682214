"""The model of bytes and launches: what it counts, and that the README has what it prints."""

from pathlib import Path

import pytest

from tucka_runtime.kernels.bench import fewer_bits, latency_model, model
from tucka_runtime.kernels.bench.shapes import LLAMA3_8B

README = Path(__file__).parents[2] / "kernels" / "README.md"


def decode(adapters: int, rank: int = 16, targets: str = "all", **machine: float) -> model.Estimate:
    return model.decode(LLAMA3_8B, model.Machine(**machine), targets, adapters, rank, 0.15)


def test_a_norm_is_a_launch_only_where_tiles_are_full() -> None:
    assert [decode(adapters).launches for adapters in (1, 8, 32)] == [192, 192, 128]
    assert decode(32, rank=64).launches == 32 * 4 * 2
    assert decode(32, targets="qv").launches == 32
    assert model.prompt(LLAMA3_8B, model.Machine(), 2048, 16, 0.04).launches == 32 * (4 * 2 + 2)


def test_what_no_stream_hides_is_counted() -> None:
    """At o and down of 32 layers: two rows of 8 KB, read twice, with as many of weights, and written; or a launch."""
    for adapters, seconds in ((32, 64 * 4 * 2 * 8192 / 1e11), (1, 64 * 1e-6)):
        line = decode(adapters)
        bytes_alone = line.at_floor / 0.75
        assert line.overlapped - bytes_alone == pytest.approx(seconds / (line.base * 1e-6))
        assert line.expected - line.overlapped == pytest.approx(32 * 4 * 1e-6 / (line.base * 1e-6))
    assert decode(32, program=1e30).overlapped == pytest.approx(decode(32).at_floor / 0.75)


def test_the_readme_has_what_the_model_prints() -> None:
    rows = [row.replace("*", "") for row in README.read_text().splitlines() if row.startswith("| ")]
    for line in model.lines(LLAMA3_8B, model.Machine()):
        figures = f"| {line.base:.0f} | {line.delta_bytes / 1e6:.0f} | {line.launches} | {line.at_floor:.1%} "
        figures += f"| {line.expected:.1%} | {line.overlapped:.1%} | {line.target:.0%} |"
        assert [row for row in rows if row.endswith(figures)], figures


def test_what_waits_add_is_over_the_bytes_alone() -> None:
    """No waits, no forks: factors and norms are left. With them, each part is what it is made of."""
    shape, free = LLAMA3_8B, model.Machine(latency=0, fork=0, launch=0)
    line = latency_model.added("", shape, free, 32, 16)
    assert (line.shrinks, line.forks, line.expands) == (0, 0, 0)
    assert line.total == pytest.approx(decode(32).overlapped)
    line = latency_model.added("", shape, model.Machine(), 32, 16)
    assert line.forks == pytest.approx(128)
    swiglu, qkv, out = (
        own + max(0, turns - 32 * 16 * 2 * width / (0.75 * 4.3e12) / 0.6e-6)
        for own, turns, width in ((2, 8 * 2, 2 * 14336), (2, 2 * 2, 6144), (4, 2 * 1, 4096))
    )
    assert line.expands == pytest.approx(32 * 0.6 * (swiglu + qkv + 2 * out))


def test_a_banks_factors_are_read_once_for_a_tile() -> None:
    assert latency_model.adapter_tiles([(i, i + 1, 0) for i in range(64)]) == 4
    assert latency_model.adapter_tiles([(i, i + 1, i) for i in range(64)]) == 64
    assert "4 tiles, 336 MB" in latency_model.bank(LLAMA3_8B, model.Machine())


def test_no_format_of_8_bits_keeps_the_tolerance() -> None:
    """Why factors stay in 16: one that did would be worth building."""
    readme = README.read_text()
    for name, error in fewer_bits.errors().items():
        assert (error > fewer_bits.TOLERANCE) == (not name.startswith("12 bits"))
        assert f"{error:.2%}" in readme


def test_the_readme_has_what_waits_add() -> None:
    rows = README.read_text().replace("*", "")
    for x in latency_model.lines(LLAMA3_8B, model.Machine()):
        figures = (f"{v:.0f}" for v in (x.factors, x.shrinks, x.forks, x.expands, x.norms))
        assert f"| {x.what} | {' | '.join(figures)} | {x.total:.1%} |" in rows
