"""The bundled model with sparse attention in the engine: its loss as recorded when it was trained."""

from __future__ import annotations

import json

import pytest

from omni_engine import Engine, SamplingParams
from omni_engine.engine.config import DEMO_MODEL

MODEL = DEMO_MODEL.parent / "deepseek-v32"
EXCERPT = (DEMO_MODEL / "held_out.txt").read_text(encoding="utf-8").rstrip("\n").split("\n\n")
RECORD = json.loads((MODEL / "training.json").read_text())
LOSS_TOLERANCE = 2e-3  # nats per token


def loss(engine, prompts):
    """Nats per token of the prompts, each but the first token given those before it."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    logprobs = [
        entry[token].logprob
        for prompt, output in zip(prompts, outputs, strict=True)
        for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
    ]
    return -sum(logprobs) / len(logprobs)


@pytest.fixture(scope="module")
def prompts():
    """Each chapter of the excerpt between bos and eos."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    return [[*tokenizer.encode(text).ids, 1] for text in EXCERPT]


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 100}], ids=["whole prompts", "chunks"])
def test_the_engine_has_the_recorded_loss(prompts, options):
    engine = Engine(str(MODEL), dtype="float32", max_model_len=1024, **options)
    assert loss(engine, prompts) == pytest.approx(RECORD["excerpt"]["loss"], abs=LOSS_TOLERANCE)


def test_the_loss_tells_another_selection(prompts):
    """The control: with all tokens selected it is that of dense attention, with a few it is much worse."""
    tolerance = LOSS_TOLERANCE
    dense = Engine(str(MODEL), dtype="float32", max_model_len=1024, hf_overrides={"index_topk": 1024})
    assert loss(dense, prompts) == pytest.approx(RECORD["excerpt_dense"]["loss"], abs=tolerance)
    few = Engine(str(MODEL), dtype="float32", max_model_len=1024, hf_overrides={"index_topk": 8})
    assert loss(few, prompts) > RECORD["excerpt"]["loss"] + 10 * tolerance
