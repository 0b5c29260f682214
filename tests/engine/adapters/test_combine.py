"""Weighted lists of adapters: PEFT's own for LoRAs; of all kinds, the weighted sum of the definitions in float64."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.support.banks import save_bank
from tests.support.driving import (
    GREEDY,
    Recorder,
    ask,
    build,
    prompt,
    relative,
    run,
    save_lora,
    save_model,
    save_tucka,
)
from tucka_runtime.adapters.format import Adapter, read_adapter
from tucka_runtime.channel_messages import AdapterPart
from tucka_runtime.engine.adapters.verify import change
from tucka_runtime.engine.engine import Engine
from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.messages import AdapterKey, Route, RouteScope

FP32 = 1e-4
MIX = AdapterKey("a+b", 1)
PINNED = Route(1, (0.9, 0.3))


@dataclass(frozen=True)
class Of:
    """An adapter of a combination, by its folder."""

    folder: str
    weight: float
    pinned: Route | None = None
    member: int | None = None


def combine(engine: Engine, root: Path, parts: Sequence[Of], key: AdapterKey = MIX) -> None:
    own = [AdapterPart(root / part.folder, part.pinned, None, part.member, part.weight) for part in parts]
    folded, info = engine.combine_adapters(key, own)
    engine.add_adapter(folded)
    assert info.bytes == folded.num_bytes and info.kind == "combination"


def save_loras(base: Path, root: Path, **settings: Any) -> None:
    """Two random LoRAs of PEFT's, of unequal ranks and targets, over the base's folder."""
    for seed, (name, r, targets) in enumerate((("a", 3, ["q_proj", "down_proj"]), ("b", 5, ["q_proj", "v_proj"]))):
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, task_type="CAUSAL_LM", **settings)
        peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in (p for n, p in peft.named_parameters() if "lora_" in n):
                parameter.copy_(0.3 * torch.randn_like(parameter))
        peft.save_pretrained(root / name, save_embedding_layers=False)


def test_logits_are_those_of_pefts_weighted_adapter(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_model(base)
    save_loras(base, tmp_path)
    engine = build(base)
    combine(engine, tmp_path, [Of("a", 0.7), Of("b", -1.3)])
    recorder, ids = Recorder(engine), prompt(21)
    ((answer,),) = run(engine, ask(ids, sampling=replace(GREEDY, max_tokens=6), adapter=MIX))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    theirs.add_weighted_adapter(["a", "b"], [0.7, -1.3], "mixed", combination_type="cat")
    theirs.set_adapter("mixed")
    with torch.inference_mode():
        expected = theirs(torch.tensor([(*ids, *answer.token_ids[:-1])])).logits[0]
        theirs.set_adapter("a")
        alone = theirs(torch.tensor([ids])).logits[0]
    assert relative(recorder.of("r"), expected) < FP32
    assert relative(recorder.of("r")[:21], alone) > 0.05, "the second adapter changes nothing: this shows nothing"


def defined(base: Path, parts: Sequence[Of], adapters: Sequence[Adapter], ids: Sequence[int], route: Route | None):
    """The logits in float64 of the base whose every linear has the weighted sum of the adapters' changes added."""
    routed = [
        (p.folder, a.config.k, a.config.t) for p, a in zip(parts, adapters, strict=True) if a.router and not p.pinned
    ]
    routes: dict[str, Route] = {}
    if route is not None:  # one number for the groups of all, the last one's counted first
        group, weights = route.group, route.weights
        for folder, k, t in reversed(routed):
            routes[folder] = Route(group % k, weights[len(weights) - t :])
            group, weights = group // k, weights[: len(weights) - t]
        assert not group and not weights
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    linears = dict(model.named_modules())

    def add(path: str) -> Any:
        def hook(linear: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x, total = inputs[0][0], output[0].clone()
            for part, adapter in zip(parts, adapters, strict=True):
                if path not in adapter.modules:
                    continue
                own = part.pinned or routes.get(part.folder)
                scale, moved = change(adapter, path, x, linear.weight, linear.bias, own, part.member)
                total += part.weight * ((0.0 if scale is None else (scale - 1) * output[0]) + moved)
            return total[None]

        return hook

    for path in {path for adapter in adapters for path in adapter.modules}:
        linears[path].register_forward_hook(add(path))
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


MIXES: dict[str, list[Of]] = {
    "loras-dora-bias": [Of("lora", 0.6), Of("dora", 0.8), Of("bias", -0.5)],
    "pinned": [Of("tucka", 0.5, pinned=PINNED), Of("lora", 0.7)],
    "two-pinned-and-a-member": [
        Of("tucka", 0.5, pinned=PINNED),
        Of("wide", 0.4, pinned=Route(0, (0.2, 0.6))),
        Of("bank", 0.9, member=2),
    ],
    "routed": [Of("lora", 0.7), Of("tucka", 0.6), Of("dora", 0.4)],
    "routed-and-a-member": [Of("tucka", 0.6), Of("bank", 0.8, member=1), Of("wide", 0.3, pinned=PINNED)],
    "routed-twice": [Of("wide", 0.7), Of("tucka", 0.6)],
    "routed-three-times": [Of("tucka", 0.6), Of("values", -0.5), Of("lora", 0.7), Of("wide", 0.4), Of("bias", 0.5)],
    "routed-inside": [Of("inner", 0.7), Of("late", 0.9)],
    "routed-beside-other-linears": [Of("wide", 0.7), Of("late", 0.5)],
}


def save_kinds(base: Path, root: Path) -> None:
    """An adapter of each kind: `inner` is routed inside the model, and `late` changes nothing before that."""
    layout = build(base).layout
    save_lora(root / "lora", layout, 1)
    save_lora(root / "dora", layout, 2, ("q_proj", "v_proj", "up_proj"), r=4, dora=True)
    save_lora(root / "late", layout, 3, ("down_proj", "gate_proj"), r=2)
    save_tucka(root / "tucka", layout, 4, ("q_proj", "v_proj", "o_proj"))
    save_tucka(root / "wide", layout, 5, ("q_proj", "k_proj"), r=12)
    save_tucka(root / "values", layout, 8, ("v_proj", "up_proj"), r=3, k=2, t=4, p=3)
    save_tucka(root / "inner", layout, 6, ("o_proj", "up_proj"), r=5)
    save_bank(root / "bank", layout, "full")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["k_proj", "o_proj"], lora_bias=True, task_type="CAUSAL_LM")
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in (p for n, p in peft.named_parameters() if "lora_" in n):
            parameter.copy_(0.3 * torch.randn_like(parameter))
    peft.save_pretrained(root / "bias", save_embedding_layers=False)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kinds")
    save_model(root / "base", "qwen2")
    save_kinds(root / "base", root)
    return root


