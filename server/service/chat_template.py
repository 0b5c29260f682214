"""Renders chat templates in a process of its own, so that one that never ends or eats memory can be killed.

The parent keeps one child and speaks length-prefixed JSON with it; `python -m` on this module is the child.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tucka_runtime.children import end_with_parent, python
from tucka_runtime.conversations import takes_tools
from tucka_runtime.errors import InvalidRequestError, TuckaError

log = logging.getLogger(__name__)

RENDER_SECONDS = 5  # of processor time: what a conversation may take, however busy the machine is
WAIT_SECONDS = 20  # of the clock: a child that has not answered by then is stopped, or gets no processor
START_SECONDS = 60
DYING_SECONDS = 2  # for a child whose pipe is closed
_MAX_MEMORY = 2**30  # bytes the child may take on top of what it has when it starts
_MAX_TEXT = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Rendering:
    """What else than messages a template is given: the functions that may be called, further variables of its own, and
    whether the assistant's next turn is to begin, or the last message to go on."""

    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False


_PLAIN = Rendering()

TRIAL = [{"role": "user", "content": "Hello"}]
"""The least of conversations."""


class TooLongError(Exception):
    """A rendering took more than RENDER_SECONDS."""


class EndedError(TuckaError):
    """The process that renders ended, twice, and does not say why."""


class Renderer:
    """The process that renders templates, one conversation at a time. It is started when it is first needed, and knows
    no template by itself: each comes with what is to be rendered, and is compiled once."""

    def __init__(self) -> None:
        self._child: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()

    async def render(
        self,
        template: str,
        special_tokens: Mapping[str, str],
        messages: list[dict[str, Any]],
        rendering: Rendering = _PLAIN,
    ) -> dict[str, Any]:
        """`text`, or `error` with what the template, or jinja2, says; `refused` where it is the template's own word.

        Raises TooLongError, and TuckaError for a child that ends otherwise, does not answer or does not start, after
        one more try with a new one.
        """
        question = {"template": template, "special_tokens": dict(special_tokens), "messages": messages}
        question |= {f.name: getattr(rendering, f.name) for f in fields(rendering)}
        async with self._lock:
            try:
                answer: dict[str, Any] = await self._answer(question)
                return answer
            except BaseException:  # cancelled: an answer that nobody read must not be taken for the next one
                await self.stop()
                raise

    async def stop(self, patience: float = 0.0) -> int | None:
        """Ends the child, if there is one, and returns its status. The next rendering starts another.

        `patience` is how many seconds it has to end by itself. To kill one that is just dying loses its status: Popen
        looks for that before it sends a signal, and asyncio's watcher then finds none.
        """
        child, self._child = self._child, None
        if child is None:
            return None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                return await child.wait()
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        return await child.wait()

    async def _answer(self, question: dict[str, Any]) -> Any:
        """What the child answers, or another one where the first has died, now or since it was last needed."""
        tries = 2
        while True:
            tries -= 1
            try:
                child = self._child or await self._start()
                async with asyncio.timeout(WAIT_SECONDS):
                    return await _ask(child, question)
            except (EOFError, OSError) as error:  # a TimeoutError is an OSError
                status = await self.stop(0.0 if isinstance(error, TimeoutError) else DYING_SECONDS)
                if status == -signal.SIGPROF:
                    raise TooLongError from None
                log.error("the chat template's process did not answer: %r, status %s", error, status)
                if not tries or isinstance(error, TimeoutError):
                    kind = TuckaError if isinstance(error, TimeoutError) else EndedError
                    raise kind(
                        "The server could not render the chat template: its process for that does not answer. Try "
                        "again; the server's log says more."
                    ) from error

    async def _start(self) -> asyncio.subprocess.Process:
        self._child = await asyncio.create_subprocess_exec(
            *python("-m", __name__, str(os.getpid())),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in the terminal is the parent's to answer
        )
        async with asyncio.timeout(START_SECONDS):
            await _ask(self._child, {"seconds": RENDER_SECONDS})
        return self._child


class ChatTemplate:
    """One model's template, and another for conversations with tools where it has one. `owner` is whose it is, for
    errors. What a conversation does to the `renderer` (it takes too long, too much memory, or the template refuses it)
    is the client's to mend: InvalidRequestError."""

    def __init__(
        self,
        template: str,
        special_tokens: Mapping[str, str],
        tool_template: str | None = None,
        renderer: Renderer | None = None,
        owner: str = "model",
    ):
        self._template = template
        self.with_tools = tool_template or template
        """The template of conversations with tools."""
        self.takes_tools = takes_tools(self.with_tools)
        """Whether that knows of functions that may be called."""
        self._special_tokens = special_tokens
        self.renderer = renderer or Renderer()
        self._owner = owner

    async def render(
        self, messages: list[dict[str, Any]], rendering: Rendering = _PLAIN, param: str = "messages"
    ) -> str:
        """The prompt that asks for the assistant's next turn; `param` is the field that the messages came in. Raises
        InvalidRequestError, TuckaError."""
        template = self.with_tools if rendering.tools else self._template
        try:
            answer = await self.renderer.render(template, self._special_tokens, messages, rendering)
        except TooLongError:
            raise InvalidRequestError(
                f"The {self._owner}'s chat template did not render these messages within {RENDER_SECONDS} s of "
                "processor time. Shorten the conversation, or render it yourself and use /v1/completions.",
                param,
            ) from None
        if "text" in answer:
            return str(answer["text"])
        # The template's own words are fine to show; what it may have built from the messages is not.
        reason = answer["error"]
        said = f': "{reason}"' if reason and len(reason) < 200 and reason in template else ""
        raise InvalidRequestError(f"The {self._owner}'s chat template refused these messages{said}.", param)

    async def warm_up(self) -> None:
        """Starts the renderer and has it compile the template, so that no request waits for it: it takes a second or
        two. Raises TuckaError where it cannot be started."""
        with contextlib.suppress(InvalidRequestError):  # this template wants another conversation
            await self.render(TRIAL)

    async def stop(self) -> None:
        """Ends the renderer's process."""
        await self.renderer.stop()


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

    end_with_parent(int(sys.argv[1]))
    import transformers.utils.chat_template_utils  # noqa: F401 (takes a second, before the first rendering is timed)
    from jinja2 import TemplateError

    from tucka_runtime.chat_rendering import render_chat

    setting = _read_frame()
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MAX_MEMORY, used + _MAX_MEMORY))
    _write(_frame({}))
    while True:
        question = _read_frame()
        signal.setitimer(signal.ITIMER_PROF, setting["seconds"])  # SIGPROF ends the child, whatever it is doing
        try:
            text = render_chat(**question)
            answer = _frame({"text": text} if len(text) <= _MAX_TEXT else {"error": "", "refused": False})
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
            said = str(error) if isinstance(error, TemplateError) else ""
            answer = _frame({"error": said, "refused": type(error) is TemplateError})  # raise_exception's
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(answer)


def _read_frame() -> Any:
    head = sys.stdin.buffer.read(4)
    if len(head) < 4:
        sys.exit(0)
    return json.loads(sys.stdin.buffer.read(struct.unpack("!I", head)[0]))


def _write(frame: bytes) -> None:
    sys.stdout.buffer.write(frame)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    _child_main()
