"""`tucka train --jobs` and `--sweep`: what comes of each, of a failing one, and going on."""

import errno
import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.training import make_workplace, records, train
from tucka_runtime.trainer import adapter, base_model
from tucka_runtime.trainer.progress import JobsProgress

JOBS: dict[str, Any] = {
    "defaults": {"steps": 3, "lr": 1e-3, "checkpoint-every": 1, "eval_every": 3, "num_threads": 1},
    "jobs": {
        "routed": {"balance": 0.01, "seed": 1},
        "lora": {"method": "lora", "r": 2, "data": "other.jsonl", "steps": 2, "dropout": 0.2},
    },
}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = make_workplace(tmp_path)
    (made / "other.jsonl").write_text("".join(json.dumps(r | {"completion": "yes"}) + "\n" for r in records(30)))
    monkeypatch.chdir(made)
    return made


def run(workplace: Path, jobs: dict[str, Any], *flags: str) -> int:
    """`tucka train --jobs` of these, each on data.jsonl and the small base where it says nothing else."""
    defaults = {"model": "base", "data": "data.jsonl", "out": "out", "r": 4, "batch_size": 8}
    whole = jobs | {"defaults": defaults | jobs["defaults"]}
    (workplace / "jobs.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    return train(workplace, "--jobs", "jobs.yaml", *flags, given=())


def with_job(name: str, **settings: Any) -> dict[str, Any]:
    return JOBS | {"jobs": JOBS["jobs"] | {name: settings}}


def assert_as_alone(workplace: Path, name: str) -> None:
    """The job's folder holds what a single run of its recorded settings writes."""
    training = json.loads((workplace / "out" / name / "training.json").read_text())
    (workplace / "run.yaml").write_text(yaml.safe_dump(training["flags"]))
    assert train(workplace, "--config", "run.yaml", "--out", f"alone-{name}", given=()) == 0
    alone = json.loads((workplace / f"alone-{name}" / "training.json").read_text())
    assert training["final_loss"] == pytest.approx(alone["final_loss"], abs=1e-5)
    assert training["data"] == alone["data"] and training["flags"] == alone["flags"]
    weights = [load_file(workplace / at / name_ / "adapter_model.safetensors") for at, name_ in
               (("out", name), (".", f"alone-{name}"))]  # fmt: skip
    assert weights[0].keys() == weights[1].keys()
    for key, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][key], atol=1e-5, rtol=0)


