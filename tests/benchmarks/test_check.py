"""benchmarks/peers/check.py: right tokens pass, wrong ones do not, by either reference."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

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


def by_transformers(peers, model, found):
    return peers.check.Check.of("float32", peers.check.transformers_margins(model, PROMPTS, found))


def by_plain_steps(peers, model, found):
    done = subprocess.run(
        [sys.executable, peers.check.__file__, str(model), "--plain"],
        input=json.dumps({"prompts": PROMPTS, "answers": found}), capture_output=True, text=True, check=True,
        env={**os.environ, peers.check.KERNELS: "0"},
    )  # fmt: skip
    return peers.check.Check.of("float32", json.loads(done.stdout.splitlines()[-1]))  # with float32's narrow bound


@pytest.mark.parametrize("reference", [by_transformers, by_plain_steps])
def test_right_tokens_pass_and_one_wrong_one_does_not(peers, answers, reference):
    model, found = answers
    right = reference(peers, model, found)
    assert right.passed and (right.tokens, right.within) == (12, 12)
    result = reference(peers, model, wrong(found))
    assert not result.passed and result.within < 12 and result.worst > 1e-3
    assert "FAILED" in result.text() and "ok" in right.text()


def test_bfloat16_may_differ_now_and_then_and_no_more(peers):
    passes = [peers.check.Check.of("bfloat16", [0.0] * 98 + [0.3] * many).passed for many in (2, 3)]
    assert passes == [True, False]
    margins = [0.0] * 90 + [0.3] * 10
    passes = [peers.check.Check.of(dtype, margins, experts=True).passed for dtype in ("bfloat16", "float32")]
    assert passes == [True, False]
    assert not peers.check.Check.of("float32", [0.0] * 99 + [math.nan]).passed
