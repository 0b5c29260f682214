"""`tucka adapters inspect`, `verify` and `export` on folders as PEFT and the trainer write them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support import GOLDEN
from tests.support.driving import GREEDY, Recorder, ask, build, prompt, relative, run, save_lora, save_model, save_tucka
from tucka_runtime.cli import adapter_files
from tucka_runtime.cli.main import main
from tucka_runtime.engine.adapters import verify
from tucka_runtime.kernels import dispatch
from tucka_runtime.messages import AdapterKey, Route

KEY = AdapterKey("a", 1)
BASE, ADAPTER = GOLDEN / "bases" / "llama-tiny", GOLDEN / "llama-all7-r4k2t2" / "adapter"


def test_inspect_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "inspect", str(ADAPTER), "--model", str(BASE)]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if not line.startswith(" "))
    shown = {name: text.strip() for name, text in lines.items()}
    engine = build(BASE)
    info = engine.load_adapter(KEY, ADAPTER)
    assert shown["kind"] == "TuckA" and shown["rank"] == "4" and shown["experts"].startswith("2 groups of 2")
    assert shown["digest"] == info.digest and shown["on this base"] == "served" and shown["router"] == info.router
    assert shown["resident"].startswith(f"{info.bytes:,} bytes") and shown["modules"] == str(info.num_modules)


def test_inspect_of_a_dora_for_another_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "base")
    save_lora(tmp_path / "dora", build(tmp_path / "base").layout, dora=True)
    config = tmp_path / "dora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "\x1b[31mred"}))
    assert main(["adapters", "inspect", str(tmp_path / "dora")]) == 0
    text = capsys.readouterr().out
    assert "LoRA (DoRA)" in text and "lora_magnitude_vector" in text and "\x1b" not in text and "?[31mred" in text
    assert "2 x lora_A.weight (3, 32), lora_B.weight (32, 3), lora_magnitude_vector (32,)" in text
    assert main(["adapters", "inspect", str(tmp_path / "dora"), "--model", str(BASE)]) == 1
    assert "not served" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_is_served_is_within_the_limit(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TuckA routed by token (Llama) and inside the model (GPT-2, or behind another linear), DoRA, adapted tables."""
    save_model(tmp_path / "base", kind)
    layout = build(tmp_path / "base").layout
    first, later = (("c_attn",), ("c_proj",)) if kind == "gpt2" else (("q_proj", "up_proj"), ("o_proj", "down_proj"))
    save_tucka(tmp_path / "early", layout, targets=first)
    save_tucka(tmp_path / "late", layout, targets=later, r=5)
    save_lora(tmp_path / "dora", layout, targets=first + later, dora=True)
    for name in ("early", "late", "dora"):
        assert main(["adapters", "verify", str(tmp_path / name), "--model", str(tmp_path / "base")]) == 0
        text = capsys.readouterr().out
        assert "all within 1e-05" in text and ("routes at" in text) is (name != "dora")
    if kind == "llama":
        tables = LoraConfig(target_modules=["embed_tokens", "lm_head"], use_dora=True, init_lora_weights=False, r=2)
        tokens = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[9, 4], init_lora_weights=False, r=2)
        for name, config in (("tables", tables), ("tokens", tokens)):
            get_peft_model(save_model(tmp_path / "base"), config).save_pretrained(tmp_path / name)
            assert main(["adapters", "verify", str(tmp_path / name), "--model", str(tmp_path / "base")]) == 0
            assert "embed_tokens" in capsys.readouterr().out
    half = ["--model", str(tmp_path / "base"), "--dtype", "float16"]
    assert main(["adapters", "verify", str(tmp_path / "early"), *half]) == 0
    choose = dispatch.choose  # a machine without native kernels, whose factors are float32 beside a half base
    monkeypatch.setattr(dispatch, "choose", lambda device, kernels: choose(device, "reference"))
    assert main(["adapters", "verify", str(tmp_path / "early"), *half]) == 0
    assert "reference kernels, factors in float32: all within" in capsys.readouterr().out


@pytest.mark.parametrize("by", [1.001, float("nan")])
@pytest.mark.parametrize("what", ["factors", "affine"])
def test_a_wrong_fold_is_found(
    what: str, by: float, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "base")
    save_lora(tmp_path / "dora", build(tmp_path / "base").layout, dora=True)
    fold = verify.fold

    def wrong(*args, **options):
        folded = yield from fold(*args, **options)
        if what == "affine":
            return dataclasses.replace(folded, affine={at: by * own for at, own in folded.affine.items()})
        return dataclasses.replace(folded, factors={at: (u, by * e) for at, (u, e) in folded.factors.items()})

    monkeypatch.setattr(verify, "fold", wrong)
    assert main(["adapters", "verify", str(tmp_path / "dora"), "--model", str(tmp_path / "base")]) == 1
    assert "over the limit" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_export_is_what_is_served_pinned(kind: str, tmp_path: Path) -> None:
    """In plain PEFT, with a head of its own."""
    base, folder, out = tmp_path / "base", tmp_path / "tucka", tmp_path / "lora"
    save_model(base, kind)
    engine = build(base)
    targets = ("c_attn", "c_fc") if kind == "gpt2" else ("q_proj", "down_proj")
    save_tucka(folder, engine.layout, targets=targets)
    route = '{"group": 1, "weights": [0.9, 0.25]}'
    command = ["adapters", "export", str(folder), str(out), "--model", str(base), "--route", route, "--to", "lora"]
    assert main(command) == 0
    assert main(command) == 1, "what is there is not written over"
    assert json.loads((out / "training.json").read_text()) == {"base_fingerprint": engine.layout.fingerprint}
    engine.load_adapter(KEY, folder, Route(1, (0.9, 0.25)))
    recorder = Recorder(engine)
    ids = prompt(21)
    run(engine, ask(ids, sampling=dataclasses.replace(GREEDY, max_tokens=1), adapter=KEY))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    with torch.inference_mode():
        theirs = model(torch.tensor([ids])).logits[0]
        with model.disable_adapter():
            plain = model(torch.tensor([ids])).logits[0]
    assert relative(recorder.of("r"), theirs) < 1e-4 and relative(plain, theirs) > 0.05


@pytest.mark.parametrize(
    "route", ["", "group", "group=", "group=2", "group=" + "1" * 5000, "group=-1", "group=x", "pinned", "[]", "{}",
              '{"group": 0}', '{"group": 0, "weights": [0.5, 2]}', '{"group": true, "weights": [0, 1]}'],
)  # fmt: skip
def test_routes_that_are_none(route: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["adapters", "export", str(ADAPTER), str(tmp_path / "out"), "--model", str(BASE), "--route", route]
    assert main(command) == 1 and "group=N with N from 0 to 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_group_takes_its_experts_alike() -> None:
    config = adapter_files.parse_config((ADAPTER / "adapter_config.json").read_bytes())
    assert isinstance(config, adapter_files.TuckASpec)
    assert adapter_files.parse_route("group=1", config) == Route(1, (0.5, 0.5))
