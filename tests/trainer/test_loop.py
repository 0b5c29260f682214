"""The loop and the command: learning, bit-for-bit resume, early stop, manifest, publishing, LoRA."""

import argparse
import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.support.training import make_workplace, records, small_base, train
from tucka_runtime.cli import train as cli
from tucka_runtime.errors import ConfigError
from tucka_runtime.tokenizer import Tokenizer
from tucka_runtime.trainer import base_model
from tucka_runtime.trainer.adapter import AdapterSettings, attach, router_of, seed_all
from tucka_runtime.trainer.data import encode
from tucka_runtime.trainer.decode import decode_together
from tucka_runtime.trainer.evaluate import evaluate
from tucka_runtime.trainer.experiments.base import build_tokenizer
from tucka_runtime.trainer.loop import Loop, LoopConfig, learning_rate
from tucka_runtime.trainer.model import set_route_scope
from tucka_runtime.trainer.progress import TrainingProgress

TOKENIZER = build_tokenizer()
CPU = torch.device("cpu")


def examples(n=24):
    return [encode(r, Tokenizer(TOKENIZER), 64) for r in records(n)]


def make(config, folder=None, method="tucka"):
    model = attach(
        small_base(), AdapterSettings(method=method, r=4, alpha=64, balance=0.01 if method == "tucka" else 0.0), 0
    )
    seed_all(0)
    return Loop(model, examples(), examples(8), config, pad=0, device=CPU, router=router_of(model), folder=folder)


@pytest.mark.parametrize("route", ["per-sample", "batch", "mixed"])
def test_the_loss_falls(route):
    history = make(LoopConfig(steps=25, batch_size=8, lr=1e-2, route_batch=route)).run()
    assert history.loss[-1] < 0.95 * history.loss[0]  # a random tied head cannot do much better
    assert len(history.load) == 25 and all(sum(load) > 0 for load in history.load)


def test_resume_continues_bit_for_bit(tmp_path):
    config = LoopConfig(steps=9, batch_size=8, accumulate=2, route_batch="mixed", eval_every=3, checkpoint_every=4)
    whole = make(config, tmp_path)
    whole.run()
    (tmp_path / "checkpoint.pt").unlink()
    interrupted = make(config, tmp_path)

    class Killed(TrainingProgress):
        def step(self, step):
            if step.number == 7:
                raise KeyboardInterrupt

    interrupted.progress = Killed(9, 0, 3)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    resumed = make(config, tmp_path)
    resumed.resume(tmp_path)
    assert resumed.step == 4
    resumed.run()
    assert resumed.history == whole.history
    for (name, p), (_, q) in zip(resumed.parameters, whole.parameters, strict=True):
        assert torch.equal(p, q), name


def test_resume_with_other_settings_is_refused(tmp_path):
    make(LoopConfig(steps=3, batch_size=8, checkpoint_every=1), tmp_path).run()
    with pytest.raises(ConfigError, match="lr"):
        make(LoopConfig(steps=3, batch_size=8, checkpoint_every=1, lr=1e-5)).resume(tmp_path)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("dtype", lambda loop: loop.model.base_model.bfloat16()),
        ("data", lambda loop: setattr(loop, "train", examples(12))),
        ("held_out", lambda loop: setattr(loop, "held", examples(6))),
        ("base", lambda loop: setattr(loop, "base", "another")),
        ("adapter", lambda loop: setattr(loop.model.peft_config["default"], "alpha", 8)),
    ],
)
def test_resume_of_another_training_is_refused(tmp_path, what, change):
    config = LoopConfig(steps=2, batch_size=8, checkpoint_every=1)
    make(config, tmp_path).run()
    make(config).resume(tmp_path)
    other = make(config)
    change(other)
    with pytest.raises(ConfigError, match=rf"other settings \({what}\)"):
        other.resume(tmp_path)


