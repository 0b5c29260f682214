"""How `tucka train` ends: whatever happens from the last step on, what was trained is there."""

import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import make_workplace, train
from tucka_runtime.trainer.loop import Loop
from tucka_runtime.trainer.progress import TrainingProgress

WEIGHTS = "out/adapter_model.safetensors"


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    return make_workplace(tmp_path)


def after_a_step(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> None:
    step = TrainingProgress.step

    def stepped(self: TrainingProgress, at: Any) -> None:
        step(self, at)
        call()

    monkeypatch.setattr(TrainingProgress, "step", stepped)


def test_the_data_may_go_while_it_trains(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = workplace / "data.jsonl"
    sha256 = hashlib.sha256(data.read_bytes()).hexdigest()
    after_a_step(monkeypatch, data.unlink)
    assert train(workplace, "--steps", "1") == 0
    training = json.loads((workplace / "out/training.json").read_text())
    assert training["data"] == {"file": "data.jsonl", "sha256": sha256, "train": 22, "held_out": 2}


def test_the_data_may_be_a_pipe(workplace: Path) -> None:
    content = (workplace / "data.jsonl").read_bytes()
    os.mkfifo(workplace / "pipe")
    threading.Thread(target=(workplace / "pipe").write_bytes, args=(content,), daemon=True).start()
    assert train(workplace, "--steps", "1", "--data", str(workplace / "pipe")) == 0
    training = json.loads((workplace / "out/training.json").read_text())
    assert training["data"]["sha256"] == hashlib.sha256(content).hexdigest()


def test_ctrl_c_while_the_end_is_measured_leaves_the_adapter(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(workplace, "--steps", "2", "--checkpoint-every", "0") == 0
    whole = (workplace / WEIGHTS).read_bytes()
    monkeypatch.setattr(Loop, "evaluate_base", lambda self: os.kill(os.getpid(), signal.SIGINT))
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    try:
        assert train(workplace, "--steps", "2", "--checkpoint-every", "0", "--overwrite") == 130
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert f"the adapter is in {workplace}/out" in capsys.readouterr().err
    assert (workplace / WEIGHTS).read_bytes() == whole
    training = json.loads((workplace / "out/training.json").read_text())
    assert training["steps"] == 2 and "eval" not in training
    assert not (workplace / "out/predictions.jsonl").exists()  # those were of the adapter before


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Who read stdout and stderr has gone, as `| head` goes."""
    with ExitStack() as opened:
        for name in ("stdout", "stderr"):
            reader, writer = os.pipe()
            os.close(reader)
            monkeypatch.setattr(sys, name, opened.enter_context(open(writer, "w")))
        yield


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("jobs", [False, True], ids=["one", "jobs"])
def test_a_training_that_nobody_listens_to_is_written(workplace: Path, jobs: bool) -> None:
    assert train(workplace, "--steps", "3", *(("--sweep", "seed=0,1") if jobs else ())) == 0
    for folder in ("out/seed-0", "out/seed-1") if jobs else ("out",):
        assert (workplace / folder / "adapter_model.safetensors").is_file()


@pytest.mark.usefixtures("nobody")
def test_a_refusal_that_nobody_reads_is_one(workplace: Path) -> None:
    assert train(workplace, "--steps", "0") == 2


def test_what_is_of_an_earlier_adapter_goes_and_what_is_ones_own_stays(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(workplace, "--steps", "1") == 0
    assert (workplace / "out/predictions.jsonl").is_file()
    assert train(workplace, "--steps", "1", "--overwrite", "--eval-fraction", "0") == 0
    assert not (workplace / "out/predictions.jsonl").exists()
    (workplace / "mine").mkdir()
    (workplace / "mine/README.md").write_text("mine")
    assert train(workplace, "--steps", "1", "--out", str(workplace / "mine")) == 2
    assert "would replace (README.md)" in capsys.readouterr().err
    assert (workplace / "mine/README.md").read_text() == "mine"


def test_a_base_of_the_hub_is_recorded_by_its_name(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tucka_runtime.cli.train_plan.find_base", lambda *_, **__: (workplace / "base", "some/name")
    )  # as for what the Hub's cache holds
    assert train(workplace, "--model", "some/name", "--steps", "1") == 0
    config = json.loads((workplace / "out/adapter_config.json").read_text())
    training = json.loads((workplace / "out/training.json").read_text())
    assert config["base_model_name_or_path"] == training["base"] == "some/name"
    assert "base_model: some/name\n" in (workplace / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("records", "flags", "steps"),
    [
        (5, (), 3),  # a pass is one batch
        (17, (), 9),  # three batches, of which the last is topped up
        (17, ("--accumulate", "2"), 5),
        (20, ("--route-batch", "batch"), 12),  # two batches of each of two sub-tasks
        (24, ("--epochs", "0.3"), 1),
    ],
)
def test_an_epoch_is_a_pass_over_every_record(
    workplace: Path, records: int, flags: tuple[str, ...], steps: int
) -> None:
    lines = (workplace / "data.jsonl").read_text().splitlines(keepends=True)[:records]
    (workplace / "data.jsonl").write_text("".join(lines))
    assert train(workplace, "--eval-fraction", "0", *flags) == 0
    assert json.loads((workplace / "out/training.json").read_text())["steps"] == steps


def test_ten_is_ten(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save = Loop.save
    monkeypatch.setattr(Loop, "save", lambda self, folder: (saved.append(self.step), save(self, folder)))
    assert train(workplace, "--steps", "19") == 0
    assert saved == list(range(2, 19, 2))
