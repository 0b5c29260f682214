"""Adapters whose vocabulary was resized for training: held to `peft`'s own log-probabilities on a base that was resized
in the same way, alone and beside others, whose answers they do not change."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.engine.adapters.test_lora import save_peft
from tests.support.driving import GREEDY, VOCAB, Answer, ask, build, prompt, relative, run, save_model, save_tucka
from tucka_runtime.adapters.format import read_adapter
from tucka_runtime.channel_messages import AdapterPart
from tucka_runtime.engine.adapters.footprint import folded_bytes
from tucka_runtime.errors import BaseModelMismatchError, InvalidRequestError
from tucka_runtime.messages import AdapterKey, Route, RouteScope, SamplingParams, TokenLogprob

FP32 = 1e-4
GROWN, CUT = VOCAB + 3, VOCAB - 5
KEY = AdapterKey("grown", 1)
LORA = {"target_modules": ["q_proj", "down_proj"]}
TABLES = ["embed_tokens", "lm_head"]

CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "linears": ("llama", GROWN, LORA),
    "linears-tied": ("qwen2", GROWN, LORA),
    "linears-conv1d-tied": ("gpt2", GROWN, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "cut": ("llama", CUT, LORA),
    "own-tables": ("llama", GROWN, LORA | {"modules_to_save": TABLES}),
    "own-tables-tied": ("qwen3", GROWN, LORA | {"modules_to_save": TABLES}),
    "own-embedding-tied": ("llama", GROWN, LORA | {"modules_to_save": ["embed_tokens"]}),
    "adapted-tables": ("llama", GROWN, {"target_modules": ["q_proj", *TABLES], "use_dora": True}),
    "adapted-embedding-tied": ("llama", GROWN, {"target_modules": ["q_proj", "embed_tokens"]}),
    "adapted-head-tied": ("llama", GROWN, {"target_modules": ["q_proj", "lm_head"], "lora_bias": True}),
    "adapted-embedding-own-head": (
        "llama",
        GROWN,
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    ),
    "rows": ("llama", GROWN, LORA | {"trainable_token_indices": [3, VOCAB + 1, VOCAB]}),
    "rows-tied": ("qwen2", GROWN, LORA | {"trainable_token_indices": [3, VOCAB + 1, VOCAB]}),
}


def save_grown(
    folder: Path, kind: str = "llama", rows: int = GROWN, tied: bool = False, tables: bool = True, **settings: Any
) -> None:
    """A base in `base`, and in `adapter` one that was trained on it with `rows` tokens, new ones at random."""
    model = save_model(folder / "base", kind, **({} if kind == "gpt2" else {"tie_word_embeddings": tied}))
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB:] = 0.3 * torch.randn(max(rows - VOCAB, 0), 32)
    save_peft(model, folder / "adapter", 1, tables, **(settings or LORA))


def reference(folder: Path, rows: int, ids: tuple[int, ...]) -> Tensor:
    """The log-probabilities (T, rows) by `peft`."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model.resize_token_embeddings(rows)
    peft = PeftModel.from_pretrained(model, folder / "adapter", autocast_adapter_dtype=False)
    with torch.inference_mode():
        return peft(torch.tensor([ids])).logits[0].log_softmax(-1)


def table(entries: list[TokenLogprob | None], rows: int) -> Tensor:
    """The log-probabilities (T, rows) of entries that have all of them."""
    out = torch.full((len(entries), rows), float("nan"))
    for row, entry in zip(out, entries, strict=True):
        assert entry is not None
        ids, values = zip(*entry.top, strict=True)
        row[list(ids)] = torch.tensor(values)
    return out


def whole(rows: int, **settings: Any) -> SamplingParams:
    """Asks for the log-probabilities of all tokens, of prompt and answer."""
    return replace(GREEDY, max_tokens=4, logprobs=rows, prompt_logprobs=rows, **settings)


def scores(answer: Answer, rows: int) -> Tensor:
    """Those of every token of prompt and answer but the first."""
    assert answer.prompt_logprobs is not None
    return table([*answer.prompt_logprobs[1:], *answer.logprobs], rows)


