"""What progress says of the experts: whole turns of the route scopes, and a router that has collapsed."""

import pytest

from tucka_runtime.trainer.progress import Step, TrainingProgress, clock, collapsed, mean_load

TURN = [[8, 24], [100, 300], [0, 1]]  # a route a record, a token, a batch


def test_load_is_a_mean_over_whole_turns() -> None:
    """However many steps are looked at, the scope `batch`, whose one route is all or nothing, weighs the same."""
    expected = [(0.25 + 0.25 + 0) / 3, (0.75 + 0.75 + 1) / 3]
    for more in range(3):
        steps = (TURN * 5)[: 12 + more]
        assert mean_load(steps, 3) == pytest.approx(expected)
    assert mean_load([[]] * 4, 1) == []


def test_a_collapsed_router_is_said() -> None:
    early = [[10, 10, 10]] * 30
    assert collapsed(early + [[0, 30, 0]] * 10, 1) is not None
    assert "group 1 took 100%" in str(collapsed(early + [[0, 30, 0]] * 10, 1))
    assert collapsed(early + [[1, 29, 0]] * 10, 1) is None
    assert collapsed([[5]] * 40, 1) is None  # a single group cannot collapse
    assert collapsed([[]] * 40, 1) is None


def test_every_line_has_load_speed_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    progress = TrainingProgress(60, 0, 3)
    for number in range(1, 61):
        progress.step(Step(number, 0.5, TURN[number % 3], 100, 1e-3))
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    for line in lines:
        assert " experts 17/83% " in line
        assert " tok/s elapsed 0:00 left 0:00" in line


def test_clock() -> None:
    assert [clock(s) for s in (0, 61, 3600 + 125)] == ["0:00", "1:01", "1:02:05"]
