"""What is made of measured times, and files of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.plans import PROFILE
from tucka_runtime.errors import ConfigError
from tucka_runtime.planning.profile import read_profile


@pytest.mark.parametrize(
    ("rows", "adapters", "seconds"),
    [
        (1, 1, 0.010),
        (2, 1, 0.012),
        (2, 2, 0.014),
        (4, 1, 0.016),
        (4, 4, 0.022),
        (3, 1, 0.014),  # between two and four rows
        (4, 2, 0.018),  # between one and four adapters
        (6, 1, 0.020),  # beyond what was timed: as from two to four
    ],
)
def test_steps_are_between_those_that_were_timed(rows: int, adapters: int, seconds: float) -> None:
    assert PROFILE.step(rows, adapters) == pytest.approx(seconds)


def test_more_adapters_than_were_timed_cost_what_those_did() -> None:
    few = replace(PROFILE, adapters=[1, 1, 2], own_adapters=[0.010, 0.012, 0.020])
    assert few.step(4, 2) == few.step(4, 4) == pytest.approx(0.020)


def test_prompts_are_between_those_that_were_timed() -> None:
    added = replace(PROFILE, prompt_tokens=[4, 8, 16], prompt_seconds=[0.1, 0.2, 0.6]).prompts(20)
    assert len(added) == 21 and added[0] == 0.0
    assert [added[tokens] for tokens in (1, 4, 6, 8, 12, 16, 20)] == pytest.approx([0.1, 0.1, 0.15, 0.2, 0.4, 0.6, 0.8])


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    PROFILE.write(tmp_path / "p.json")
    assert read_profile(tmp_path / "p.json") == PROFILE
    with pytest.raises(ConfigError, match="cannot be written"):
        PROFILE.write(tmp_path / "none" / "p.json")


@pytest.mark.parametrize(
    "change",
    [
        {"format": "tucka-plan-profile/9"},
        {"rows": [2, 1, 4]},
        {"rows": [1, 2]},
        {"rows": []},
        {"rows": [1], "one_adapter": [1.0], "adapters": [1], "own_adapters": [1.0]},
        {"load": -1.0},
        {"prompt_tokens": [100, 1]},
        {"prompt_seconds": [0.1]},
        {"step_beside": 0.9},
        {"servers": 0},
        {"load": "1"},
        {"load": float("nan")},
        {"adapters": [0, 1, 1]},
        {"adapter_bytes": 0},
        {"more": 1},
        {"request": None},
    ],
)
def test_what_is_no_profile_is_told_how_to_make_one(change: dict[str, object], tmp_path: Path) -> None:
    PROFILE.write(tmp_path / "p.json")
    (tmp_path / "p.json").write_text(json.dumps(json.loads((tmp_path / "p.json").read_text()) | change))
    with pytest.raises(ConfigError, match=r"no profile of this version\. Make one: tucka plan --measure"):
        read_profile(tmp_path / "p.json")


def test_no_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_profile(tmp_path / "none.json")
    for text in ("", "[]", "7", "{}"):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(ConfigError, match="no profile"):
            read_profile(tmp_path / "p.json")
