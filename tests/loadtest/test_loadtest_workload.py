import json

import pytest

from tucka_runtime.errors import ConfigError
from tucka_runtime.loadtest.settings import Settings
from tucka_runtime.loadtest.workload import TokenScale, Workload, read_lines


def workload(models=("a", "b", "c"), base="base", **changes):
    return Workload(Settings(**changes), list(models), base, TokenScale())


def jsonl(path, *items):
    path.write_text("\n".join(json.dumps(item) for item in items))
    return str(path)


def test_the_same_seed_sends_the_same_and_another_does_not():
    one, same, other = (workload(rate="20", seed=s, turns="uniform:1:3").plan() for s in (1, 1, 2))
    assert one == same
    assert one != other


def test_a_conversation_does_not_depend_on_those_before_it():
    assert workload().conversation(17) == workload().conversation(17)


def test_lengths_prefixes_and_turns():
    plan = workload(rate="100", prompt_tokens="5", prefixes=2, prefix_tokens="9", turns="3", think=0.5).plan()
    assert all(len(c.turns) == 3 for c in plan)
    assert all(len(c.turns[0].text.split()) == 14 and len(c.turns[1].text.split()) == 5 for c in plan)
    assert len({c.turns[0].text.rsplit(" ", 5)[0] for c in plan}) == 2
    pauses = [t.think for c in plan for t in c.turns[1:]]
    assert 0.45 < sum(pauses) / len(pauses) < 0.55
    assert all(c.turns[0].think == 0 for c in plan)


def test_the_base_gets_its_share():
    plan = workload(rate="100", base_share=0.3).plan()
    assert sum(c.model == "base" for c in plan) / len(plan) == pytest.approx(0.3, abs=0.04)


def test_token_scale_turns_tokens_to_words():
    scale = TokenScale(offset=10, per_word=1.5)
    assert scale.words(160) == 100
    assert scale.words(1) == 1


def test_trace_replay(tmp_path):
    trace = jsonl(
        tmp_path / "t.jsonl",
        {"timestamp": 3000, "input_length": 8, "output_length": 4},
        {"at": 1, "model": "b", "prompt": "hello", "max_tokens": 2, "expected": "x"},
    )
    first, second = workload(trace=trace, trace_speed=2.0).plan()
    assert (first.at, first.model, first.turns[0].text, first.turns[0].expected) == (0, "b", "hello", "x")
    assert (second.at, len(second.turns[0].text.split()), second.turns[0].max_tokens) == (1.0, 8, 4)


def test_a_timestamp_that_is_no_number(tmp_path):
    """A trace needs one, what else a dataset has is its own."""
    lines = jsonl(tmp_path / "t.jsonl", {"timestamp": "2024-05-10 00:00:00", "prompt": "x"})
    with pytest.raises(ConfigError, match="'timestamp' \\(milliseconds\\) in every line"):
        workload(trace=lines)
    assert workload(rate="50", dataset=lines).plan()[0].turns[0].text == "x"


def test_dataset_lines_go_to_their_models(tmp_path):
    data = jsonl(tmp_path / "d.jsonl", {"model": "a", "prompt": "for a"}, {"prompt": "for all"})
    plan = workload(rate="50", dataset=data).plan()
    assert all(c.turns[0].text == ("for a" if c.model == "a" else "for all") for c in plan)


def test_a_conversation_given_to_another_model_has_that_ones_prompt(tmp_path):
    lines = ({"model": m, "prompt": f"for {m}", "expected": m} for m in "abc")
    load = workload(dataset=jsonl(tmp_path / "d.jsonl", *lines))
    first = load.conversation(3)
    other = load.conversation(3, instead="b" if first.model == "a" else "a")
    assert other.model != first.model
    assert other.turns[0].text == f"for {other.model}" and other.turns[0].expected == other.model
    traced = workload(trace=jsonl(tmp_path / "t.jsonl", {"at": 0, "model": "a", "prompt": "x", "expected": "y"}))
    assert traced.conversation(0).turns[0].expected == "y"
    assert traced.conversation(0, instead="b").turns[0].expected is None


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("", {}, "has no lines"),
        ("[1]", {}, "line 1"),
        ('{"prompt": "x"}\nnonsense', {}, "line 2"),
        ('{"model": "a", "prompt": "x"}', {}, "no line for b, c, only for a"),
        ('{"messages": [{"role": "user", "content": "x"}]}', {}, "--endpoint chat"),
        ('{"prompt": [1, 2]}', {"endpoint": "chat"}, "--endpoint completions"),
    ],
)
def test_bad_datasets_are_refused(tmp_path, content, flags, message):
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message):
        workload(dataset=str(tmp_path / "d.jsonl"), **flags)


def test_a_line_ends_where_jsonl_says_and_a_mark_may_begin_the_file(tmp_path):
    texts = ["a\u2028b", "a\u0085b", "a\u2029b", "a\x0bb"]
    lines = "\r\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "d.jsonl").write_text(lines, "utf-8-sig", newline="")
    assert [item["prompt"] for item in read_lines(str(tmp_path / "d.jsonl"))] == texts


def test_a_trace_without_times_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="'at'"):
        workload(trace=jsonl(tmp_path / "t.jsonl", {"prompt": "x"}))
    with pytest.raises(ConfigError, match="FileNotFoundError"):
        workload(trace=str(tmp_path / "none"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "ftp://x"},
        {"rate": "inf"},
        {"rate": "0"},
        {"base_share": 1.5},
        {"percentiles": "50,100"},
        {"goodput": ("ttft",)},
        {"goodput": ("speed:3",)},
        {"goodput": ("ttft:inf",)},
        {"versus_base": True, "churn_rate": 1.0},
        {"concurrency": 0},
        {"duration": 0.0},
        {"extra_body": "[]"},
        {"extra_body": "{"},
        {"timeout": float("nan")},
    ],
)
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        Settings(**wrong)
