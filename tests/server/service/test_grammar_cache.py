"""Grammars are made once for a schema that comes again, and no flood of others grows the memory."""

import asyncio

import pytest

from tucka_runtime import grammars
from tucka_runtime.server.service import grammar_cache
from tucka_runtime.server.service.grammar_cache import GrammarCache

SCHEMA = '{"type": "object", "properties": {"a": {"const": 1}}}'


def test_what_comes_again_is_made_once() -> None:
    made: list[str] = []

    def make(text: str) -> str:
        made.append(text)
        return grammars.of_schema(text)

    async def ask() -> None:
        cache = GrammarCache()
        assert {await cache.get(make, SCHEMA) for _ in range(5)} == {grammars.of_schema(SCHEMA)}
        assert await cache.get(grammars.followed, SCHEMA) == grammars.followed(SCHEMA)
        for _ in range(2):
            with pytest.raises(grammars.UnusableError):
                await cache.get(make, '{"type": "thing"}')

    asyncio.run(ask())
    assert made == [SCHEMA, '{"type": "thing"}', '{"type": "thing"}']


def test_the_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_cache, "MOST", 3)
    made: list[str] = []

    def make(text: str) -> str:
        made.append(text)
        return text * grammar_cache.MOST_CHARS if text == "long" else text

    async def ask() -> None:
        cache = GrammarCache()
        for text in ("a", "b", "c", "a", "d", "a", "long", "c", "b", "long", "a"):
            await cache.get(make, text)

    asyncio.run(ask())
    assert made == ["a", "b", "c", "d", "long", "b", "long"]
