"""The script that holds mixed traffic to solo runs, short: nothing differs, and what makes it hard took place."""

import pytest

from tests.chaos import mixed


def test_mixed_traffic_is_what_solo_runs_are(capsys: pytest.CaptureFixture[str]) -> None:
    report = mixed.check(tokens=200)
    mixed.show(report)
    said = capsys.readouterr().out
    assert not report.mismatches, said
    assert report.tokens >= 200 and report.happened["of them right"] > 0, said


def test_a_token_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft that is believed where the sampler chose another token."""

    def believed(sampler, rounds, chunks, drafts):
        depth = len(rounds) - 1
        going = [i for i in rounds[-1].due if depth < len(drafts.get(i, ()))]
        for i in going:
            chunks[i].seq.tokens.append(drafts[i][depth])
        return going

    monkeypatch.setattr("tucka_runtime.engine.verify._right", believed)
    assert mixed.check(tokens=50).mismatches
