"""KV pages: counted, shared and reused under any sequence of events."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from tucka_runtime.engine.block_manager import BlockManager, chain

PAGE = 2


class Pages(RuleBasedStateMachine):
    """Texts over two letters take pages, share prefixes, and let go; a model remembers what each page holds."""

    held = Bundle("held")

    @initialize(num_blocks=st.integers(1, 9))
    def start(self, num_blocks: int) -> None:
        self.manager = BlockManager(num_blocks, PAGE)
        self.tables: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    def hashes(self, text: str) -> list[bytes]:
        out = [b"tenant"]
        for i in range(0, len(text) - PAGE + 1, PAGE):
            out.append(chain(out[-1], [ord(c) for c in text[i : i + PAGE]]))
        return out[1:]

    @rule(target=held, text=st.text("ab", min_size=1, max_size=9), register=st.booleans())
    def take(self, text: str, register: bool) -> list[int]:
        manager, known = self.manager, self.hashes(text)
        reuse = manager.match(known)
        assert [self.content[b] for b in reuse] == known[: len(reuse)], "a page is what its hash says"
        need = manager.blocks_for(len(text)) - len(reuse)
        idle = manager.num_blocks - len({b for table in self.tables for b in table} | set(reuse))
        assert manager.can_allocate(need, reuse) == (idle >= need)
        if idle < need:
            return []
        manager.hold(reuse)
        fresh = manager.allocate(need)
        assert len(set(fresh)) == need
        assert not {b for table in self.tables for b in table} & set(fresh), "a held page is nobody else's"
        assert not set(reuse) & set(fresh)
        table = reuse + fresh
        for block in fresh:
            self.content.pop(block, None)
        if register:
            for block, h in zip(table, known, strict=False):
                self.content.setdefault(block, h)
                manager.register(block, h)
        self.tables.append(table)
        return table

    @rule(table=consumes(held))
    def give(self, table: list[int]) -> None:
        if table:
            self.tables.remove(table)
            self.manager.release(table)

    @rule()
    def forget(self) -> None:
        self.manager.forget_all()
        assert not self.manager.cached

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "manager"):
            self.manager.check_integrity(self.tables)
            used = {b for table in self.tables for b in table}
            assert self.manager.num_free == self.manager.num_blocks - len(used)


Pages.TestCase.settings = settings(max_examples=100, stateful_step_count=30, derandomize=True, deadline=None)
TestPages = Pages.TestCase


def test_pages_for_tokens():
    manager = BlockManager(1, 4)
    assert [manager.blocks_for(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_a_hash_depends_on_everything_before():
    a, b = chain(b"x", [1, 2]), chain(b"y", [1, 2])
    assert a != b
    assert chain(a, [3, 4]) != chain(b, [3, 4])
    assert chain(b"x", [1, 2]) == a
    assert chain(b"x", [2, 1]) != a
    assert len(a) == 16


def test_the_cache_loses_the_oldest_page_first_and_tails_before_heads():
    manager = BlockManager(4, 1)
    names = [b"old head", b"old tail", b"new head", b"new tail"]
    old, new = manager.allocate(2), manager.allocate(2)
    for block, name in zip(old + new, names, strict=True):
        manager.register(block, name)
    manager.release(old)
    manager.release(new)
    lost = []
    for _ in range(4):
        manager.allocate(1)
        lost.append(next(n for n in names if n not in lost and not manager.match([n])))
    assert lost == [b"old tail", b"old head", b"new tail", b"new head"]


def test_pages_without_content_go_first():
    manager = BlockManager(3, 1)
    cached, plain = manager.allocate(1), manager.allocate(1)
    manager.register(cached[0], b"h")
    manager.release(cached)
    manager.release(plain)
    assert manager.allocate(1) == plain
    manager.allocate(1)
    assert manager.match([b"h"]) == cached


def test_a_match_ends_at_the_first_gap():
    manager = BlockManager(3, 1)
    blocks = manager.allocate(3)
    for block, name in zip(blocks, (b"a", b"b", b"c"), strict=True):
        manager.register(block, name)
    assert manager.match([b"a", b"x", b"c"]) == blocks[:1]
    assert manager.match([b"x", b"a"]) == []


def test_the_first_page_of_a_content_is_the_known_one():
    manager = BlockManager(2, 1)
    first, second = manager.allocate(2)
    manager.register(first, b"h")
    manager.register(second, b"h")
    assert manager.match([b"h"]) == [first]
    manager.release([first, second])
    manager.check_integrity([])


@pytest.mark.parametrize("damage", ["references", "free", "cached"])
def test_damage_is_found(damage: str):
    manager = BlockManager(3, 1)
    table = manager.allocate(2)
    manager.register(table[0], b"h")
    manager.check_integrity([table])
    if damage == "references":
        manager.references[table[0]] += 1
    elif damage == "free":
        manager.free[table[0]] = None
    else:
        manager.cached[b"other"] = table[1]
    with pytest.raises(RuntimeError):
        manager.check_integrity([table])
