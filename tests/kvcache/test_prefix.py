"""Prefix keys: equal for equal (salt, tokens, tokens behind), different for anything else, at every granularity."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_engine.kvcache.manager import KVCacheManager
from omni_engine.kvcache.prefix import PrefixHasher
from omni_engine.kvcache.spec import KVCacheSpec, KVGroup, KVPart

SIZES = [(4, 4), (4, 2), (4, 1), (2, 8), (1, 4)]  # block_size, hash_block_size


def keys(hasher: PrefixHasher, token_ids: list[int], salt: str | None = None) -> list[bytes]:
    digests = hasher.start(salt)
    hasher.extend(digests, token_ids)
    return [hasher.key(digests, index, token_ids) for index in range(hasher.num_keys(token_ids))]


def test_chain_is_sha256_over_parent_and_little_endian_int64_tokens():
    hasher = PrefixHasher(2, 2)
    root = hashlib.sha256(b"omni-engine prefix cache\0\0").digest()
    first = hashlib.sha256(root + struct.pack("<2q", 7, 300)).digest()
    second = hashlib.sha256(first + struct.pack("<2q", 1, 2**40)).digest()
    assert keys(hasher, [7, 300, 1, 2**40, 9]) == [first, second]


@pytest.mark.parametrize(("block_size", "hash_block_size"), [(16, 6), (6, 16), (0, 4), (4, 0), (4, -4)])
def test_sizes_that_do_not_divide_are_refused(block_size, hash_block_size):
    with pytest.raises(ValueError, match=f"divide the other: {block_size} and {hash_block_size}"):
        PrefixHasher(block_size, hash_block_size)


@pytest.mark.parametrize(("block_size", "hash_block_size"), SIZES)
def test_only_blocks_of_complete_units_have_keys(block_size, hash_block_size):
    hasher = PrefixHasher(block_size, hash_block_size)
    for length in range(20):
        complete = length // hash_block_size * hash_block_size
        assert len(keys(hasher, list(range(length)))) == complete // block_size


@pytest.mark.parametrize(("block_size", "hash_block_size"), SIZES)
def test_every_block_of_a_sequence_has_its_own_key(block_size, hash_block_size):
    found = keys(PrefixHasher(block_size, hash_block_size), [3] * 32)
    assert len(set(found)) == len(found) == 32 // block_size


@pytest.mark.parametrize(("block_size", "hash_block_size"), SIZES)
@given(
    left=st.lists(st.integers(0, 2), max_size=24),
    right=st.lists(st.integers(0, 2), max_size=24),
    salts=st.tuples(st.sampled_from([None, "", "a"]), st.sampled_from([None, "", "a"])),
)
def test_keys_are_equal_exactly_for_equal_salt_and_tokens(block_size, hash_block_size, left, right, salts):
    hasher = PrefixHasher(block_size, hash_block_size)
    unit = max(block_size, hash_block_size)
    pairs = zip(keys(hasher, left, salts[0]), keys(hasher, right, salts[1]), strict=False)
    for index, (left_key, right_key) in enumerate(pairs):
        end = (index * block_size // unit + 1) * unit  # a key stands for the tokens up to the end of its unit
        assert (left_key == right_key) == (salts[0] == salts[1] and left[:end] == right[:end])


def test_salt_cannot_be_continued_by_tokens():
    hasher = PrefixHasher(1, 1)
    text_of_token = struct.pack("<q", 65).decode("latin-1")
    assert not set(keys(hasher, [65, 66], "a")) & set(keys(hasher, [66], "a" + text_of_token))


def test_salt_may_be_any_python_string():
    assert keys(PrefixHasher(1, 1), [1], "\ud800") != keys(PrefixHasher(1, 1), [1], "é")


@given(st.lists(st.integers(0, 10), max_size=40), st.lists(st.integers(0, 40), max_size=5))
def test_extending_step_by_step_gives_the_same_chain(token_ids, cuts):
    hasher = PrefixHasher(4, 2)
    digests = hasher.start("salt")
    for cut in sorted(cuts):
        hasher.extend(digests, token_ids[:cut])
    hasher.extend(digests, token_ids)
    whole = hasher.start("salt")
    hasher.extend(whole, token_ids)
    assert digests == whole


def test_extending_hashes_only_new_units(monkeypatch):
    hasher = PrefixHasher(4, 4)
    digests = hasher.start(None)
    token_ids = list(range(400))
    hasher.extend(digests, token_ids)
    calls = []
    real = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda data: calls.append(data) or real(data))
    hasher.extend(digests, [*token_ids, 1, 2, 3])
    assert not calls
    hasher.extend(digests, [*token_ids, 1, 2, 3, 4])
    assert len(calls) == 1


# --- lookahead -----------------------------------------------------------------------------------------------------

TOKENS = st.lists(st.integers(0, 2), max_size=24)


@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize(("block_size", "hash_block_size"), SIZES)
def test_with_lookahead_a_block_has_a_key_when_the_tokens_behind_its_unit_are_known(
    block_size, hash_block_size, lookahead
):
    hasher = PrefixHasher(block_size, hash_block_size, lookahead)
    unit = max(block_size, hash_block_size)
    for length in range(26):
        complete = max(0, length - lookahead) // unit * unit
        assert hasher.num_keys(range(length)) == complete // block_size
        assert len(keys(hasher, list(range(length)))) == complete // block_size


@pytest.mark.parametrize("lookahead", [1, 2])
@pytest.mark.parametrize(("block_size", "hash_block_size"), SIZES)
@given(common=TOKENS, left=TOKENS, right=TOKENS, salts=st.tuples(*[st.sampled_from([None, "", "a"])] * 2))
def test_with_lookahead_keys_are_equal_exactly_if_the_tokens_behind_are_too(
    block_size, hash_block_size, lookahead, common, left, right, salts
):
    hasher = PrefixHasher(block_size, hash_block_size, lookahead)
    left, right = common + left, common + right
    unit = max(block_size, hash_block_size)
    pairs = zip(keys(hasher, left, salts[0]), keys(hasher, right, salts[1]), strict=False)
    for index, (left_key, right_key) in enumerate(pairs):
        end = (index * block_size // unit + 1) * unit + lookahead
        assert (left_key == right_key) == (salts[0] == salts[1] and left[:end] == right[:end])


@pytest.mark.parametrize(("block_size", "hash_block_size"), SIZES)
@given(st.lists(st.integers(0, 1), min_size=20, max_size=20))
def test_with_lookahead_every_block_of_a_sequence_has_its_own_key(block_size, hash_block_size, token_ids):
    found = keys(PrefixHasher(block_size, hash_block_size, 1), token_ids)
    assert len(set(found)) == len(found) > 0


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=5, max_size=5), st.integers(-(2**63), 2**63 - 1))
def test_any_token_may_stand_behind_a_block(token_ids, other):
    hasher = PrefixHasher(4, 4, 1)
    (found,) = keys(hasher, token_ids)
    assert (keys(hasher, [*token_ids[:4], other]) == [found]) == (other == token_ids[4])


def test_every_byte_of_the_token_behind_counts():
    hasher = PrefixHasher(2, 2, 1)
    behind = [7, *(7 + 2**bit for bit in range(3, 63))]
    assert len({keys(hasher, [1, 2, token_id])[0] for token_id in behind}) == len(behind)


def test_a_key_says_the_token_behind_its_block_and_no_other():
    hasher = PrefixHasher(2, 2, 1)
    root = hashlib.sha256(b"omni-engine prefix cache\0\0").digest()
    first = hashlib.sha256(root + struct.pack("<2q", 7, 300)).digest()
    assert keys(hasher, [7, 300, 5, 9]) == [first + struct.pack("<q", 5)]


# --- what two requests share ----------------------------------------------------------------------------------------


def manager(block_size: int, hash_block_size: int, lookahead: int) -> KVCacheManager:
    spec = KVCacheSpec((KVGroup((0,), (KVPart("k", 1, 1),)),), "float32", lookahead=lookahead)
    return KVCacheManager(spec, 64, block_size, hash_block_size)


@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize(("block_size", "hash_block_size"), SIZES)
@given(common=TOKENS, left=TOKENS, right=TOKENS, num_computed=st.integers(0, 48))
def test_two_requests_share_a_block_exactly_if_what_it_depends_on_is_known_and_agrees(
    block_size, hash_block_size, lookahead, common, left, right, num_computed
):
    kv = manager(block_size, hash_block_size, lookahead)
    left, right = common + left, common + right
    num_computed = min(num_computed, len(left))
    first = kv.new_blocks(None)
    kv.admit(first, [], len(left), len(left))
    kv.publish(first, left, num_computed)
    unit = max(block_size, hash_block_size)
    shared: list[int] = []
    for index in range(len(left) // block_size):
        end = (index * block_size // unit + 1) * unit  # of the tokens that its key stands for
        if end > num_computed or end + lookahead > min(len(left), len(right)):
            break
        if left[: end + lookahead] != right[: end + lookahead]:
            break
        if (index + 1) * block_size > len(right) - 1:  # the last token is always computed
            break
        shared.append(first.block_ids[index])
    assert kv.find_prefix(kv.new_blocks(None), right) == shared
    assert kv.find_prefix(kv.new_blocks("salt"), right) == []
    kv.check_integrity([first])


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize(("block_size", "hash_block_size"), SIZES)
@given(token_ids=TOKENS, steps=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12))
def test_publishing_step_by_step_comes_to_the_same(block_size, hash_block_size, lookahead, token_ids, steps):
    """However tokens come to be known and computed, ahead of each other or not."""
    kv = manager(block_size, hash_block_size, lookahead)
    blocks = kv.new_blocks(None)
    kv.admit(blocks, [], len(token_ids), len(token_ids))
    num_known = num_computed = 0
    for known, computed in [*steps, (24, 24)]:
        num_known = min(len(token_ids), num_known + known)
        num_computed = min(len(token_ids), num_computed + computed)
        kv.publish(blocks, token_ids[:num_known], num_computed)
        ready = min(num_computed, num_known - lookahead)
        assert blocks.num_published == max(0, ready) // kv.hasher.publish_tokens * kv.hasher.blocks_per_publish
    other = [*token_ids, 0, 0]
    if keys(kv.hasher, token_ids) == keys(kv.hasher, other)[: len(keys(kv.hasher, token_ids))]:
        assert len(kv.find_prefix(kv.new_blocks(None), other)) == blocks.num_published


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize(("block_size", "hash_block_size"), SIZES)
@pytest.mark.parametrize("length", [*range(1, 10), 16, 17])
def test_a_found_prefix_is_whole_blocks_without_the_last_token(block_size, hash_block_size, lookahead, length):
    kv = manager(block_size, hash_block_size, lookahead)
    first = kv.new_blocks(None)
    kv.admit(first, [], 24, 24)
    kv.publish(first, [5] * 24, 24)
    found = kv.find_prefix(kv.new_blocks(None), [5] * length)
    unit = max(block_size, hash_block_size)
    complete = (length - lookahead) // unit * unit  # tokens whose blocks have keys
    assert len(found) == min(complete, (length - 1)) // block_size
    assert found == first.block_ids[: len(found)]
