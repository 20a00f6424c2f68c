"""The block pool: states, order of eviction, and a comparison with a plain model over random operations."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from omni_engine.kvcache.block_pool import BlockPool


def cached(pool: BlockPool, *keys: bytes) -> list[int]:
    """Blocks published under `keys` and freed, as one request would."""
    block_ids = pool.allocate(len(keys))
    for block_id, key in zip(block_ids, keys, strict=True):
        pool.publish(block_id, key)
    pool.free(block_ids)
    return block_ids


def test_null_block_is_never_given_out():
    pool = BlockPool(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert pool.num_free == 0
    pool.check_integrity()


def test_pool_without_a_usable_block_is_refused():
    with pytest.raises(ValueError, match=r"at least 2 blocks.*: 1"):
        BlockPool(1)


def test_freed_block_without_key_is_fresh_again():
    pool = BlockPool(4)
    pool.free(pool.allocate(2))
    assert (pool.num_free, pool.num_cached, pool.num_pinned) == (3, 0, 0)
    pool.check_integrity()


def test_cached_block_is_found_and_pinned_again():
    pool = BlockPool(4)
    (block_id,) = cached(pool, b"k")
    assert pool.lookup(b"k") == block_id
    assert (pool.num_cached, pool.num_free) == (1, 3)
    pool.touch([block_id])
    assert (pool.num_cached, pool.num_free, pool.num_pinned) == (0, 2, 1)
    pool.check_integrity()


def test_shared_block_is_free_only_after_its_last_owner():
    pool = BlockPool(3)
    (block_id,) = pool.allocate(1)
    pool.publish(block_id, b"k")
    pool.touch([block_id])
    pool.free([block_id])
    assert pool.num_pinned == 1
    pool.free([block_id])
    assert pool.num_pinned == 0
    pool.check_integrity()


def test_fresh_blocks_go_before_cached_ones():
    pool = BlockPool(5)
    cached(pool, b"a", b"b")
    pool.allocate(2)
    assert pool.lookup(b"a") is not None and pool.lookup(b"b") is not None


def test_last_block_of_a_freed_request_is_evicted_first():
    pool = BlockPool(4)
    cached(pool, b"first", b"second", b"third")
    pool.allocate(1)
    assert pool.lookup(b"third") is None
    pool.allocate(1)
    assert pool.lookup(b"second") is None
    assert pool.lookup(b"first") is not None
    pool.check_integrity()


def test_least_recently_freed_block_is_evicted_first():
    pool = BlockPool(3)
    cached(pool, b"old")
    cached(pool, b"new")
    block_id = pool.lookup(b"old")
    assert block_id is not None
    pool.touch([block_id])
    pool.free([block_id])  # "old" has been used last now
    pool.allocate(1)
    assert pool.lookup(b"new") is None
    assert pool.lookup(b"old") == block_id


def test_second_block_with_the_same_key_stays_unpublished():
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    pool.publish(first, b"k")
    pool.publish(second, b"k")
    assert pool.lookup(b"k") == first
    pool.free([second])
    assert pool.num_cached == 0
    pool.check_integrity()


def test_reset_forgets_all_when_nothing_is_pinned():
    pool = BlockPool(4)
    cached(pool, b"a", b"b")
    assert pool.reset_prefix_cache()
    assert pool.lookup(b"a") is None
    assert (pool.num_free, pool.num_cached) == (3, 0)
    pool.check_integrity()


def test_reset_keeps_pinned_blocks_and_says_so():
    pool = BlockPool(4)
    cached(pool, b"a")
    (block_id,) = pool.allocate(1)
    pool.publish(block_id, b"b")
    assert not pool.reset_prefix_cache()
    assert pool.lookup(b"a") is None
    assert pool.lookup(b"b") == block_id
    pool.check_integrity()


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool._ref_counts.__setitem__(1, 0),  # lost
        lambda pool: pool._fresh.append(1),  # pinned and free
        lambda pool: pool._cached.__setitem__(3, None),  # fresh and cached
        lambda pool: pool._ref_counts.__setitem__(0, 1),  # null block pinned
        lambda pool: pool._fresh.append(0),  # null block free
        lambda pool: pool._keys.__setitem__(1, b"unknown"),  # key that the index does not know
        lambda pool: pool._block_of_key.__setitem__(b"unknown", 3),  # index entry that no block has
        lambda pool: pool._keys.__setitem__(2, None),  # cached without a key
    ],
)
def test_integrity_check_sees_damage(damage):
    pool = BlockPool(5)
    pool.free([])
    pinned, other = pool.allocate(2)
    assert (pinned, other) == (1, 2)
    pool.publish(other, b"k")
    pool.free([other])
    pool.check_integrity()
    damage(pool)
    with pytest.raises(RuntimeError, match="block pool integrity"):
        pool.check_integrity()


class PoolAgainstModel(RuleBasedStateMachine):
    """Owners allocate, share, publish and free at random; a list of free blocks in plain order predicts the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(9)
        self.owners: list[list[int]] = []
        self.keys: dict[int, bytes] = {}  # found by lookup
        self.cached_order: list[int] = []  # least recently freed first

    def refs(self, block_id: int) -> int:
        return sum(owner.count(block_id) for owner in self.owners)

    @rule(data=st.data())
    def allocate(self, data) -> None:
        count = data.draw(st.integers(0, self.pool.num_free))
        num_fresh = self.pool.num_free - len(self.cached_order)
        evicted = self.cached_order[: max(0, count - num_fresh)]
        block_ids = self.pool.allocate(count)
        assert len(set(block_ids)) == count
        assert set(evicted) == set(block_ids) & set(self.cached_order)
        self.cached_order = self.cached_order[len(evicted) :]
        for block_id in evicted:
            assert self.pool.lookup(self.keys.pop(block_id)) is None
        self.owners.append(block_ids)

    @precondition(lambda self: any(self.owners))
    @rule(data=st.data())
    def publish(self, data) -> None:
        pinned = sorted({block_id for owner in self.owners for block_id in owner} - set(self.keys))
        if pinned:
            block_id = data.draw(st.sampled_from(pinned))
            key = bytes([data.draw(st.integers(0, 5))])
            self.pool.publish(block_id, key)
            if key not in self.keys.values():
                self.keys[block_id] = key

    @precondition(lambda self: self.keys)
    @rule(data=st.data())
    def touch(self, data) -> None:
        block_id = data.draw(st.sampled_from(sorted(self.keys)))
        assert self.pool.lookup(self.keys[block_id]) == block_id
        self.pool.touch([block_id])
        if block_id in self.cached_order:
            self.cached_order.remove(block_id)
        self.owners.append([block_id])

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def free(self, data) -> None:
        owner = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
        self.pool.free(owner)
        self.cached_order += [b for b in reversed(owner) if b in self.keys and not self.refs(b)]

    @rule()
    def reset(self) -> None:
        for block_id in self.cached_order:
            del self.keys[block_id]
        self.cached_order = []
        assert self.pool.reset_prefix_cache() == (not self.keys)

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert [self.pool.ref_count(block_id) for block_id in range(9)] == [self.refs(b) for b in range(9)]
        assert list(self.pool._cached) == self.cached_order
        assert all(self.pool.lookup(key) == block_id for block_id, key in self.keys.items())


TestPoolAgainstModel = PoolAgainstModel.TestCase
TestPoolAgainstModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
