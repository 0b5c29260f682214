"""Embeddings against transformers and peft: base, LoRA and TuckA; whole prompts, chunks, packed batches."""

import itertools
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM

import tucka_runtime.trainer  # noqa: F401  peft learns of TuckA
from tests.support.driving import Answer, ask, build, drain, prompt, relative, run, save_lora, save_model, save_tucka
from tucka_runtime.engine.engine import Engine
from tucka_runtime.messages import AdapterKey, FinishReason, Pooling, RouteScope, SamplingParams

FP32 = 1e-4  # relative L2 error of an embedding
LORA, TUCKA = AdapterKey("lora", 1), AdapterKey("tucka", 1)
EMBED = SamplingParams(max_tokens=0)


def vectors(answers: list[Answer]) -> Tensor:
    for answer in answers:
        assert answer.finish_reason is FinishReason.LENGTH and not answer.token_ids
    return torch.stack([torch.tensor(answer.last.embedding) for answer in answers])  # type: ignore[union-attr]


def theirs(base: Path, adapter: Path | None, ids: tuple[int, ...], pooling: Pooling) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].double()
    return normalize(states.mean(dim=0) if pooling is Pooling.MEAN else states[-1], dim=0)


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt2"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Path]:
    """An engine whose steps take 16 tokens: prompts that are longer come in chunks."""
    folder = tmp_path_factory.mktemp(request.param)
    save_model(folder / "base", request.param)
    engine = build(folder / "base", max_num_batched_tokens=16, max_num_seqs=8, block_size=4)
    targets = ("c_attn", "mlp.c_proj") if request.param == "gpt2" else ("q_proj", "down_proj")
    save_lora(folder / "lora", engine.layout, targets=targets)
    save_tucka(folder / "tucka", engine.layout, targets=targets)
    engine.load_adapter(LORA, folder / "lora")
    engine.load_adapter(TUCKA, folder / "tucka")
    return engine, folder


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("adapter", [None, LORA, TUCKA])
def test_as_transformers_and_peft(loaded: tuple[Engine, Path], adapter: AdapterKey | None, pooling: Pooling) -> None:
    """One token, a part of a chunk, many chunks; TuckA as for a prompt alone."""
    engine, folder = loaded
    prompts = [prompt(1), prompt(9), prompt(53)]
    (answers,) = run(engine, ask(*prompts, sampling=EMBED, pooling=pooling, adapter=adapter, scope=RouteScope.REQUEST))
    ours = vectors(answers)
    path = folder / adapter.name if adapter else None
    expected = torch.stack([theirs(folder / "base", path, ids, pooling) for ids in prompts])
    assert relative(ours, expected) < FP32
    assert torch.linalg.vector_norm(ours, dim=1).tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    if path is not None:
        plain = torch.stack([theirs(folder / "base", None, ids, pooling) for ids in prompts])
        assert relative(expected, plain) > 0.01, "the adapter changes nothing: this shows nothing"


@pytest.mark.parametrize("pooling", Pooling)
def test_beside_streams_and_after_them(loaded: tuple[Engine, Path], pooling: Pooling) -> None:
    """Prompts that are averaged take nothing from the cache, whatever lies there; and nothing is left of them."""
    engine, _ = loaded
    ids = prompt(40)
    (alone,) = run(engine, ask(ids, sampling=EMBED, pooling=pooling))
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    run(engine, ask(ids, id="before", sampling=sampling))
    beside, *_ = run(
        engine,
        ask(ids, sampling=EMBED, pooling=pooling),
        ask(ids, id="other", sampling=sampling),
        ask(prompt(30), id="lora", sampling=sampling, adapter=LORA),
    )
    assert relative(vectors(beside), vectors(alone)) < 1e-5
    assert beside[0].last.cached_tokens == (0 if pooling is Pooling.MEAN else 36)  # type: ignore[union-attr]


def test_a_prompt_that_is_computed_again_counts_once(tmp_path: Path) -> None:
    """The cache is too small for the prompt and a stream before it: it loses its blocks half way."""
    save_model(tmp_path / "base")
    engine = build(
        tmp_path / "base",
        max_num_batched_tokens=16,
        max_num_seqs=8,
        block_size=4,
        kv_cache_tokens=128,
        max_model_len=120,
    )
    answers = {("s", 0): Answer(), ("r", 0): Answer()}
    engine.add(ask(prompt(3), id="s", sampling=SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)))
    ids = prompt(110)
    for step in itertools.count():
        if step == 8:
            engine.add(ask(ids, sampling=EMBED, pooling=Pooling.MEAN))
        for out in engine.step()[0]:
            answers[out.request_id, out.index].take(out)
        if engine.scheduler.num_preemptions:
            break
    assert engine.runner.pooler.sums
    drain(engine, answers)
    assert relative(vectors([answers["r", 0]]), theirs(tmp_path / "base", None, ids, Pooling.MEAN)[None]) < FP32


def test_an_aborted_prompt_leaves_nothing(loaded: tuple[Engine, Path]) -> None:
    engine, _ = loaded
    engine.add(ask(prompt(50), sampling=EMBED, pooling=Pooling.MEAN))
    engine.step()
    assert engine.runner.pooler.sums
    engine.abort("r")
    assert not engine.runner.pooler.sums


def test_what_overflows_is_an_error(tmp_path: Path) -> None:
    model = save_model(tmp_path / "base")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    model.save_pretrained(tmp_path / "base")
    engine = build(tmp_path / "base")
    (answers,) = run(engine, ask(prompt(5), sampling=EMBED, pooling=Pooling.LAST))
    assert answers[0].finish_reason is FinishReason.ERROR
