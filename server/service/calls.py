"""Calls of functions in what a model writes, in the formats of the families' chat templates.

| name | what a model writes |
|---|---|
| `hermes` | `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, once a call (Hermes, Qwen) |
| `llama3_json` | `{"name": …, "parameters": {…}}`, maybe behind `<|python_tag|>`; several parted by `;` |
| `mistral` | `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or `[TOOL_CALLS]name[ARGS]{…}` |
| `json` | `{"name": …, "arguments": {…}}` or a list of those, at the answer's beginning |

Only what names one of the request's functions is a call; what merely looks like one stays text. A call goes out as soon
as its name is known, its arguments as they are written: whether they are JSON is the reader's to find out.
"""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from tucka_runtime.server.service.events import CallArguments, CallBegun, CallEnded, Text
from tucka_runtime.server.service.parsing import Step, StreamParser


@dataclass(frozen=True, slots=True)
class CallFormat:
    """`begin` stands before calls and `end` behind each. `bare`: an answer may begin with the JSON itself. `key` is
    what arguments are called. `marks` are all texts that may be special tokens and yet have to be seen."""

    begin: str = ""
    end: str = ""
    bare: bool = False
    key: str = "arguments"
    marks: tuple[str, ...] = ()


FORMATS = {
    "hermes": CallFormat("<tool_call>", "</tool_call>", marks=("<tool_call>", "</tool_call>")),
    "llama3_json": CallFormat("<|python_tag|>", bare=True, key="parameters", marks=("<|python_tag|>",)),
    "mistral": CallFormat("[TOOL_CALLS]", marks=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")),
    "json": CallFormat(bare=True),
}

_KEYS = ("arguments", "parameters")
_LONGEST_HEAD = 256  # characters of a name with what stands between it and its arguments
_HEAD = re.compile(r"\s*([\w.:/-]+)\s*(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*")
_JSON = frozenset('{}[]:,"0123456789+-.eEtrufalsn \t\r\n')


class CallParser(StreamParser):
    """Text and calls. `functions` are the names that may be called; `new_id` makes the calls' ids.

    Blanks between calls, and between a text and its calls, belong to neither.
    """

    def __init__(self, form: CallFormat, functions: Collection[str], new_id: Callable[[], str]):
        self.marks = form.marks
        self._form = form
        self._functions = functions
        self._new_id = new_id
        self._calls = 0
        self._blanks = ""  # at the end of the text that was given out
        super().__init__()

    def run(self) -> Step[None]:
        if self._form.bare:
            start = yield from self.skip_blanks(0)
            yield from self._block(start)
        while not self.closed or self.text:
            if not self._form.begin:
                self._say(len(self.text))
            elif (found := self.text.find(self._form.begin)) < 0:
                self._say(self.before(self._form.begin))
            else:
                self._say(found)
                if not (yield from self._block(len(self._form.begin))):
                    self._say(len(self._form.begin))
                continue
            if not self.closed:
                yield
        if not self._calls:
            self._give(self._blanks)

    def _say(self, count: int) -> None:
        """Gives characters out as text."""
        text = self._blanks + self.take(count)
        said = text.rstrip()
        self._blanks = text[len(said) :]
        self._give(said)

    def _give(self, text: str) -> None:
        if text:
            self.events.append(Text(text))

    def _block(self, index: int) -> Step[bool]:
        """Reads the calls that begin at `index`, one or a list. False, and nothing is taken, if there is none."""
        index = yield from self.skip_blanks(index)
        if (yield from self.char(index)) == "[":
            index = yield from self.skip_blanks(index + 1)
        if not (yield from self._call(index)):
            return False
        while True:
            index = yield from self.skip_blanks(0)
            if self._form.end and (yield from self.starts(self._form.end, index)):
                self.take(index + len(self._form.end))
                return True
            char = yield from self.char(index)
            if char == "]":
                self.take(index + 1)
                continue
            if char not in (",", ";") or not char:
                return True
            index = yield from self.skip_blanks(index + 1)
            if not (yield from self._call(index)):
                return True

    def _call(self, index: int) -> Step[bool]:
        """Reads one call. False, and nothing is taken, if there is none."""
        if (yield from self.char(index)) == "{":
            return (yield from self._object(index + 1))
        if self._form is FORMATS["mistral"]:
            return (yield from self._named(index))
        return False

    def _named(self, index: int) -> Step[bool]:
        """A name and, behind it, the arguments."""
        end = index
        while (char := (yield from self.char(end))) != "{":
            if not char or end - index >= _LONGEST_HEAD:
                return False
            end += 1
        head = _HEAD.fullmatch(self.text[index:end])
        if head is None or head[1] not in self._functions:
            return False
        call = self._begin(head[1], end)
        if (yield from self._arguments(call)):
            self.events.append(CallEnded(call))
        return True

    def _object(self, index: int) -> Step[bool]:
        """A call as a JSON object whose inside begins at `index`. It has begun when its arguments do, if its name came
        before them, else where it ends."""
        name: str | None = None
        arguments: str | None = None
        call: int | None = None
        while True:
            index = yield from self.skip_blanks(index)
            char = yield from self.char(index)
            if char == ",":
                index += 1
            elif char == "}":
                index += 1
                break
            elif char != '"':
                return call is not None
            else:
                end = yield from self._value_end(index)
                key = _loaded(self.text[index:end])
                index = yield from self.skip_blanks(end)
                if (yield from self.char(index)) != ":":
                    return call is not None
                index = yield from self.skip_blanks(index + 1)
                if call is None and name is not None and key in _KEYS:
                    call = self._begin(name, index)
                    yield from self._arguments(call)
                    index = 0
                    continue
                end = yield from self._value_end(index)
                value, index = self.text[index:end], end
                if call is None and key == "name":
                    name = _loaded(value)
                    if name not in self._functions:
                        return False
                elif key in _KEYS:
                    arguments = value
        if call is None:
            if name is None or (arguments is None and not self._form.begin):
                return False
            call = self._begin(name, index)
            self.events.append(CallArguments(call, _unwrapped("{}" if arguments is None else arguments)))
        else:
            self.take(index)
        self.events.append(CallEnded(call))
        return True

    def _begin(self, name: str, count: int) -> int:
        """Takes the characters of a call's head. Returns the call's index."""
        self.take(count)
        self._blanks = ""
        self.events.append(CallBegun(self._calls, self._new_id(), name))
        self._calls += 1
        return self._calls - 1

    def _arguments(self, call: int) -> Step[bool]:
        """Takes the value at the beginning of the text and gives it out as it comes, if it is an object. Returns
        whether it came to its end."""
        if (yield from self.char(0)) != "{":
            value = self.take((yield from self._value_end(0)))
            self.events.append(CallArguments(call, _unwrapped(value)))
            return True
        scan = _Scan()
        while True:
            end = scan.feed(self.text)
            if passed := self.take(len(self.text) if end is None else end):
                self.events.append(CallArguments(call, passed))
            if end is not None or self.closed:
                return scan.whole
            yield

    def _value_end(self, index: int) -> Step[int]:
        """The index after the JSON value at `index`, or where it breaks off."""
        scan = _Scan()
        while (end := scan.feed(self.text[index:])) is None:
            index = len(self.text)
            if self.closed:
                return index
            yield
        return index + end


class _Scan:
    """Finds the end of a JSON value by its brackets and quotes."""

    def __init__(self) -> None:
        self._depth = 0
        self._string = self._escaped = self._begun = False

    @property
    def whole(self) -> bool:
        """Whether every bracket and quote is closed."""
        return self._begun and not self._depth and not self._string

    def feed(self, text: str) -> int | None:
        """The number of characters of the next piece that belong to the value; None if all do and it may go on. What
        no JSON has outside of strings ends it."""
        for position, char in enumerate(text):
            if self._string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._string = False
                    if not self._depth:
                        return position + 1
            elif char not in _JSON or (not self._depth and self._begun and char in ',:}] \t\r\n"'):
                return position
            elif char == '"':
                self._string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return position + (self._depth == 0)
            self._begun = True
        return None


def _loaded(text: str) -> str | None:
    """The string that a JSON text is; None if it is none, or one with half of a surrogate pair, which no answer can
    hold."""
    try:
        value = json.loads(text)
        if not isinstance(value, str):
            return None
        value.encode()
    except (ValueError, RecursionError):
        return None
    return value


def _unwrapped(value: str) -> str:
    """Arguments as the JSON text of an object: some models write that into a string, or null for none."""
    if value == "null":
        return "{}"
    inner = _loaded(value)
    return value if inner is None else inner