@pytest.mark.parametrize("name", CASES)
def test_log_probabilities_are_those_of_peft(name: str, tmp_path: Path) -> None:
    kind, rows, settings = CASES[name]
    save_grown(tmp_path, kind, rows, "tied" in name, **settings)
    engine = build(tmp_path / "base")
    info, runner = engine.load_adapter(KEY, tmp_path / "adapter"), engine.runner
    adapter = read_adapter(tmp_path / "adapter", engine.layout)
    kept, _ = folded_bytes(adapter, runner.arch, runner.dtype, runner.factor_dtype, None)
    assert kept == info.bytes and info.vocab_size == rows
    ids, base = (*prompt(9), *range(rows - 4, rows), 5), ask(prompt(11), id="base", sampling=whole(VOCAB))
    ((alone,),) = run(engine, base)
    (answer,), (beside,) = run(engine, ask(ids, sampling=whole(rows), adapter=KEY), base)
    theirs = reference(tmp_path, rows, (*ids, *answer.token_ids[:-1]))
    assert relative(scores(answer, rows), theirs) < FP32
    assert answer.token_ids == theirs[len(ids) - 1 :].argmax(-1).tolist()
    assert torch.equal(scores(beside, VOCAB), scores(alone, VOCAB))


@pytest.mark.parametrize("rows", [GROWN, CUT])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["lm_head"], "use_dora": True},
        LORA | {"modules_to_save": ["lm_head"], "tables": False},
        {"target_modules": TABLES, "tables": False},
    ],
)
def test_a_vocabulary_that_is_not_in_the_file_is_refused(settings: dict[str, Any], rows: int, tmp_path: Path) -> None:
    """Of the embedding or of the head there are not all rows, and the number that a base has to have is said."""
    save_grown(tmp_path, rows=rows, **settings)
    with pytest.raises(BaseModelMismatchError, match=f"resize_token_embeddings to {rows} rows"):
        build(tmp_path / "base").load_adapter(KEY, tmp_path / "adapter")


def test_rows_of_tokens_that_are_nowhere_are_refused(tmp_path: Path) -> None:
    save_grown(tmp_path, target_modules=["q_proj"], trainable_token_indices=[3, VOCAB + 1], tables=False)
    with pytest.raises(BaseModelMismatchError, match=f"resize_token_embeddings to over {VOCAB + 1} rows"):
        build(tmp_path / "base").load_adapter(KEY, tmp_path / "adapter")


def test_tables_of_two_sizes_are_refused(tmp_path: Path) -> None:
    save_grown(tmp_path)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    (head,) = (name for name in tensors if name.endswith("lm_head.weight"))
    save_file(tensors | {head: tensors[head][:-1].contiguous()}, weights)
    with pytest.raises(BaseModelMismatchError, match=f"numbers of rows \\({GROWN - 1}, {GROWN}\\)"):
        build(tmp_path / "base").load_adapter(KEY, tmp_path / "adapter")


