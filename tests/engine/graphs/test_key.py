"""What the key of a compiled graph tells apart."""

from __future__ import annotations

import pytest

from omni_engine.engine.config import EngineArgs, EngineConfig
from omni_engine.engine.graphs.key import CacheKey, GraphShape
from omni_engine.engine.graphs.startup import key_fields

MTP = {"method": "mtp", "num_speculative_tokens": 3}


def digest(num_blocks=100, **options):
    config = EngineConfig.from_args(EngineArgs(**options))
    return CacheKey(key_fields(config, GraphShape(num_blocks, 4, 128), "inductor", None)).digest


PLAIN = {"speculative_config": MTP}


@pytest.mark.parametrize(
    "other",
    [
        {"speculative_config": MTP | {"adaptive_depth": False}},  # its drafter remembers nothing, so has fewer inputs
        {"speculative_config": {}},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
        {"speculative_config": MTP, "dtype": "bfloat16"},
        {"speculative_config": MTP, "num_blocks": 101},
    ],
)
def test_steps_of_different_inputs_have_different_keys(other):
    assert digest(**PLAIN) == digest(**PLAIN) != digest(**other)
