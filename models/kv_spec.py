"""What each model stores per token, from its config alone."""

from __future__ import annotations

from ..kvcache.spec import KVCacheSpec, KVGroup, KVPart, uniform_spec
from .config import ModelConfig
from .parallel import ParallelLayout


def kv_cache_spec(config: ModelConfig, layout: ParallelLayout, dtype: str, num_extra_layers: int = 0) -> KVCacheSpec:
    """This rank's cache: keys and values of its heads; with latent attention one latent and one rope key per token,
    whole on every rank, and one indexer key in layers that select what attention reads. dtype: float32 | bfloat16 |
    float16. Layers with a sliding window keep their whole context. `num_extra_layers` behind the decoder's own store
    the same: 1 for the layer of multi-token prediction, which has an indexer where there is any."""
    if config.mla is not None:
        parts = (KVPart("latent", 1, config.mla.kv_lora_rank), KVPart("rope_key", 1, config.mla.qk_rope_head_dim))
        if config.indexer is not None:
            sparse = (*parts, KVPart("index_key", 1, config.indexer.head_dim))
            sharing = config.indexer.sharing_layers
            if not sharing:
                return uniform_spec(config.num_layers + num_extra_layers, sparse, dtype)
            selecting = tuple(i for i in range(config.num_layers + num_extra_layers) if i not in sharing)
            groups = (KVGroup(selecting, sparse), KVGroup(tuple(sorted(sharing)), parts))
            return KVCacheSpec(groups, dtype, one_table=True)
    else:
        start, stop = layout.share(config.num_kv_heads, "num_key_value_heads")
        parts = (KVPart("key", stop - start, config.head_dim), KVPart("value", stop - start, config.head_dim))
    return uniform_spec(config.num_layers + num_extra_layers, parts, dtype)
