"""The cache's tensors follow the spec."""

from __future__ import annotations

import torch

from omni_engine.kvcache.spec import KVCacheSpec, KVGroup, KVPart
from omni_engine.kvcache.tensors import allocate_kv_tensors


def test_each_layer_gets_the_zeroed_parts_of_its_group() -> None:
    wide, latent = (KVPart("key", 2, 8), KVPart("value", 2, 6)), (KVPart("latent", 1, 16),)
    spec = KVCacheSpec((KVGroup((0, 2), wide), KVGroup((1,), latent)), "bfloat16")
    caches = allocate_kv_tensors(spec, num_blocks=3, block_size=4, device=torch.device("cpu"))
    assert [[tuple(part.shape) for part in cache] for cache in caches] == [
        [(3, 4, 2, 8), (3, 4, 2, 6)],
        [(3, 4, 1, 16)],
        [(3, 4, 2, 8), (3, 4, 2, 6)],
    ]
    assert all(part.dtype == torch.bfloat16 and not part.any() for cache in caches for part in cache)
    assert sum(part.nbytes for cache in caches for part in cache) == 3 * spec.bytes_per_block(4)
