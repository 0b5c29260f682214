"""A model's chat template, in its own process: whatever it does, the answer comes in bounded time."""

import asyncio
import time

import pytest

from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.server.service import chat_template
from tucka_runtime.server.service.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "Hi {{ 1 }}"}]
GOOD = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.content == 'spin' %}"
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}{% endif %}{% endfor %}"
)


def render(template: str, *conversations: list[dict[str, str]]) -> list[str]:
    async def run() -> list[str]:
        made = ChatTemplate(template, {"bos_token": "<bos>"})
        try:
            return [await made.render(messages) for messages in conversations or (MESSAGES,)]
        finally:
            await made.stop()

    return asyncio.run(run())


def test_renders_and_does_not_render_messages() -> None:
    assert render(GOOD, MESSAGES, MESSAGES) == ["<bos>Hi {{ 1 }}"] * 2


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
        "{% for %}",
        "{{ range(10000000000) | list }}",
        "{{ 'a' * 10000000000 }}",
    ],
)
def test_row_19_templates_that_try_to_leave(template: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        render(template)
    assert caught.value.param == "messages" and len(caught.value.message) < 400


def test_row_19_a_template_that_never_ends_is_ended_and_the_next_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 1)

    async def run() -> str:
        made = ChatTemplate(GOOD, {"bos_token": ""})
        try:
            await made.render(MESSAGES)
            began = time.monotonic()
            with pytest.raises(InvalidRequestError, match="within"):
                await made.render([{"role": "user", "content": "spin"}])
            assert time.monotonic() - began < 3
            return await made.render(MESSAGES)
        finally:
            await made.stop()

    assert asyncio.run(run()) == "Hi {{ 1 }}"


def test_the_templates_own_words_are_shown_and_the_clients_are_not() -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequestError) as caught:
        render("{{ raise_exception('bad: ' + messages[0].content) }}", [{"role": "user", "content": "xyzzy"}])
    assert "xyzzy" not in caught.value.message
