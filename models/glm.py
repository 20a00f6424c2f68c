"""GLM-5: the layers of DeepSeek-V3.2."""

from __future__ import annotations

from .deepseek import DeepseekV32ForCausalLM


class GlmMoeDsaForCausalLM(DeepseekV32ForCausalLM):
    """GLM-5: sparse attention whose indexers rotate pairs side by side, experts in one group. Of GLM-5.2's layers only
    some have an indexer, and those behind one attend to what it selects."""
