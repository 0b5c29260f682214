"""Training data: what is learnt, what is refused with line and reason, batches that depend on the seed alone."""

import json

import pytest

from tucka_runtime.tokenizer import Tokenizer
from tucka_runtime.trainer.data import DataError, collate, encode, epoch, load, split, tasks
from tucka_runtime.trainer.experiments.base import END, build_tokenizer
from tucka_runtime.trainer.experiments.tasks import TASKS, held_out

TOKENIZER = Tokenizer(build_tokenizer())


def chat(prompt, answer):
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


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
        ({"prompt": "a", "completion": "b", "weight": 1}, "unknown key 'weight'"),
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
    with pytest.raises(DataError, match=r"(?s)12 bad records.*line 10: .*and 2 more"):
        load(write(tmp_path / "d", *["{"] * 12), TOKENIZER, 64)


def test_empty_or_binary_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="no records"):
        load(write(tmp_path / "d", ""), TOKENIZER, 64)
    (tmp_path / "d").write_bytes(b'{"prompt": "a", "completion": "b"}\n\xff\n')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
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
