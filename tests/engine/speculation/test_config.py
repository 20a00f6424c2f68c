"""`speculative_config`: what it may say, what it comes to, and what is refused with which words."""

from __future__ import annotations

import dataclasses

import pytest

from omni_engine.engine.config import EngineArgs
from omni_engine.engine.speculation.config import SpeculationChoice, check_draft_model, choose_speculation
from omni_engine.models.config_parser import parse_config

NGRAM = {"method": "ngram", "num_speculative_tokens": 4}
DRAFT = {"model": "some/draft", "num_speculative_tokens": 4}


@pytest.mark.parametrize("config", [None, {}])
def test_nothing_said_is_no_speculation(config):
    assert choose_speculation(config) is None
    assert EngineArgs("m", speculative_config=config).speculative_config == {}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # mtp: its one layer drafts one token, unless more are asked for, which it is then applied to again
        ({"method": "mtp"}, SpeculationChoice("mtp", 1, (0, 1))),
        ({"method": "mtp", "num_speculative_tokens": 3}, SpeculationChoice("mtp", 3, (0, 2, 3))),
        # vLLM's rule for the match: both 5 where nothing is said, else one stands for both
        (NGRAM, SpeculationChoice("ngram", 4, (0, 2, 4), min_n=5, max_n=5)),
        (NGRAM | {"prompt_lookup_max": 3}, SpeculationChoice("ngram", 4, (0, 2, 4), min_n=3, max_n=3)),
        (NGRAM | {"prompt_lookup_min": 2}, SpeculationChoice("ngram", 4, (0, 2, 4), min_n=2, max_n=2)),
        (NGRAM | {"prompt_lookup_min": 7}, SpeculationChoice("ngram", 4, (0, 2, 4), min_n=7, max_n=7)),
        (
            NGRAM | {"prompt_lookup_min": 2, "prompt_lookup_max": 4},
            SpeculationChoice("ngram", 4, (0, 2, 4), min_n=2, max_n=4),
        ),
        # the method follows from the model where it is not named
        (DRAFT, SpeculationChoice("draft_model", 4, (0, 2, 4), model="some/draft")),
        (DRAFT | {"revision": "v1"}, SpeculationChoice("draft_model", 4, (0, 2, 4), model="some/draft", revision="v1")),
        (DRAFT | {"method": "draft_model"}, SpeculationChoice("draft_model", 4, (0, 2, 4), model="some/draft")),
        ({"model": "ngram", "num_speculative_tokens": 1}, SpeculationChoice("ngram", 1, (0, 1), min_n=5, max_n=5)),
        ({"model": "[ngram]", "num_speculative_tokens": 1}, SpeculationChoice("ngram", 1, (0, 1), min_n=5, max_n=5)),
        (NGRAM | {"model": "ngram"}, SpeculationChoice("ngram", 4, (0, 2, 4), min_n=5, max_n=5)),
        # null is as good as nothing
        (
            {"method": "mtp", "model": None, "num_speculative_tokens": None, "adaptive_depth": None, "revision": None},
            SpeculationChoice("mtp", 1, (0, 1)),
        ),
        ({"method": "mtp", "draft_tensor_parallel_size": 1}, SpeculationChoice("mtp", 1, (0, 1))),
    ],
)
def test_what_is_said_and_what_follows(config, expected):
    assert choose_speculation(config) == expected


@pytest.mark.parametrize("name", ["deepseek_mtp", "glm4_moe_mtp", "mimo_mtp", "qwen3_next_mtp", "pangu_ultra_moe_mtp"])
def test_older_names_of_mtp_mean_mtp(name):
    choice = choose_speculation({"method": name, "num_speculative_tokens": 2})
    assert choice is not None and choice.method == "mtp"