@pytest.mark.parametrize("method", ["tucka", "lora"])
def test_a_checkpoint_from_before_a_setting_resumes_with_its_default(tmp_path, method):
    make(LoopConfig(steps=2, batch_size=8, checkpoint_every=1), tmp_path, method).run()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    adapter = json.loads(state["config"]["adapter"])
    del state["config"]["route_prefix_tokens"], adapter["exclude_modules"]
    del state["config"]["base"], state["config"]["held_out"]  # nothing is known of these
    state["config"]["adapter"] = json.dumps(adapter, sort_keys=True)
    torch.save(state, tmp_path / "checkpoint.pt")
    make(LoopConfig(steps=2, batch_size=8, checkpoint_every=1), method=method).resume(tmp_path)
    other = make(LoopConfig(steps=2, batch_size=8, checkpoint_every=1, route_prefix_tokens=16), method=method)
    with pytest.raises(ConfigError, match=r"other settings \(route_prefix_tokens\)"):
        other.resume(tmp_path)
    other = make(LoopConfig(steps=2, batch_size=8), method=method)
    other.model.peft_config["default"].exclude_modules = "head"
    with pytest.raises(ConfigError, match=r"other settings \(adapter\)"):
        other.resume(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", [1], {"model": {}}], ids=str)
def test_a_file_that_is_no_checkpoint_is_said_to_be_none(tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / "checkpoint.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(ConfigError, match="is no checkpoint of a training"):
        make(LoopConfig(steps=2, batch_size=8)).resume(tmp_path)


def test_accumulation_equals_a_larger_batch():
    ends = []
    for batch_size, accumulate in ((8, 1), (4, 2)):
        loop = make(LoopConfig(steps=1, batch_size=batch_size, accumulate=accumulate), method="lora")
        loop.train = examples(8)
        loop.run()
        ends.append(loop.parameters)
    for (_, p), (_, q) in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-3)


def test_early_stop_keeps_the_best_weights():
    loop = make(LoopConfig(steps=60, batch_size=8, lr=0.5, eval_every=2, patience=2))
    history = loop.run()
    assert history.stopped_early and len(history.loss) < 60
    assert loop.evaluate().loss == pytest.approx(history.best, rel=1e-5)


def test_a_route_of_a_batch_is_measured_as_it_was_trained():
    """Of one sub-task alone: each has the figures and the group that it has without the other."""
    loop = make(LoopConfig(steps=2, batch_size=8, route_batch="batch"))
    loop.run()
    both = loop.evaluate()
    apart = {task: [e for e in loop.held if e.task == task] for task in "ab"}
    alone = {task: evaluate(loop.model, held, 0, CPU, router=loop.router) for task, held in apart.items()}
    assert both.groups == {task: own.groups[task] for task, own in alone.items()}
    assert both.loss == pytest.approx(sum(own.loss for own in alone.values()) / 2, rel=1e-6)


def test_learning_rate_warms_up_and_falls():
    config = LoopConfig(steps=100, lr=1.0, warmup=0.1)
    rates = [learning_rate(config, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == 1.0 and rates[-1] < 0.01


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 0}, {"lr": 0}, {"lr": float("nan")}, {"lr": float("inf")}, {"patience": 2}, {"patience": -1},
        {"route_prefix_tokens": 0}, {"weight_decay": -1}, {"weight_decay": float("nan")}, {"checkpoint_every": -1},
        {"seed": -1}, {"seed": 2**32}, {"objective": "dpo", "beta": float("inf")},
    ],
)  # fmt: skip
def test_bad_loop_settings_are_refused(fields):
    with pytest.raises(ConfigError):
        LoopConfig(**{"steps": 1} | fields)


def test_teacher_forcing_agrees_with_decoding():
    """Exact match without generating is what greedy decoding gives, alone under the batch scope."""
    loop = make(LoopConfig(steps=25, batch_size=8, lr=1e-2, route_batch="mixed"))
    loop.run()
    model = loop.model.eval()
    set_route_scope(model, "batch")
    said = [decode_together(model, [list(e.ids[: e.start])], [2], 0, limit=8)[0] for e in loop.held]
    exact = sum(tuple(s) == e.ids[e.start : -1] for s, e in zip(said, loop.held, strict=True)) / len(said)
    set_route_scope(model, "decode")
    assert evaluate(model, loop.held, 0, CPU, router=loop.router).exact == exact
    assert exact > 0


@pytest.fixture
def workplace(tmp_path):
    return make_workplace(tmp_path)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), ("request", None)),
        (("--route-batch", "batch"), ("batch", None)),
        (("--route-batch", "per-sample"), ("request", None)),
        (("--route-batch", "prefix"), ("prefix", 64)),
        (("--route-batch", "prefix", "--route-prefix-tokens", "16"), ("prefix", 16)),
    ],
)
def test_an_adapter_says_how_it_was_routed(workplace, flags, said):
    assert train(workplace, "--steps", "1", *flags) == 0
    training = json.loads((workplace / "out" / "training.json").read_text())
    assert (training["route"], training.get("route_prefix_tokens")) == said


