"""The scripts that mutate bodies and ask what /openapi.json describes, short."""

import random

import pytest

from tests.chaos import described, mutations


def test_mutated_bodies_are_answered() -> None:
    answers, faults, memory = mutations.trial(300, threads=4, seed=5)
    assert not faults, faults
    assert len(memory) == mutations.PARTS and answers["200"] and answers["400"]


def test_every_seed_is_changed_everywhere() -> None:
    chance = random.Random(1)
    for _, body in mutations.SEEDS:
        places = set(mutations.nodes(body))
        assert len(places) >= len(body)
        assert any(mutations.mutated(body, chance) != body for _ in range(10))


def test_what_is_described_holds(capfd: pytest.CaptureFixture[str]) -> None:
    assert described.main(["--examples", "3", "--path", "/tokenize", "--phases", "fuzzing"]) == 0, (
        capfd.readouterr().out
    )