@pytest.mark.parametrize(
    ("num_drafts", "depths"),
    [(1, (0, 1)), (2, (0, 1, 2)), (3, (0, 2, 3)), (4, (0, 2, 4)), (5, (0, 3, 5)), (16, (0, 8, 16))],
)
def test_depths_are_none_half_and_all_or_always_all(num_drafts, depths):
    config = {"method": "mtp", "num_speculative_tokens": num_drafts}
    adaptive, fixed = choose_speculation(config), choose_speculation(config | {"adaptive_depth": False})
    assert adaptive is not None and adaptive.depths == depths
    assert fixed is not None and fixed.depths == (num_drafts,)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_speculative_tokens": 3}, "method must be one of mtp, ngram, draft_model: None"),
        ({"method": "eagle", "num_speculative_tokens": 3}, "method must be one of mtp, ngram, draft_model: eagle"),
        ({"method": "eagle3"}, "one of mtp, ngram, draft_model: eagle3"),
        ({"method": "medusa"}, "one of mtp, ngram, draft_model: medusa"),
        ({"method": "mlp_speculator"}, "one of mtp, ngram, draft_model: mlp_speculator"),
        ({"method": "suffix"}, "one of mtp, ngram, draft_model: suffix"),
        ({"method": "ngram_gpu"}, "one of mtp, ngram, draft_model: ngram_gpu"),
        ({"method": "MTP"}, "one of mtp, ngram, draft_model: MTP"),
        ({"method": 1}, "one of mtp, ngram, draft_model: 1"),
        ({"method": ["mtp"]}, r"one of mtp, ngram, draft_model: \['mtp'\]"),
        ({"method": "mtp", "ngram_prompt_lookup_max": 4}, "not supported: ngram_prompt_lookup_max"),
        ({"method": "mtp", "quantization": "fp8", "max_model_len": 9}, "not supported: quantization, max_model_len"),
        ({"method": "mtp", "tensor_parallel_size": 1}, "not supported: tensor_parallel_size"),
        ({"method": "mtp", "disable_by_batch_size": 8}, "not supported: disable_by_batch_size"),
        ({"method": "mtp", "num_speculative_tokens": 0}, "num_speculative_tokens must be a positive integer: 0"),
        ({"method": "mtp", "num_speculative_tokens": -1}, "num_speculative_tokens must be a positive integer: -1"),
        ({"method": "mtp", "num_speculative_tokens": 17}, "num_speculative_tokens must be at most 16: 17"),
        ({"method": "mtp", "num_speculative_tokens": True}, "num_speculative_tokens must be a positive integer: True"),
        ({"method": "mtp", "num_speculative_tokens": 2.0}, "num_speculative_tokens must be a positive integer: 2.0"),
        ({"method": "mtp", "num_speculative_tokens": "2"}, "num_speculative_tokens must be a positive integer: 2"),
        ({"method": "ngram"}, "num_speculative_tokens must be given, a positive integer: None"),
        ({"model": "some/draft"}, "num_speculative_tokens must be given, a positive integer: None"),
        ({"method": "mtp", "draft_tensor_parallel_size": 2}, "draft_tensor_parallel_size must be 1: 2"),
        (
            {"method": "mtp", "draft_tensor_parallel_size": "1"},
            "draft_tensor_parallel_size must be a positive integer: 1",
        ),
        ({"method": "mtp", "adaptive_depth": 1}, "adaptive_depth must be true or false: 1"),
        ({"method": "mtp", "adaptive_depth": "no"}, "adaptive_depth must be true or false: no"),
        ({"method": "mtp", "model": "some/model"}, "model is for the method draft_model only: some/model"),
        (NGRAM | {"model": "some/model"}, "model is for the method draft_model only: some/model"),
        ({"method": "draft_model", "num_speculative_tokens": 2}, "must name the checkpoint of the draft model: None"),
        (DRAFT | {"model": ""}, "must name the checkpoint of the draft model: "),
        (DRAFT | {"model": 3}, "must name the checkpoint of the draft model: 3"),
        (NGRAM | {"revision": "main"}, "revision must be.* of the draft model.*: main"),
        (DRAFT | {"revision": 3}, "revision must be.* of the draft model.*: 3"),
        ({"method": "mtp", "prompt_lookup_max": 3}, "are for ngram only: mtp"),
        (DRAFT | {"prompt_lookup_min": 3}, "are for ngram only: draft_model"),
        (NGRAM | {"prompt_lookup_min": 4, "prompt_lookup_max": 3}, "must not be above prompt_lookup_max=3: 4"),
        (NGRAM | {"prompt_lookup_max": 0}, "prompt_lookup_max must be a positive integer: 0"),
        (NGRAM | {"prompt_lookup_min": 0}, "prompt_lookup_min must be a positive integer: 0"),
        (NGRAM | {"prompt_lookup_min": 0, "prompt_lookup_max": 4}, "prompt_lookup_min must be a positive integer: 0"),
        (NGRAM | {"prompt_lookup_max": "4"}, "prompt_lookup_max must be a positive integer: 4"),
        (NGRAM | {"prompt_lookup_max": 65}, "prompt_lookup_max must be at most 64: 65"),
        (NGRAM | {"prompt_lookup_min": 65}, "prompt_lookup_max must be at most 64: 65"),
    ],
)
def test_what_cannot_be_is_refused_by_name_with_its_value(config, message):
    for read in (choose_speculation, lambda config: EngineArgs("m", speculative_config=config)):
        with pytest.raises(ValueError, match=rf"^speculative_config.*{message}$"):
            read(config)


def test_engine_arguments_have_short_forms():
    args = EngineArgs("m", spec_method="ngram", spec_tokens=2, speculative_config={"prompt_lookup_max": 3})
    assert args.speculative_config == {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    assert EngineArgs(**dataclasses.asdict(args)) == args  # as another process reads them
    assert EngineArgs("m", spec_model="d", spec_tokens=2).speculative_config == {
        "model": "d", "num_speculative_tokens": 2,
    }  # fmt: skip


def test_short_forms_leave_the_mapping_of_the_caller_alone():
    given = {"method": "mtp"}
    EngineArgs("m", speculative_config=given, spec_tokens=2)
    assert given == {"method": "mtp"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"spec_method": "eagle"}, "speculative_config.method must be one of .*: eagle"),
        ({"spec_tokens": 2}, "speculative_config.method must be one of .*: None"),
        ({"spec_method": "mtp", "spec_tokens": 0}, "num_speculative_tokens must be a positive integer: 0"),
        ({"spec_method": "mtp", "spec_tokens": True}, "spec_tokens must be an integer or nothing: True"),
        ({"spec_method": 3}, "spec_method must be text or nothing: 3"),
        (
            {"spec_method": "mtp", "speculative_config": {"method": "ngram"}},
            "spec_method and speculative_config.method must not differ; give one: mtp and ngram",
        ),
        (
            {"spec_model": "a", "speculative_config": {"model": "b"}},
            "spec_model and speculative_config.model must not differ; give one: a and b",
        ),
    ],
)
def test_short_forms_are_refused_like_long_ones(args, message):
    with pytest.raises(ValueError, match=message):
        EngineArgs("m", **args)


def test_a_draft_model_of_another_vocabulary_is_refused():
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "max_position_embeddings": 16, "rms_norm_eps": 1e-6, "vocab_size": 32,
    }  # fmt: skip
    model = parse_config(config)
    check_draft_model(model, parse_config(config | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"the vocabulary of the model it drafts for, 32 tokens: 33$"):
        check_draft_model(model, parse_config(config | {"vocab_size": 33}))
