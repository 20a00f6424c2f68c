"""The pool of KV block ids: reference counts, the LRU order of free blocks, the keys of cached ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Block ids [0, num_blocks). Block 0 is the null block: padding points there, it is never given out.

    Every other block is in exactly one of three states:
    pinned  reference count > 0, with or without a key;
    cached  reference count 0, with a key: `lookup` finds it, `touch` pins it again, `allocate` may evict it;
    fresh   reference count 0, no key: its content means nothing.
    `allocate` takes fresh blocks first, then the cached block that has been free longest.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a block pool needs at least 2 blocks, the null block included: {num_blocks}")
        self.num_blocks = num_blocks
        self.highest_given = 0  # the highest id that was ever given out
        self._ref_counts = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._block_of_key: dict[bytes, int] = {}
        self._fresh = list(range(num_blocks - 1, 0, -1))  # a stack: the lowest id is given out first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently freed first

    @property
    def num_usable(self) -> int:
        """All blocks but the null block."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give out: fresh and cached."""
        return len(self._fresh) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_pinned(self) -> int:
        return self.num_usable - self.num_free

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def num_unpinned(self, block_ids: Iterable[int]) -> int:
        """How many of these are free now, so that touching them lowers `num_free`."""
        ref_counts = self._ref_counts
        return sum(not ref_counts[block_id] for block_id in block_ids)

    def allocate(self, count: int) -> list[int]:
        """Pin `count` blocks, each with one reference and no key. The caller has seen that `num_free` suffices."""
        assert count <= self.num_free, f"{count} blocks asked of {self.num_free}"
        fresh = self._fresh
        block_ids = []
        for _ in range(count):
            if fresh:
                block_id = fresh.pop()
            else:
                block_id, _none = self._cached.popitem(last=False)
                self._unpublish(block_id)
            self._ref_counts[block_id] = 1
            block_ids.append(block_id)
        self.highest_given = max(self.highest_given, max(block_ids, default=0))
        return block_ids

    def touch(self, block_ids: Iterable[int]) -> None:
        """Add one reference to blocks that `lookup` has found; a cached block is pinned again."""
        for block_id in block_ids:
            if not self._ref_counts[block_id]:
                del self._cached[block_id]
            self._ref_counts[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Take back one reference from each block of a request, given in the order of its tokens.

        They become evictable last block first: the start of a prompt is what others are likeliest to share.
        """
        for block_id in reversed(block_ids):
            count = self._ref_counts[block_id] - 1
            assert count >= 0, f"block {block_id} is freed more often than it was pinned"
            self._ref_counts[block_id] = count
            if not count:
                if self._keys[block_id] is None:
                    self._fresh.append(block_id)
                else:
                    self._cached[block_id] = None

    def publish(self, block_id: int, key: bytes) -> None:
        """Let `lookup(key)` find this pinned block. Where another block has that key already, that one stays found."""
        assert self._ref_counts[block_id] > 0, f"block {block_id} is published but not pinned"
        assert self._keys[block_id] is None, f"block {block_id} is published twice"
        if self._block_of_key.setdefault(key, block_id) == block_id:
            self._keys[block_id] = key

    def lookup(self, key: bytes) -> int | None:
        return self._block_of_key.get(key)

    def reset_prefix_cache(self) -> bool:
        """Forget every cached block. Published blocks that are pinned stay; returns whether there were none."""
        for block_id in self._cached:
            self._unpublish(block_id)
        self._fresh.extend(self._cached)
        self._cached.clear()
        return not self._block_of_key

    def _unpublish(self, block_id: int) -> None:
        key = self._keys[block_id]
        assert key is not None
        del self._block_of_key[key]
        self._keys[block_id] = None

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every block is in exactly one state and the keys agree with it."""
        states = ["pinned" if count else "lost" for count in self._ref_counts]
        for name, block_ids in (("fresh", self._fresh), ("cached", self._cached)):
            for block_id in block_ids:
                _require(states[block_id] == "lost", f"block {block_id} is {states[block_id]} and {name}")
                states[block_id] = name
        _require(self._ref_counts[0] == 0 and self._keys[0] is None, "the null block was given out")
        _require(states[0] == "lost", "the null block is listed as free")
        for block_id in range(1, self.num_blocks):
            state, key = states[block_id], self._keys[block_id]
            _require(state != "lost", f"block {block_id} is neither pinned nor free")
            _require(self._ref_counts[block_id] >= 0, f"block {block_id} has a negative reference count")
            _require((state != "fresh") or key is None, f"fresh block {block_id} has a key")
            _require((state != "cached") or key is not None, f"cached block {block_id} has no key")
            _require(
                key is None or self._block_of_key.get(key) == block_id, f"the key of block {block_id} finds another"
            )
        num_keys = sum(key is not None for key in self._keys)
        _require(num_keys == len(self._block_of_key), "the key index holds keys that no block has")
        total = len(self._fresh) + len(self._cached) + self.num_pinned
        _require(total == self.num_usable, f"free + cached + pinned != total: {total} != {self.num_usable}")


def _require(holds: bool, violation: str) -> None:
    if not holds:
        raise RuntimeError(f"block pool integrity: {violation}")
