"""A model's chat template, in its own process: whatever it does, the answer comes in bounded time."""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from tucka_runtime.errors import InvalidRequestError, TuckaError
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
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.2)

    async def run() -> str:
        made = ChatTemplate(GOOD, {"bos_token": ""})
        try:
            await made.render(MESSAGES)
            for _ in range(5):  # its status got lost now and then, where it was killed while it was dying
                began = time.monotonic()
                with pytest.raises(InvalidRequestError, match="within"):
                    await made.render([{"role": "user", "content": "spin"}])
                assert time.monotonic() - began < chat_template.WAIT_SECONDS
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


def test_row_47_a_file_in_the_working_directory_is_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json.py", "resource.py", "random.py", "transformers.py", "tucka_runtime/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    assert render(GOOD) == ["<bos>Hi {{ 1 }}"]
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("template", [GOOD, "{{ raise_exception('not you') }}"])
def test_a_template_that_is_warm_has_its_child(template: str) -> None:
    async def run() -> None:
        made = ChatTemplate(template, {"bos_token": ""})
        try:
            await made.warm_up()
            assert made.renderer._child is not None and made.renderer._child.returncode is None
        finally:
            await made.stop()

    asyncio.run(run())


def test_a_child_that_was_killed_is_replaced_and_nobody_notices() -> None:
    """Killed while nobody needs it, and in the middle of a rendering."""

    async def run() -> list[str]:
        made = ChatTemplate(GOOD, {"bos_token": ""})
        try:
            answers = [await made.render(MESSAGES)]
            assert made.renderer._child is not None
            first = made.renderer._child
            first.kill()
            await first.wait()
            answers.append(await made.render(MESSAGES))
            os.kill(made.renderer._child.pid, signal.SIGSTOP)  # it cannot answer before it is killed
            rendering = asyncio.create_task(made.render(MESSAGES))
            await asyncio.sleep(0.1)
            assert not rendering.done()
            made.renderer._child.kill()
            return [*answers, await rendering]
        finally:
            await made.stop()

    assert asyncio.run(run()) == ["Hi {{ 1 }}"] * 3


def test_a_child_that_is_stopped_or_does_not_start_is_our_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "WAIT_SECONDS", 0.5)

    async def run() -> None:
        made = ChatTemplate(GOOD, {"bos_token": ""})
        try:
            await made.render(MESSAGES)
            assert made.renderer._child is not None
            os.kill(made.renderer._child.pid, signal.SIGSTOP)
            with pytest.raises(TuckaError, match="could not render") as caught:
                await made.render(MESSAGES)
            assert caught.value.status == 500
            assert await made.render(MESSAGES) == "Hi {{ 1 }}"
            await made.stop()
            monkeypatch.setattr(chat_template, "python", lambda *arguments: ["false"])
            with pytest.raises(TuckaError, match="could not render") as caught:
                await made.render(MESSAGES)
            assert caught.value.status == 500
        finally:
            await made.stop()

    asyncio.run(run())
