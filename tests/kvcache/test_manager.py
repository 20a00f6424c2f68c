"""The KV cache manager: admission, growth, publishing, prefix hits and what it refuses."""

from __future__ import annotations

import pytest

from omni_engine.kvcache.manager import KVCacheManager, RequestBlocks
from omni_engine.kvcache.spec import KVCacheSpec, KVGroup, KVPart, uniform_spec

PARTS = (KVPart("k", 2, 8), KVPart("v", 2, 8))


def admitted(kv: KVCacheManager, token_ids: list[int], salt: str | None = None) -> tuple[RequestBlocks, int]:
    """A request with all its tokens computed and published; and how many blocks it found."""
    blocks = kv.new_blocks(salt)
    prefix_ids = kv.find_prefix(blocks, token_ids)
    assert kv.admit(blocks, prefix_ids, len(token_ids), len(token_ids)) is not None
    kv.publish(blocks, token_ids, len(token_ids))
    return blocks, len(prefix_ids)


def test_spec_with_several_groups_is_refused_by_name():
    groups = (KVGroup((0,), PARTS), KVGroup((1,), (KVPart("latent", 1, 16),)))
    with pytest.raises(ValueError, match=r"exactly one group.*1 layers of k\+v; 1 layers of latent"):
        KVCacheManager(KVCacheSpec(groups, "float32"), 8, 4)


def test_spec_with_one_group_is_taken():
    assert KVCacheManager(uniform_spec(2, PARTS, "float32"), 8, 4).pool.num_usable == 7


def test_blocks_follow_the_number_of_tokens():
    kv = KVCacheManager(None, 8, 4)
    blocks = kv.new_blocks(None)
    assert kv.admit(blocks, [], 5, 5) == [1, 2]
    assert kv.allocate(blocks, 8) == []
    assert kv.allocate(blocks, 9) == [3]
    assert blocks.block_ids == [1, 2, 3]
    assert kv.usage == 3 / 7
    kv.check_integrity([blocks])


def test_growth_that_does_not_fit_changes_nothing():
    kv = KVCacheManager(None, 4, 4)
    blocks, _ = admitted(kv, list(range(8)))
    assert kv.allocate(blocks, 17) is None
    assert len(blocks.block_ids) == 2 and kv.pool.num_free == 1
    kv.check_integrity([blocks])


def test_admission_needs_room_for_all_expected_tokens():
    kv = KVCacheManager(None, 4, 4)
    blocks = kv.new_blocks(None)
    assert kv.admit(blocks, [], 4, 13) is None
    assert kv.pool.num_free == 3
    assert kv.admit(blocks, [], 4, 12) == [1]
    kv.check_integrity([blocks])


def test_admission_counts_found_blocks_that_are_free_as_taken():
    kv = KVCacheManager(None, 4, 4)
    tokens = list(range(13))
    first, _ = admitted(kv, tokens[:12])
    kv.free(first)
    blocks = kv.new_blocks(None)
    prefix_ids = kv.find_prefix(blocks, tokens)
    assert len(prefix_ids) == 3
    assert kv.admit(blocks, prefix_ids, 13, 13) is None  # the fourth block would have to evict one of the three
    assert kv.pool.num_cached == 3
    kv.check_integrity([blocks])


def test_prefix_is_found_while_its_owner_runs_and_after():
    kv = KVCacheManager(None, 20, 4)
    first, _ = admitted(kv, list(range(12)))
    second, num_found = admitted(kv, [*range(8), 99, 98])
    assert num_found == 2
    assert second.block_ids[:2] == first.block_ids[:2]
    kv.check_integrity([first, second])
    kv.free(first)
    kv.free(second)
    third, num_found = admitted(kv, [*range(12), 5])
    assert num_found == 3
    kv.check_integrity([third])


