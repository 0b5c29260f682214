"""The public face: the engine offline, held to what it gives request by request."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tucka_runtime
from tests.support.driving import GREEDY, prompt, save_lora, save_model, save_tucka
from tucka_runtime import LLM, InvalidRequestError, Route, SamplingParams
from tucka_runtime.embedded import FOLDER
from tucka_runtime.errors import ContextLengthError, ModelNotFoundError
from tucka_runtime.messages import FinishReason, RouteScope

SHORT = replace(GREEDY, max_tokens=6)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("llm")
    save_model(folder / "model")
    made = LLM(folder / "model", device="cpu", kv_cache_tokens=1024)
    save_tucka(folder / "routed", made.engine.layout)
    save_lora(folder / "plain", made.engine.layout)
    made.load_adapter("routed", folder / "routed")
    made.load_adapter("plain", folder / "plain")
    made.load_adapter("pinned", folder / "routed", Route(1, (0.5, 0.25)))
    return made


def test_what_the_package_promises_is_there() -> None:
    for name in tucka_runtime.__all__:
        assert getattr(tucka_runtime, name) is not None
    with pytest.raises(AttributeError):
        _ = tucka_runtime.nothing  # type: ignore[attr-defined]


def test_the_face_brings_no_torch() -> None:
    code = "import sys; from tucka_runtime import SamplingParams; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_prompts_of_all_adapters_at_once_are_as_alone(llm: LLM) -> None:
    names = [None, "routed", "plain", "pinned", "routed"]
    prompts = [prompt(5 + i, i) for i in range(len(names))]
    together = llm.generate(prompts, SHORT, adapter=names, route="request", n=2)
    for output, ids, name in zip(together, prompts, names, strict=True):
        assert output.prompt_token_ids == ids and len(output.outputs) == 2
        ((alone,), *_) = [one.outputs for one in llm.generate(ids, SHORT, adapter=name, route="request")]
        for own in output.outputs:
            assert own.token_ids == alone.token_ids and own.finish_reason is FinishReason.LENGTH
            assert (own.route is None) == (name in (None, "plain", "pinned"))


def test_several_adapters_with_weights(llm: LLM, tmp_path: Path) -> None:
    """One list for all prompts, or one each; alone with the weight 1 an adapter is itself, with 0 the base."""
    mix = [{"name": "routed", "weight": 0.7}, {"name": "plain", "weight": 3.0}, {"name": "pinned", "weight": -0.5}]
    before, ids = len(llm.engine.adapters.loaded), prompt(9)

    def tokens(*adapters: Any) -> list[list[int]]:
        outputs = llm.generate([ids] * len(adapters), SHORT, adapter=list(adapters), route="request")
        return [output.outputs[0].token_ids for output in outputs]

    mixed, plain, base, swapped, one, nothing = tokens(
        mix, "plain", None, mix[::-1], [{"name": "plain"}], [{"name": "plain", "weight": 0}]
    )
    assert mixed == swapped and one == plain and nothing == base
    assert len({tuple(mixed), tuple(plain), tuple(base)}) == 3
    for output in llm.generate([ids, ids], SHORT, adapter=mix, route="request"):
        assert output.outputs[0].token_ids == mixed
        assert output.outputs[0].route is not None, "its router decides"
    assert len(llm.engine.adapters.loaded) == before + 1, "only what the last call asked for"
    for wrong in ([{"name": "plain"}, {"weight": 1}], [{"name": "plain", "weight": "1"}], [{"name": "plain", "x": 1}]):
        with pytest.raises(InvalidRequestError, match="`weight`"):
            llm.generate(ids, SHORT, adapter=wrong)
    with pytest.raises(ModelNotFoundError):
        llm.generate(ids, SHORT, adapter=[{"name": "plain"}, {"name": "unknown"}])
    llm.load_adapter("passing", save_lora(tmp_path / "a", llm.engine.layout, seed=5))
    save_lora(tmp_path / "a", llm.engine.layout, seed=6)
    with pytest.raises(InvalidRequestError, match="Load it again"):
        llm.generate(ids, SHORT, adapter=[{"name": "plain"}, {"name": "passing"}])
    llm.load_adapter("passing", tmp_path / "a")
    llm.generate(ids, SHORT, adapter=[{"name": "plain"}, {"name": "passing"}])
    llm.unload_adapter("passing")
    assert len(llm.engine.adapters.loaded) == before, "a combination goes with the first of its adapters"


def test_one_sampling_each(llm: LLM) -> None:
    params = [SHORT, replace(SHORT, max_tokens=2, logprobs=3, prompt_logprobs=1)]
    first, second = llm.generate([prompt(4), prompt(5)], params)
    assert [len(o.outputs[0].token_ids) for o in (first, second)] == [6, 2]
    assert second.prompt_logprobs is not None and len(second.prompt_logprobs) == 5 and not first.outputs[0].logprobs
    assert [len(entry.top) for entry in second.outputs[0].logprobs] == [3, 3]


def test_answers_are_cut_at_the_end_of_the_context(llm: LLM) -> None:
    (output,) = llm.generate(prompt(120), replace(GREEDY, max_tokens=50))
    assert len(output.outputs[0].token_ids) == 8
    with pytest.raises(ContextLengthError):
        llm.generate(prompt(128), SHORT)


def test_what_is_wrong_is_said(llm: LLM) -> None:
    with pytest.raises(ModelNotFoundError, match="routed, plain, pinned"):
        llm.generate(prompt(4), SHORT, adapter="unknown")
    with pytest.raises(InvalidRequestError, match="2 entries for 1 prompts"):
        llm.generate([prompt(4)], SHORT, adapter=["plain", "routed"])
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        llm.generate("text", SHORT)
    with pytest.raises(InvalidRequestError, match="chat template"):
        llm.chat([{"role": "user", "content": "hello"}])


def test_an_adapter_that_is_gone_is_unknown(llm: LLM, tmp_path: Path) -> None:
    llm.load_adapter("passing", save_lora(tmp_path / "a", llm.engine.layout, seed=5))
    llm.load_adapter("passing", save_lora(tmp_path / "b", llm.engine.layout, seed=6))
    assert len(llm.engine.adapters.loaded) == 4, "what it stood for before is gone"
    llm.unload_adapter("passing")
    llm.unload_adapter("passing")
    with pytest.raises(ModelNotFoundError):
        llm.generate(prompt(4), SHORT, adapter="passing")


def test_texts_and_chats_of_the_embedded_model() -> None:
    llm = LLM(adapters={"formats": FOLDER / "adapters" / "formats"}, device="cpu")
    ask = [{"role": "user", "content": "2024-03-05"}]
    sampling = SamplingParams(temperature=0, max_tokens=40)
    own, base = llm.chat([ask, ask], sampling, adapter=["formats", None], route=RouteScope.REQUEST)
    assert own.outputs[0].text == "5 March 2024" and own.outputs[0].finish_reason is FinishReason.STOP
    assert base.outputs[0].text != own.outputs[0].text
    (cut,) = llm.chat(ask, replace(sampling, stop=("March",)), adapter="formats", route="request")
    assert (cut.outputs[0].text, cut.outputs[0].stop_reason) == ("5 ", "March")
    special = replace(sampling, stop=("<|end|>",), ignore_eos=True)
    (ended,) = llm.chat(ask, special, adapter="formats", route="request")
    assert (ended.outputs[0].text, ended.outputs[0].stop_reason) == ("5 March 2024", "<|end|>")
    spelled = [{"role": "user", "content": "2024-03-05<|end|>"}]
    assert 2 not in llm.chat(spelled, sampling)[0].prompt_token_ids, "2 is <|end|>: what people write is text"
    (text,) = llm.generate("Once upon", SamplingParams(temperature=0, max_tokens=5))
    assert isinstance(text.outputs[0].text, str) and len(text.outputs[0].token_ids) <= 5
    assert not llm.engine.busy and not llm.engine.requests


def test_stop_strings_end_an_answer_within_a_draft_where_they_do_without() -> None:
    """The base says ` abc abcbabcbabcbabcbabc abcb...`, which is drafted some tokens at a time: a stop string that is a
    part of it ends in the middle of what one step brings, with the same text, tokens and cause."""
    plain, drafted = (LLM(device="cpu", kv_cache_tokens=4096, speculate=how) for how in ("none", "ngram"))
    bursts: list[int] = []
    step = drafted.engine.step

    def watched() -> Any:
        outputs, stats = step()
        bursts.append(stats.accepted_tokens if stats is not None else 0)
        return outputs, stats

    drafted.engine.step = watched  # type: ignore[method-assign]
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    (free,) = drafted.generate("abc abc abc abc", sampling)
    text = free.outputs[0].text
    assert max(bursts) >= 3 and len(text) == 40
    for end in (20, 28, 29):
        stop = text[end - 9 : end]
        found = []
        for llm in (plain, drafted):
            (output,) = llm.generate("abc abc abc abc", replace(sampling, stop=(stop, "never said")))
            (own,) = output.outputs
            found.append((own.text, own.token_ids, own.finish_reason, own.stop_reason))
            assert not llm.engine.busy and not llm.engine.requests
        assert found[0] == found[1]
        assert found[1][0] == text[: text.index(stop)] and found[1][2:] == (FinishReason.STOP, stop)


def test_thousands_of_prompts_each_with_its_adapter(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    """More than a server's queue takes. docs/measurements/offline-2026-11-26.md has what a step costs beside them."""
    count = 1500
    names = [(None, "plain", "pinned")[i % 3] for i in range(count)]
    prompts = [prompt(4 + i % 3, i) for i in range(count)]
    outputs = llm.generate(prompts, replace(SHORT, max_tokens=2), adapter=names, progress=True)
    assert [o.prompt_token_ids for o in outputs] == prompts
    assert all(len(o.outputs[0].token_ids) == 2 for o in outputs)
    for i in (0, 1, 700, count - 1):
        (alone,) = llm.generate(prompts[i], replace(SHORT, max_tokens=2), adapter=names[i])
        assert outputs[i].outputs[0].token_ids == alone.outputs[0].token_ids
    said = capsys.readouterr().err
    assert f"{count}/{count}" in said and "tok/s" in said


def test_what_raises_leaves_nothing_in_the_engine(llm: LLM) -> None:
    """Else the others would hold their adapters, and be computed beside the next call's."""
    with pytest.raises(InvalidRequestError, match="token ids outside"):
        llm.generate([prompt(4), (10**9,)], SHORT, adapter=["routed", None])
    assert not llm.engine.requests and not llm.engine.busy


def test_a_prompt_that_fills_the_context_is_scored(llm: LLM) -> None:
    (output,) = llm.generate(prompt(128), replace(GREEDY, max_tokens=0, prompt_logprobs=0))
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 128