def test_jobs_end_as_alone_and_a_failing_one_leaves_the_others(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = adapter.write

    def full(model: Any, folder: Path, *rest: Any) -> None:
        if folder == Path("out/unlucky"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(model, folder, *rest)

    monkeypatch.setattr(adapter, "write", full)
    jobs = with_job("wild", method="lora", lr=1e30)
    jobs["jobs"]["unlucky"] = {"method": "lora", "steps": 1}
    assert run(workplace, jobs) == 1
    said = capsys.readouterr()
    assert "wild: ended after step 1: The loss became nan at step 2" in said.err
    last = [line for line in said.err.splitlines() if "tok/s" in line][-1]
    assert "routed 3/3 loss" in last and "lora 2/2 loss" in last and " left 0:00" in last
    assert "failed: out/unlucky could not be written (is the disk full?): the adapter is in" in said.out
    assert not (workplace / "out/wild/adapter_config.json").exists()
    assert_as_alone(workplace, "routed")
    assert_as_alone(workplace, "lora")


def test_jobs_go_on_where_they_were_stopped(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = JobsProgress.turn

    def press(self: JobsProgress) -> None:
        turn(self)
        if self.jobs[1].done == 2:  # the job that has two steps ends with this one, and is written
            os.kill(os.getpid(), signal.SIGINT)

    jobs = with_job("late", method="lora", seed=3, patience=0)
    jobs["defaults"] = jobs["defaults"] | {"overwrite": True}  # how it begins, and not how it goes on
    with monkeypatch.context() as patch:
        patch.setattr(JobsProgress, "turn", press)
        assert run(workplace, jobs) == 130
    said = capsys.readouterr().out
    assert "routed: stopped after step 2 of 3; the checkpoint is in out/routed." in said
    (workplace / "out/late/checkpoint.pt").unlink()  # as if killed before its first
    words = shlex.split(said.splitlines()[-1])
    assert words == ["tucka", "train", "--jobs", "jobs.yaml", "--resume"]
    assert train(workplace, *words[2:], given=()) == 0
    said = capsys.readouterr().out
    assert "lora: already written to out/lora" in said
    assert "3 steps of 8, 2 of them done" in said
    assert_as_alone(workplace, "routed")
    assert train(workplace, "--jobs", "jobs.yaml", "--resume", "--lr", "1", given=()) == 2
    assert "job routed: out/routed holds what a training would replace" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("jobs", "words"),
    [
        (with_job("a", r=513), "job a: The server would refuse such an adapter: `r`"),
        (with_job("a", target_modules="query"), "job a: --target-modules: this base has no linear layer query"),
        (with_job("a", data="none.jsonl"), "job a: The data file none.jsonl does not exist"),
        (with_job("a", data="bad.jsonl"), "job a: 1 bad records in bad.jsonl"),
        (with_job("a", rank=2), "job a names what is no flag of tucka train: rank. There are model, data"),
        (with_job("a", out="out/lora"), "job a: its out is that of job lora"),
        (with_job("a", num_threads=2), "num_threads must be the same for all jobs"),
        (with_job("a", load_in="4bit"), "load_in must be the same for all jobs"),
        (with_job("a", report_to=["wandb"]), "job a: --report-to wandb"),
        (with_job("../a"), "a job's name has letters"),
        (JOBS | {"job": {}}, "`defaults` and `jobs` at its top, not job"),
        (JOBS | {"jobs": []}, "must have `jobs`"),
    ],
)
def test_what_is_wrong_with_a_job_is_said_before_the_base_is_loaded(
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    jobs: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.setattr(base_model, "load_model", None)
    monkeypatch.setattr("tucka_runtime.trainer.tracking.check", lambda names: None)
    (workplace / "bad.jsonl").write_text("{}\n")
    assert run(workplace, jobs) == 2
    assert words in capsys.readouterr().err
    assert not (workplace / "out").exists()


def test_a_sweep_ends_with_a_table_and_names_the_best(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ("--sweep", "lr=1e-3,1e30", "--sweep", "seed=0,1", "--method", "lora", "--steps", "2", "--num-threads", "1")
    assert train(workplace, *sweep) == 1
    *_, head, a, b, c, d, best = capsys.readouterr().out.splitlines()
    assert head.split() == ["job", "steps", "loss", "held-out", "loss", "exact", "match"]
    assert [line.split()[0] for line in (a, b, c, d)] == [
        "lr-1e-3_seed-0", "lr-1e-3_seed-1", "lr-1e30_seed-0", "lr-1e30_seed-1",
    ]  # fmt: skip
    report = json.loads((workplace / "out/report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    measured = [row for row in report["rows"] if row["held_out_loss"] is not None]
    assert len(measured) == 2 and "The loss became" in rows["lr-1e30_seed-1"]["failed"]
    first = max(measured, key=lambda row: (row["exact_match"], -row["held_out_loss"]))
    assert report["best"] == first["name"]
    assert best == f"best by held-out exact match, then loss: {first['name']}, in {workplace}/out/{first['name']}"
    assert (workplace / "out/report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--sweep", "rank=1,2"), "--sweep rank: not a setting that can be swept. These can: eval_fraction"),
        (("--sweep", "r=1,1"), "with different values"),
        (("--sweep", "load_in=4bit,8bit"), "--sweep load_in: not a setting that can be swept"),
        (("--sweep", "r=1,a"), "r in the configuration file must be a int"),
        (("--sweep", "r=1,2", "--jobs", "jobs.yaml"), "without --sweep"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str], words: str
) -> None:
    assert train(workplace, *flags) == 2
    assert words in capsys.readouterr().err
