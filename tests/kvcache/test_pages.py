"""A cache's pages come into memory piece by piece, up to where they are wanted, and keep what they hold."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Callable

import pytest
import torch

from omni_engine.kvcache import pages
from omni_engine.kvcache.pages import CachePages

NUM_BLOCKS, BLOCK_SIZE = 5120, 16  # 40 MiB a tensor
HUGE_PAGE_BYTES = 2 << 20  # the system may bring in as much at once
SHAPE = (NUM_BLOCKS, BLOCK_SIZE, 4, 64)
BLOCK_BYTES = BLOCK_SIZE * 4 * 64 * 2

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are in memory")


def _caches() -> list[tuple[torch.Tensor, ...]]:
    """Of memory fresh from the system; what malloc gives, somebody in this process may have used before."""

    def fresh() -> torch.Tensor:
        memory = mmap.mmap(-1, NUM_BLOCKS * BLOCK_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(memory, dtype=torch.bfloat16).view(SHAPE)

    return [(fresh(), fresh()) for _ in range(2)]


def _resident(part: torch.Tensor) -> list[bool]:
    """Of every page that lies in a tensor, whether it is in memory, by mincore(2)."""
    begin = math.ceil(part.data_ptr() / mmap.PAGESIZE) * mmap.PAGESIZE
    count = (part.data_ptr() + part.nbytes - begin) // mmap.PAGESIZE
    found = (ctypes.c_ubyte * count)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(begin), ctypes.c_size_t(count * mmap.PAGESIZE), found) == 0
    return [bool(each & 1) for each in found]


@pytest.fixture
def supply_of() -> Callable[[list[tuple[torch.Tensor, ...]]], CachePages]:
    """Skips where the system brings in no pages."""
    probe = mmap.mmap(-1, mmap.PAGESIZE)
    if not pages._populate(ctypes.addressof(ctypes.c_char.from_buffer(probe)), mmap.PAGESIZE):
        pytest.skip("the system does not know MADV_POPULATE_WRITE")
    return CachePages


def test_the_pages_of_the_first_blocks_and_no_others(supply_of) -> None:
    caches = _caches()
    parts = [part for cache in caches for part in cache]
    parts[0][3] = 7
    of_half = NUM_BLOCKS // 2 * BLOCK_BYTES // mmap.PAGESIZE - 1
    of_more = (NUM_BLOCKS // 2 * BLOCK_BYTES + HUGE_PAGE_BYTES) // mmap.PAGESIZE
    assert not any(all(_resident(part)[:of_half]) for part in parts)
    supply = supply_of(caches)
    rounds = 0
    while supply.bring(NUM_BLOCKS // 2):
        rounds += 1
    assert rounds == len(parts) * NUM_BLOCKS // 2 * BLOCK_BYTES // pages.PIECE_BYTES
    for part in parts:
        resident = _resident(part)
        assert all(resident[:of_half]) and not any(resident[of_more:])
    assert not supply.bring(NUM_BLOCKS // 2) and not supply.bring(5)
    while supply.bring(NUM_BLOCKS + 9):  # no further than to the last block
        pass
    assert all(all(_resident(part)) for part in parts)
    assert (parts[0][3] == 7).all()
    parts[0][3] = 0
    assert not any(part.any() for part in parts)


def test_all_pages_at_once(supply_of) -> None:
    caches = _caches()
    parts = [part for cache in caches for part in cache]
    parts[0][3] = 7
    supply = supply_of(caches)
    supply.bring_all()
    assert all(all(_resident(part)) for part in parts)
    assert (parts[0][3] == 7).all()
    assert not supply.bring(NUM_BLOCKS)


def test_a_system_that_refuses_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(pages, "MADV_POPULATE_WRITE", 12345)
    populate = pages._populate
    monkeypatch.setattr(pages, "_populate", lambda *each: asked.append(each) or populate(*each))
    supply = CachePages(_caches())
    assert not supply.bring(10) and not supply.bring(20)
    assert len(asked) == 1
    supply = CachePages(_caches())
    supply.bring_all()
    assert not supply.bring(10)


def test_a_model_without_a_cache() -> None:
    supply = CachePages([])
    supply.bring_all()
    assert not supply.bring(10)
