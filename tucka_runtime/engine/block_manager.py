"""KV blocks: who holds which, and which hold a prefix that another sequence may reuse. No torch: block numbers only.

A block is *held* (references > 0), or *free*. A free block may still be *cached*: its content is known by the hash of
all tokens up to its end, and it can be taken back to life until somebody else needs the block. Free blocks are reused
oldest first, so that the cache evicts by least recent use."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def chain(previous: bytes, tokens: Sequence[int]) -> bytes:
    """Hash of a full block's tokens and of everything before it; `previous` of the first block is its namespace."""
    return hashlib.blake2b(previous + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockManager:
    """The pool of blocks."""

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.references = [0] * num_blocks
        self.hashes: list[bytes | None] = [None] * num_blocks
        self.cached: dict[bytes, int] = {}
        self.free: OrderedDict[int, None] = OrderedDict((i, None) for i in range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self.free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens fill."""
        return -(-tokens // self.block_size)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest cached prefix, not yet held."""
        found = []
        for h in hashes:
            if (block := self.cached.get(h)) is None:
                break
            found.append(block)
        return found

    def can_allocate(self, count: int, reuse: Sequence[int] = ()) -> bool:
        """Whether `count` fresh blocks are there once `reuse` is held as well."""
        return self.num_free - sum(self.references[b] == 0 for b in reuse) >= count

    def hold(self, blocks: Iterable[int]) -> None:
        """Takes one more reference to blocks that `match` found."""
        for block in blocks:
            if self.references[block] == 0:
                del self.free[block]
            self.references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` fresh blocks, each held once. The caller asked `can_allocate` before."""
        blocks = []
        for _ in range(count):
            block, _ = self.free.popitem(last=False)
            self._forget(block)
            self.references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Gives up one reference to each. The last blocks of a sequence are reused first: a prefix outlives its
        tail."""
        for block in reversed(blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                self.free[block] = None
                if self.hashes[block] is None:
                    self.free.move_to_end(block, last=False)

    def register(self, block: int, h: bytes) -> None:
        """Makes a full block known by its hash, unless another already is."""
        if h not in self.cached and self.hashes[block] is None:
            self.cached[h] = block
            self.hashes[block] = h

    def forget_all(self) -> None:
        """Drops the cache; held blocks stay held."""
        for block in range(self.num_blocks):
            self._forget(block)

    def _forget(self, block: int) -> None:
        h = self.hashes[block]
        if h is not None:
            del self.cached[h]
            self.hashes[block] = None

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises RuntimeError unless the references are exactly those of the given tables and the books agree."""
        counts = [0] * self.num_blocks
        for table in tables:
            for block in table:
                counts[block] += 1
        if counts != self.references:
            raise RuntimeError("KV blocks: reference counts differ from the block tables")
        if set(self.free) != {b for b, r in enumerate(counts) if r == 0}:
            raise RuntimeError("KV blocks: the free list differs from the unreferenced blocks")
        if {h: b for b, h in enumerate(self.hashes) if h is not None} != self.cached:
            raise RuntimeError("KV blocks: the prefix cache differs from the blocks' hashes")