def test_last_token_is_never_taken_from_the_cache():
    kv = KVCacheManager(None, 20, 4)
    admitted(kv, list(range(8)))
    _, num_found = admitted(kv, list(range(8)))
    assert num_found == 1


def test_salts_do_not_share():
    kv = KVCacheManager(None, 40, 4)
    tokens = list(range(9))
    admitted(kv, tokens, "tenant a")
    assert admitted(kv, tokens, "tenant b")[1] == 0
    assert admitted(kv, tokens, None)[1] == 0
    assert admitted(kv, tokens, "tenant a")[1] == 2


def test_unknown_tokens_are_not_published():
    kv = KVCacheManager(None, 20, 4)
    blocks = kv.new_blocks(None)
    kv.admit(blocks, [], 8, 8)
    kv.publish(blocks, list(range(7)), 8)  # position 7 is computed, but its token is sampled by a step in flight
    assert kv.find_prefix(kv.new_blocks(None), list(range(9))) == blocks.block_ids[:1]
    kv.publish(blocks, list(range(8)), 8)
    assert kv.find_prefix(kv.new_blocks(None), list(range(9))) == blocks.block_ids


def test_uncomputed_tokens_are_not_published():
    kv = KVCacheManager(None, 20, 4)
    blocks = kv.new_blocks(None)
    kv.admit(blocks, [], 12, 12)
    kv.publish(blocks, list(range(12)), 7)
    assert kv.find_prefix(kv.new_blocks(None), list(range(12))) == blocks.block_ids[:1]


@pytest.mark.parametrize(("hash_block_size", "num_found"), [(1, 3), (2, 3), (4, 3), (8, 2)])
def test_hits_at_each_hash_granularity(hash_block_size, num_found):
    kv = KVCacheManager(None, 20, 4, hash_block_size=hash_block_size)
    admitted(kv, list(range(15)))
    blocks, found = admitted(kv, list(range(15)))
    assert found == num_found
    kv.publish(blocks, list(range(16)), 15)
    kv.pool.check_integrity()


def test_hit_that_ends_inside_a_hash_unit_publishes_the_rest_once():
    kv = KVCacheManager(None, 5, 4, hash_block_size=8)
    tokens = list(range(16))
    first, _ = admitted(kv, tokens)
    kv.free(first)
    kv.pool.free(kv.pool.allocate(1))  # evicts the last block: three remain
    second, num_found = admitted(kv, tokens)
    assert num_found == 3
    kv.check_integrity([second])
    kv.free(second)
    assert len(kv.find_prefix(kv.new_blocks(None), [*tokens, 1])) == 4


def test_without_prefix_caching_nothing_is_found():
    kv = KVCacheManager(None, 20, 4, enable_prefix_caching=False)
    admitted(kv, list(range(12)))
    blocks, num_found = admitted(kv, list(range(12)))
    assert num_found == 0 and not blocks.digests
    kv.free(blocks)
    assert kv.pool.num_cached == 0


def test_freed_request_can_be_admitted_again():
    kv = KVCacheManager(None, 20, 4)
    tokens = list(range(10))
    blocks, _ = admitted(kv, tokens)
    kv.free(blocks)
    prefix_ids = kv.find_prefix(blocks, tokens)
    assert len(prefix_ids) == 2
    kv.admit(blocks, prefix_ids, 10, 10)
    kv.publish(blocks, [*tokens, 10, 11], 12)
    assert len(kv.find_prefix(kv.new_blocks(None), [*tokens, 10, 11, 12])) == 3
    kv.check_integrity([blocks])


def test_integrity_check_sees_a_block_without_owner():
    kv = KVCacheManager(None, 20, 4)
    blocks, _ = admitted(kv, list(range(10)))
    with pytest.raises(RuntimeError, match="block 1 has 1 references and 0 owners"):
        kv.check_integrity([])
    blocks.block_ids[0] = 9
    with pytest.raises(RuntimeError, match="KV cache integrity"):
        kv.check_integrity([blocks])
