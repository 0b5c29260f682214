"""TuckA and LoRA on one model, as PEFT lets them: trained together, and served as a weighted list."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support.driving import GREEDY, Recorder, ask, build, prompt, relative, run, save_model
from tucka_runtime.channel_messages import AdapterPart
from tucka_runtime.messages import AdapterKey, RouteScope
from tucka_runtime.trainer import TuckAConfig, set_route_scope

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
]


def routed(**fields: Any) -> TuckAConfig:
    return TuckAConfig(r=4, k=2, t=2, p=2, alpha=16, task_type="CAUSAL_LM", **fields)


def low_rank(**fields: Any) -> LoraConfig:
    return LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", **fields)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_both_are_trained_together_and_served_as_their_sum(targets: Any, tmp_path: Path) -> None:
    save_model(tmp_path / "base")

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    base = fresh()
    torch.manual_seed(0)
    inner = get_peft_model(base, routed(target_modules=targets), adapter_name="shaped")
    model = get_peft_model(base, low_rank(target_modules=targets), adapter_name="extra")
    set_route_scope(inner, "request")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), 1e-2)
    batch = torch.tensor([prompt(12), prompt(12, 1)])
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    assert {name.rsplit(".", 1)[-1] for name in trained} == {"shaped", "weight"}
    assert not any(torch.equal(p, before[name]) for name, p in trained.items())

    model.eval()
    ids = prompt(21)
    with torch.inference_mode():
        wanted = model(torch.tensor([ids])).logits[0]
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    again = fresh()
    inner = PeftModel.from_pretrained(again, str(tmp_path / "shaped"), adapter_name="shaped")
    again = PeftModel.from_pretrained(again, str(tmp_path / "extra"), adapter_name="extra").eval()
    set_route_scope(inner, "request")
    with torch.inference_mode():
        assert torch.equal(again(torch.tensor([ids])).logits[0], wanted)

    engine = build(tmp_path / "base")
    key = AdapterKey("extra+shaped", 1)
    parts = [AdapterPart(tmp_path / name, None, None, None, 1.0) for name in ("shaped", "extra")]
    engine.add_adapter(engine.combine_adapters(key, parts)[0])
    alone = [AdapterKey(name, 1) for name in ("shaped", "extra")]
    for one in alone:
        engine.load_adapter(one, tmp_path / one.name)
    recorder, once = Recorder(engine), replace(GREEDY, max_tokens=1)
    asked = [ask(ids, id=k.name, sampling=once, adapter=k, scope=RouteScope.REQUEST) for k in (key, *alone)]
    run(engine, *asked)
    assert relative(recorder.of(key.name), wanted) < 1e-4
    for one in alone:
        assert relative(recorder.of(one.name), wanted) > 0.01, f"{one.name} alone gives the same: this shows nothing"


def test_what_peft_does_not_mix_is_refused(tmp_path: Path) -> None:
    """By PEFT itself, but for TuckA around another method's layers."""
    base = save_model(tmp_path / "base")
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(base, routed(target_modules=["q_proj"]), mixed=True)
    model = get_peft_model(base, low_rank(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("shaped", routed(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="Put TuckA into the base first"):
        get_peft_model(base, routed(target_modules=["q_proj"]), adapter_name="shaped")


def test_all_linear_means_the_same_layers_for_the_second_adapter(tmp_path: Path) -> None:
    model = get_peft_model(save_model(tmp_path / "base"), routed(target_modules="all-linear"))
    found = list(model.base_model.targeted_module_names)
    model.add_adapter("second", routed(target_modules="all-linear"))
    assert len(found) == 14 and list(model.base_model.targeted_module_names) == found
