"""Renders the model's chat template in a process of its own, so that one that never ends or eats memory can be killed.

The parent keeps one child and speaks length-prefixed JSON with it; `python -m` on this module is the child.
"""

import asyncio
import contextlib
import json
import struct
import sys
from typing import Any

from tucka_runtime.errors import InvalidRequestError

RENDER_SECONDS = 5
START_SECONDS = 60
_MAX_MEMORY = 2**30  # bytes the child may take on top of what it has when it starts
_MAX_TEXT = 64 * 2**20


class ChatTemplate:
    """One model's template. Renders one conversation at a time; the child is started when it is first needed."""

    def __init__(self, template: str, special_tokens: dict[str, str]):
        self._template = template
        self._special_tokens = special_tokens
        self._child: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()

    async def render(self, messages: list[dict[str, str]]) -> str:
        """The prompt that asks for the assistant's next turn. Raises InvalidRequestError."""
        async with self._lock:
            try:
                child = self._child or await self._start()
                async with asyncio.timeout(RENDER_SECONDS):
                    answer = await _ask(child, messages)
            except (TimeoutError, EOFError, OSError):
                await self.stop()
                raise InvalidRequestError(
                    f"The model's chat template did not render these messages within {RENDER_SECONDS} s and 1 GiB. "
                    "Shorten the conversation, or render it yourself and use /v1/completions.",
                    "messages",
                ) from None
            except BaseException:  # cancelled: an answer that nobody read must not be taken for the next one
                await self.stop()
                raise
        if "text" in answer:
            return str(answer["text"])
        # The template's own words are fine to show; what it may have built from the messages is not.
        reason = answer["error"]
        said = f': "{reason}"' if reason and len(reason) < 200 and reason in self._template else ""
        raise InvalidRequestError(f"The model's chat template refused these messages{said}.", "messages")

    async def stop(self) -> None:
        """Ends the child, if there is one. The next rendering starts another."""
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        self._child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            __name__,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in the terminal is the parent's to answer
        )
        async with asyncio.timeout(START_SECONDS):
            await _ask(self._child, {"template": self._template, "special_tokens": self._special_tokens})
        return self._child


async def _ask(child: asyncio.subprocess.Process, question: Any) -> Any:
    if child.stdin is None or child.stdout is None:
        raise OSError("the child has no pipes")
    child.stdin.write(_frame(question))
    await child.stdin.drain()
    (length,) = struct.unpack("!I", await child.stdout.readexactly(4))
    return json.loads(await child.stdout.readexactly(length))


def _frame(value: Any) -> bytes:
    data = json.dumps(value).encode()
    return struct.pack("!I", len(data)) + data


def _child_main() -> None:
    import resource
    import signal

    import transformers.utils.chat_template_utils  # noqa: F401 (takes a second, before the first rendering is timed)
    from jinja2 import TemplateError

    from tucka_runtime.tokenizer import render_chat

    setting = _read_frame()
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MAX_MEMORY, used + _MAX_MEMORY))
    _write_frame({})
    while True:
        messages = _read_frame()
        signal.alarm(RENDER_SECONDS + 1)  # ends the child even when its parent is gone
        try:
            text = render_chat(setting["template"], setting["special_tokens"], messages)
            answer = {"text": text} if len(text) <= _MAX_TEXT else {"error": ""}
        except (
            TemplateError,
            ValueError,
            TypeError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
            MemoryError,
        ) as error:
            answer = {"error": str(error) if isinstance(error, TemplateError) else ""}
        signal.alarm(0)
        _write_frame(answer)


def _read_frame() -> Any:
    head = sys.stdin.buffer.read(4)
    if len(head) < 4:
        sys.exit(0)
    return json.loads(sys.stdin.buffer.read(struct.unpack("!I", head)[0]))


def _write_frame(value: Any) -> None:
    sys.stdout.buffer.write(_frame(value))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    _child_main()
