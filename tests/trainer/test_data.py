"""Training data: what is learnt, what is refused with line and reason, batches that depend on the seed alone."""

import gzip
import json
import struct
import sys

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from tucka_runtime.tokenizer import Tokenizer
from tucka_runtime.trainer import data
from tucka_runtime.trainer.data import DataError, collate, encode, epoch, split, tasks
from tucka_runtime.trainer.experiments.base import END, build_tokenizer
from tucka_runtime.trainer.experiments.tasks import TASKS, held_out
from tucka_runtime.trainer.records import read

TOKENIZER = Tokenizer(build_tokenizer())


def load(path, *rest, **more):
    return data.load(read(path), *rest, **more)


def chat(prompt, answer):
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


ANSWER = {"role": "assistant", "content": "y"}


def told(prompt, answer):
    return {"messages": [{"role": "developer", "content": "s"}, *chat(prompt, answer)["messages"]]}


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_only_the_completion_is_learnt(tmp_path):
    examples = load(write(tmp_path / "d", {"prompt": "ab", "completion": "cde"}, "", chat("x", "yz")), TOKENIZER, 64)
    ids, mask, labels = collate(examples, 0)
    assert labels.tolist()[0] == [-100, -100, *ids.tolist()[0][2:]]
    assert ids.tolist()[0][-1] == END
    assert TOKENIZER.decode(list(examples[1].ids), False) == "<|user|>x<|assistant|>yz<|end|>"
    assert examples[1].start == 3
    assert mask.sum(1).tolist() == [len(e.ids) for e in examples]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{not json", "not JSON"),
        ("[1]", "must be a JSON object"),
        ({"prompt": "a"}, "'completion' must be a non-empty string"),
        ({"prompt": 3, "completion": "b"}, "'prompt' must be"),
        ({"answer": "a"}, "it has no form that is known: prompt and completion, messages"),
        ('{"prompt": "a", "completion": "\\ud83d"}', "half a surrogate pair"),
        ('{"prompt": "a", "completion": "b", "task": "\\udc00"}', "half a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [1]}]},
            "has a call without",
        ),
        ({**chat("a", "b"), "tools": [{"type": "function"}]}, "tool 1 must be a function with a name"),
        ({**chat("a", "b"), "tools": "[{"}, "'tools' is not JSON"),
        (
            {"messages": [{"role": "user", "content": [{"image_url": 1}]}, {"role": "assistant", "content": "b"}]},
            "no text",
        ),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "'history' must be a list of pairs"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "'completion' must be a list of messages"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
            "learnt",
        ),
        ({"messages": []}, "at least two messages"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "must be the assistant's"),
        ({"messages": [{"role": "robot", "content": "a"}, {"role": "assistant", "content": "b"}]}, "a role other than"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}, "message 1 must be an object"),
        ({"prompt": "a" * 100, "completion": "b"}, "more than the limit of 64"),
        ({"prompt": "a", "completion": "b", "task": 1}, "'task' must be a string"),
    ],
)
def test_bad_records_name_line_and_reason(tmp_path, record, reason):
    with pytest.raises(DataError) as error:
        load(write(tmp_path / "d", chat("a", "b"), "", record), TOKENIZER, 64)
    assert "line 3: " in error.value.message
    assert reason in error.value.message


def test_every_bad_line_is_counted(tmp_path):
    with pytest.raises(DataError, match=r"(?s)12 bad records in d;.*line 10: .*and 2 more"):
        load(write(tmp_path / "d", *["{"] * 12), TOKENIZER, 64)


def test_empty_or_binary_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="no records"):
        load(write(tmp_path / "d", ""), TOKENIZER, 64)
    (tmp_path / "d").write_bytes(b'{"prompt": "a", "completion": "b"}\n\xff\n')
    with pytest.raises(DataError, match="/d, line 2: not UTF-8"):
        load(tmp_path / "d", TOKENIZER, 64)
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path / "missing", TOKENIZER, 64)


def test_a_mark_may_begin_the_file_and_half_a_character_is_a_reason(tmp_path):
    (tmp_path / "d").write_text(json.dumps(chat("a\u2028b", "c")) + "\n", "utf-8-sig")
    assert len(load(tmp_path / "d", TOKENIZER, 64)) == 1
    for record in ({"prompt": "cut \ud83d here", "completion": "x"}, chat("x", "cut \ud83d here")):
        with pytest.raises(DataError, match="line 2: a text holds half a surrogate pair"):
            load(write(tmp_path / "d", chat("a", "b"), record), TOKENIZER, 64)


