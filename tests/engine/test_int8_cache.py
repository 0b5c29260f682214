"""Serving from an int8 KV cache: the tokens of a run alone, whatever the blocks go through, in less memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

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
from tucka_runtime import machine
from tucka_runtime.engine.engine import Engine
from tucka_runtime.errors import ModelLoadError
from tucka_runtime.kernels.ops import ExpandQkvRopeKv, Ops
from tucka_runtime.kernels.reference.int8 import quantize
from tucka_runtime.messages import AdapterKey, Request, RouteScope

TUCKA, LORA = AdapterKey("tucka", 1), AdapterKey("lora", 1)
KEYS = (None, TUCKA, LORA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    save_model(folder / "model", sliding_window=24, kind="mistral")
    layout = build(folder / "model").layout
    save_tucka(folder / "tucka", layout)
    (folder / "tucka" / "training.json").write_text('{"route_prefix_tokens": 8}')
    save_lora(folder / "lora", layout)
    return folder


def serve(folder: Path, **settings: Any) -> Engine:
    engine = build(folder / "model", **{"kv_cache_dtype": "int8", **settings})
    for key in (TUCKA, LORA):
        engine.load_adapter(key, folder / key.name)
    return engine


def turns() -> list[Request]:
    """Prompts of two lengths behind one start, for the base and both adapters, with a second answer each."""
    start, sampling = prompt(16, 99), replace(GREEDY, max_tokens=14)
    return [
        ask(start + prompt(1 + 5 * i, i), id=f"{key and key.name} {i}", sampling=sampling, n=2, adapter=key)
        for key in KEYS
        for i in range(2)
    ]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[int]]:
    engine, found = serve(folder, block_size=16), {}
    for request in turns():
        engine.blocks.forget_all()
        ((answer, _),) = run(engine, replace(request, route_scope=RouteScope.PREFIX))
        found[request.id] = answer.token_ids
    assert len({tuple(ids) for ids in found.values()}) == len(found)
    return found


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_tokens_are_those_of_a_run_alone(
    folder: Path, alone: dict[str, list[int]], overlap: bool, drafts: bool
) -> None:
    """In a pool that holds one and a half of them: with blocks that were found in the cache, given up and computed
    again, and with drafts that were wrong."""
    engine = serve(
        folder, block_size=4, max_model_len=48, kv_cache_tokens=72, max_num_batched_tokens=11, max_num_seqs=4,
        speculate="ngram" if drafts else "none",
    )  # fmt: skip
    engine.overlap = overlap
    asked = [replace(request, route_scope=RouteScope.PREFIX) for request in turns()]
    known = run(serve(folder), *asked) if drafts else None
    first = run(engine, *asked, known=known)
    again = run(engine, *(replace(r, id=f"again {r.id}") for r in asked))
    assert engine.scheduler.num_preemptions > 0
    assert any(answer.last is not None and answer.last.cached_tokens for both in again for answer in both)
    for answers in (first, again):
        assert [[a.token_ids for a in both] for both in answers] == [[alone[r.id]] * 2 for r in asked]


def test_logits_are_those_of_rounded_keys_and_values(folder: Path) -> None:
    """As an engine's with a plain cache whose entries go through int8 and back when they are written."""
    found = []
    for dtype in ("auto", "int8"):
        engine = serve(folder, kv_cache_dtype=dtype)
        if dtype == "auto":
            engine.runner.model.ops = replace(engine.runner.ops, expand_qkv_rope_kv=rounding(engine.runner.ops))
        recorder = Recorder(engine)
        run(engine, ask(prompt(40), sampling=replace(GREEDY, max_tokens=9), adapter=LORA))
        found.append(recorder.of("r"))
    assert relative(*found) < 1e-4


def rounding(ops: Ops) -> ExpandQkvRopeKv:
    def write(*args: Any) -> Tensor:
        q = ops.expand_qkv_rope_kv(*args)
        *_, k_cache, v_cache, slots = args
        for cache in (k_cache, v_cache):
            steps, scale = quantize(cache[slots])
            cache[slots] = steps * scale[..., None]
        return q

    return write


def test_twice_the_tokens_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory decides. Two heads of 8 numbers and their scales take 24 bytes in 32, instead of 64."""
    memory = machine.memory()
    monkeypatch.setattr(machine, "memory", lambda: replace(memory, available=1_000_000))
    engines = [build(folder / "model", kv_cache_dtype=dtype, kv_cache_tokens=None) for dtype in ("auto", "int8")]
    plain, small = (engine.info.kv_cache_tokens for engine in engines)
    assert 1.9 < small / plain < 2.1
    sizes = [
        sum(len(c) * c.stride(0) * c.itemsize for pair in engine.runner.caches for c in pair) for engine in engines
    ]
    assert [size // tokens for size, tokens in zip(sizes, (plain, small), strict=True)] == [256, 128]
    assert [engine.info.kv_cache_dtype for engine in engines] == ["float32", "int8"]
    assert {cache.dtype for pair in engines[1].runner.caches for cache in pair} == {torch.int8}


def test_heads_whose_scales_would_not_be_aligned_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, head_dim=6)
    with pytest.raises(ModelLoadError, match=r"multiple of 4.* have 6.*--kv-cache-dtype"):
        build(tmp_path, kv_cache_dtype="int8")
