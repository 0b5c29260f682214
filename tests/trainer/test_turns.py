"""What is learnt of conversations: tokens as a request for the turn has them, with what the template writes."""

import json

import pytest

from tests.support.chat_templates import HERMES, PLAIN
from tucka_runtime.tokenizer import Tokenizer
from tucka_runtime.trainer.data import DataError, collate, encode_turns
from tucka_runtime.trainer.experiments.base import build_tokenizer
from tucka_runtime.trainer.records import normalise

MARKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' }}{% generation %}"
    "{{ m.content + '<|end|>' }}{% endgeneration %}{% else %}{{ '<|user|>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
FORGETS = (  # thoughts of earlier turns
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' and loop.last %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
OPENS = (  # a thought, which history leaves out
    "{% for m in messages %}{{ m.role }}:{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:<think>\n{% endif %}"
)
ASK = {"role": "user", "content": "a"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CALLS = [
    ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "2"}, {"role": "assistant", "content": "It is 2."},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def tokenizer_with(template):
    made = build_tokenizer()
    made.chat_template = template
    return Tokenizer(made)


def turns(template, record, learn="all"):
    """(prompt, what is learnt) of every example, as text."""
    tokenizer = tokenizer_with(template)
    found = []
    for example in encode_turns(normalise(record), tokenizer, 999, learn):
        ids, _, labels = collate([example], 0)
        said = [i for i in labels[0].tolist() if i != -100]
        found.append(tuple(tokenizer.decode(list(part), False) for part in (ids[0, : example.start].tolist(), said)))
    return found


def test_calls_are_learnt_as_the_template_writes_them():
    call, answer = turns(HERMES, {"messages": CALLS, "tools": TOOLS})
    assert call == (
        '# {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}\nuser: a\nassistant:',
        ' <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|end|>',
    )
    assert answer[0].endswith("</tool_call>\ntool: 2\nassistant:") and answer[1] == "It is 2.<|end|>"


def test_a_template_without_functions_is_told_of_them_as_the_server_tells_it():
    call, answer = turns(PLAIN, {"messages": CALLS, "tools": json.dumps(TOOLS)})
    assert call[0].startswith("user: You can call functions.") and '{"name": "f", "parameters"' in call[0]
    assert call[1] == '{"name": "f", "arguments": {"x": 1}}<|end|>'
    assert "user: f returned:\n2\n" in answer[0]


@pytest.mark.parametrize("key", ["from", "role"])
def test_calls_of_other_tools_are_the_same_calls(key):
    talk = [
        ("human", "a"), ("function_call", '{"name": "f", "arguments": {"x": 1}}'), ("observation", "2"),
        ("gpt", "It is 2."),
    ]  # fmt: skip
    value = "value" if key == "from" else "content"
    record = {"conversations": [{key: role, value: text} for role, text in talk], "tools": [TOOLS[0]["function"]]}
    assert turns(HERMES, record) == turns(HERMES, {"messages": CALLS, "tools": TOOLS})


def test_thoughts_are_learnt_where_the_template_keeps_them():
    answer = {"role": "assistant", "content": "b", "reasoning_content": "so"}
    two = {"messages": [ASK, answer, ASK, answer]}
    first, second = turns(FORGETS, two)
    assert first == ("user:a<|end|>assistant:", "<think>so</think>b<|end|>")
    assert second == ("user:a<|end|>assistant:b<|end|>user:a<|end|>assistant:", "<think>so</think>b<|end|>")
    with pytest.raises(ValueError, match="message 2 has a reasoning, which"):
        turns(MARKS, two)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"content": "b"}, "\n</think>\n\nb<|end|>"),
        ({"content": "<think>\nso</think>b"}, "so</think>b<|end|>"),
        ({"content": "b", "reasoning_content": "so"}, "so\n</think>\n\nb<|end|>"),
    ],
)
def test_a_thought_that_the_prompt_opens_is_closed(answer, said):
    ((prompt, learnt),) = turns(OPENS, {"messages": [ASK, {"role": "assistant", **answer}]})
    assert prompt == "user:a<|end|>assistant:<think>\n" and learnt == said


def test_a_call_of_unknown_spelling_is_refused():
    with pytest.raises(ValueError, match="not known how the call is to be written"):
        turns(OPENS.replace("{{ m.role", "{{ tools or '' }}{{ m.role"), {"messages": CALLS, "tools": TOOLS})


def test_what_the_template_marks_is_learnt_as_one_example():
    talk = {"messages": [ASK, {"role": "assistant", "content": "b"}, ASK, {"role": "assistant", "content": "<|end|>c"}]}
    tokenizer = tokenizer_with(MARKS)
    (example,) = encode_turns(normalise(talk), tokenizer, 99, "generation")
    apart = encode_turns(normalise(talk), tokenizer, 99, "all")
    assert example.ids == apart[1].ids and example.start == apart[0].start and example.answer == apart[0].answer
    assert turns(MARKS, talk, "generation") == [("<|user|>a<|assistant|>", "b<|end|><|end|>c<|end|>")]
    talk["messages"][1]["weight"] = 0
    assert turns(MARKS, talk, "generation")[0][1] == "<|end|>c<|end|>"
    outside = MARKS.replace(" + '<|end|>' }}{% endgeneration %}", " }}{% endgeneration %}{{ '<|end|>' }}")
    assert turns(outside, talk, "generation") == turns(MARKS, talk, "generation")
    with pytest.raises(DataError, match="marks nothing"):
        turns(HERMES, talk, "generation")
    with pytest.raises(DataError, match="would never end"):
        turns(MARKS.replace(" + '<|end|>'", ""), talk, "generation")