def test_no_prompt_is_on_both_sides():
    examples = [encode(chat(f"p{i % 20}", f"a{i}"), TOKENIZER, 64) for i in range(60)]
    train, held = split(examples, 0.2, seed=1)
    assert len(train) + len(held) == 60
    assert len({e.ids[: e.start] for e in held}) == 4
    assert not {e.ids[: e.start] for e in train} & {e.ids[: e.start] for e in held}
    assert split(examples, 0.0, 1)[1] == []


def test_texts_are_held_out_one_by_one():
    """Their first token, which nobody is asked for, is common to many or to all."""
    texts = [encode({"text": f"text {i % 20}"}, TOKENIZER, 64) for i in range(40)]
    train, held = split(texts, 0.2, seed=1)
    assert (len(train), len(held)) == (32, 8) and not set(train) & set(held)


@pytest.mark.parametrize(("prompts", "fraction"), [(2, 0.75), (10, 0.96)])
def test_something_is_left_to_train_on(prompts, fraction):
    train, held = split([encode(chat(f"p{i}", "a"), TOKENIZER, 64) for i in range(prompts)], fraction, seed=0)
    assert (len(train), len(held)) == (1, prompts - 1)


def test_batches_depend_on_seed_and_epoch_alone():
    examples = [encode({**chat(f"p{i}", "a"), "task": "ab"[i % 2]}, TOKENIZER, 64) for i in range(22)]
    again = epoch(examples, 4, seed=5, number=2, by_task=True)
    assert epoch(examples, 4, 5, 2, by_task=True) == again
    assert epoch(examples, 4, 5, 3, by_task=True) != again
    assert all(len(b) == 4 and len({e.task for e in b}) == 1 for b in again)
    assert {e for b in again for e in b} == set(examples)
    assert tasks(examples) == {"a": 11, "b": 11}


def test_tasks_keep_held_out_prompts_apart():
    for task in TASKS.values():
        train = [next(r) for r in [task.records(0, False)] for _ in range(200)]
        held = [next(r) for r in [task.records(1, True)] for _ in range(50)]
        assert not {p for p, _, _ in train} & {p for p, _, _ in held}
        assert all(held_out(p) for p, _, _ in held)
        assert all(answer for _, answer, _ in train)


PAIR = {"prompt": "ab", "completion": "c"}


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\r\n",
        gzip.compress(json.dumps(PAIR).encode()),
        b" [" + json.dumps(PAIR, indent=1).encode() + b"]\n",
    ],
    ids=["mark and CRLF", "gzip", "array"],
)
def test_files_as_people_have_them(tmp_path, content):
    (tmp_path / "d").write_bytes(content)
    assert load(tmp_path / "d", TOKENIZER, 64) == [encode(PAIR, TOKENIZER, 64)]


def test_broken_gzip_and_parquet_without_pyarrow_are_said(tmp_path, monkeypatch):
    (tmp_path / "d").write_bytes(gzip.compress(json.dumps(PAIR).encode() * 99)[:40])
    with pytest.raises(DataError, match="not whole gzip data"):
        load(tmp_path / "d", TOKENIZER, 64)
    (tmp_path / "d").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow: in the checkout run"):
        load(tmp_path / "d", TOKENIZER, 64)


@pytest.mark.parametrize(
    ("record", "same"),
    [
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], "system": "s"},
            told("x", "y"),
        ),
        ({"instruction": "x", "output": "y", "system": "s"}, told("x", "y")),
        ({"prompt": told("x", "y")["messages"][:2], "completion": told("x", "y")["messages"][2:]}, told("x", "y")),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}, ANSWER]}, chat("x", "y")),
        (
            {"instruction": "x", "output": "y", "history": [["a", "b"]]},
            {"messages": [*chat("a", "b")["messages"], *chat("x", "y")["messages"]]},
        ),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}, chat("x", "y")),
        ({"instruction": "x", "input": "", "output": "y"}, chat("x", "y")),
        ({"prompt": "x", "completion": "y", "instruction": "i7"}, {"prompt": "x", "completion": "y"}),
        ({"instruction": "x", "input": "z", "output": "y"}, chat("x\n\nz", "y")),
    ],
)
def test_forms_of_other_tools_are_conversations(record, same):
    assert encode(record, TOKENIZER, 64) == encode(same, TOKENIZER, 64)


