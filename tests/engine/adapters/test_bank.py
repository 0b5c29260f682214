"""Banks: every member answers as the plain adapter that it is, alone and beside all others."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.banks import MEMBERS, save_bank
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
from tucka_runtime.adapters.format import read_adapter
from tucka_runtime.engine.adapters.footprint import folded_bytes
from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.messages import AdapterKey, RouteScope

FP32 = 1e-5
BANK = AdapterKey("bank", 1)


def of(member: int, *prompts, **more):
    return replace(ask(*prompts, adapter=BANK, **more), member=member)


@pytest.mark.parametrize("core", ["full", "diagonal"])
@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_members_answer_as_plain_adapters_do(core: str, kernels: str, tmp_path: Path) -> None:
    """In one batch: members in mixed order, one of them twice, the base, a LoRA of a larger rank than the bank's, a
    routed TuckA of a smaller one; whole prompts and decoding."""
    save_model(tmp_path / "base")
    engine = build(tmp_path / "base", kernels=kernels)
    info = engine.load_adapter(BANK, save_bank(tmp_path / "bank", engine.layout, core))
    assert info.kind == "bank" and info.members == tuple(f"m{i}" for i in range(MEMBERS)) and info.r == 6
    lora, tucka = AdapterKey("lora", 1), AdapterKey("tucka", 1)
    engine.load_adapter(lora, save_lora(tmp_path / "lora", engine.layout, r=9))
    engine.load_adapter(tucka, save_tucka(tmp_path / "tucka", engine.layout))
    plain = [AdapterKey(f"plain{i}", 1) for i in range(MEMBERS)]
    for i, key in enumerate(plain):
        engine.load_adapter(key, tmp_path / str(i))
    sampling = replace(GREEDY, max_tokens=6)
    order = [3, 0, 4, 3, 1, 2]
    prompts = [prompt(5 + i, seed=i) for i in range(len(order))]
    others = [
        ask(prompt(7), id="base", sampling=sampling),
        ask(prompt(8), id="lora", adapter=lora, sampling=sampling),
        ask(prompt(9), id="tucka", adapter=tucka, scope=RouteScope.REQUEST, sampling=sampling),
    ]
    recorder = Recorder(engine)
    mixed = [of(m, p, id=f"bank{i}", sampling=sampling) for i, (m, p) in enumerate(zip(order, prompts, strict=True))]
    answers = run(engine, *mixed[:3], *others, *mixed[3:])
    for i, (member, own) in enumerate(zip(order, prompts, strict=True)):
        alone = run(engine, ask(own, id=f"plain{i}", adapter=plain[member], sampling=sampling))
        assert answers[i if i < 3 else i + 3][0].token_ids == alone[0][0].token_ids
        assert relative(recorder.of(f"bank{i}"), recorder.of(f"plain{i}")) < FP32
    for other in others:
        run(engine, replace(other, id=f"{other.id} alone"))
        assert relative(recorder.of(other.id), recorder.of(f"{other.id} alone")) < FP32


def test_kv_is_shared_within_a_member_alone(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    engine = build(tmp_path / "base", block_size=4)
    engine.load_adapter(BANK, save_bank(tmp_path / "bank", engine.layout, "full"))
    own = prompt(17)
    cached = [run(engine, of(m, own, id=f"r{i}"))[0][0].last.cached_tokens for i, m in enumerate([1, 2, 1])]
    assert cached == [0, 0, 16]


def test_what_is_no_member_is_refused_and_leases_nothing(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    engine = build(tmp_path / "base")
    engine.load_adapter(BANK, save_bank(tmp_path / "bank", engine.layout, "full"))
    engine.load_adapter(AdapterKey("plain", 1), tmp_path / "0")
    for wrong in (
        of(MEMBERS, prompt(4)),
        of(-1, prompt(4)),
        ask(prompt(4), adapter=BANK),
        replace(ask(prompt(4), adapter=AdapterKey("plain", 1)), member=0),
    ):
        with pytest.raises(InvalidRequestError):
            engine.add(wrong)
    engine.check_integrity()
    assert not engine.adapters.leases()


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_a_member_costs_its_cores(core: str, tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    engine = build(tmp_path / "base")
    folder = save_bank(tmp_path / "bank", engine.layout, core)
    info = engine.load_adapter(BANK, folder)
    adapter = read_adapter(folder, engine.layout)
    linears, dims = 6, 2 * (32 + 32 + 32 + 16 + 44 + 32)
    cores = 6 if core == "diagonal" else 36
    assert info.bytes == 4 * 6 * dims + linears * (8 + 4 * MEMBERS * cores)
    runner = engine.runner
    assert folded_bytes(adapter, runner.arch, runner.dtype, torch.float32, None)[0] == info.bytes
