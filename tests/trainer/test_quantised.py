"""`--load-in`: an adapter trained on a base in 4 or 8 bits by bitsandbytes, and used on the base as it is stored."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.training import SIZES, make_workplace, train
from tucka_runtime import extras
from tucka_runtime.cli import train_plan
from tucka_runtime.trainer.adapter import AdapterSettings, attach
from tucka_runtime.trainer.base_model import load_model
from tucka_runtime.trainer.experiments.base import build_model, build_tokenizer, save_base
from tucka_runtime.trainer.loop import Loop

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install bitsandbytes"
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its base is wider than that of other tests: 4 bits go by blocks of 64."""
    folder = make_workplace(tmp_path_factory.mktemp("quantised"))
    torch.manual_seed(0)
    wide = SIZES | {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
    save_base(build_model(**wide), build_tokenizer(), folder / "base")
    return folder


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("load_in", "method", "kind"),
    [("4bit", "tucka", "Linear4bit"), ("4bit", "lora", "Linear4bit"), ("8bit", "tucka", "Linear8bitLt")],
)
def test_the_base_is_quantised_and_the_adapter_is_not(
    workplace: Path, tmp_path: Path, load_in: str, method: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: set[str] = set()
    begin = Loop.begin

    def looked(loop: Loop) -> Any:
        kinds.update(type(module).__name__ for module in loop.model.modules())
        return begin(loop)

    monkeypatch.setattr(Loop, "begin", looked)
    out = tmp_path / "out"
    flags = ("--load-in", load_in, "--method", method, "--out", str(out), "--steps", "12", "--lr", "1e-2")
    assert train(workplace, *flags, "--eval-fraction", "0.4") == 0
    training = json.loads((out / "training.json").read_text())
    held = training["eval"]
    assert kind in kinds and training["flags"]["load_in"] == load_in
    assert held["loss"] < held["base"]["loss"] - 0.1
    model: Any = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(workplace / "base"), str(out)
    ).eval()
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name or "tucka_" in name} == {torch.float32}
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.arange(3, 19)[None]).logits).all()


@needs_bitsandbytes
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_an_evaluation_leaves_the_gradients_as_they_were(workplace: Path, load_in: str) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes packs 4-bit weights when it is asked in eval mode: they then have none."""
    base = load_model(workplace / "base", "float32", torch.device("cpu"), load_in)
    model = attach(base, AdapterSettings(method="lora", r=4, alpha=8), 0)
    ids = torch.arange(3, 43).view(2, 20)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    after = gradients()
    assert len(before) == len([p for p in model.parameters() if p.requires_grad])
    assert any(grad.abs().max() > 0 for grad in before)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


@needs_bitsandbytes
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_jobs_in_one_pass_end_as_alone(workplace: Path, tmp_path: Path, load_in: str) -> None:
    flags = ("--load-in", load_in, "--steps", "3", "--lr", "1e-2", "--num-threads", "1")
    assert train(workplace, *flags, "--out", str(tmp_path), "--sweep", "method=lora,tucka") == 0
    for method in ("lora", "tucka"):
        assert train(workplace, *flags, "--out", str(tmp_path / method), "--method", method) == 0
        together, alone = (
            json.loads((tmp_path / name / "training.json").read_text()) for name in (f"method-{method}", method)
        )
        assert together["final_loss"] == pytest.approx(alone["final_loss"], abs=1e-4)
        assert together["eval"]["loss"] == pytest.approx(alone["eval"]["loss"], abs=1e-4)


def test_without_bitsandbytes_it_is_said_how_to_get_it(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_plan, "installed", lambda extra: extra in extras.EXTRAS and extra != "quant")
    assert train(workplace, "--load-in", "4bit") == 2
    said = capsys.readouterr().err
    assert "--load-in quantises by bitsandbytes, which is not installed: in the checkout run" in said
    assert not (workplace / "out").exists()