def test_plain_text_is_learnt_but_for_its_first_token():
    (text,) = [encode({"text": "abc"}, TOKENIZER, 64)]
    assert TOKENIZER.decode(list(text.ids), False) == "abc<|end|>" and text.start == 1


@pytest.mark.parametrize("record", [{"prompt": "a", "completion": "bc"}, {"text": "abc"}])
def test_an_end_that_is_there_is_not_put_twice(record):
    spelled = {key: text + ("" if key == "prompt" else "<|end|>") for key, text in record.items()}
    assert encode(spelled, TOKENIZER, 64) == encode(record, TOKENIZER, 64)


def test_every_turn_is_learnt_with_the_prompt_that_asks_for_it(tmp_path):
    talk = {"messages": chat("a", "b")["messages"] + chat("c", "d")["messages"]}
    path = write(tmp_path / "d", talk)
    turns = load(path, TOKENIZER, 64)
    assert [TOKENIZER.decode(list(e.ids), False) for e in turns] == [
        "<|user|>a<|assistant|>b<|end|>", "<|user|>a<|assistant|>b<|end|><|user|>c<|assistant|>d<|end|>",
    ]  # fmt: skip
    assert [TOKENIZER.decode(list(e.ids[e.start :]), False) for e in turns] == ["b<|end|>", "d<|end|>"]
    assert [e.ids for e in load(path, TOKENIZER, 64, "last")] == [turns[1].ids]
    others = [encode(chat(f"p{i}", "x"), TOKENIZER, 64) for i in range(9)]
    for seed in range(8):
        train, held = split(turns + others, 0.3, seed)
        assert sum(e in held for e in turns) in (0, 2) and len(train) + len(held) == 11


def test_what_has_no_weight_is_not_learnt(tmp_path):
    talk = chat("a", "b")["messages"] + chat("c", "d")["messages"]
    talk[1]["weight"] = 0
    (turn,) = load(write(tmp_path / "d", {"messages": talk}), TOKENIZER, 64)
    assert TOKENIZER.decode(list(turn.answer), False) == "d"
    before = {"prompt": talk[:2], "completion": talk[2:]}
    assert load(write(tmp_path / "d", before), TOKENIZER, 64) == [turn]


def test_tables_are_read_without_the_columns_of_other_rows(tmp_path):
    rows = [
        chat("a", "b"),
        {"messages": [*chat("a", "b")["messages"][:1], {"role": "assistant", "content": "y", "weight": 1}]},
    ]
    lines = load(write(tmp_path / "d", *rows), TOKENIZER, 64)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "d.parquet")
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "splits")
    for name in ("d.parquet", "one", "splits", "splits/test"):
        assert load(tmp_path / name, TOKENIZER, 64, strict=True) == lines
    datasets.DatasetDict(test=table).save_to_disk(tmp_path / "none")
    for folder, words in ((tmp_path, "holds no dataset"), (tmp_path / "none", "has no split train. Name one: .*test")):
        with pytest.raises(DataError, match=words):
            load(folder, TOKENIZER, 64)
    (tmp_path / "d.gz").write_bytes(gzip.compress((tmp_path / "d.parquet").read_bytes()))
    assert load(tmp_path / "d.gz", TOKENIZER, 64) == lines


def test_a_table_whose_text_is_not_utf8_is_refused(tmp_path):
    half = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(struct.pack("2i", 0, 1)), pyarrow.py_buffer(b"\xff"))
    parquet.write_table(pyarrow.table({"prompt": half, "completion": ["b"]}), tmp_path / "d")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load(tmp_path / "d", TOKENIZER, 64)


def test_further_keys_are_named_once_and_refused_when_strict(tmp_path):
    path = write(tmp_path / "d", *[PAIR | {"weight": 1, "id": str(i)} for i in range(20)])
    said = []
    assert len(load(path, TOKENIZER, 64, tell=said.append)) == 20
    assert said == ["d: ignored keys: id, weight"]
    with pytest.raises(DataError, match=r"line 1: unknown keys: id, weight \(--strict\)"):
        load(path, TOKENIZER, 64, strict=True)