def test_each_has_the_ids_of_its_own_vocabulary(tmp_path: Path) -> None:
    save_grown(tmp_path / "a")
    save_grown(tmp_path / "b", rows=CUT)
    engine, cut = build(tmp_path / "a" / "base"), AdapterKey("cut", 1)
    engine.load_adapter(KEY, tmp_path / "a" / "adapter")
    engine.load_adapter(cut, tmp_path / "b" / "adapter")
    for key, rows in ((None, VOCAB), (KEY, GROWN), (cut, CUT)):
        run(engine, ask([rows - 1], adapter=key))
        with pytest.raises(InvalidRequestError, match=f"outside 0..{rows - 1}"):
            engine.add(ask([rows], adapter=key))


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, a TuckA adapter `adapter` with a vocabulary of its own, and the same in two: `resized`, the base with
    those tables, and `plain`, the rest of the adapter."""
    folder = tmp_path_factory.mktemp("routed")
    layout = build(save_model(folder / "base") and folder / "base").layout
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.resize_token_embeddings(GROWN, mean_resizing=False)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight += 0.3 * torch.randn(GROWN, 32, generator=random)
    model.save_pretrained(folder / "resized")
    saved = {
        f"{name}.weight": model.get_parameter(f"{name}.weight").detach() for name in ("model.embed_tokens", "lm_head")
    }
    save_tucka(folder / "adapter", layout, saved=saved)
    save_tucka(folder / "plain", layout)
    return folder


SAMPLINGS: dict[str, SamplingParams] = {
    "greedy": whole(GROWN),
    "drawn": SamplingParams(max_tokens=12, seed=1, ignore_eos=True),
    "filtered": SamplingParams(max_tokens=12, seed=2, top_k=90, top_p=0.99, min_p=0.001, ignore_eos=True),
    "penalties": replace(GREEDY, max_tokens=12, repetition_penalty=1.7, presence_penalty=0.5, frequency_penalty=0.5),
    "bias": replace(GREEDY, max_tokens=12, logit_bias=((VOCAB + 1, 9.0), (4, 2.0)), frequency_penalty=1.0),
    "allowed": replace(GREEDY, max_tokens=6, allowed_token_ids=(5, VOCAB, VOCAB + 2)),
    "not-yet": SamplingParams(max_tokens=9, min_tokens=5, seed=3, end_token_ids=(VOCAB,), stop_token_ids=(7,)),
    "bad-words": replace(GREEDY, max_tokens=6, bad_words=((VOCAB,), (VOCAB + 1, 4))),
}


@pytest.mark.parametrize("kernels", ["reference", pytest.param("native", marks=pytest.mark.native)])
@pytest.mark.parametrize("scope", [RouteScope.REQUEST, RouteScope.PREFIX, RouteScope.BATCH])
def test_a_routed_one_answers_as_it_does_on_a_base_resized(routed: Path, scope: RouteScope, kernels: str) -> None:
    """However its tokens are chosen, in one batch with the base's, whose answers stay what they were; and so it does
    with drafts."""
    ids = (*prompt(5), VOCAB, VOCAB + 2, 9, VOCAB + 1, 3)
    resized = build(routed / "resized", kernels=kernels)
    resized.load_adapter(KEY, routed / "plain")
    engine = build(routed / "base", kernels=kernels)
    engine.load_adapter(KEY, routed / "adapter")
    asked = [ask(ids, id=name, sampling=own, adapter=KEY, scope=scope) for name, own in SAMPLINGS.items()]
    others = [ask(prompt(7), id=f"base-{i}", sampling=whole(VOCAB, seed=i)) for i in range(2)]
    if scope is RouteScope.BATCH:  # whose route is its batch's: one after the other
        theirs = [run(resized, one)[0] for one in asked]
        ours = [run(engine, one, *others)[0] for one in asked]
    else:
        theirs = run(resized, *asked)
        alone = run(engine, *others)
        *ours, first, second = run(engine, *asked, *others)
        for (beside,), (before,) in zip([first, second], alone, strict=True):
            assert torch.equal(scores(beside, VOCAB), scores(before, VOCAB))
        drafted = run(engine, *others, *asked, known=[*alone, *ours])
        assert tokens(drafted) == tokens([*alone, *ours])
    assert tokens(ours) == tokens(theirs)
    assert max(map(max, tokens(ours))) >= VOCAB, "no added token came: this shows nothing"
    assert relative(scores(ours[0][0], GROWN), scores(theirs[0][0], GROWN)) < 1e-6


def tokens(answers: list[list[Answer]]) -> list[list[int]]:
    return [answer.token_ids for (answer,) in answers]


def test_it_comes_back_from_the_host_cache_and_goes(routed: Path) -> None:
    engine = build(routed / "base")
    ids = ask((VOCAB, 5, VOCAB + 2), sampling=whole(GROWN), adapter=KEY, scope=RouteScope.REQUEST)
    engine.host.note(engine.load_adapter(KEY, routed / "adapter"))
    ((before,),) = run(engine, ids)
    folded = engine.evict_adapter(KEY)
    assert folded is not None
    engine.cache_adapter(folded)
    found = engine.activate_adapter(KEY)
    assert found is not None and found[1].vocab_size == GROWN
    engine.add_adapter(found[0])
    ((after,),) = run(engine, ids)
    assert torch.equal(scores(after, GROWN), scores(before, GROWN))


def test_none_is_combined(routed: Path) -> None:
    engine = build(routed / "base")
    parts = [AdapterPart(routed / name, Route(0, (0.5, 0.5)), None, None, 0.5) for name in ("adapter", "plain")]
    with pytest.raises(InvalidRequestError, match="embedding, the head"):
        engine.combine_adapters(AdapterKey("both", 1), parts)
