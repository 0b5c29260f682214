"""What is checked of a proxy or router that stands before the server: openai's client works through it."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator

import openai
from checks import ANSWERED, ASKS, CITIES, SCHEMA, TOOL, answers, check, fits, last, same


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@contextlib.contextmanager
def started(words: list[str], ready: str, seconds: float = 120, **environment: str) -> Iterator[None]:
    """The command runs, and `ready`, an address, answers. Raises AssertionError with its last lines if it does not."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | environment)
        try:
            deadline = time.monotonic() + seconds
            while not answers_at(ready):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise AssertionError(f"{words[0]} is not ready: {last([log.read()])}")
                time.sleep(0.2)
            yield
        finally:
            process.terminate()
            process.wait(30)


def answers_at(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def lists_models(url: str, key: str = "none") -> None:
    """Checks that it says which models there are."""

    @check("models through it")
    def _() -> None:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)
        assert {"base", "formats", "words"} <= {model.id for model in client.models.list()}


def check_through(url: str, key: str = "none") -> None:
    """What a client does at one server, by way of another at `url`."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)

    def asked(model: str, prompt: str, **more: object) -> dict[str, object]:
        return {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, **more}

    @check("chat, base and adapters")
    def _() -> None:
        answers(lambda *of: client.chat.completions.create(**asked(*of)).choices[0].message.content)

    @check("streamed chat")
    def _() -> None:
        stream = client.chat.completions.create(**asked("formats", "2024-03-05"), stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        same(text, ASKS["formats"]["answer"])

    @check("completions, streamed and not")
    def _() -> None:
        ask = {"model": "words", "prompt": "Hello", "temperature": 0, "max_tokens": 12}
        whole = client.completions.create(**ask).choices[0].text
        stream = client.completions.create(**ask, stream=True)
        same("".join(chunk.choices[0].text or "" for chunk in stream if chunk.choices), whole)

    @check("24 chats at once")
    def _() -> None:
        async def together() -> list[str]:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60) as many:
                asks = [many.chat.completions.create(**asked(one["model"], one["prompt"])) for one in ANSWERED * 8]
                return [answer.choices[0].message.content for answer in await asyncio.gather(*asks)]

        same(asyncio.run(together()), [one["answer"] for one in ANSWERED] * 8)

    @check("a required tool call, a JSON schema")
    def _() -> None:
        tools = [{"type": "function", "function": TOOL}]
        ask = asked("formats", "Oslo?", max_tokens=200)
        message = client.chat.completions.create(**ask, tools=tools, tool_choice="required").choices[0].message
        assert message.tool_calls
        assert all(json.loads(call.function.arguments)["city"] in CITIES for call in message.tool_calls)
        form = {"type": "json_schema", "json_schema": {"name": "ticket", "schema": SCHEMA, "strict": True}}
        fits(json.loads(client.chat.completions.create(**ask, response_format=form).choices[0].message.content))
