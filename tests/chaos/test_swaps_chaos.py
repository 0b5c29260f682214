"""The script of swaps and big loads, short: it runs, no stream breaks, and no prompt waits for a copy."""

import pytest

from tests.chaos import swaps


def test_streams_and_prompts_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    """How long tokens take is for an idle machine to say: here no ratio is too large."""
    status = swaps.main(
        ["--swaps", "12", "--rate", "6", "--streams", "4", "--ratio", "1000", "--loads", "3", "--mib", "64"]
    )
    said = capsys.readouterr().out
    assert status == 0, said
    assert float(said.rpartition("longest first token ")[2].split()[0]) < 10, said