@pytest.mark.parametrize("method", ["tucka", "lora"])
def test_command_writes_an_adapter_that_loads(workplace, method, capsys):
    assert train(workplace, "--method", method, "--steps", "4") == 0
    out = workplace / "out"
    assert {p.name for p in out.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "predictions.jsonl", "training.json",
        "training.png",
    }  # fmt: skip
    training = json.loads((out / "training.json").read_text())
    assert training["data"]["train"] == 22 and training["data"]["held_out"] == 2
    assert len(training["base_fingerprint"]) == 64
    assert str(workplace) not in (out / "adapter_config.json").read_text() + (out / "training.json").read_text()
    assert "exact match" in capsys.readouterr().out
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(workplace / "base"), str(out))
    assert model(input_ids=torch.tensor([[5, 6]])).logits.isfinite().all()


def test_a_base_whose_files_begin_with_marks_is_trained(workplace):
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = workplace / "base" / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert train(workplace, "--steps", "1") == 0


def test_command_is_deterministic(workplace):
    weights = []
    for _ in range(2):
        assert train(workplace, "--steps", "3", "--overwrite") == 0
        weights.append((workplace / "out/adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_command_says_what_is_wrong(workplace, capsys):
    (workplace / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    assert train(workplace) == 2
    assert "line 2: 'completion'" in capsys.readouterr().err
    assert not (workplace / "out").exists()
    assert train(workplace / "elsewhere") == 2
    assert "config.json" in capsys.readouterr().err


def test_a_training_that_diverges_is_said(workplace, capsys):
    assert train(workplace, "--method", "lora", "--steps", "3", "--lr", "1e30") == 2
    assert "Lower --lr or --alpha" in capsys.readouterr().err


def test_every_flag_says_what_it_does_and_its_default():
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    for action in parser._actions[1:]:
        assert action.help, action.dest
        assert "default: " in action.help, action.dest
    parser.format_help()


@pytest.mark.parametrize(
    ("method", "flags", "alpha"),
    [("tucka", (), 64), ("lora", (), 8), ("lora", ("--alpha", "0.5"), 0.5), ("tucka", ("--alpha", "3"), 3)],
)
def test_default_scales(workplace, method, flags, alpha):
    """LoRA's is PEFT's habit, twice the rank; TuckA's normalised factors need a scale of their own."""
    assert train(workplace, "--method", method, "--steps", "1", *flags) == 0
    config = json.loads((workplace / "out/adapter_config.json").read_text())
    assert config["alpha" if method == "tucka" else "lora_alpha"] == alpha


def test_files_are_as_readable_as_the_umask_allows(workplace):
    """A server may be another user; safetensors alone would keep the weights to their owner."""
    before = os.umask(0o027)
    try:
        assert train(workplace, "--steps", "1") == 0
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (workplace / "out").iterdir()} == {0o640}


def test_an_earlier_training_is_not_overwritten_unasked(workplace, capsys):
    assert train(workplace, "--steps", "1") == 0
    weights = (workplace / "out/adapter_model.safetensors").read_bytes()
    assert train(workplace, "--steps", "2") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (workplace / "out/adapter_model.safetensors").read_bytes() == weights
    assert train(workplace, "--steps", "2", "--overwrite") == 0
    assert (workplace / "out/adapter_model.safetensors").read_bytes() != weights


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
        (("--eval-data", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
        (("--data", "empty.jsonl"), "holds no records"),
        (("--batch-size", "0"), "batch_size"),
        (("--t", "1"), "t = 1"),
        (("--resume",), "no checkpoint"),
        (("--out", "empty.jsonl"), "cannot be written"),
    ],
)
def test_inputs_are_checked_before_the_model_is_loaded(workplace, capsys, monkeypatch, flags, words):
    monkeypatch.chdir(workplace)
    (workplace / "empty.jsonl").write_text("\n")
    monkeypatch.setattr(base_model, "load_model", None)
    assert train(workplace, *flags) == 2
    assert words in capsys.readouterr().err


def test_a_missing_chat_template_is_said_once(workplace, capsys):
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (workplace / "data.jsonl").write_text(f"{json.dumps(record)}\n" * 36)
    config = json.loads((workplace / "base/tokenizer_config.json").read_text())
    del config["chat_template"]
    (workplace / "base/tokenizer_config.json").write_text(json.dumps(config))
    assert train(workplace) == 2
    error = capsys.readouterr().err
    assert error.count("chat template") == 1 and "bad records" not in error


def test_training_says_nothing_of_its_tools(workplace):
    """Neither progress of loading nor warnings of libraries: what is on stderr is the training's."""
    command = [sys.executable, "-m", "tucka_runtime.cli.train", "--steps", "1", "--r", "4", "--batch-size", "8"]
    paths = ["--model", workplace / "base", "--data", workplace / "data.jsonl", "--out", workplace / "out"]
    said = subprocess.run([*command, *map(str, paths)], capture_output=True, text=True, check=True).stderr
    assert [line.split()[0] for line in said.splitlines()] == ["step", "step"], said
