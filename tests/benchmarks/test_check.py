"""benchmarks/peers/check.py: right tokens pass, wrong ones do not, by either reference."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

PROMPTS = [[5, 9, 200, 31, 7], [40, 41, 42]]


@pytest.fixture(scope="module")
def answers(make_checkpoint):
    """A checkpoint, and what transformers makes of the prompts, one token after another."""
    model = make_checkpoint("Qwen3ForCausalLM")
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 6:
            tokens.append(int(reference(torch.tensor([tokens])).logits[0, -1].argmax()))
        found.append(tokens[len(prompt) :])
    return model, found


def wrong(found):
    """One token of the second answer is another one."""
    return [found[0], [*found[1][:3], (found[1][3] + 1) % 256, *found[1][4:]]]


@pytest.mark.parametrize("reference", ["float32", "bfloat16"])
def test_right_tokens_pass_and_one_wrong_one_does_not(peers, answers, reference):
    model, found = answers

    def checked(tokens):  # with float32's narrow bound: nothing is near between so few tokens
        margins = peers.check.reference_margins(model, reference, PROMPTS, tokens)
        return peers.check.Check.of("float32", margins)

    right = checked(found)
    assert right.passed and (right.tokens, right.within) == (12, 12)
    result = checked(wrong(found))
    assert not result.passed and result.within < 12 and result.worst > 1e-3
    assert "FAILED" in result.text() and "ok" in right.text()


def test_a_reference_that_fails_says_why(peers, tmp_path):
    with pytest.raises(RuntimeError, match=r"reference for float32 failed with status 1: (.|\n)*Error"):
        peers.check.reference_margins(tmp_path, "float32", PROMPTS, PROMPTS)


def test_bfloat16_may_differ_now_and_then_and_no_more(peers):
    passes = [peers.check.Check.of("bfloat16", [0.0] * 98 + [0.3] * many).passed for many in (2, 3)]
    assert passes == [True, False]
    margins = [0.0] * 90 + [0.3] * 10
    passes = [peers.check.Check.of(dtype, margins, experts=True).passed for dtype in ("bfloat16", "float32")]
    assert passes == [True, False]
    assert not peers.check.Check.of("float32", [0.0] * 99 + [math.nan]).passed