@pytest.mark.parametrize(
    ("kernels", "tokens"),
    [("reference", 2048), ("reference", 12), pytest.param("native", 2048, marks=pytest.mark.native)],
)
def test_every_mix_is_the_weighted_sum_of_its_definitions(kernels: str, tokens: int, kinds: Path) -> None:
    """In one batch with each other, with their adapters alone and with the base, whole prompts and in chunks."""
    engine = build(kinds / "base", kernels=kernels, max_num_batched_tokens=tokens, max_num_seqs=12)
    keys = {name: AdapterKey(name, 1) for name in MIXES}
    for name, parts in MIXES.items():
        combine(engine, kinds, parts, keys[name])
    alone = [AdapterKey(name, 1) for name in ("lora", "tucka")]
    for key in alone:
        engine.load_adapter(key, kinds / key.name)
    sampling = replace(GREEDY, max_tokens=5)
    requests = [
        ask(prompt(9 + 4 * i), id=key.name if key else "base", sampling=sampling, adapter=key, scope=RouteScope.REQUEST)
        for i, key in enumerate((None, *keys.values(), *alone))
    ]
    recorder = Recorder(engine)
    answers = run(engine, *requests)
    mixes = MIXES | {"base": [], "lora": [Of("lora", 1.0)], "tucka": [Of("tucka", 1.0)]}
    for request, (answer,) in zip(requests, answers, strict=True):
        parts = mixes[request.id]
        adapters = [read_adapter(kinds / part.folder, engine.layout) for part in parts]
        text = (*request.prompts[0], *answer.token_ids[:-1])
        route = answer.route.route if answer.route else None
        assert (route is not None) == (request.id in ("tucka",) or request.id.startswith("routed"))
        theirs = defined(kinds / "base", parts, adapters, text, route)
        assert relative(recorder.of(request.id), theirs) < FP32, request.id


@pytest.mark.parametrize("name", ["routed", "routed-twice"])
def test_under_the_scope_batch_each_has_its_own_route(name: str, kinds: Path) -> None:
    engine = build(kinds / "base")
    parts = MIXES[name]
    combine(engine, kinds, parts)
    recorder, ids = Recorder(engine), prompt(15)
    ((answer,),) = run(engine, ask(ids, sampling=replace(GREEDY, max_tokens=1), adapter=MIX))
    assert answer.route is not None
    adapters = [read_adapter(kinds / part.folder, engine.layout) for part in parts]
    theirs = defined(kinds / "base", parts, adapters, ids, answer.route.route)
    assert relative(recorder.of("r"), theirs) < FP32


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([Of("tucka", 0.5), Of("inner", 0.5)], "inside the model"),
        ([Of("tucka", 0.5), Of("trained", 0.5)], "different lengths"),
        ([Of("lora", 0.5), Of("inner", 0.5)], "before the router"),
        ([Of("lora", 0.5), Of("head", 0.5)], "Leave that adapter out"),
        ([Of("huge0", 0.5), Of("huge1", 0.5)], "more than 512"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_the_reason(parts: list[Of], why: str, kinds: Path) -> None:
    engine = build(kinds / "base")
    if any(part.folder == "head" for part in parts):
        model = AutoModelForCausalLM.from_pretrained(kinds / "base")
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        peft = get_peft_model(model, config)
        with torch.no_grad():
            peft.base_model.model.lm_head.modules_to_save["default"].weight += 1
        peft.save_pretrained(kinds / "head", save_embedding_layers=False)
    for part in parts:
        if part.folder == "trained":
            save_tucka(kinds / "trained", engine.layout)
            (kinds / "trained" / "training.json").write_text('{"route_prefix_tokens": 32}')
        if part.folder.startswith("huge"):
            save_lora(kinds / part.folder, engine.layout, 1, ("q_proj",), r=257)
    with pytest.raises(InvalidRequestError, match=why) as refused:
        combine(engine, kinds, parts)
    assert refused.value.param == "adapters"
    assert not engine.adapters.serving()
